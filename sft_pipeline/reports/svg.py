"""Charts as SVG that is part of the page: its colours are the page's variables, so it follows light and dark.

matplotlib is an extra and imported where it is used. No text of the data goes into a drawing.
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
COLOURS = 6  # the page's variables --series-0 to --series-5
# matplotlib knows no variables: these stand for them until the drawing is text.
INK, LINE = "#010000", "#020000"
SERIES = [f"#0300{at:02x}" for at in range(COLOURS)]
VARIABLES = {INK: "var(--muted)", LINE: "var(--line)"} | {
    colour: f"var(--series-{at})" for at, colour in enumerate(SERIES)
}
# Inches of 72 units; a phone shows a unit as about a pixel, so the letters are 10 of them there and more elsewhere.
SIZE, FONT = (4.9, 2.5), 10


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def render_svg(chart: Chart) -> Markup:
    """The drawing as an <svg> element that is as wide as its place."""
    from matplotlib import rc_context

    drawn = io.StringIO()
    # Letters stay letters; ids differ from chart to chart and are the same at every call.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.title, "font.size": FONT}):
        draw_figure(chart).savefig(drawn, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return Markup(_as_part_of_a_page(drawn.getvalue()))


def draw_figure(chart: Chart) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    whole = Figure(figsize=SIZE)
    whole.patch.set_visible(False)
    axes = whole.add_axes((0.115, 0.175, 0.865, 0.79))
    for series in chart.series:
        _add(axes, series)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if chart.floor is not None:
        axes.set_ylim(0, max(chart.floor, 1.06 * max(y for one in chart.series for _, y in one.points)))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    # The least that tells the ticks apart: 2.5 and 3, 47.5% and 50%, 1,000 and 2,000.
    axes.yaxis.set_major_formatter((lambda x, _: f"{100 * x:.5g}%") if chart.percent else "{x:,.5g}")
    _style(axes, chart.x_label)
    return whole


def _add(axes: Axes, series: Series) -> None:
    colour, (x, y) = SERIES[series.colour % COLOURS], zip(*series.points)
    if series.kind == "bars":
        axes.stairs(y[:-1], x, fill=True, color=colour)
    elif series.kind == "dots":
        axes.plot(x, y, "o--", color=colour, markersize=4, linewidth=1.2, clip_on=False, zorder=3)
    else:
        axes.plot(x, y, color=colour, linewidth=1.4, marker="o" if len(x) == 1 else "", markersize=4)


def _style(axes: Axes, x_label: str) -> None:
    axes.patch.set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.tick_params(colors=INK, length=0, pad=5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    # At the right below the ticks, where it never meets them.
    axes.set_xlabel(x_label, color=INK, loc="right", labelpad=1)


def _as_part_of_a_page(text: str) -> str:
    text = text[text.index("<svg") :]
    # Its own style would hold for the whole page, and its names of groups are alike in every drawing.
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    opening, rest = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', opening)
    assert box is not None
    for colour, variable in VARIABLES.items():
        rest = rest.replace(colour, variable)
    return f'<svg {box[0]} aria-hidden="true">{rest}'
