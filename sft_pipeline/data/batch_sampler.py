"""Choose the rows of each optimizer step and divide them into micro-batches.

    StepBatchSampler(lengths, seed=42, rows=8, accumulation=2, processes=2, process=0)

The order of the rows in an epoch depends on seed and epoch alone, and each step takes a slice of it. So a step has the
same rows for every split of its micro-batches into accumulation x processes, and the division into micro-batches never
changes a loss that is the mean over all targets of the step. Every process computes the same plan and takes its share:
nothing is communicated, and a run can resume anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from sft_pipeline.data.packing import pack_best_fit

MICRO_BATCHES = "micro_batches"  # the key of a batch that has several


def count_row_tokens(rows: Dataset, share_prefixes: bool = False) -> np.ndarray:
    """Return the number of tokens of each row, (rows,): of all its sequences, in full.

    With `share_prefixes` those of its own prefix tree, from the column `computed_tokens` where the rows have it.
    """
    batches = rows.with_format("arrow")
    if share_prefixes and "computed_tokens" in rows.column_names:
        return np.concatenate([batch["computed_tokens"].to_numpy() for batch in batches.iter(10_000)])
    return np.concatenate([pc.list_value_length(batch["input_ids"]).to_numpy() for batch in batches.iter(10_000)])


@dataclass
class StepBatchSampler:
    """Yield the batches of one process: a `batch_sampler` for `DataLoader`.

    A step has accumulation x processes micro-batches of `rows` rows. The last step of an epoch has the remaining rows,
    in as few micro-batches as possible. A batch is a micro-batch, as a list of row indices.

    With `tokens`, a step has the same rows, and as few micro-batches of at most `tokens` tokens as best fit needs, as
    many on each process, with each row counted by itself. A row of more tokens is a micro-batch of its own. A batch is
    then the share of the process in a step: a list of micro-batches.

    `lengths` (rows,) are the tokens of each row. They and one permutation are all that is stored: 12 bytes per row.

    Micro-batches have similar numbers of tokens if `packed`, else of rows. A micro-batch is empty only if a step has
    fewer rows than micro-batches. The collators turn it into two tokens without a target, which add nothing to the
    loss, so that all processes run the same number of forward passes.
    """

    lengths: np.ndarray
    seed: int
    rows: int
    accumulation: int = 1
    processes: int = 1
    process: int = 0
    tokens: int = 0
    packed: bool = True
    shuffle: bool = True
    epoch: int = 0

    def __post_init__(self) -> None:
        self.lengths = np.asarray(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        steps, remaining_rows = divmod(len(self.lengths), self.rows * self.accumulation * self.processes)
        if self.tokens:
            return steps + (remaining_rows > 0)
        return steps * self.accumulation - (-remaining_rows // (self.rows * self.processes))

    def __iter__(self) -> Iterator[list[Any]]:
        for step in self.split_epoch(self.epoch):
            micro_batches = self.split_step(step)[self.process :: self.processes]
            if self.tokens:
                yield micro_batches
            else:
                yield from micro_batches

    def shuffle_rows(self, epoch: int) -> np.ndarray:
        """Return all row indices in the order of this epoch: shuffled, or ascending without `shuffle`."""
        if not self.shuffle:
            return np.arange(len(self.lengths))
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))

    def split_epoch(self, epoch: int) -> list[np.ndarray]:
        """Return the row indices of each optimizer step, over all processes: slices of `shuffle_rows(epoch)`."""
        order, size = self.shuffle_rows(epoch), self.rows * self.accumulation * self.processes
        return [order[start : start + size] for start in range(0, len(order), size)]

    def split_step(self, step: np.ndarray) -> list[list[int]]:
        """Divide the rows of a step into micro-batches; micro-batch i is for process i modulo `processes`."""
        count = self.count_micro_batches(step)
        if not self.packed:
            return [step[index::count].tolist() for index in range(count)]
        return [step[rows].tolist() for rows in divide_rows(self.lengths[step].tolist(), count, self.tokens)]

    def count_micro_batches(self, step: np.ndarray) -> int:
        """Return the number of micro-batches of a step over all processes, a multiple of `processes`."""
        if self.tokens:
            count = len(pack_best_fit(self.lengths[step].tolist(), self.tokens))
        else:
            count = -(-len(step) // self.rows)
        return -(-count // self.processes) * self.processes


def divide_rows(lengths: Sequence[int], count: int, budget: int = 0) -> list[list[int]]:
    """Divide rows of the given lengths (tokens) into `count` bins with similar sums; return lists of row indices.

    Uses the smallest capacity, found by bisection, for which best fit needs at most `count` bins (MULTIFIT: Coffman,
    Garey and Johnson, 1978). No bin has more tokens than the mean + the longest row, nor more than `budget` if best fit
    can pack the rows into `count` bins of that size. Bins are empty only if there are fewer rows than bins.
    """
    mean = -(-sum(lengths) // count)
    low, high = max(mean, *lengths), mean + max(lengths)
    high = min(high, budget or high)
    while low < high:
        middle = (low + high) // 2
        if len(pack_best_fit(lengths, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    bins = pack_best_fit(lengths, high)
    while len(bins) < min(count, len(lengths)):
        largest = max(range(len(bins)), key=lambda index: len(bins[index]))
        bins[largest : largest + 1] = [bins[largest][::2], bins[largest][1::2]]
    return bins + [[] for _ in range(count - len(bins))]


class EpochDataLoader(DataLoader):
    """A `DataLoader` over the batches of a StepBatchSampler, to which it passes the epoch from `Trainer`.

    collate_fn: makes a batch of a list of rows. A batch of several micro-batches has them under MICRO_BATCHES, each
    made by `collate_fn`, and the `input_ids` and `shift_labels` of all, which `Trainer` counts.
    """

    batch_sampler: StepBatchSampler

    def __init__(
        self, rows: Any, batch_sampler: StepBatchSampler, collate_fn: Callable[..., Any], **options: Any
    ) -> None:
        if batch_sampler.tokens:
            rows, collate_fn = RowLists(rows), MicroBatchCollator(collate_fn)
        super().__init__(rows, batch_sampler=batch_sampler, collate_fn=collate_fn, **options)

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


@dataclass(frozen=True)
class RowLists:
    """A dataset whose items are lists of the rows of another: `RowLists(rows)[[3, 0]]` is `[rows[3], rows[0]]`."""

    rows: Any

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [self.rows[index] for index in indices]


@dataclass(frozen=True)
class MicroBatchCollator:
    """Collate the rows of each micro-batch with `collate`; see EpochDataLoader."""

    collate: Callable[..., Any]

    def __call__(self, micro_batches: list[list[dict[str, Any]]]) -> dict[str, Any]:
        batches = [self.collate(rows) for rows in micro_batches]
        if len(batches) == 1:
            return batches[0]
        shared = {key: torch.cat([batch[key] for batch in batches], 1) for key in ("input_ids", "shift_labels")}
        return {**shared, "labels": shared["shift_labels"], MICRO_BATCHES: batches}
