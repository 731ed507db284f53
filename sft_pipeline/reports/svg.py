"""Draw charts as inline SVG with the CSS variables of the page as colors, so that they follow light and dark mode.

matplotlib is an optional dependency and imported only when a chart is drawn. No text of the data enters a drawing.
"""

from __future__ import annotations

import importlib.util
import io
import re
from typing import TYPE_CHECKING

from markupsafe import Markup

from sft_pipeline.reports.charts import Chart, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NO_CHARTS = (
    "No charts: they need matplotlib; install it with `pip install 'sft_pipeline[plot]'` and call `report` again."
)
NUM_COLORS = 6  # the page's variables --series-0 to --series-5
# matplotlib has no CSS variables: it draws in these colors, which are replaced in the SVG text.
TEXT_COLOR, GRID_COLOR = "#010000", "#020000"
SERIES_COLORS = [f"#0300{i:02x}" for i in range(NUM_COLORS)]
CSS_VARIABLES = {TEXT_COLOR: "var(--muted)", GRID_COLOR: "var(--line)"} | {
    color: f"var(--series-{i})" for i, color in enumerate(SERIES_COLORS)
}
# Inches of 72 units. On a phone a unit is about a pixel, so text is about 10 pixels high there and more elsewhere.
SIZE, FONT_SIZE = (4.9, 2.5), 10


def can_draw() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def render_svg(chart: Chart) -> Markup:
    """Render the chart as an <svg> element as wide as its container."""
    from matplotlib import rc_context

    stream = io.StringIO()
    # Text stays text. The salt makes ids differ between charts and stay the same at every call.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.title, "font.size": FONT_SIZE}):
        draw_figure(chart).savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return Markup(_convert_to_inline(stream.getvalue()))


def draw_figure(chart: Chart) -> Figure:
    """Draw the chart with matplotlib, without title and legend, which are HTML."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    figure = Figure(figsize=SIZE)
    figure.patch.set_visible(False)
    axes = figure.add_axes((0.115, 0.175, 0.865, 0.79))
    for series in chart.series:
        _draw_series(axes, series)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if chart.floor is not None:
        axes.set_ylim(0, max(chart.floor, 1.06 * max(y for series in chart.series for _, y in series.points)))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    # As few digits as distinguish the ticks: 2.5 and 3, 47.5% and 50%, 1,000 and 2,000.
    axes.yaxis.set_major_formatter((lambda y, _: f"{100 * y:.5g}%") if chart.percent else "{x:,.5g}")
    _apply_style(axes, chart.x_label)
    return figure


def _draw_series(axes: Axes, series: Series) -> None:
    color, (x, y) = SERIES_COLORS[series.color % NUM_COLORS], zip(*series.points)
    if series.kind == "bars":
        axes.stairs(y[:-1], x, fill=True, color=color)
    elif series.kind == "dots":
        axes.plot(x, y, "o--", color=color, markersize=4, linewidth=1.2, clip_on=False, zorder=3)
    else:
        axes.plot(x, y, color=color, linewidth=1.4, marker="o" if len(x) == 1 else "", markersize=4)


def _apply_style(axes: Axes, x_label: str) -> None:
    axes.patch.set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=GRID_COLOR, linewidth=0.8)
    axes.tick_params(colors=TEXT_COLOR, length=0, pad=5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID_COLOR)
    # At the right, below the tick labels, so that they do not overlap.
    axes.set_xlabel(x_label, color=TEXT_COLOR, loc="right", labelpad=1)


def _convert_to_inline(text: str) -> str:
    """Return matplotlib's SVG file as an element of a page: without its style, which would apply to the whole page, and
    without ids of groups, which are the same in every drawing."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    opening_tag, body = text.split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', opening_tag)
    assert view_box is not None
    for color, variable in CSS_VARIABLES.items():
        body = body.replace(color, variable)
    return f'<svg {view_box[0]} aria-hidden="true">{body}'
