"""Packed rows: the rows of a micro-batch laid end to end, without padding, the prefix they share once.

A packed batch is one line of tokens `[prefix, rest of row 1, rest of row 2, ...]` with positions that restart after
the prefix for every row, and `row_lengths` = [prefix, rest 1, rest 2, ...], which is all that attention needs to let
every row see the prefix and itself alone. Nothing here draws a random number, so a run can resume anywhere.
"""

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sft_pipeline.data.padding import NO_ROW
from sft_pipeline.utils.constants import IGNORED

MIN_SAVED_SHARE = 0.05  # share of the tokens a common prefix must save to be worth its bookkeeping


def pack_best_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Pack rows of the given lengths (tokens) into bins of at most `budget` tokens; lists of row numbers.

    Best fit decreasing: longest rows first, each into the fullest bin that still holds it. A row over the budget gets
    a bin of its own (the length limit is decided before packing). Rows keep their order within a bin, and bins are
    ordered by their first row, so that equal input gives equal output in every process.
    """
    space: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    bins: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        at = bisect.bisect_left(space, (lengths[row], -1))
        if at == len(space):
            bins.append([])
            free, number = budget, len(bins) - 1
        else:
            free, number = space.pop(at)
        bins[number].append(row)
        if lengths[row] < free:
            bisect.insort(space, (free - lengths[row], number))
    return sorted((sorted(rows) for rows in bins), key=lambda rows: rows[0])


def find_common_prefix(input_ids: Sequence[Tensor], labels: Sequence[Tensor]) -> int:
    """How many tokens at the start all rows share and can be computed once; 0 where that would save under 5%.

    Every row keeps a token of its own, and a position counts only if no row has a target there: the target of the
    prefix's last position differs from row to row.
    """
    if len(input_ids) < 2:
        return 0
    most = min(len(ids) for ids in input_ids) - 1
    first = input_ids[0][:most]
    same = torch.stack([(ids[:most] == first) & (label[:most] == IGNORED) for ids, label in zip(input_ids, labels)])
    length = int(same.all(0).long().cumprod(0).sum())
    saved = length * (len(input_ids) - 1)
    return length if saved >= MIN_SAVED_SHARE * sum(len(ids) for ids in input_ids) else 0


@dataclass(frozen=True)
class PackedCollator:
    """Turns dataset rows (`input_ids` and shifted `labels` of one length) into one packed batch of tensors.

    `input_ids`, `position_ids`, `labels` (1, tokens); `shift_labels`, the same tensor as `labels`, tells transformers
    that nothing is to be shifted again; `row_lengths` (1 + rows) as described above. `share_prefix` computes the
    common prefix once.
    """

    share_prefix: bool = True

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        rows = rows or [NO_ROW]
        ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
        labels = [torch.as_tensor(row["labels"], dtype=torch.long) for row in rows]
        prefix = find_common_prefix(ids, labels) if self.share_prefix else 0
        positions = [torch.arange(prefix), *(torch.arange(prefix, len(row)) for row in ids)]
        targets = _laid_out(labels, prefix)
        return {
            "input_ids": _laid_out(ids, prefix),
            "position_ids": torch.cat(positions)[None],
            "labels": targets,
            "shift_labels": targets,
            "row_lengths": torch.tensor([prefix, *(len(row) - prefix for row in ids)]),
        }


def _laid_out(rows: Sequence[Tensor], prefix: int) -> Tensor:
    """(1, tokens): the prefix of the first row, then what follows it in every row."""
    return torch.cat([rows[0][:prefix], *(row[prefix:] for row in rows)])[None]


def describe_savings(rows: Sequence[dict[str, Any]], batches: Iterable[list[int]]) -> str:
    """One line on what packing saves over the same micro-batches padded; `batches` are lists of row numbers."""
    padded = real = computed = targets = 0
    collate = PackedCollator()
    for numbers in filter(None, batches):
        batch = [rows[number] for number in numbers]
        lengths = [len(row["input_ids"]) for row in batch]
        packed = collate(batch)
        padded += max(lengths) * len(lengths)
        real += sum(lengths)
        computed += packed["input_ids"].numel()
        targets += int(packed["labels"].ne(IGNORED).sum())
    return (
        f"packed rows: no padding (saves {1 - real / padded:.0%} of the tokens of padded batches), the common prefix "
        f"once (saves {1 - computed / real:.0%} of the rest), the head at {targets / computed:.0%} of the positions"
    )
