"""Compute metrics of the registry with Hugging Face's `evaluate`.

    compute_metrics({"predictions": answers, "references": references})
    evaluate.combine([RegisteredMetric("stop_rate"), RegisteredMetric("word_f1")]).compute(...)

Nothing is loaded from the Hub, and the rows stay in memory.
"""

from itertools import groupby
from typing import Any

import evaluate
from datasets import Features, Value

from sft_pipeline.evaluation.metrics.registry import METRICS, TEXT_COLUMNS, Columns, select_metrics
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.files import get_cache_dir


class RegisteredMetric(evaluate.Metric):
    """An `evaluate.Metric` of one metric of the registry, or of several with the same columns, which are its features.

    Each evaluate.Metric costs about 4 ms, most of it for the fingerprint that `datasets` computes of the rows, so
    `compute_metrics` uses one for all metrics with the same columns. It creates a folder in the cache and no file.
    """

    def __init__(self, *names: str) -> None:
        self.metrics = [METRICS[name] for name in names]
        # No metric draws random numbers; without a seed `evaluate` takes one from numpy's random state.
        super().__init__(keep_in_memory=True, cache_dir=str(get_cache_dir() / "metrics"), seed=0)

    @property
    def name(self) -> str:
        return self.metrics[0].name

    def _info(self) -> evaluate.MetricInfo:
        columns = self.metrics[0].columns
        return evaluate.MetricInfo(
            description="\n".join(f"{metric.name}: {metric.description}" for metric in self.metrics),
            citation="",
            inputs_description=f"One value per row for each of: {', '.join(columns)}. Returns a dictionary of floats.",
            features=Features({name: Value("string" if name in TEXT_COLUMNS else "float64") for name in columns}),
        )

    def _compute(self, **columns: Any) -> dict[str, float]:
        values: dict[str, float] = {}
        for metric in self.metrics:
            values |= metric.compute_with_groups(columns)
        return values


def compute_metrics(columns: Columns) -> dict[str, float]:
    """Compute every metric that the columns suffice for (`select_metrics`), over the rows without None in them.

    Raises SFTError without rows, for columns of different lengths, and for an unknown instruction id.
    """
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise SFTError(f"columns of different lengths: {lengths}; give every column one value per row")
    if not any(lengths.values()):
        raise SFTError("no answers to score; give at least one")
    values: dict[str, float] = {}
    for names, metrics in groupby(select_metrics(columns), key=lambda metric: metric.columns):
        rows = [row for row in zip(*(columns[name] for name in names)) if None not in row]
        if rows:
            values |= RegisteredMetric(*(metric.name for metric in metrics)).compute(**dict(zip(names, zip(*rows))))
    return values
