"""What the benchmarks share: contenders in processes of their own, rounds in the order A B A B, tables and pictures.

Nothing heavy is imported here: the memory of a child's parent counts in the peak that Linux reports for the child.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

ROOT = Path(__file__).resolve().parent.parent
SYSTEM = "你是小冬瓜智能体,请安全详细回答用户 USER 的问题"  # the reference's system prompt
PACKAGES = ("torch", "transformers", "trl", "datasets", "accelerate", "tokenizers", "peft")
Run = dict[str, Any]


def facts() -> Run:
    """Where and when figures were taken."""
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def run_child(script: str, *arguments: str) -> Run:
    """What benchmarks/SCRIPT prints as its last line, read as JSON. Ends the benchmark with the child's own words."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    # This folder's package, whichever one is installed; no tracker and no progress bars.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}
    child = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if child.returncode:
        sys.exit(f"{script} {' '.join(arguments)} failed:\n{child.stderr[-3000:]}")
    return json.loads(child.stdout.splitlines()[-1])


def rounds(names: Iterable[str], repeat: int, run: Callable[[str], Run]) -> dict[str, list[Run]]:
    """Every contender once, then all of them again: what the machine does meanwhile meets each alike."""
    found: dict[str, list[Run]] = {name: [] for name in names}
    for _ in range(repeat):
        for name, runs in found.items():
            runs.append(run(name))
            print(json.dumps({"name": name, **runs[-1]}), flush=True)
    return found


def median(runs: list[Run], key: str) -> float:
    return statistics.median(run[key] for run in runs)


@dataclass(frozen=True)
class Table:
    """Texts in rows, for the terminal and for Markdown; `best` is the row that stands out."""

    header: list[str]
    rows: list[list[str]]
    best: str = ""

    def show(self) -> None:
        table = RichTable(box=None, padding=(0, 1), header_style="bold")
        for at, name in enumerate(self.header):
            table.add_column(name, justify="right" if at else "left")
        for row in self.rows:
            table.add_row(*row, style="green" if row[0] == self.best else None)
        Console(width=80).print(table)

    def markdown(self) -> str:
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write(output: Path, record: Run, markdown: str) -> None:
    """`output`.json with every run and the facts, `output`.md with the tables."""
    output.parent.mkdir(parents=True, exist_ok=True)
    whole = {"facts": facts(), "command": " ".join(["python", *sys.argv]), **record}
    output.with_suffix(".json").write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(markdown, encoding="utf-8")


def bars(picture: Path, names: list[str], panels: dict[str, list[float]], best: str) -> None:
    """Horizontal bars, a panel a figure, one contender coloured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (3.7 * len(panels) + 0.8, 0.9 + 0.34 * len(names))
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", sharey=True, squeeze=False)
    colours = ["#2a7f62" if name == best else "#b9c0c7" for name in names]
    for ax, (title, values) in zip(axes[0], panels.items()):
        drawn = ax.barh(names, values, color=colours, height=0.64)
        ax.bar_label(drawn, fmt="{:,.4g}", padding=4, fontsize=9, color="#333333")
        ax.set_title(title, loc="left", fontsize=10)
        ax.set_xlim(0, 1.18 * max(values))
        ax.set_xticks([])
        ax.tick_params(length=0, labelsize=9)
        ax.spines[:].set_visible(False)
    axes[0][0].invert_yaxis()
    figure.savefig(picture, dpi=150)
