"""SVG drawings: points, tick labels, colours and ids."""

import re

import pytest

from sft_pipeline.reports import charts, svg
from sft_pipeline.reports.run_results import read_run


def test_the_drawings_have_the_points_of_the_charts(trained):
    run = read_run(trained[0])
    for one in charts.build_run_charts(run):
        lines = svg.draw_figure(one).axes[0].lines
        assert [[tuple(point) for point in line.get_xydata()] for line in lines] == [s.points for s in one.series]
    [lengths] = charts.build_length_charts(run)
    [bars] = svg.draw_figure(lengths).axes[0].patches
    assert list(bars.get_data().values) == run.preview["lengths"]["rows"]
    assert list(bars.get_data().edges) == run.preview["lengths"]["edges"]


@pytest.mark.parametrize(("low", "high"), [(0.39, 0.49), (0.0, 1.0), (0.571, 0.573)])
def test_a_share_says_at_its_axis_what_it_is(low, high):
    series = charts.Series("", [(0, low), (90, high)], 0, "dots")
    axis = svg.draw_figure(charts.Chart("Share", "step", [series], percent=True)).axes[0].yaxis
    ticks = axis.get_majorticklocs()
    labels = [label.replace("\N{MINUS SIGN}", "-") for label in axis.get_major_formatter().format_ticks(ticks)]
    assert [float(label.removesuffix("%")) / 100 for label in labels] == pytest.approx(list(ticks), abs=1e-9)


def test_drawings_have_the_colours_of_the_page_and_names_of_their_own(trained):
    page = trained[0].joinpath("report.html").read_text()
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 6
    for one in drawings:
        assert "var(--series-" in one and "var(--line)" in one and "var(--muted)" in one
        assert not re.search(r"#0[123]00[0-9a-f]{2}\b", one) and "<style" not in one
    names = re.findall(r'\bid="([^"]+)"', page)
    assert names and len(set(names)) == len(names)
