"""Choose the rows of each optimizer step and divide them into micro-batches.

    StepBatchSampler(lengths, seed=42, rows=8, accumulation=2, processes=2, process=0)

The order of the rows in an epoch depends on seed and epoch alone, and each step takes a slice of it. So a step has the
same rows for every split of its micro-batches into accumulation x processes, and the division into micro-batches never
changes a loss that is the mean over all targets of the step. Every process computes the same plan and takes its share:
nothing is communicated, and a run can resume anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from torch.utils.data import DataLoader

from sft_pipeline.data.packing import pack_best_fit


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
    """Yield the micro-batches of one process as lists of row indices: a `batch_sampler` for `DataLoader`.

    An epoch is split into steps in one of two ways:

    - By rows (`tokens` is 0): a step has accumulation x processes micro-batches of `rows` rows. The last step of an
      epoch has the remaining rows, in as few micro-batches as possible.
    - By tokens: a step has as many rows as best fit packs into accumulation x processes micro-batches of at most
      `tokens` tokens, with each row counted by itself. The number of rows varies by step, and the number of steps that
      an epoch needs varies with the shuffle. Since `Trainer` plans with one number of steps per epoch, every epoch is
      split into the largest number that any epoch of the run (`epochs`, or `max_steps` if positive) needs, by halving
      steps. A row of more than `tokens` tokens is a micro-batch of its own.

    `lengths` (rows,) are the tokens of each row. They and one permutation are all that is stored: 12 bytes per row.

    Micro-batches have similar numbers of tokens if `packed`, else of rows. A micro-batch is empty only if a step has
    fewer rows than micro-batches. The collators turn it into one token without a target, which adds nothing to the
    loss, so that all processes run the same number of forward passes.
    """

    lengths: np.ndarray
    seed: int
    rows: int
    accumulation: int = 1
    processes: int = 1
    process: int = 0
    tokens: int = 0
    epochs: int = 1
    max_steps: int = -1
    packed: bool = True
    shuffle: bool = True
    epoch: int = 0

    def __post_init__(self) -> None:
        self.lengths = np.asarray(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.split_epoch(self.epoch):
            yield from self.split_step(step)[self.process :: self.processes]

    def shuffle_rows(self, epoch: int) -> np.ndarray:
        """Return all row indices in the order of this epoch: shuffled, or ascending without `shuffle`."""
        if not self.shuffle:
            return np.arange(len(self.lengths))
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))

    def split_epoch(self, epoch: int) -> list[np.ndarray]:
        """Return the row indices of each optimizer step, over all processes: slices of `shuffle_rows(epoch)`."""
        if self.tokens:
            return self._halve_largest_steps(self._split_by_tokens(epoch))
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
        accumulation = self.accumulation if self.tokens else -(-len(step) // (self.rows * self.processes))
        return accumulation * self.processes

    @cached_property
    def _length(self) -> int:
        return sum(map(self.count_micro_batches, self.split_epoch(0))) // self.processes

    @cached_property
    def _steps_per_epoch(self) -> int:
        """With `tokens`: the largest number of steps that an epoch of the run needs."""
        steps = epoch = 0
        while epoch * steps < self.max_steps if self.max_steps > 0 else epoch < self.epochs:
            steps = max(steps, len(self._split_by_tokens(epoch)))
            epoch += 1
        return steps

    def _split_by_tokens(self, epoch: int) -> list[np.ndarray]:
        """Split the order of the epoch into slices, each with as many rows as fit into the micro-batches of a step."""
        order, steps, start = self.shuffle_rows(epoch), [], 0
        totals = np.concatenate([[0], self._cap_lengths(order).cumsum()])
        while start < len(order):
            end = self._find_step_end(order, totals, start)
            steps.append(order[start:end])
            start = end
        return steps

    def _find_step_end(self, order: np.ndarray, totals: np.ndarray, start: int) -> int:
        """Return where the step that begins at `start` ends; `totals` (1 + rows) are the tokens before each index."""
        count = self.accumulation * self.processes
        end = int(np.searchsorted(totals, totals[start] + count * self.tokens, side="right")) - 1
        while len(pack_best_fit(self.lengths[order[start:end]].tolist(), self.tokens)) > count:
            end -= 1
        return end

    def _cap_lengths(self, rows: np.ndarray) -> np.ndarray:
        """Return the tokens of each row, at most the budget: a longer row takes one whole micro-batch."""
        return np.minimum(self.lengths[rows], self.tokens)

    def _halve_largest_steps(self, steps: list[np.ndarray]) -> list[np.ndarray]:
        """Halve the steps with the most rows until there are `_steps_per_epoch` steps.

        A step is split where the tokens of its halves are most even. Then neither half has more than
        (micro-batches + 1) / 2 x `tokens` tokens, for which best fit needs no more bins than there are micro-batches,
        because any two of its bins together hold more than one bin could.
        """
        while len(steps) < self._steps_per_epoch:
            largest = max(range(len(steps)), key=lambda index: len(steps[index]))
            totals = self._cap_lengths(steps[largest]).cumsum()
            middle = int(np.abs(2 * totals[:-1] - totals[-1]).argmin()) + 1
            steps[largest : largest + 1] = [steps[largest][:middle], steps[largest][middle:]]
        return steps


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
    """A `DataLoader` that passes the epoch from `Trainer` to its batch sampler."""

    batch_sampler: StepBatchSampler

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)
