"""Tables of a comparison: for the terminal, at most 80 columns wide, and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from sft_pipeline.evaluation.bootstrap import PairedDifference
from sft_pipeline.evaluation.comparison import ComparedModel, Comparison
from sft_pipeline.evaluation.metrics.registry import INSTRUCTIONS_FOLLOWED, METRICS, TOOL_CALLS_MATCHED, Metric

# The metrics of the overview; it has room for the first OVERVIEW_COLUMNS of those that there are.
OVERVIEW_METRICS = ("nll_nats_per_token", "stop_rate", TOOL_CALLS_MATCHED, INSTRUCTIONS_FOLLOWED, "loop_rate")
OVERVIEW_COLUMNS = 4


def format_details(comparison: Comparison) -> RenderableType:
    """Build tables of all metrics: one of a single model, or one for each model against the baseline."""
    baseline, *models = comparison.entries
    tables = [_build_difference_table(baseline, model) for model in models] or [_build_value_table(baseline)]
    return Group(*tables, Text(_describe_counts(comparison), style="dim"))


def format_overview(comparison: Comparison, notes: Sequence[str]) -> Table:
    """Build one table with a row per model: its note, the overview metrics, and the intervals of their differences from
    the baseline."""
    table = Table("", box=None, header_style="bold", padding=(0, 1, 0, 0), caption=_describe_counts(comparison))
    names = [name for name in OVERVIEW_METRICS if name in comparison.entries[0].metrics]
    metrics = [METRICS[name] for name in names[:OVERVIEW_COLUMNS]]
    for metric in metrics:
        table.add_column(metric.heading, justify="right")
    for model, note in zip(comparison.entries, notes, strict=True):
        cells = []
        for metric in metrics:
            difference = model.differences.get(metric.name)
            value = metric.format_number(model.metrics[metric.name])
            cells.append(Text(f"{value}\n{_format_interval(metric, difference)}", style=_choose_style(difference)))
        table.add_row(Text.assemble(model.name, "\n", (note, "dim")), *cells)
    return table


def format_markdown(comparison: Comparison, extra_rows: Mapping[str, Sequence[str]] | None = None) -> str:
    """Return a Markdown table with a row per metric and a column per model; in brackets the interval of the difference
    from the baseline. extra_rows: title -> a cell per model."""
    names = [model.name.replace("|", "\\|") for model in comparison.entries]
    lines = ["| | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for metric in _select_present(comparison.entries[0]):
        cells = []
        for model in comparison.entries:
            interval = _format_interval(metric, model.differences.get(metric.name))
            cells.append(f"{_format_value(metric, model)} {interval}".strip())
        lines.append(f"| {metric.heading} | " + " | ".join(cells) + " |")
    lines += [f"| {title} | " + " | ".join(cells) + " |" for title, cells in (extra_rows or {}).items()]
    return "\n".join([*lines, "", f"{_describe_counts(comparison)}, 95%.", ""])


def print_table(content: RenderableType, console: Console) -> None:
    console.print(content, highlight=False)


def _build_value_table(model: ComparedModel) -> Table:
    table = Table("metric", title=Text(model.name), title_justify="left", box=None, header_style="bold")
    table.add_column("value", justify="right")
    for metric in _select_present(model):
        table.add_row(metric.heading, _format_value(metric, model))
    return table


def _build_difference_table(baseline: ComparedModel, model: ComparedModel) -> RenderableType:
    table = Table("metric", box=None, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("first", "this", "difference", "95% interval"):
        table.add_column(title, justify="right", no_wrap=True)
    for metric in _select_present(baseline):
        first, this = baseline.metrics[metric.name], model.metrics[metric.name]
        difference = model.differences.get(metric.name)
        table.add_row(
            metric.heading,
            _format_value(metric, baseline),
            _format_value(metric, model),
            metric.format_number(this - first, "+"),
            _format_interval(metric, difference),
            style=_choose_style(difference),
        )
    return Group(Text.assemble((model.name, "bold"), " against ", (baseline.name, "bold")), table, "")


def _select_present(model: ComparedModel) -> list[Metric]:
    """Return the metrics that a model has, then the scores of its tasks, as rows of a table."""
    present = [metric for metric in METRICS.values() if metric.name in model.metrics]
    return [*present, *(score.as_metric() for score in model.tasks.values())]


def _format_value(metric: Metric, model: ComparedModel) -> str:
    """Return the model's value, with the standard error of a task's score."""
    value, score = metric.format_number(model.metrics[metric.name]), model.tasks.get(metric.name)
    error = score.standard_error if score else None
    return value if error is None else f"{value} ± {metric.format_number(error)}"


def _format_interval(metric: Metric, difference: PairedDifference | None) -> str:
    if difference is None:
        return ""
    return f"[{metric.format_number(difference.low, '+')}, {metric.format_number(difference.high, '+')}]"


def _choose_style(difference: PairedDifference | None) -> str:
    return "bold" if difference and difference.excludes_zero else ""


def _describe_counts(comparison: Comparison) -> str:
    excluded = f", {comparison.left_out} excluded that not every model could answer" if comparison.left_out else ""
    questions = {score.task: score.questions for score in comparison.entries[0].tasks.values()}
    counts = [f"{count} questions of {task}" for task, count in questions.items()]
    if comparison.rows or comparison.instructions or not questions:
        counts.insert(0, f"{comparison.rows} held-out rows, {comparison.instructions} instructions{excluded}")
    errors = "; ± is the standard error" if questions else ""
    return f"{', '.join(counts)}; intervals are of the difference, paired bootstrap{errors}"
