"""Shared by the benchmarks: child processes, rounds in the order A B A B, tables and bar charts.

Nothing heavy is imported here: on Linux the peak memory reported for a child includes that of the parent at the start.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

ROOT = Path(__file__).resolve().parent.parent
SYSTEM_PROMPT = "你是小冬瓜智能体,请安全详细回答用户 USER 的问题"  # the reference's system prompt
PACKAGES = ("torch", "transformers", "trl", "datasets", "accelerate", "tokenizers", "peft", "liger-kernel", "triton")
Run = dict[str, Any]


def require_bench_extra(*packages: str) -> None:
    """Exit with the install line unless these packages of the extra `bench` are installed."""
    if missing := [name for name in packages if find_spec(name) is None]:
        sys.exit(f'{sys.argv[0]} needs {" and ".join(missing)}: pip install -e ".[bench]"')


def describe_machine() -> Run:
    """Return date, machine and versions of the installed packages, for the JSON of the results."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def find_free_port() -> int:
    """Return a port of this machine that nothing listens on, for the processes of a run to meet at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def build_environment() -> dict[str, str]:
    """Return the variables of child processes: this checkout's package, whichever is installed; no tracker, no bars."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | own


def run_child(script: str, *arguments: str) -> Run:
    """Run benchmarks/SCRIPT in a process of its own and parse the last line it prints as JSON.

    Exits with the end of the child's standard error if it fails.
    """
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    child = subprocess.run(command, capture_output=True, text=True, env=build_environment(), check=False)
    if child.returncode:
        sys.exit(f"{script} {' '.join(arguments)} failed:\n{child.stderr[-3000:]}")
    return json.loads(child.stdout.splitlines()[-1])


def run_rounds(names: Iterable[str], repeat: int, run: Callable[[str], Run]) -> dict[str, list[Run]]:
    """Run every name once, then all of them again: other load on the machine then affects each alike."""
    results: dict[str, list[Run]] = {name: [] for name in names}
    for _ in range(repeat):
        for name, runs in results.items():
            runs.append(run(name))
            print(json.dumps({"name": name, **runs[-1]}), flush=True)
    return results


def compute_median(runs: list[Run], key: str) -> float:
    return statistics.median(run[key] for run in runs)


@dataclass(frozen=True)
class Table:
    """Rows of text for the terminal and for Markdown; the row named `highlighted` is colored."""

    header: list[str]
    rows: list[list[str]]
    highlighted: str = ""

    def print(self) -> None:
        table = RichTable(box=None, padding=(0, 1), header_style="bold")
        for index, name in enumerate(self.header):
            table.add_column(name, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*row, style="green" if row[0] == self.highlighted else None)
        Console(width=80).print(table)

    def format_markdown(self) -> str:
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_results(output: Path, record: Run, markdown: str) -> None:
    """Write OUTPUT.json with every run, the machine and the command, and OUTPUT.md with the tables."""
    output.parent.mkdir(parents=True, exist_ok=True)
    content = {"facts": describe_machine(), "command": " ".join(["python", *sys.argv]), **record}
    output.with_suffix(".json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(markdown, encoding="utf-8")


def draw_bars(picture: Path, names: list[str], panels: dict[str, list[float]], highlighted: str) -> None:
    """Draw horizontal bars, one panel per metric (its title to a value per name), with one name colored."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (3.7 * len(panels) + 0.8, 0.9 + 0.34 * len(names))
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", sharey=True, squeeze=False)
    colors = ["#2a7f62" if name == highlighted else "#b9c0c7" for name in names]
    for ax, (title, values) in zip(axes[0], panels.items()):
        bars = ax.barh(names, values, color=colors, height=0.64)
        ax.bar_label(bars, fmt="{:,.4g}", padding=4, fontsize=9, color="#333333")
        ax.set_title(title, loc="left", fontsize=10)
        ax.set_xlim(0, 1.18 * max(values))
        ax.set_xticks([])
        ax.tick_params(length=0, labelsize=9)
        ax.spines[:].set_visible(False)
    axes[0][0].invert_yaxis()
    figure.savefig(picture, dpi=150)
