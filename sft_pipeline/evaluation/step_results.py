"""Results of the evaluations of a run, and their files in its output folder.

    evaluation/step_000090.json     one per evaluation
    evaluation/best.json            of the best model, if load_best_model_at_end restores one after training

A file is written completely or not at all; its fields are those of `StepResults`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sft_pipeline.data.messages import Conversation, Message, replace_messages
from sft_pipeline.data.template import Template
from sft_pipeline.evaluation.bootstrap import estimate_difference
from sft_pipeline.evaluation.metrics.hf_metrics import compute_metrics
from sft_pipeline.evaluation.metrics.instruction_following import get_instruction, is_followed
from sft_pipeline.evaluation.metrics.registry import (
    INSTRUCTIONS_FOLLOWED,
    METRICS,
    TOOL_CALLS_MATCHED,
    Columns,
    build_answer_columns,
)
from sft_pipeline.evaluation.metrics.tool_calls import match_tool_calls
from sft_pipeline.evaluation.readable_messages import format_answer, format_message, format_prompt
from sft_pipeline.inference.answers import Answer
from sft_pipeline.utils.files import write_json

BEST_FILE = "best.json"
# The metrics that are compared between two evaluations.
CHANGES = ("nll_nats_per_token", "stop_rate", "loop_rate", TOOL_CALLS_MATCHED, INSTRUCTIONS_FOLLOWED)

AnswerRow = dict[str, Any]


@dataclass(frozen=True)
class EvalPrompt:
    """A held-out conversation without its last answer, which is the reference, or a checkable instruction with its
    id. held_out_set: the name of the set that the conversation is of, if there are several."""

    conversation: Conversation
    reference: Message | None = None
    instruction: str | None = None
    held_out_set: str | None = None


@dataclass(frozen=True)
class StepResults:
    """One evaluation. All `metrics` can be computed again from the other fields.

    complete: all prompts were answered, not only the first ones. seconds: time to answer, on the slowest process.
    held_out: `nll_nats`, `tokens` (supervised ones) and `correct` (those that were the model's most likely token), one
    value per row, in the same order at every evaluation. utf8_bytes: of the supervised text of all these rows.
    table: see `build_table_row`; with several held-out sets, `set` is the name of a row's.
    sets: of several held-out sets, by their names: `metrics` of its rows and answers alone, `rows`, their indices in
    the columns of `held_out`, and `utf8_bytes` of their text.
    """

    step: int
    complete: bool
    seconds: float
    metrics: dict[str, float]
    held_out: dict[str, list[float]]
    utf8_bytes: int
    table: list[AnswerRow]
    sets: dict[str, dict[str, Any]] = field(default_factory=dict)

    def select_set(self, name: str) -> StepResults:
        """Return the results of one of the held-out sets, as if there were no other and no instructions."""
        part = self.sets[name]
        return replace(
            self,
            metrics=part["metrics"],
            held_out={column: [values[row] for row in part["rows"]] for column, values in self.held_out.items()},
            utf8_bytes=part["utf8_bytes"],
            table=[row for row in self.table if row["set"] == name],
            sets={},
        )

    def write(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        values = asdict(self)
        if not self.sets:
            del values["sets"]
        write_json(file, values)


def build_table_row(template: Template, prompt: EvalPrompt, answer: Answer) -> AnswerRow:
    """Return a prompt with its answer, both as `readable_messages.py` formats them.

    `error` is the reason why there is no answer. `followed` is None except for answered instructions, `calls_match`
    except for answered prompts whose reference calls tools.
    """
    text, followed, calls_match = format_answer(answer), None, None
    messages = prompt.conversation["messages"]
    if prompt.instruction is not None and answer.error is None:
        followed = is_followed(get_instruction(prompt.instruction), text)
    if prompt.reference is not None and answer.error is None:
        answered = replace_messages(prompt.conversation, [*messages, prompt.reference])
        calls_match = match_tool_calls(template, answered, answer.text)
    return {
        "instruction": prompt.instruction,
        "prompt": format_prompt(messages),
        "reference": None if prompt.reference is None else format_message(prompt.reference),
        "reasoning": (answer.message or {}).get("reasoning_content"),
        "answer": text,
        "stopped": answer.stopped,
        "tokens": answer.tokens,
        "followed": followed,
        "calls_match": calls_match,
        "error": answer.error,
    }


def compute_held_out_metrics(held_out: dict[str, list[float]], utf8_bytes: int) -> dict[str, float]:
    """Compute the metrics of the held-out loss. The rows enter as one row with their sums, because the bytes are known
    as a sum."""
    sums = {name: [float(np.sum(values))] for name, values in held_out.items()}
    return compute_metrics(sums | {"utf8_bytes": [utf8_bytes]})


def compute_table_metrics(table: list[AnswerRow]) -> dict[str, float]:
    """Compute the metrics of the answered rows. `answers` and `instructions` count them, `answer_errors` the others."""
    answered = [row for row in table if row["error"] is None]
    rows, instruction_rows = (_select_rows(answered, instructions) for instructions in (False, True))
    metrics: dict[str, float] = {
        "answers": len(rows),
        "instructions": len(instruction_rows),
        "answer_errors": len(table) - len(answered),
    }
    for part in (rows, instruction_rows):
        if part:
            metrics |= compute_metrics(_build_columns(part))
    return metrics


def get_step_file(step: int) -> str:
    """Return the name of the file of the evaluation at this step."""
    return f"step_{step:06d}.json"


def load_earlier_results(folder: Path, step: int) -> list[StepResults]:
    """Return the evaluations up to `step`, in order. Delete later ones, which the resumed run evaluates again."""
    results = []
    for file in sorted(folder.glob("*.json")):
        result = StepResults(**json.loads(file.read_text(encoding="utf-8")))
        if result.step > step or file.name == BEST_FILE:
            file.unlink()
        else:
            results.append(result)
    return results


def compute_changes(first: StepResults, last: StepResults) -> dict[str, dict[str, float | None]]:
    """Return {metric: before, after, difference, its 95% bootstrap interval from low to high, items} over the rows that
    both evaluations have. A metric without rows is left out, and the loss if the evaluations held out different rows.
    """
    changes = {}
    for name in CHANGES:
        columns = _pair_columns(first, last, name)
        if columns:
            changes[name] = _compute_change(name, *columns)
    return changes


def compute_set_changes(first: StepResults | None, last: StepResults) -> dict[str, dict[str, Any]]:
    """Return the metrics of each held-out set and their changes (`compute_changes`) since `first`, by its name."""
    return {
        name: {
            "metrics": part["metrics"],
            "before_and_after": compute_changes(first.select_set(name), last.select_set(name))
            if first and name in first.sets
            else {},
        }
        for name, part in last.sets.items()
    }


def join_answers(first: StepResults | None, last: StepResults) -> list[AnswerRow]:
    """Return the held-out answers of two evaluations side by side; without the first, its answers are None."""
    no_answer = {"answer": None, "stopped": None}
    pairs = _pair_rows(first, last, False) if first else [(no_answer, row) for row in _select_rows(last.table, False)]
    return [
        {
            **({"set": last_row["set"]} if "set" in last_row else {}),
            "prompt": last_row["prompt"],
            "reference": last_row["reference"],
            "before": first_row["answer"],
            "after": last_row["answer"],
            "stopped": last_row["stopped"],
            "stopped_before": first_row["stopped"],
            "error": last_row["error"],
        }
        for first_row, last_row in pairs
    ]


def _select_rows(table: list[AnswerRow], instructions: bool) -> list[AnswerRow]:
    """Return the rows of instructions, or those of held-out prompts."""
    return [row for row in table if (row["instruction"] is not None) == instructions]


def _pair_rows(first: StepResults, last: StepResults, instructions: bool) -> list[tuple[AnswerRow, AnswerRow]]:
    """Return the rows of both tables with the same prompt; both tables start with the same prompts."""
    pairs = zip(_select_rows(first.table, instructions), _select_rows(last.table, instructions))
    return [(first_row, last_row) for first_row, last_row in pairs if first_row["prompt"] == last_row["prompt"]]


def _build_columns(rows: list[AnswerRow]) -> Columns:
    """Return the columns of answered rows, all of instructions or none."""
    answers = [row["answer"] for row in rows]
    if rows[0]["instruction"] is not None:
        return {"predictions": answers, "instruction_ids": [row["instruction"] for row in rows]}
    return build_answer_columns(
        answers,
        prompts=[row["prompt"] for row in rows],
        references=[row["reference"] for row in rows],
        finish_reasons=["stop" if row["stopped"] else "length" for row in rows],
        calls_match=[row["calls_match"] for row in rows],
    )


def _pair_columns(first: StepResults, last: StepResults, name: str) -> tuple[Columns, Columns] | None:
    """Return the metric's columns over the rows that both evaluations have; None without such rows."""
    if "tokens" in METRICS[name].columns:
        return (first.held_out, last.held_out) if first.held_out["tokens"] == last.held_out["tokens"] else None
    pairs = _pair_rows(first, last, "instruction_ids" in METRICS[name].columns)
    answered = [pair for pair in pairs if not (pair[0]["error"] or pair[1]["error"])]
    if not answered:
        return None
    columns = _build_columns([pair[0] for pair in answered]), _build_columns([pair[1] for pair in answered])
    return columns if set(METRICS[name].columns) <= set(columns[0]) else None


def _compute_change(name: str, first: Columns, last: Columns) -> dict[str, float | None]:
    """Compute a metric's change over the rows that have it. There is no interval with one row, or with a loss that is
    not finite."""
    pairs = [METRICS[name].compute_rows(columns) for columns in (first, last)]
    counts = pairs[0][1] > 0
    (a, a_weights), (b, b_weights) = ([column[counts] for column in pair] for pair in pairs)
    mean_a, mean_b = float(a.sum() / a_weights.sum()), float(b.sum() / b_weights.sum())
    paired = estimate_difference(a, b, a_weights, b_weights)
    low, high = (paired.low, paired.high) if paired else (None, None)
    return {"before": mean_a, "after": mean_b, "difference": mean_b - mean_a, "low": low, "high": high, "items": len(a)}
