"""Picture of a comparison: panels, bars and names."""

import pytest

from sft_pipeline.evaluation import plots
from sft_pipeline.evaluation.metrics.registry import METRICS, TOOL_CALLS_MATCHED


@pytest.mark.filterwarnings("error")
def test_the_picture_has_a_panel_for_each_metric_and_a_bar_for_each_model(comparison, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
    plots.draw_comparison(comparison, tmp_path / "x.png")
    panels = figures[0].axes
    assert [panel.get_title() for panel in panels][:3] == [
        "held-out loss, nats/token",
        "answers that end on their own, %",
        "answers in a loop, %",
    ]
    names = [name for name in plots.PLOTTED_METRICS if name in comparison.entries[0].metrics]
    assert names == [name for name in plots.PLOTTED_METRICS if name != TOOL_CALLS_MATCHED]  # no reference calls a tool
    for axes, name in zip(panels, names):
        scale = 100 if METRICS[name].unit == "%" else 1
        dots = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
        assert dots == [scale * entry.metrics[name] for entry in comparison.entries]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == [entry.name for entry in comparison.entries]


def test_a_long_name_keeps_its_end():
    assert plots._shorten_name("outputs/" + "x" * 40 + "/run7").endswith("/run7")
    assert len(plots._shorten_name("y" * 99)) == plots.MAX_NAME_LENGTH
