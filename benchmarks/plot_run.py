"""A run over its steps, from results.json and evaluation/ of its output folder, as a picture: losses, and its answers.

    python benchmarks/plot_run.py outputs/alpaca_smollm2 docs/run.png

Needs the extra `bench`.
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from sft_pipeline.evaluation.metrics.registry import METRICS
from sft_pipeline.reports.charts import ANSWER_METRICS


def losses(axes: Axes, curve: list[dict[str, float]]) -> None:
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(entry["step"], entry[key]) for entry in curve if key in entry]
        axes.plot(*zip(*points), style, label=label, markersize=4)
    axes.set(xlabel="optimizer step", ylabel="loss, nats a token", ylim=(0, None))


def answers(axes: Axes, evaluations: list[dict]) -> None:
    for name in ANSWER_METRICS:
        points = [(entry["step"], 100 * entry["metrics"][name]) for entry in evaluations if name in entry["metrics"]]
        axes.plot(*zip(*points), "o-", label=METRICS[name].title, markersize=4)
    axes.set(xlabel="optimizer step", ylabel="%", ylim=(-3, 103))


def main(folder: Path, picture: str) -> None:
    curve = json.loads((folder / "results.json").read_text(encoding="utf-8"))["loss_curve"]
    evaluations = [
        json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("evaluation/step_*.json"))
    ]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    losses(left, curve)
    answers(right, evaluations)
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=150)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
