"""Compare models: the metrics of each, and their paired differences from the first, the baseline.

All values are over the rows and instructions that every model could answer: a prompt that exceeds one model's context
is excluded for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from sft_pipeline.evaluation.bootstrap import PairedDifference, estimate_difference
from sft_pipeline.evaluation.harness import TaskScore
from sft_pipeline.evaluation.metrics.hf_metrics import compute_metrics
from sft_pipeline.evaluation.metrics.instruction_following import load_instructions
from sft_pipeline.evaluation.metrics.registry import NUMBER_COLUMNS, Columns, build_answer_columns, select_metrics
from sft_pipeline.evaluation.model_results import ModelResults
from sft_pipeline.evaluation.prompt_set import PromptSet
from sft_pipeline.evaluation.readable_messages import format_answer

# Numerators and denominators, one per row, whose sums make a metric.
RowValues = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class ComparedModel:
    """The metrics of a model, and for each metric with a value per row the difference from the first model.

    tasks: the scores of lm-evaluation-harness by their names, which `metrics` and `differences` have too.
    """

    name: str
    metrics: dict[str, float]
    differences: dict[str, PairedDifference]
    tasks: dict[str, TaskScore] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """entries: the models, the baseline first. rows, instructions: how many were compared. left_out: how many rows and
    instructions were excluded."""

    entries: list[ComparedModel]
    rows: int
    instructions: int
    left_out: int

    def as_json(self) -> dict[str, Any]:
        content = asdict(self)
        for entry, model in zip(content["entries"], self.entries):
            entry["tasks"] = {name: score.as_json() for name, score in model.tasks.items()}
        return content


def compare_models(models: list[ModelResults], prompts: PromptSet) -> Comparison:
    """Compute the metrics of all models and their differences from the first. `prompts` is what they have answered."""
    instructions = models[0].instructions
    rows = [i for i in range(len(prompts.rows)) if all(_has_row(results, i) for results in models)]
    tasks = [i for i in range(len(instructions)) if not any(results.instruction_answers[i].error for results in models)]
    entries = []
    baseline: dict[str, RowValues] = {}
    for results in models:
        metrics: dict[str, float] = {}
        values: dict[str, RowValues] = {}
        for columns in _build_columns(results, prompts, rows, tasks):
            metrics |= compute_metrics(columns)
            row_metrics = [metric for metric in select_metrics(columns) if metric.compute_row]
            values |= {metric.name: metric.compute_rows(columns) for metric in row_metrics}
        scores = {score.name: score for score in results.task_scores}
        metrics |= {name: score.value for name, score in scores.items()}
        values |= {
            name: (np.array(score.values), np.ones(len(score.values))) for name, score in scores.items() if score.values
        }
        differences = {
            name: compute_difference(baseline[name], values[name])
            for name in baseline
            if name in values and len(baseline[name][0]) == len(values[name][0])
        }
        defined = {name: difference for name, difference in differences.items() if difference is not None}
        entries.append(ComparedModel(results.name, metrics, defined, scores))
        baseline = baseline or values
    excluded = len(prompts.rows) - len(rows) + len(instructions) - len(tasks)
    return Comparison(entries, len(rows), len(tasks), excluded)


def compare_sets(models: list[ModelResults], prompts: PromptSet) -> dict[str, Comparison]:
    """Compare the models on the rows of each named held-out set alone, without instructions and tasks."""
    comparisons = {}
    for name in dict.fromkeys(prompts.sets):
        rows = [index for index, set_name in enumerate(prompts.sets) if set_name == name]
        parts = [
            ModelResults(
                results.name,
                [results.losses[index] for index in rows],
                [results.answers[index] for index in rows],
                [results.calls_match[index] for index in rows],
                [],
            )
            for results in models
        ]
        comparisons[name] = compare_models(parts, PromptSet([prompts.rows[index] for index in rows], []))
    return comparisons


def compute_difference(baseline: RowValues, values: RowValues) -> PairedDifference | None:
    """Return the difference from the baseline; None with fewer than two rows or a value that is not finite.

    Rows with a denominator of 0, such as a reference without words, are excluded.
    """
    has_denominator = (baseline[1] > 0) & (values[1] > 0)
    (a, a_weights), (b, b_weights) = ([column[has_denominator] for column in pair] for pair in (baseline, values))
    return estimate_difference(a, b, a_weights, b_weights)


def _build_columns(results: ModelResults, prompts: PromptSet, rows: list[int], tasks: list[int]) -> Iterator[Columns]:
    """Yield the columns of these held-out rows, then those of these instructions, as far as there are any."""
    if rows:
        losses = [results.losses[i] for i in rows]
        answers = [results.answers[i] for i in rows]
        texts, references = prompts.texts, prompts.references
        yield {name: [getattr(loss, name) for loss in losses] for name in NUMBER_COLUMNS} | build_answer_columns(
            [format_answer(answer) for answer in answers],
            prompts=[texts[i] for i in rows],
            references=[references[i] for i in rows],
            finish_reasons=[answer.finish_reason for answer in answers],
            calls_match=[results.calls_match[i] for i in rows],
        )
    if tasks:
        instructions = load_instructions()
        yield {
            "predictions": [format_answer(results.instruction_answers[i]) for i in tasks],
            "instruction_ids": [instructions[i].id for i in tasks],
        }


def _has_row(results: ModelResults, index: int) -> bool:
    return results.losses[index] is not None and not results.answers[index].error
