"""A comparison as tables: in the terminal, 80 columns wide, and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from sft_pipeline.evaluation.bootstrap import PairedDifference
from sft_pipeline.evaluation.comparison import INSTRUCTIONS, ComparedModel, Comparison


@dataclass(frozen=True)
class Shown:
    """How a figure is shown: its title, and a share of 1 as percent."""

    title: str
    percent: bool = False
    decimals: int = 2

    def value(self, number: float | None, sign: str = "") -> str:
        if number is None:
            return ""
        return f"{100 * number if self.percent else number:{sign}.{self.decimals}f}"

    def interval(self, one: PairedDifference | None) -> str:
        return f"[{self.value(one.low, '+')}, {self.value(one.high, '+')}]" if one else ""


FIGURES = {
    "nll_nats_per_token": Shown("held-out nll, nats/token", decimals=3),
    "perplexity": Shown("perplexity"),
    "bits_per_byte": Shown("bits/byte", decimals=3),
    "token_accuracy": Shown("token accuracy, %", True, 1),
    "stop_rate": Shown("stop rate, %", True, 1),
    "cap_rate": Shown("cap rate, %", True, 1),
    "loop_rate": Shown("loop (复读机) rate, %", True, 1),
    "rep_2_share": Shown("rep-2, %", True, 1),
    "rep_3_share": Shown("rep-3, %", True, 1),
    "rep_4_share": Shown("rep-4, %", True, 1),
    "distinct_1_share": Shown("distinct-1, %", True, 1),
    "distinct_2_share": Shown("distinct-2, %", True, 1),
    "prompt_echo_share": Shown("prompt echo, %", True, 1),
    "answer_length_ratio": Shown("length / reference's"),
    "bleu_percent": Shown("BLEU", decimals=1),
    "chrf_percent": Shown("chrF", decimals=1),
    "rouge_l_f1": Shown("ROUGE-L, %", True, 1),
    "exact_match_rate": Shown("exact match, %", True, 1),
    "word_f1": Shown("word F1, %", True, 1),
    INSTRUCTIONS: Shown("instructions followed, %", True, 1),
}
# What an overview of many models has room for.
KEY_FIGURES = ("nll_nats_per_token", "stop_rate", "loop_rate", INSTRUCTIONS)


def format_details(comparison: Comparison) -> RenderableType:
    """All metrics: of the one model, or a table for each model against the first."""
    first, *others = comparison.entries
    parts = [_one(first)] if not others else [_against(first, other) for other in others]
    return Group(*parts, Text(_counts(comparison), style="dim"))


def _one(entry: ComparedModel) -> Table:
    table = Table("figure", title=Text(entry.name), title_justify="left", box=None, header_style="bold")
    table.add_column("value", justify="right")
    for name, shown in _present(entry):
        table.add_row(shown.title, shown.value(entry.metrics[name]))
    return table


def _against(first: ComparedModel, other: ComparedModel) -> RenderableType:
    table = Table("figure", box=None, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("first", "this", "difference", "95% interval"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, shown in _present(first):
        one = other.differences.get(name)
        change = shown.value(other.metrics[name] - first.metrics[name], "+")
        cells = [
            shown.title,
            shown.value(first.metrics[name]),
            shown.value(other.metrics[name]),
            change,
            shown.interval(one),
        ]
        table.add_row(*cells, style="bold" if one and one.excludes_zero else "")
    return Group(Text.assemble((other.name, "bold"), " against ", (first.name, "bold")), table, "")


def _present(entry: ComparedModel) -> list[tuple[str, Shown]]:
    return [(name, shown) for name, shown in FIGURES.items() if name in entry.metrics]


def _counts(comparison: Comparison) -> str:
    left_out = f", {comparison.left_out} left out that not every model could be asked" if comparison.left_out else ""
    said = f"{comparison.rows} held-out rows, {comparison.instructions} instructions{left_out}"
    return f"{said}; intervals are of the difference, paired bootstrap"


def format_overview(comparison: Comparison, notes: Sequence[str]) -> Table:
    """A line for each model with the key metrics, and below it a note and the intervals of the differences from the
    first."""
    table = Table("", box=None, header_style="bold", padding=(0, 1, 0, 0), caption=_counts(comparison))
    names = [name for name in KEY_FIGURES if name in comparison.entries[0].metrics]
    for name in names:
        table.add_column(FIGURES[name].title, justify="right")
    for entry, note in zip(comparison.entries, notes, strict=True):
        cells = []
        for name in names:
            one, shown = entry.differences.get(name), FIGURES[name]
            style = "bold" if one and one.excludes_zero else ""
            cells.append(Text(f"{shown.value(entry.metrics[name])}\n{shown.interval(one)}", style=style))
        table.add_row(Text.assemble(entry.name, "\n", (note, "dim")), *cells)
    return table


def format_markdown(comparison: Comparison, more: Mapping[str, Sequence[str]] | None = None) -> str:
    """All metrics, a column for each model; in brackets the interval of the difference from the first. `more`: lines of
    other things, a cell for each model."""
    names = [entry.name.replace("|", "\\|") for entry in comparison.entries]
    lines = ["| | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for name, shown in _present(comparison.entries[0]):
        cells = [_cell(shown, entry, name) for entry in comparison.entries]
        lines.append(f"| {shown.title} | " + " | ".join(cells) + " |")
    lines += [f"| {title} | " + " | ".join(cells) + " |" for title, cells in (more or {}).items()]
    return "\n".join([*lines, "", f"{_counts(comparison)}, 95%.", ""])


def _cell(shown: Shown, entry: ComparedModel, name: str) -> str:
    return f"{shown.value(entry.metrics[name])} {shown.interval(entry.differences.get(name))}".strip()


def print_table(content: RenderableType, console: Console) -> None:
    console.print(content, highlight=False)
