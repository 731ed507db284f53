"""A comparison as a picture: each figure's value a model, with the interval of its difference from the first.

matplotlib is an extra and imported where it is used.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from sft_pipeline.evaluation.comparison import INSTRUCTIONS, ComparedModel, Comparison
from sft_pipeline.evaluation.tables import FIGURES
from sft_pipeline.utils.errors import SFTError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DRAWN = (
    "nll_nats_per_token", "stop_rate", "loop_rate", INSTRUCTIONS, "rouge_l_f1", "word_f1",
    "answer_length_ratio", "prompt_echo_share", "token_accuracy",
)  # fmt: skip
COLUMNS = 3
LONGEST_NAME = 28  # characters; of a longer one the end is shown, which tells two runs apart


def draw_comparison(comparison: Comparison, file: Path) -> None:
    """Write the picture. Raises SFTError where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SFTError("no picture: it needs matplotlib; install it with `pip install 'sft_pipeline[plot]'`")
    from matplotlib.figure import Figure

    names = [name for name in DRAWN if name in comparison.entries[0].metrics]
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    height = 0.75 + 0.3 * len(comparison.entries)
    figure = Figure(figsize=(2 + 2.6 * columns, 0.3 + rows * height), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for axes, name in zip(panels, names):
        _panel(axes, comparison.entries, name)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    figure.supxlabel("bars: 95% interval of the difference from the first model (dashed)", fontsize=8, color="0.4")
    figure.savefig(file, dpi=150)


def _panel(axes: Axes, entries: list[ComparedModel], name: str) -> None:
    """Models from top to bottom; the dashed line is the first one's value."""
    shown, first = FIGURES[name], entries[0].metrics[name]
    scale = 100 if shown.percent else 1
    for at, entry in enumerate(entries):
        one = entry.differences.get(name)
        if one:
            axes.plot([scale * (first + one.low), scale * (first + one.high)], [at, at], color="C0", linewidth=2)
        axes.plot(scale * entry.metrics[name], at, "o", color="C0" if at else "0.4", markersize=5)
    axes.axvline(scale * first, color="0.6", linestyle="--", linewidth=0.8)
    # Chinese has no glyphs in matplotlib's own font.
    axes.set_title(shown.title.replace(" (复读机)", ""), fontsize=9)
    axes.set_yticks(range(len(entries)), [_short(entry.name) for entry in entries], fontsize=8)
    axes.set_ylim(len(entries) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else "…" + name[1 - LONGEST_NAME :]
