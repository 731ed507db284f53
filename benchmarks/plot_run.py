"""Loss over training from a run's results.json, as a picture.

    python benchmarks/plot_run.py outputs/alpaca_smollm2 docs/loss.png        # needs the extra `bench`
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt


def main(folder: str, picture: str) -> None:
    curve = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))["loss_curve"]
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(entry["step"], entry[key]) for entry in curve if key in entry]
        axes.plot(*zip(*points), style, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss, nats a token", ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:3])
