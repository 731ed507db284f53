"""The charts of a report as series of points; svg.py draws them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sft_pipeline.evaluation.metrics.registry import INSTRUCTIONS_FOLLOWED, METRICS, TOOL_CALLS_MATCHED
from sft_pipeline.evaluation.step_results import StepResults
from sft_pipeline.reports.run_results import RunResults

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """points: (x, y), all finite; of bars, y is the height from x to the next x. color: its index in the page's
    palette."""

    label: str
    points: Points
    color: int
    kind: Literal["line", "dots", "bars"] = "line"


@dataclass(frozen=True)
class Chart:
    """floor: the smallest upper limit of a y axis that starts at 0; None fits the axis to the points. key: whether the
    chart has a legend."""

    title: str
    x_label: str
    series: list[Series]
    note: str = ""
    percent: bool = False
    floor: float | None = None
    key: bool = True


# The metrics of the answers that are drawn over the steps.
ANSWER_METRICS = ("stop_rate", "loop_rate", INSTRUCTIONS_FOLLOWED, TOOL_CALLS_MATCHED)
PARTIAL_NOTE = "evaluations during training use fewer prompts"


def build_run_charts(run: RunResults) -> list[Chart]:
    """Build the charts over the steps of one run; a chart without points is left out.

    With several held-out sets, loss and accuracy have a series for each, and each metric of answers has a chart.
    """
    sets = list(enumerate(run.set_names, start=2))
    answers = [
        Series(METRICS[name].title, _get_metric_points(run, name), color, "dots")
        for color, name in enumerate(ANSWER_METRICS)
    ]
    charts = [
        _build_loss_chart(
            [
                *_build_loss_series(run, "", 0, 1),
                *(Series(name, _get_log_points(run, f"eval_{name}_loss"), color, "dots") for color, name in sets),
            ]
        ),
        _build_accuracy_chart(
            [
                Series("held out", _get_log_points(run, "eval_token_accuracy"), 1, "dots"),
                *(
                    Series(name, _get_log_points(run, f"eval_{name}_token_accuracy"), color, "dots")
                    for color, name in sets
                ),
            ],
            key=bool(sets),
        ),
        Chart("Answers", "step", answers, PARTIAL_NOTE, percent=True, floor=1),
        *(
            _build_answer_chart(
                metric, [Series(name, _get_set_points(run, name, metric), color, "dots") for color, name in sets]
            )
            for metric in ANSWER_METRICS
        ),
        _build_speed_chart([Series("", _get_log_points(run, "tokens_per_second"), 0)], key=False),
        _build_memory_chart([Series("", _get_log_points(run, "peak_memory_gib"), 2)], key=False),
    ]
    return list(_drop_empty(charts))


def build_comparison_charts(runs: Sequence[RunResults], names: Sequence[str]) -> list[Chart]:
    """Build the same charts over several runs, each in its own color."""
    named_runs = list(enumerate(zip(runs, names)))
    losses = [series for i, (run, name) in named_runs for series in _build_loss_series(run, f"{name}: ", i, i)]

    def build_series(
        get_points: Callable[[RunResults, str], Points], key: str, kind: Literal["line", "dots"]
    ) -> list[Series]:
        return [Series(name, get_points(run, key), i, kind) for i, (run, name) in named_runs]

    answers = [_build_answer_chart(name, build_series(_get_metric_points, name, "dots")) for name in ANSWER_METRICS]
    charts = [
        _build_loss_chart(losses),
        _build_accuracy_chart(build_series(_get_log_points, "eval_token_accuracy", "dots")),
        *answers,
        _build_speed_chart(build_series(_get_log_points, "tokens_per_second", "line")),
        _build_memory_chart(build_series(_get_log_points, "peak_memory_gib", "line")),
    ]
    return list(_drop_empty(charts))


def build_length_charts(run: RunResults) -> list[Chart]:
    """Build the histogram of tokens per sequence, if the run has a preview."""
    if run.preview is None:
        return []
    lengths = run.preview["lengths"]
    points = list(zip(lengths["edges"], [*lengths["rows"], 0]))
    return [Chart("Training sequences by length", "tokens", [Series("", points, 0, "bars")], floor=1, key=False)]


def _build_loss_series(run: RunResults, prefix: str, training_color: int, held_out_color: int) -> list[Series]:
    return [
        Series(f"{prefix}training", _get_log_points(run, "loss"), training_color),
        Series(f"{prefix}held out", _get_log_points(run, "eval_loss"), held_out_color, "dots"),
    ]


def _build_loss_chart(series: list[Series]) -> Chart:
    return Chart(f"Loss, {METRICS['nll_nats_per_token'].unit}", "step", series)


def _build_accuracy_chart(series: list[Series], key: bool = True) -> Chart:
    return Chart(METRICS["token_accuracy"].title.capitalize(), "step", series, percent=True, key=key)


def _build_answer_chart(name: str, series: list[Series]) -> Chart:
    return Chart(METRICS[name].title.capitalize(), "step", series, PARTIAL_NOTE, percent=True, floor=1)


def _build_speed_chart(series: list[Series], key: bool = True) -> Chart:
    return Chart("Tokens per second", "step", series, "mean since the start, without evaluations", floor=1, key=key)


def _build_memory_chart(series: list[Series], key: bool = True) -> Chart:
    return Chart("Memory, GiB", "step", series, "peak since the start", floor=1, key=key)


def _get_log_points(run: RunResults, key: str) -> Points:
    """Return (step, value) of the log entries with this key."""
    return _select_finite([(entry["step"], entry[key]) for entry in run.results["loss_curve"] if key in entry])


def _get_metric_points(run: RunResults, name: str) -> Points:
    """Return (step, value) of the evaluations with this metric; that of the best model replaces the one of its step."""
    return _select_metric_points(run.evaluations, name)


def _get_set_points(run: RunResults, set_name: str, name: str) -> Points:
    """Return the same for the answers to one of the held-out sets."""
    evaluations = [evaluation for evaluation in run.evaluations if set_name in evaluation.sets]
    return _select_metric_points([evaluation.select_set(set_name) for evaluation in evaluations], name)


def _select_metric_points(evaluations: Sequence[StepResults], name: str) -> Points:
    points = {evaluation.step: evaluation.metrics[name] for evaluation in evaluations if name in evaluation.metrics}
    return _select_finite(sorted(points.items()))


def _select_finite(points: Points) -> Points:
    return [point for point in points if math.isfinite(point[1])]


def _drop_empty(charts: list[Chart]) -> Iterator[Chart]:
    """Yield the charts without their empty series, and only those with points."""
    for chart in charts:
        series = [series for series in chart.series if series.points]
        if series:
            yield replace(chart, series=series)
