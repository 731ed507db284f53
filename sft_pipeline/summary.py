"""What a run prints at its end: answers before and after, and what changed in figures."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

SHOWN = 5  # answers printed; results.json has them all


def print_results(results: dict[str, Any], folder: str, console: Console) -> None:
    """Answers before and after, and the figures."""
    for one in results["answers"][:SHOWN]:
        table = Table(show_header=False, box=None, padding=(0, 1), expand=True)
        table.add_column(style="bold", width=9, no_wrap=True)
        table.add_column()
        table.add_row("prompt", Text(one["prompt"]))
        table.add_row("before", Text(one["before"] + ("" if one["stopped_before"] else " … (cut off)")), style="dim")
        table.add_row("after", Text(one["after"] + ("" if one["stopped"] else " … (cut off)")), style="green")
        console.print(table)
        console.print()
    loss, stopped = results["eval_loss"], results["stopped_share"]
    if loss["before"] is not None and loss["after"] is not None:
        change = loss["after"] / loss["before"] - 1
        console.print(f"held-out loss {loss['before']:.3f} -> {loss['after']:.3f} ({change:+.0%})", highlight=False)
    if stopped:
        count = len(results["answers"])
        line = f"answers that end by themselves {stopped['before']:.0%} -> {stopped['after']:.0%} (of {count})"
        console.print(line, highlight=False)
    console.print(
        f"{results['steps']} steps in {results['seconds']:.0f} s, {results['tokens_per_second']:.0f} tokens/s, "
        f"{results['peak_memory_gib']} GiB at most\nsaved in {folder}; talk to it: ./launch.sh chat {folder}",
        highlight=False,
    )
