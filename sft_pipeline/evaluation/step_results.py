"""What the evaluations of a run found, and how they are kept in its output folder.

    evaluation/step_000090.json     one an evaluation
    evaluation/best.json            of the best model, where load_best_model_at_end brings one back after training

A file is whole or absent; its fields are those of `Evaluation`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sft_pipeline.data.messages import Message
from sft_pipeline.evaluation.bootstrap import estimate_difference
from sft_pipeline.evaluation.metrics.degeneration import is_loop
from sft_pipeline.evaluation.metrics.instruction_following import followed, instruction_figures
from sft_pipeline.evaluation.metrics.registry import answer_figures, loss_figures
from sft_pipeline.evaluation.metrics.words import words
from sft_pipeline.inference.answers import Answer
from sft_pipeline.utils.files import write_json

BEST_FILE = "best.json"

AnswerRow = dict[str, Any]
# The metrics of the table before and after: whether they are of the instructions, and what one answer has.
COMPARED: dict[str, tuple[bool, Callable[[AnswerRow], bool]]] = {
    "stop_rate": (False, lambda row: row["stopped"]),
    "loop_rate": (False, lambda row: is_loop(row["answer"])),
    "instructions_followed_rate": (True, lambda row: row["followed"]),
}


@dataclass(frozen=True)
class EvalPrompt:
    """What is asked: a held-out conversation without its last answer, which is the reference, or a checkable
    instruction, named by its id."""

    messages: list[Message]
    reference: str | None = None
    instruction: str | None = None


@dataclass(frozen=True)
class StepResults:
    """One evaluation. All `metrics` can be computed again from what else is here.

    complete: all questions were asked, not only the first ones. seconds: that answering took, on the slowest process.
    held_out: a value a row of `nll_nats`, `tokens` (supervised ones) and `correct` (those that were the likeliest), in
    the same order at every evaluation. utf8_bytes: of the supervised text of all these rows.
    table: see `build_table_row`.
    """

    step: int
    complete: bool
    seconds: float
    metrics: dict[str, float]
    held_out: dict[str, list[float]]
    utf8_bytes: int
    table: list[AnswerRow]

    def write(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, asdict(self))


def build_table_row(question: EvalPrompt, answer: Answer) -> AnswerRow:
    """One question with its answer; `error` says why there is none, `followed` is there for instructions alone."""
    ids = question.instruction and [question.instruction]
    return {
        "instruction": question.instruction,
        "prompt": question.messages[-1]["content"],
        "reference": question.reference,
        "answer": answer.text,
        "stopped": answer.stopped,
        "tokens": answer.tokens,
        "followed": followed([answer.text], ids)[0] if ids and answer.error is None else None,
        "error": answer.error,
    }


def compute_held_out_metrics(held_out: dict[str, list[float]], utf8_bytes: int) -> dict[str, float]:
    return loss_figures(held_out["nll_nats"], held_out["tokens"], held_out["correct"], utf8_bytes)


def compute_table_metrics(table: list[AnswerRow]) -> dict[str, float]:
    """Figures of the rows that have an answer; `answers` and `instructions` count those, `answer_errors` the rest."""
    rows, told = ([row for row in _of_kind(table, kind) if row["error"] is None] for kind in (False, True))
    metrics: dict[str, float] = {
        "answers": len(rows),
        "instructions": len(told),
        "answer_errors": len(table) - len(rows) - len(told),
    }
    if rows:
        references = [row["reference"] for row in rows]
        metrics |= answer_figures(
            [row["answer"] for row in rows],
            prompts=[row["prompt"] for row in rows],
            references=references if any(map(words, references)) else None,
            finish_reasons=["stop" if row["stopped"] else "length" for row in rows],
        )
    if told:
        metrics |= instruction_figures([row["answer"] for row in told], [row["instruction"] for row in told])
    return metrics


def get_step_file(step: int) -> str:
    return f"step_{step:06d}.json"


def load_earlier_results(folder: Path, step: int) -> list[StepResults]:
    """The evaluations up to `step`, in order; later ones, which the run is about to make again, are taken away."""
    earlier = []
    for file in sorted(folder.glob("*.json")):
        found = StepResults(**json.loads(file.read_text(encoding="utf-8")))
        if found.step > step or file.name == BEST_FILE:
            file.unlink()
        else:
            earlier.append(found)
    return earlier


def compute_changes(before: StepResults, after: StepResults) -> dict[str, dict[str, float | None]]:
    """{figure: before, after, difference, its 95% bootstrap interval from low to high, items} over what both have.

    A figure without items is left out.
    """
    found = {}
    tokens = before.held_out["tokens"]
    if tokens == after.held_out["tokens"]:
        losses = before.held_out["nll_nats"], after.held_out["nll_nats"]
        found["nll_nats_per_token"] = _change(*losses, tokens)
    for name, (of_instructions, value) in COMPARED.items():
        pairs = [pair for pair in _pairs(before, after, of_instructions) if not (pair[0]["error"] or pair[1]["error"])]
        if pairs:
            old, new = ([float(value(row)) for row in column] for column in zip(*pairs))
            found[name] = _change(old, new, [1.0] * len(pairs))
    return found


def join_answers(before: StepResults | None, after: StepResults) -> list[AnswerRow]:
    """The held-out answers of two evaluations side by side; without the first, what it would give is None."""
    none = {"answer": None, "stopped": None}
    pairs = _pairs(before, after, False) if before else [(none, row) for row in _of_kind(after.table, False)]
    return [
        {
            "prompt": new["prompt"],
            "reference": new["reference"],
            "before": old["answer"],
            "after": new["answer"],
            "stopped": new["stopped"],
            "stopped_before": old["stopped"],
            "error": new["error"],
        }
        for old, new in pairs
    ]


def _of_kind(table: list[AnswerRow], instructions: bool) -> list[AnswerRow]:
    return [row for row in table if (row["instruction"] is not None) == instructions]


def _pairs(before: StepResults, after: StepResults, instructions: bool) -> list[tuple[AnswerRow, AnswerRow]]:
    """The rows of both tables that ask the same; both begin with the same first questions."""
    rows = zip(_of_kind(before.table, instructions), _of_kind(after.table, instructions))
    return [(old, new) for old, new in rows if old["prompt"] == new["prompt"]]


def _change(before: list[float], after: list[float], weights: list[float]) -> dict[str, float | None]:
    """Of one item, or of a loss that is no number, there is no interval."""
    a, b = (float(np.sum(values) / np.sum(weights)) for values in (before, after))
    found = estimate_difference(before, after, weights, weights)
    low, high = (found.low, found.high) if found else (None, None)
    return {"before": a, "after": b, "difference": b - a, "low": low, "high": high, "items": len(before)}
