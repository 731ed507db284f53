"""A comparison as a picture: the value of each metric per model, with the interval of its difference from the baseline.

matplotlib is an optional dependency and imported only when a picture is drawn.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from sft_pipeline.evaluation.comparison import ComparedModel, Comparison
from sft_pipeline.evaluation.metrics.registry import INSTRUCTIONS_FOLLOWED, METRICS, TOOL_CALLS_MATCHED, Metric
from sft_pipeline.utils.errors import SFTError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOTTED_METRICS = (
    "nll_nats_per_token", "stop_rate", "loop_rate", TOOL_CALLS_MATCHED, INSTRUCTIONS_FOLLOWED, "rouge_l_f1", "word_f1",
    "answer_length_ratio", "prompt_echo_share", "token_accuracy",
)  # fmt: skip
COLUMNS = 3
MAX_NAME_LENGTH = 28  # characters; a longer name keeps its end, which distinguishes two runs


def draw_comparison(comparison: Comparison, file: Path) -> None:
    """Write the picture to `file`. Raises SFTError if matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SFTError("no picture: it needs matplotlib; install it with `pip install 'sft_pipeline[plot]'`")
    from matplotlib.figure import Figure

    metrics = [METRICS[name] for name in PLOTTED_METRICS if name in comparison.entries[0].metrics]
    metrics += [score.as_metric() for score in comparison.entries[0].tasks.values()]
    columns = min(COLUMNS, len(metrics))
    rows = -(-len(metrics) // columns)
    row_height = 0.75 + 0.3 * len(comparison.entries)
    figure = Figure(figsize=(2 + 2.6 * columns, 0.3 + rows * row_height), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for axes, metric in zip(panels, metrics):
        _draw_panel(axes, comparison.entries, metric)
    for axes in panels[len(metrics) :]:
        axes.set_visible(False)
    figure.supxlabel("bars: 95% interval of the difference from the first model (dashed)", fontsize=8, color="0.4")
    figure.savefig(file, dpi=150)


def _draw_panel(axes: Axes, entries: list[ComparedModel], metric: Metric) -> None:
    """Draw the models from top to bottom; the dashed line is the baseline's value."""
    baseline, scale = entries[0].metrics[metric.name], metric.scale
    for y, model in enumerate(entries):
        difference = model.differences.get(metric.name)
        if difference:
            interval = [scale * (baseline + difference.low), scale * (baseline + difference.high)]
            axes.plot(interval, [y, y], color="C0", linewidth=2)
        axes.plot(scale * model.metrics[metric.name], y, "o", color="C0" if y else "0.4", markersize=5)
    axes.axvline(scale * baseline, color="0.6", linestyle="--", linewidth=0.8)
    axes.set_title(f"{metric.title}, {metric.unit}" if metric.unit else metric.title, fontsize=9)
    axes.set_yticks(range(len(entries)), [_shorten_name(model.name) for model in entries], fontsize=8)
    axes.set_ylim(len(entries) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)


def _shorten_name(name: str) -> str:
    return name if len(name) <= MAX_NAME_LENGTH else "…" + name[1 - MAX_NAME_LENGTH :]
