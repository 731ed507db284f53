"""Detect a NaN or exploding loss, and report the rows of the step."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import sort_checkpoints

ROWS_FILE = "diverged.jsonl"
MAX_LISTED_ROWS = 20  # row numbers in the message


def detect_divergence(loss: float, grad_norm: float, vocab_size: int) -> str | None:
    """Return why training cannot go on from this step, or None. loss: nats per target, the mean over the step.

    The loss counts as exploded above twice that of a uniform guess, the logarithm of the vocabulary size: a pretrained
    model does not recover from there, and no working one starts there.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(grad_norm):
        return f"the loss is {loss:.3f}, but the gradient norm is {grad_norm}"
    uniform_loss = math.log(vocab_size)
    if loss > 2 * uniform_loss:
        return f"the loss exploded: {loss:.1f} nats per token, a uniform guess has {uniform_loss:.1f}"
    return None


def describe_divergence(folder: Path, step: int, reason: str, rows: Sequence[int | str]) -> str:
    """Return one line: the step, the reason, the training rows, the newest checkpoint and the remedy.

    rows: numbers, those in ROWS_FILE; or of a stream where each is from.
    """
    where = "in unknown training rows"
    if rows:
        numbers = ", ".join(map(str, rows[:MAX_LISTED_ROWS]))
        if len(rows) > MAX_LISTED_ROWS:
            numbers += f" and {len(rows) - MAX_LISTED_ROWS} more"
        where = f"in training rows {numbers}"
        if isinstance(rows[0], int):
            where += f" (see {folder / ROWS_FILE})"
    checkpoints = sort_checkpoints(str(folder))
    checkpoint = f"the last checkpoint is {checkpoints[-1]}" if checkpoints else "no checkpoint was saved"
    return f"step {step}: {reason}, {where}; {checkpoint}; lower learning_rate or max_grad_norm, or check these rows"


def write_diverged_rows(
    folder: Path, rows: list[int], dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Write the rows of the step to `diverged.jsonl` in `folder`.

    Each line is a JSON object: `row` (its index in the training data), `text` and `input_ids`.
    """
    lines = []
    for row in rows:
        ids = dataset[row]["input_ids"]
        text = tokenizer.decode(ids) if tokenizer else None
        lines.append(json.dumps({"row": row, "text": text, "input_ids": ids}, ensure_ascii=False) + "\n")
    (folder / ROWS_FILE).write_text("".join(lines), encoding="utf-8")
