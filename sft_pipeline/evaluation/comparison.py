"""Records of models side by side: their metrics, and their paired differences from the first.

All metrics are over the items that every model could be asked: a prompt over one model's context is left out for all.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from sft_pipeline.evaluation.bootstrap import PairedDifference, estimate_difference
from sft_pipeline.evaluation.metrics.instruction_following import followed, instruction_figures, load_instructions
from sft_pipeline.evaluation.metrics.registry import answer_figures, loss_figures, row_figures
from sft_pipeline.evaluation.model_results import ModelResults
from sft_pipeline.evaluation.prompt_set import PromptSet

INSTRUCTIONS = "instructions_followed_rate"


@dataclass(frozen=True)
class ItemValues:
    """One figure's values, one an item: numerators and denominators of a ratio of sums, or values and ones."""

    values: list[float]
    weights: list[float]


@dataclass(frozen=True)
class ComparedModel:
    """One model's metrics, and for those that have a value an item the difference from the first model."""

    name: str
    metrics: dict[str, float]
    differences: dict[str, PairedDifference]


@dataclass(frozen=True)
class Comparison:
    """entries[0] is the baseline. `left_out`: items that not every model could be asked, of rows and instructions."""

    entries: list[ComparedModel]
    rows: int
    instructions: int
    left_out: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def compare_models(records: list[ModelResults], questions: PromptSet) -> Comparison:
    """Figures of all records, each against the first. They must be of these questions."""
    rows = [at for at in range(len(questions.rows)) if all(_has_row(record, at) for record in records)]
    count = len(load_instructions())
    tasks = [at for at in range(count) if not any(record.instruction_answers[at].error for record in records)]
    first = extract_item_values(records[0], questions, rows, tasks)
    entries = [ComparedModel(records[0].name, compute_model_metrics(records[0], questions, rows, tasks), {})]
    for record in records[1:]:
        other = extract_item_values(record, questions, rows, tasks)
        differences = {name: compute_difference(first[name], other[name]) for name in first}
        found = {name: one for name, one in differences.items() if one is not None}
        entries.append(ComparedModel(record.name, compute_model_metrics(record, questions, rows, tasks), found))
    return Comparison(entries, len(rows), len(tasks), len(questions.rows) - len(rows) + count - len(tasks))


def compute_model_metrics(
    record: ModelResults, questions: PromptSet, rows: list[int], tasks: list[int]
) -> dict[str, float]:
    """All metrics of one record over these rows and instructions; those of an empty side are left out."""
    found: dict[str, float] = {}
    if rows:
        losses = [record.losses[at] for at in rows]
        columns = [[getattr(loss, name) for loss in losses] for name in ("nll_nats", "tokens", "correct", "utf8_bytes")]
        found |= loss_figures(*columns)
        found |= answer_figures(
            [record.answers[at].text for at in rows],
            prompts=[questions.texts[at] for at in rows],
            references=[questions.references[at] for at in rows],
            finish_reasons=[record.answers[at].finish_reason for at in rows],
        )
    if tasks:
        found |= instruction_figures([record.instruction_answers[at].text for at in tasks], _ids(tasks))
    return found


def extract_item_values(
    record: ModelResults, questions: PromptSet, rows: list[int], tasks: list[int]
) -> dict[str, ItemValues]:
    """Every figure that has a value an item, under its name."""
    found = _row_values(record, questions, rows) if rows else {}
    if tasks:
        verdicts = followed([record.instruction_answers[at].text for at in tasks], _ids(tasks))
        found[INSTRUCTIONS] = ItemValues([float(one) for one in verdicts], [1.0] * len(verdicts))
    return found


def compute_difference(first: ItemValues, other: ItemValues) -> PairedDifference | None:
    """Other - first with its interval; None for fewer than two items or where one is no number (a model that diverged).
    A ratio leaves out items without a denominator: a reference of no words."""
    kept = [at for at, pair in enumerate(zip(first.weights, other.weights)) if min(pair) > 0]
    a, b = ([items.values[at] for at in kept] for items in (first, other))
    a_weights, b_weights = ([items.weights[at] for at in kept] for items in (first, other))
    return estimate_difference(a, b, a_weights, b_weights)


def _row_values(record: ModelResults, questions: PromptSet, rows: list[int]) -> dict[str, ItemValues]:
    losses = [loss for loss in (record.losses[at] for at in rows) if loss]
    nll, tokens = [loss.nll_nats for loss in losses], [float(loss.tokens) for loss in losses]
    found = {
        "nll_nats_per_token": ItemValues(nll, tokens),
        "bits_per_byte": ItemValues([nats / math.log(2) for nats in nll], [float(loss.utf8_bytes) for loss in losses]),
        "token_accuracy": ItemValues([float(loss.correct) for loss in losses], tokens),
    }
    answers = [_answer_values(record, questions, at) for at in rows]
    columns = {name: [one[name] for one in answers] for name in answers[0]}
    found["answer_length_ratio"] = ItemValues(columns.pop("answer_words"), columns.pop("reference_words"))
    return found | {name: ItemValues(values, [1.0] * len(values)) for name, values in columns.items()}


def _answer_values(record: ModelResults, questions: PromptSet, at: int) -> dict[str, float]:
    given = record.answers[at]
    return row_figures(
        given.text,
        prompt=questions.texts[at],
        reference=questions.references[at],
        finish_reason=given.finish_reason,
    )


def _has_row(record: ModelResults, at: int) -> bool:
    return record.losses[at] is not None and not record.answers[at].error


def _ids(tasks: list[int]) -> list[str]:
    known = load_instructions()
    return [known[at].id for at in tasks]
