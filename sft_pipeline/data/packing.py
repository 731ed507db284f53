"""Pack the rows of a micro-batch into one sequence without padding, with their common prefix computed once.

A packed batch is one sequence of tokens `[prefix, remainder of row 1, remainder of row 2, ...]`. The positions of every
remainder begin after those of the prefix, and `row_lengths` = [prefix, remainder 1, remainder 2, ...] is all that
attention needs to let each row attend to the prefix and to itself only. Nothing here uses random numbers, so a run can
resume anywhere.
"""

import bisect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sft_pipeline.data.padding import DUMMY_ROW
from sft_pipeline.model.loss_forward import patch_loss_forward
from sft_pipeline.model.packed_attention import find_packing_obstacle, use_packed_attention
from sft_pipeline.utils.constants import IGNORED
from sft_pipeline.utils.errors import SFTError

MIN_SAVED_SHARE = 0.05  # share of the tokens that a common prefix must save to be worth its overhead


def pack_best_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Pack rows of the given lengths (tokens) into bins of at most `budget` tokens; return lists of row indices.

    Best fit decreasing: longest rows first, each into the fullest bin that still has space for it. A row over the
    budget gets a bin of its own (the length limit is applied before packing). Rows keep their order within a bin, and
    bins are ordered by their first row, so equal input gives equal output in every process.
    """
    free: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    bins: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        index = bisect.bisect_left(free, (lengths[row], -1))
        if index == len(free):
            bins.append([])
            free_tokens, bin_index = budget, len(bins) - 1
        else:
            free_tokens, bin_index = free.pop(index)
        bins[bin_index].append(row)
        if lengths[row] < free_tokens:
            bisect.insort(free, (free_tokens - lengths[row], bin_index))
    return sorted((sorted(rows) for rows in bins), key=lambda rows: rows[0])


def find_common_prefix(input_ids: Sequence[Tensor], labels: Sequence[Tensor]) -> int:
    """Return how many tokens at the start of all rows are equal and can be computed once; 0 if that saves under 5%.

    Every row keeps at least one token after the prefix. A position counts only if no row has a target there, because
    the targets at the end of the prefix differ between rows.
    """
    if len(input_ids) < 2:
        return 0
    limit = min(len(ids) for ids in input_ids) - 1
    first = input_ids[0][:limit]
    equal = torch.stack([(ids[:limit] == first) & (label[:limit] == IGNORED) for ids, label in zip(input_ids, labels)])
    length = int(equal.all(0).long().cumprod(0).sum())
    saved = length * (len(input_ids) - 1)
    return length if saved >= MIN_SAVED_SHARE * sum(len(ids) for ids in input_ids) else 0


class PackingCollator:
    """Collate rows to a packed batch, for `model`, which is set to attend within each row and to return losses.

    Raises SFTError with the reason if `model` would not compute the same as for single rows.
    longest: number of tokens of the longest row; a sliding window at least as long does no harm.
    """

    def __init__(self, model: PreTrainedModel, longest: int | None = None) -> None:
        if reason := find_packing_obstacle(model, longest):
            raise SFTError(reason)
        patch_loss_forward(model)
        use_packed_attention(model)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        return pack_rows(rows)


def pack_rows(rows: Sequence[dict[str, Any]], share_prefix: bool = True) -> dict[str, Tensor]:
    """Collate dataset rows (`input_ids` and shifted `labels` of equal length) into one packed batch.

    The batch has `input_ids`, `position_ids`, `labels`, each (1, tokens) int64, `shift_labels`, the same tensor as
    `labels`, which tells transformers not to shift them again, and `row_lengths` (1 + rows) as described above.
    `share_prefix` computes the common prefix once.
    """
    rows = rows or [DUMMY_ROW]
    ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
    row_labels = [torch.as_tensor(row["labels"], dtype=torch.long) for row in rows]
    prefix = find_common_prefix(ids, row_labels) if share_prefix else 0
    positions = [torch.arange(prefix), *(torch.arange(prefix, len(row)) for row in ids)]
    labels = _join_rows(row_labels, prefix)
    return {
        "input_ids": _join_rows(ids, prefix),
        "position_ids": torch.cat(positions)[None],
        "labels": labels,
        "shift_labels": labels,
        "row_lengths": torch.tensor([prefix, *(len(row) - prefix for row in ids)]),
    }


def _join_rows(rows: Sequence[Tensor], prefix: int) -> Tensor:
    """Concatenate the prefix of the first row and what follows the prefix in every row, (1, tokens)."""
    return torch.cat([rows[0][:prefix], *(row[prefix:] for row in rows)])[None]


def describe_savings(rows: Sequence[dict[str, Any]], batches: Iterable[list[int]]) -> str:
    """Describe in one line what packing saves compared with padding the same micro-batches (lists of row indices)."""
    padded_tokens = row_tokens = packed_tokens = targets = 0
    for indices in filter(None, batches):
        batch = [rows[index] for index in indices]
        lengths = [len(row["input_ids"]) for row in batch]
        packed = pack_rows(batch)
        padded_tokens += max(lengths) * len(lengths)
        row_tokens += sum(lengths)
        packed_tokens += packed["input_ids"].numel()
        targets += int(packed["labels"].ne(IGNORED).sum())
    return (
        f"packed rows: no padding (saves {1 - row_tokens / padded_tokens:.0%} of the tokens of padded batches), common "
        f"prefix computed once (saves {1 - packed_tokens / row_tokens:.0%} of the rest), "
        f"lm_head at {targets / packed_tokens:.0%} of the positions"
    )
