"""Collate rows into a batch with padding on the right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sft_pipeline.utils.constants import IGNORED

# Stands for the rows of an empty micro-batch (see batch_sampler.py): one token without a target adds nothing to a loss.
DUMMY_ROW: dict[str, Any] = {"input_ids": [0], "labels": [IGNORED]}


@dataclass(frozen=True)
class PaddingCollator:
    """Collate rows (`input_ids`, shifted `labels`) into int64 tensors (rows, length).

    The length is the longest row's, rounded up to a multiple of `pad_to_multiple_of`. The attention mask is made from
    the lengths of the rows, not from the pad id, which is often the stop id. `labels` and `shift_labels` are the same
    tensor: `Trainer` counts targets in the first, and the second tells transformers that they are shifted already
    (transformers/loss/loss_utils.py, ForCausalLMLoss).
    """

    pad_token_id: int
    pad_to_multiple_of: int = 8

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        rows = rows or [DUMMY_ROW]
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        width = -(-int(lengths.max()) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        labels = self._pad_column(rows, "labels", width, IGNORED)
        return {
            "input_ids": self._pad_column(rows, "input_ids", width, self.pad_token_id),
            "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
            "labels": labels,
            "shift_labels": labels,
        }

    @staticmethod
    def _pad_column(rows: list[dict[str, Any]], column: str, width: int, fill_value: int) -> Tensor:
        padded = torch.full((len(rows), width), fill_value)
        for index, row in enumerate(rows):
            padded[index, : len(row[column])] = torch.as_tensor(row[column])
        return padded
