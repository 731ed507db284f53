"""Paired bootstrap: the difference between two models on the same items, with an interval. Pure numpy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sft_pipeline.utils.errors import SFTError

Values = Sequence[float] | np.ndarray
_CELLS_AT_A_TIME = 1 << 20  # resamples x items in memory at a time: 8 MiB per array


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
        """Whether the whole interval is on one side of zero."""
        return self.low > 0 or self.high < 0


def compute_paired_difference(
    a: Values,
    b: Values,
    *,
    a_weights: Values | None = None,
    b_weights: Values | None = None,
    resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> PairedDifference:
    """Return the difference b - a over paired items with a percentile bootstrap interval (Efron and Tibshirani 1993,
    chapter 13).

    `a[i]` and `b[i]` are the two models' values of item i. Items are drawn with replacement, both values of an item
    together. For a ratio of sums, such as nats per token, `a` and `b` are the numerators (the summed nll of each item)
    and the weights are the denominators (its tokens); the mean is then sum / sum of weights. The same `seed` gives the
    same interval for the same input.

    Raises SFTError for fewer than 2 items, unequal lengths, values that are not finite, weights that are not positive
    or given for one model only, and `resamples` or `confidence` out of range.
    """
    if (a_weights is None) != (b_weights is None):
        raise SFTError("a ratio needs a_weights and b_weights; give both or neither")
    ones = np.ones(len(a))
    columns = [
        _build_column("a", a),
        _build_column("b", b),
        _build_column("a_weights", ones if a_weights is None else a_weights),
        _build_column("b_weights", ones if b_weights is None else b_weights),
    ]
    _check_arguments(columns, resamples, confidence)
    table = np.stack(columns)
    mean_a, mean_b = _compute_means(table, np.arange(table.shape[1]))
    differences = _resample_differences(table, resamples, np.random.default_rng(seed))
    low, high = np.quantile(differences, [(1 - confidence) / 2, (1 + confidence) / 2])
    return PairedDifference(
        float(mean_a), float(mean_b), float(mean_b - mean_a), float(low), float(high), confidence, table.shape[1]
    )


def estimate_difference(a: Values, b: Values, a_weights: Values, b_weights: Values) -> PairedDifference | None:
    """Return the paired difference; None with fewer than two items or a value that is not finite (a model that
    diverged)."""
    if len(a) < 2 or not np.isfinite([*a, *b]).all():
        return None
    return compute_paired_difference(a, b, a_weights=a_weights, b_weights=b_weights)


def _resample_differences(table: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Return the differences of all resamples, shape (resamples,), computed in blocks to bound the memory."""
    items = table.shape[1]
    block = max(1, _CELLS_AT_A_TIME // items)
    differences = []
    for start in range(0, resamples, block):
        indices = generator.integers(0, items, size=(min(block, resamples - start), items))
        mean_a, mean_b = _compute_means(table, indices)
        differences.append(mean_b - mean_a)
    return np.concatenate(differences)


def _compute_means(table: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the means of a and b over the items `indices` (..., items); table: a, b, weights of a, weights of b."""
    a, b, a_weights, b_weights = (column[indices].sum(axis=-1) for column in table)
    return a / a_weights, b / b_weights


def _build_column(name: str, values: Values) -> np.ndarray:
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1:
        raise SFTError(f"{name} must be a flat list with one value per item, got shape {column.shape}")
    not_finite = np.flatnonzero(~np.isfinite(column))
    if not_finite.size:
        raise SFTError(f"{name}[{not_finite[0]}] is {column[not_finite[0]]}; remove that item on both sides")
    return column


def _check_arguments(columns: list[np.ndarray], resamples: int, confidence: float) -> None:
    lengths = [len(column) for column in columns]
    if len(set(lengths)) > 1:
        raise SFTError(f"a, b and their weights must have equal lengths, got {lengths}")
    if lengths[0] < 2:
        raise SFTError(f"an interval needs at least 2 paired items, got {lengths[0]}")
    if min(columns[2].min(), columns[3].min()) <= 0:
        raise SFTError("weights must be positive; remove items without tokens on both sides")
    if resamples < 1 or not 0 < confidence < 1:
        raise SFTError(f"resamples must be 1 or more and confidence between 0 and 1, got {resamples} and {confidence}")
