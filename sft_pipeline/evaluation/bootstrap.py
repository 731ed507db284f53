"""Compare two models on the same items: a difference with a bootstrap interval over paired items. Pure numpy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sft_pipeline.utils.errors import SFTError

_CELLS_AT_A_TIME = 1 << 20  # resampled rows x items held in memory at once: 8 MiB an array


@dataclass(frozen=True)
class PairedDifference:
    """Means of two models, `difference` = b - a, and its bootstrap interval from `low` to `high`."""

    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    confidence: float
    items: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies wholly on one side of zero."""
        return self.low > 0 or self.high < 0


def compute_paired_difference(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    *,
    a_weights: Sequence[float] | np.ndarray | None = None,
    b_weights: Sequence[float] | np.ndarray | None = None,
    resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> PairedDifference:
    """Difference b - a over paired items with a percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13).

    `a[i]` and `b[i]` are the two models' values for item i; items are drawn with replacement, both models' values
    together. For a ratio of sums, as nats a token, `a` and `b` are the numerators of each item (its summed nll) and the
    weights its denominators (its tokens); "mean" is then sum / sum of weights. The same `seed` gives the same interval
    for the same input. Raises SFTError for fewer than 2 items, unequal lengths, values that are not finite, weights
    that are not positive or given for one side only, and settings out of range.
    """
    if (a_weights is None) != (b_weights is None):
        raise SFTError("a ratio needs a_weights and b_weights, both or neither")
    ones = np.ones(len(a))
    columns = [_column("a", a), _column("b", b)]
    columns += [_column("a_weights", ones if a_weights is None else a_weights)]
    columns += [_column("b_weights", ones if b_weights is None else b_weights)]
    _check(columns, resamples, confidence)
    table = np.stack(columns)
    mean_a, mean_b = _means(table, np.arange(table.shape[1]))
    differences = _resampled_differences(table, resamples, np.random.default_rng(seed))
    low, high = np.quantile(differences, [(1 - confidence) / 2, (1 + confidence) / 2])
    return PairedDifference(
        float(mean_a), float(mean_b), float(mean_b - mean_a), float(low), float(high), confidence, table.shape[1]
    )


def estimate_difference(
    a: Sequence[float], b: Sequence[float], a_weights: Sequence[float], b_weights: Sequence[float]
) -> PairedDifference | None:
    """Paired difference, or None for fewer than two items or a value that is not finite (a model that diverged)."""
    if len(a) < 2 or not np.isfinite([*a, *b]).all():
        return None
    return compute_paired_difference(a, b, a_weights=a_weights, b_weights=b_weights)


def _resampled_differences(table: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """(resamples,) differences, a block of resamples at a time to bound the memory."""
    items = table.shape[1]
    block = max(1, _CELLS_AT_A_TIME // items)
    differences = []
    for start in range(0, resamples, block):
        drawn = generator.integers(0, items, size=(min(block, resamples - start), items))
        mean_a, mean_b = _means(table, drawn)
        differences.append(mean_b - mean_a)
    return np.concatenate(differences)


def _means(table: np.ndarray, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of a and b over the items `drawn` (..., items) of a table (a, b, weights of a, weights of b; items)."""
    a, b, a_weights, b_weights = (column[drawn].sum(axis=-1) for column in table)
    return a / a_weights, b / b_weights


def _column(name: str, values: Sequence[float] | np.ndarray) -> np.ndarray:
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1:
        raise SFTError(f"{name} must be a flat list with one value an item, got shape {column.shape}")
    bad = np.flatnonzero(~np.isfinite(column))
    if bad.size:
        raise SFTError(f"{name}[{bad[0]}] is {column[bad[0]]}: leave that item out of both sides")
    return column


def _check(columns: list[np.ndarray], resamples: int, confidence: float) -> None:
    lengths = [len(column) for column in columns]
    if len(set(lengths)) > 1:
        raise SFTError(f"paired items need equal lengths of a, b and their weights, got {lengths}")
    if lengths[0] < 2:
        raise SFTError(f"an interval needs at least 2 paired items, got {lengths[0]}")
    if min(columns[2].min(), columns[3].min()) <= 0:
        raise SFTError("weights must be positive: leave items without tokens out of both sides")
    if resamples < 1 or not 0 < confidence < 1:
        raise SFTError(f"resamples must be 1 or more and confidence between 0 and 1, got {resamples} and {confidence}")
