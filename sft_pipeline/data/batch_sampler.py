"""Which rows each optimizer step trains, and how they are divided into micro-batches.

    StepBatches(lengths, seed=42, rows=8, accumulation=2, processes=2, process=0)

Each epoch is a permutation of all rows, drawn from seed and epoch alone, and a step is a piece of it. So the rows of a
step are the same for every way to spread accumulation x processes micro-batches, whose division among each other never
changes a loss that is the mean over the step's targets. Every process computes the same plan and takes its share: there
is nothing to send, and a run can resume anywhere.
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


def count_row_tokens(rows: Dataset) -> np.ndarray:
    """Tokens of each row, (rows,)."""
    batches = rows.with_format("arrow").iter(10_000)
    return np.concatenate([pc.list_value_length(batch["input_ids"]).to_numpy() for batch in batches])


@dataclass
class StepBatchSampler:
    """The micro-batches of one process, in order: a `batch_sampler` for `DataLoader`, lists of row numbers.

    Two ways to cut an epoch into steps:

    - `rows`: a step is rows x accumulation x processes rows. The epoch's last step has what is left, in as few
      micro-batches as that allows.
    - `tokens`, where not 0: a step has as many rows as best fit lays into accumulation x processes micro-batches of at
      most so many tokens, each row counted whole. How many rows that is varies, and how many steps an epoch needs
      varies with the shuffle; since `Trainer` plans with one number, every epoch is cut into the most steps that any
      epoch of the run (`epochs`, or `max_steps` where positive) needs, by halving steps. A row above `tokens` is a
      micro-batch alone.

    `lengths` (rows,) are the tokens of each row. They and one permutation are all that is kept of the rows: 12 bytes
    each.

    `packed` micro-batches are balanced in tokens, others in rows. A micro-batch is empty only where a step has fewer
    rows than micro-batches: the collators make one token without a target of it, which counts zero, so that all
    processes go through the same number of forward passes.
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
        """All row numbers, shuffled for this epoch."""
        if not self.shuffle:
            return np.arange(len(self.lengths))
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))

    def split_epoch(self, epoch: int) -> list[np.ndarray]:
        """The rows of each optimizer step, over all processes: pieces (views) of `order(epoch)`."""
        if self.tokens:
            return self._in_halves(self._by_tokens(epoch))
        order, size = self.shuffle_rows(epoch), self.rows * self.accumulation * self.processes
        return [order[at : at + size] for at in range(0, len(order), size)]

    def split_step(self, step: np.ndarray) -> list[list[int]]:
        """The step's micro-batches, one for each process, and so on: a multiple of `processes`."""
        parts = self.count_micro_batches(step)
        if not self.packed:
            return [step[part::parts].tolist() for part in range(parts)]
        return [step[rows].tolist() for rows in divide_rows(self.lengths[step].tolist(), parts, self.tokens)]

    def count_micro_batches(self, step: np.ndarray) -> int:
        most = self.accumulation if self.tokens else -(-len(step) // (self.rows * self.processes))
        return most * self.processes

    @cached_property
    def _length(self) -> int:
        return sum(map(self.count_micro_batches, self.split_epoch(0))) // self.processes

    @cached_property
    def _steps_an_epoch(self) -> int:
        """By tokens: the most steps that one of the run's epochs needs."""
        most = epoch = 0
        while epoch * most < self.max_steps if self.max_steps > 0 else epoch < self.epochs:
            most = max(most, len(self._by_tokens(epoch)))
            epoch += 1
        return most

    def _by_tokens(self, epoch: int) -> list[np.ndarray]:
        """Pieces of the epoch's order, each as long as its rows fit into one step's micro-batches."""
        order, pieces, at = self.shuffle_rows(epoch), [], 0
        sums = np.concatenate([[0], self._costs(order).cumsum()])
        while at < len(order):
            end = self._end(order, sums, at)
            pieces.append(order[at:end])
            at = end
        return pieces

    def _end(self, order: np.ndarray, sums: np.ndarray, at: int) -> int:
        """Where the step that begins at `at` has to end; `sums` (rows + 1,) are of the costs before each place."""
        parts = self.accumulation * self.processes
        end = int(np.searchsorted(sums, sums[at] + parts * self.tokens, side="right")) - 1
        while len(pack_best_fit(self.lengths[order[at:end]].tolist(), self.tokens)) > parts:
            end -= 1
        return end

    def _costs(self, rows: np.ndarray) -> np.ndarray:
        return np.minimum(self.lengths[rows], self.tokens)

    def _in_halves(self, steps: list[np.ndarray]) -> list[np.ndarray]:
        """As many steps as every epoch of the run has, by halving those with the most rows.

        Cut where the halves' tokens are most even, none has more than (parts + 1) / 2 x `tokens`, and best fit, two
        of whose bins always hold more than one bin could, needs no more than `parts` bins for that.
        """
        while len(steps) < self._steps_an_epoch:
            at = max(range(len(steps)), key=lambda at: len(steps[at]))
            sums = self._costs(steps[at]).cumsum()
            cut = int(np.abs(2 * sums[:-1] - sums[-1]).argmin()) + 1
            steps[at : at + 1] = [steps[at][:cut], steps[at][cut:]]
        return steps


def divide_rows(lengths: Sequence[int], parts: int, most: int = 0) -> list[list[int]]:
    """Divide rows of the given lengths (tokens) into `parts` bins of like sums; lists of row numbers.

    The least capacity, found by halving, for which best fit needs no more than `parts` bins (MULTIFIT: Coffman, Garey
    and Johnson, 1978). No bin has more than the mean + the longest row, nor, where best fit can do with `parts` bins of
    `most` tokens, more than that. Bins are empty only where there are fewer rows than bins.
    """
    mean = -(-sum(lengths) // parts)
    low, high = max(mean, *lengths), mean + max(lengths)
    high = min(high, most or high)
    while low < high:
        middle = (low + high) // 2
        if len(pack_best_fit(lengths, middle)) <= parts:
            high = middle
        else:
            low = middle + 1
    bins = pack_best_fit(lengths, high)
    while len(bins) < min(parts, len(lengths)):
        at = max(range(len(bins)), key=lambda at: len(bins[at]))
        bins[at : at + 1] = [bins[at][::2], bins[at][1::2]]
    return bins + [[] for _ in range(parts - len(bins))]


class EpochDataLoader(DataLoader):
    """A `DataLoader` that `Trainer` can tell the epoch."""

    batch_sampler: StepBatchSampler

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)
