"""What the charts of a report show, as numbers; svg.py draws them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sft_pipeline.reports.run_results import RunResults

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """points: (x, y), none infinite or NaN; of bars, y is the height from x to the next x. colour: its number."""

    label: str
    points: Points
    colour: int
    kind: Literal["line", "dots", "bars"] = "line"


@dataclass(frozen=True)
class Chart:
    """floor: the least top of an axis that begins at 0; without it the axis takes what the points need. key: whether
    the series need names beside the title."""

    title: str
    x_label: str
    series: list[Series]
    note: str = ""
    percent: bool = False
    floor: float | None = None
    key: bool = True


# Figures of the evaluations, as they are called there.
ANSWERS = {
    "stop_rate": "answers that end by themselves",
    "loop_rate": "answers in a loop",
    "instructions_followed_rate": "instructions followed",
}
ASKED_FEWER = "evaluations on the way ask fewer questions"
SO_FAR = "mean since the start, evaluations not counted"


def build_run_charts(run: RunResults) -> list[Chart]:
    """All charts over the steps of one run; what has no points is left out."""
    answers = [Series(title, _evaluated(run, name), at, "dots") for at, (name, title) in enumerate(ANSWERS.items())]
    charts = [
        Chart("Loss, nats a token", "step", _losses(run, "", 0, 1)),
        _accuracy([Series("held out", _logged(run, "eval_token_accuracy"), 1, "dots")], key=False),
        Chart("Answers", "step", answers, ASKED_FEWER, percent=True, floor=1),
        _speed([Series("", _logged(run, "tokens_per_second"), 0)], key=False),
        _memory([Series("", _logged(run, "peak_memory_gib"), 2)], key=False),
    ]
    return list(_with_points(charts))


def build_comparison_charts(runs: Sequence[RunResults], names: Sequence[str]) -> list[Chart]:
    """The same charts with every run in a colour of its own."""
    named = list(enumerate(zip(runs, names)))
    losses = [series for at, (run, name) in named for series in _losses(run, f"{name}: ", at, at)]

    def over(points: Callable[[RunResults, str], Points], key: str, kind: Literal["line", "dots"]) -> list[Series]:
        return [Series(name, points(run, key), at, kind) for at, (run, name) in named]

    charts = [
        Chart("Loss, nats a token", "step", losses),
        _accuracy(over(_logged, "eval_token_accuracy", "dots")),
        *(
            Chart(title.capitalize(), "step", over(_evaluated, key, "dots"), ASKED_FEWER, percent=True, floor=1)
            for key, title in ANSWERS.items()
        ),
        _speed(over(_logged, "tokens_per_second", "line")),
        _memory(over(_logged, "peak_memory_gib", "line")),
    ]
    return list(_with_points(charts))


def build_length_charts(run: RunResults) -> list[Chart]:
    """The histogram of tokens a row, where the run left one."""
    if run.preview is None:
        return []
    lengths = run.preview["lengths"]
    points = list(zip(lengths["edges"], [*lengths["rows"], 0]))
    return [Chart("Training rows by length", "tokens", [Series("", points, 0, "bars")], floor=1, key=False)]


def _losses(run: RunResults, prefix: str, training: int, held_out: int) -> list[Series]:
    return [
        Series(f"{prefix}training", _logged(run, "loss"), training),
        Series(f"{prefix}held out", _logged(run, "eval_loss"), held_out, "dots"),
    ]


def _accuracy(series: list[Series], key: bool = True) -> Chart:
    return Chart("Held-out tokens that were the likeliest", "step", series, percent=True, key=key)


def _speed(series: list[Series], key: bool = True) -> Chart:
    return Chart("Tokens a second", "step", series, SO_FAR, floor=1, key=key)


def _memory(series: list[Series], key: bool = True) -> Chart:
    return Chart("Memory, GiB", "step", series, "the most so far", floor=1, key=key)


def _logged(run: RunResults, key: str) -> Points:
    """(step, value) of the log entries that have it."""
    return _finite([(entry["step"], entry[key]) for entry in run.results["loss_curve"] if key in entry])


def _evaluated(run: RunResults, key: str) -> Points:
    """(step, value) of the evaluations; one of the best model stands for that of its step."""
    found = {one.step: one.metrics[key] for one in run.evaluations if key in one.metrics}
    return _finite(sorted(found.items()))


def _finite(points: Points) -> Points:
    return [point for point in points if math.isfinite(point[1])]


def _with_points(charts: list[Chart]) -> Iterator[Chart]:
    for chart in charts:
        series = [one for one in chart.series if one.points]
        if series:
            yield replace(chart, series=series)
