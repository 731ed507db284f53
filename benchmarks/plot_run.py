"""Plot a run over its steps: losses, and what its answers do, from results.json and evaluation/ of its output folder.

pip install -e ".[bench]"
python benchmarks/plot_run.py outputs/alpaca_smollm2 docs/run.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from report import require_bench_extra

from sft_pipeline.evaluation.metrics.registry import METRICS
from sft_pipeline.reports.charts import ANSWER_METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_losses(axes: Axes, log: list[dict[str, float]]) -> None:
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(entry["step"], entry[key]) for entry in log if key in entry]
        axes.plot(*zip(*points), style, label=label, markersize=4)
    axes.set(xlabel="optimizer step", ylabel="loss, nats/token", ylim=(0, None))


def plot_answers(axes: Axes, evaluations: list[dict]) -> None:
    for name in ANSWER_METRICS:
        points = [(entry["step"], 100 * entry["metrics"][name]) for entry in evaluations if name in entry["metrics"]]
        axes.plot(*zip(*points), "o-", label=METRICS[name].title, markersize=4)
    axes.set(xlabel="optimizer step", ylabel="%", ylim=(-3, 103))


def draw_run(folder: Path, picture: Path) -> None:
    import matplotlib.pyplot as plt

    log = json.loads((folder / "results.json").read_text(encoding="utf-8"))["loss_curve"]
    evaluations = [
        json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("evaluation/step_*.json"))
    ]
    figure, (loss_axes, answer_axes) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    plot_losses(loss_axes, log)
    plot_answers(answer_axes, evaluations)
    for axes in (loss_axes, answer_axes):
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the output folder of a finished run")
    parser.add_argument("picture", type=Path, help="the file to write, such as run.png")
    args = parser.parse_args()
    require_bench_extra("matplotlib")
    draw_run(args.folder, args.picture)


if __name__ == "__main__":
    main()
