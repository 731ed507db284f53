"""Collate rows into a batch with padding on the right: a line for each sequence of each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sft_pipeline.utils.constants import IGNORED

# Stands for the rows of an empty micro-batch (see batch_sampler.py): tokens without a target add nothing to a loss.
# They are two because torch.compile makes other code for a length of one.
DUMMY_ROW: dict[str, Any] = {"input_ids": [0, 0], "labels": [IGNORED, IGNORED]}


def split_sequences(row: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the ids and the shifted labels of each sequence of an encoded row.

    Their lengths are in the column `sequence_lengths`; a row without it is one sequence.
    """
    ids, labels = np.asarray(row["input_ids"]), np.asarray(row["labels"])
    lengths = row.get("sequence_lengths")
    if lengths is None or len(lengths) == 1:
        return [(ids, labels)]
    ends = np.cumsum(lengths)[:-1]
    return list(zip(np.split(ids, ends), np.split(labels, ends)))


@dataclass(frozen=True)
class PaddingCollator:
    """Collate rows (`input_ids`, shifted `labels`, `sequence_lengths` of several) into int64 tensors (lines, length).

    The length is the longest sequence's, rounded up to a multiple of `pad_to_multiple_of`. The attention mask is made
    from the lengths of the sequences, not from the pad id, which is often the stop id. `labels` and `shift_labels` are
    the same tensor: `Trainer` counts targets in the first, and the second tells transformers that they are shifted
    already (transformers/loss/loss_utils.py, ForCausalLMLoss). `target_positions` (targets,) are the positions of the
    targets in the flattened labels, so that they need not be searched for on the device. `target_counts` (rows,) is the
    number of targets of each row, for the sums of an evaluation.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 8

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        rows_of_sequences = [split_sequences(row) for row in rows or [DUMMY_ROW]]
        sequences = [sequence for row in rows_of_sequences for sequence in row]
        lengths = torch.tensor([len(ids) for ids, _ in sequences])
        width = -(-int(lengths.max()) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        labels = _pad_lines([labels for _, labels in sequences], width, IGNORED)
        return {
            "input_ids": _pad_lines([ids for ids, _ in sequences], width, self.pad_token_id),
            "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
            "labels": labels,
            "shift_labels": labels,
            "target_positions": labels.flatten().ne(IGNORED).nonzero()[:, 0],
            "target_counts": count_targets(rows_of_sequences),
        }


def count_targets(rows: list[list[tuple[np.ndarray, np.ndarray]]]) -> Tensor:
    """Return the number of targets of each row of sequences, (rows,)."""
    return torch.tensor([sum(int((labels != IGNORED).sum()) for _, labels in row) for row in rows])


def _pad_lines(lines: list[np.ndarray], width: int, fill_value: int) -> Tensor:
    padded = torch.full((len(lines), width), fill_value)
    for index, line in enumerate(lines):
        padded[index, : len(line)] = torch.as_tensor(line)
    return padded
