"""A loss that is lost: when it is, and what is said of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import sort_checkpoints

ROWS_FILE = "diverged.jsonl"
NAMED = 20  # rows whose numbers are in the message


def detect_divergence(loss: float, grad_norm: float, vocabulary: int) -> str | None:
    """Why a step cannot be trained on from, or None. loss: nats a target, the mean over the step.

    A pretrained model that does twice as badly as one that guesses evenly (the logarithm of the vocabulary) does not
    come back, and no healthy one begins there.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(grad_norm):
        return f"the loss is {loss:.3f}, but the norm of its gradient is {grad_norm}"
    if loss > 2 * math.log(vocabulary):
        return f"the loss exploded: {loss:.1f} nats a token, where guessing evenly has {math.log(vocabulary):.1f}"
    return None


def describe_divergence(folder: Path, step: int, reason: str, rows: list[int]) -> str:
    """One line: what happened, in which rows, what is left, what to do."""
    numbers = ", ".join(map(str, rows[:NAMED])) + (f" and {len(rows) - NAMED} more" if len(rows) > NAMED else "")
    where = f"in training rows {numbers} (see {folder / ROWS_FILE})" if rows else "in rows of unknown numbers"
    checkpoints = sort_checkpoints(str(folder))
    kept = f"{checkpoints[-1]} is from before" if checkpoints else "no checkpoint was saved before"
    return f"step {step}: {reason}, {where}; {kept}; lower learning_rate or max_grad_norm, or look at these rows"


def write_diverged_rows(
    folder: Path, rows: list[int], dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """The step's rows, a line of JSON each: `row` (its number among the training rows), `text`, `input_ids`."""
    lines = []
    for row in rows:
        ids = dataset[row]["input_ids"]
        text = tokenizer.decode(ids) if tokenizer else None
        lines.append(json.dumps({"row": row, "text": text, "input_ids": ids}, ensure_ascii=False) + "\n")
    (folder / ROWS_FILE).write_text("".join(lines), encoding="utf-8")
