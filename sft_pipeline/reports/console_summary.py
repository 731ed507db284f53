"""What a run prints at its end: answers before and after, and what changed in metrics."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sft_pipeline.utils.sanitize import replace_control_characters

SHOWN = 5  # answers printed; results.json has them all
# Figures of the table, as they are called there, and how a value and a difference are written.
FIGURES = {
    "nll_nats_per_token": ("held-out loss, nats a token", "{:.3f}", "{:+.3f}"),
    "stop_rate": ("answers that end", "{:.0%}", "{:+.0%}"),
    "loop_rate": ("answers in a loop (复读机)", "{:.0%}", "{:+.0%}"),
    "instructions_followed_rate": ("instructions followed", "{:.0%}", "{:+.0%}"),
}


def print_results(results: dict[str, Any], folder: str, console: Console) -> None:
    """Answers before and after, and the metrics."""
    for one in results["answers"][:SHOWN]:
        table = Table(show_header=False, box=None, padding=(0, 1), expand=True)
        table.add_column(style="bold", width=9, no_wrap=True)
        table.add_column()
        table.add_row("prompt", Text(replace_control_characters(one["prompt"])))
        if one["before"] is not None:
            table.add_row("before", Text(_shown(one["before"], one["stopped_before"], one["error"])), style="dim")
        table.add_row("after", Text(_shown(one["after"], one["stopped"], one["error"])), style="green")
        console.print(table)
        console.print()
    if results["before_and_after"]:
        console.print(build_metrics_table(results["before_and_after"]))
    console.print(
        f"{results['steps']} steps in {results['seconds']:.0f} s, {results['tokens_per_second']:.0f} tokens/s, "
        f"{results['peak_memory_gib']} GiB at most\nsaved in {folder}; talk to it: ./launch.sh chat {folder}",
        highlight=False,
        markup=False,  # a folder's name may hold brackets
    )


def build_metrics_table(changes: dict[str, dict[str, float | None]]) -> Table:
    """A row a figure: before, after, the difference with its 95% interval, and the items it is over."""
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("")
    for name in ("before", "after", "change", "95% interval", "of"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, (title, value, difference) in FIGURES.items():
        if name not in changes:
            continue
        one = changes[name]
        interval = "" if one["low"] is None else f"{difference.format(one['low'])} to {difference.format(one['high'])}"
        written = value.format(one["before"]), value.format(one["after"]), difference.format(one["difference"])
        table.add_row(title, *written, interval, str(one["items"]))
    return table


def _shown(answer: str, stopped: bool, error: str | None) -> str:
    answer = replace_control_characters(f"no answer: {error}" if error else answer)
    return answer if error or stopped else f"{answer} … (cut off)"
