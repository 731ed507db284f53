"""Tables of a comparison: width, lines per metric, intervals."""

from dataclasses import replace

import pytest
from rich.console import Console

from sft_pipeline.evaluation import tables
from sft_pipeline.evaluation.bootstrap import PairedDifference, compute_paired_difference
from sft_pipeline.evaluation.comparison import compare_models
from sft_pipeline.evaluation.metrics.registry import METRICS, TOOL_CALLS_MATCHED


def printed(content, width: int = 80) -> list[str]:
    console = Console(record=True, width=width, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        tables.print_table(content, console)
    return console.export_text().splitlines()


@pytest.mark.parametrize(
    "make", [tables.format_details, lambda result: tables.format_overview(result, ["12.3 min, 6.4 GiB"] * 4)]
)
def test_tables_fit_80_columns_uncut(make, comparison):
    lines = printed(make(comparison))
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)


def test_the_overview_with_tool_calls_fits(comparison):
    extreme = PairedDifference(0, 1, 1, -1, 1, 0.95, 9)
    entries = [
        replace(
            entry,
            metrics=entry.metrics | {TOOL_CALLS_MATCHED: 1.0},
            differences=dict.fromkeys(tables.OVERVIEW_METRICS, extreme),
        )
        for entry in comparison.entries
    ]
    lines = printed(tables.format_overview(replace(comparison, entries=entries), ["12.3 min, 6.4 GiB"] * 4))
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    text = "\n".join(lines)
    assert "calls" in text and "followed" in text and "loop" not in text


def test_every_metric_has_a_line(comparison):
    text = "\n".join(printed(tables.format_details(comparison)))
    assert "second against first" in text and "first, 2 examples against first" in text
    names = set(comparison.entries[0].metrics) - {name for name in comparison.entries[0].metrics if "rate_" in name}
    assert names == set(METRICS) - {TOOL_CALLS_MATCHED}
    markdown = tables.format_markdown(comparison)
    for name in names:
        metric = METRICS[name]
        assert text.count(metric.heading) == 3
        assert f"| {metric.heading} | {metric.format_number(comparison.entries[0].metrics[name])} |" in markdown


def test_intervals_are_spelled():
    metric = METRICS["stop_rate"]
    assert tables._format_interval(metric, None) == ""
    assert tables._format_interval(metric, compute_paired_difference([0, 0], [1, 1])) == "[+100.0, +100.0]"


def test_one_model_alone(evaluated):
    questions, records = evaluated
    text = "\n".join(printed(tables.format_details(compare_models(records[:1], questions))))
    assert text.split()[:3] == ["first", "metric", "value"] and "95% interval" not in text and "stop rate, %" in text
