"""The summary that a run prints at its end: answers before and after training, and the changes of metrics."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sft_pipeline.evaluation.metrics.registry import get_metric
from sft_pipeline.utils.sanitize import replace_control_characters

MAX_ANSWERS = 5  # results.json has all answers


def print_results(results: dict[str, Any], folder: str, console: Console) -> None:
    """Print the answers before and after training, the metrics, and where the run is saved."""
    for row in results["answers"][: max(MAX_ANSWERS, len(results.get("sets", {})))]:
        table = Table(show_header=False, box=None, padding=(0, 1), expand=True)
        table.add_column(style="bold", width=9, no_wrap=True)
        table.add_column(ratio=1)  # else the first column grows beside a short answer
        if "set" in row:
            table.add_row("held out", row["set"])
        table.add_row("prompt", Text(replace_control_characters(row["prompt"])))
        if row["before"] is not None:
            table.add_row(
                "before", Text(_format_answer(row["before"], row["stopped_before"], row["error"])), style="dim"
            )
        table.add_row("after", Text(_format_answer(row["after"], row["stopped"], row["error"])), style="green")
        console.print(table)
        console.print()
    if results["before_and_after"]:
        console.print(build_metrics_table(results))
    for name, score in results["tasks"].items():
        console.print(f"task {name}: {format_score(score)}", highlight=False, markup=False)
    parts = (f"{part} {seconds:.0f} s" for part, seconds in results["seconds_by_part"].items() if seconds >= 0.5)
    console.print(f"time: {', '.join(parts)}", highlight=False)
    console.print(
        f"{results['steps']} steps in {results['seconds']:.0f} s, {results['tokens_per_second']:.0f} tokens/s, "
        f"{results['peak_memory_gib']} GiB at most\nsaved in {folder}; talk to it: ./launch.sh chat {folder}",
        highlight=False,
        markup=False,  # a folder's name may hold brackets
    )


def build_metrics_table(results: dict[str, Any]) -> Table:
    """Build a table of the changes of the metrics: a row per metric, and per held-out set."""
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("")
    for name in ("before", "after", "change", "95% interval", "of"):
        table.add_column(name, justify="right", no_wrap=True)
    for cells in format_changes(results):
        table.add_row(*cells, style=None if any(cells[1:]) else "bold")
    return table


def format_changes(results: dict[str, Any]) -> list[list[str]]:
    """Return the cells of each change: of all held-out rows together, then of each held-out set below its name."""
    lines = [format_change(metric, change) for metric, change in results["before_and_after"].items()]
    for name, part in results.get("sets", {}).items():
        lines += [[name, *[""] * 5]] if part["before_and_after"] else []
        lines += [format_change(metric, change) for metric, change in part["before_and_after"].items()]
    return lines


def format_change(name: str, change: dict[str, Any]) -> list[str]:
    """Return the cells of a metric's change: label, before, after, difference, interval, items; percentages rounded."""
    metric = get_metric(name).rounded
    interval = ""
    if change["low"] is not None:
        interval = f"{metric.format_change(change['low'])} to {metric.format_change(change['high'])}"
    return [
        metric.label,
        metric.format(change["before"]),
        metric.format(change["after"]),
        metric.format_change(change["difference"]),
        interval,
        str(change["items"]),
    ]


def format_score(score: dict[str, Any]) -> str:
    """Return the value of a task's score, ± its standard error, and the number of questions."""
    error = "" if score["standard_error"] is None else f" ± {score['standard_error']:.3f}"
    return f"{score['value']:.3f}{error} of {score['questions']:,} questions"


def _format_answer(answer: str, stopped: bool, error: str | None) -> str:
    text = replace_control_characters(f"no answer: {error}" if error else answer)
    return text if error or stopped else f"{text} … (cut off)"
