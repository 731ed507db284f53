"""Rows to a batch, padded on the right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sft_pipeline.utils.constants import IGNORED

# What an empty micro-batch is made of (see batch_sampler.py): one token, without a target, counts nothing.
NO_ROW: dict[str, Any] = {"input_ids": [0], "labels": [IGNORED]}


@dataclass(frozen=True)
class PaddingCollator:
    """Rows (`input_ids`, shifted `labels`) to tensors (rows, length), length a multiple of `pad_to_multiple_of`.

    The mask comes from the rows' lengths, never from the pad id, which often is the stop id. `labels` and
    `shift_labels` are one tensor: the first key lets `Trainer` count targets, the second tells transformers that they
    are shifted already (transformers/loss/loss_utils.py, ForCausalLMLoss).
    """

    pad_token_id: int
    pad_to_multiple_of: int = 8

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        rows = rows or [NO_ROW]
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        width = -(-int(lengths.max()) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        labels = self._padded(rows, "labels", width, IGNORED)
        return {
            "input_ids": self._padded(rows, "input_ids", width, self.pad_token_id),
            "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
            "labels": labels,
            "shift_labels": labels,
        }

    @staticmethod
    def _padded(rows: list[dict[str, Any]], column: str, width: int, fill: int) -> Tensor:
        padded = torch.full((len(rows), width), fill)
        for at, row in enumerate(rows):
            padded[at, : len(row[column])] = torch.as_tensor(row[column])
        return padded
