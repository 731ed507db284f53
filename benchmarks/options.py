"""What each option of a run costs and gives: seconds, memory, held-out loss; each through the real `train`.

    python benchmarks/options.py smollm2-135m alpaca_en_demo.json --output docs/options

A row is a config key or two on top of the first row's. Each runs in a process of its own, all once, then all again.
LoRA has ten times the learning rate, as adapters want; all else is alike. Seconds and tokens a second are those of
training alone, without evaluation and saving; memory is the most that the process ever had.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import SYSTEM, Run, Table, bars, median, rounds, run_child, write

FULL = "full"
OPTIONS: dict[str, dict[str, Any]] = {
    FULL: {},
    "lora": {"lora": True, "learning_rate": 1e-3},
    "checkpointing": {"activation_checkpointing": True},
    "packing: false": {"packing": False},
    "prefix not shared": {"share_prefix": False},
    "bf16 (autocast)": {"bf16": True},
}


def config(model: str, data: str, folder: str, held_out: int) -> dict[str, Any]:
    """The keys that all runs share."""
    return {
        "model_name_or_path": model,
        "train_data": data,
        "held_out": held_out,
        "template": "role",
        "system_prompt": SYSTEM,
        "num_answers": 0,
        "num_instructions": 0,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "eval_on_start": False,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "output_dir": folder,
        "overwrite_output_dir": True,
    }


def child(keys: dict[str, Any]) -> Run:
    """One run; the benchmark's own key `share_prefix`, which no config has, is put into the collator."""
    from rich.console import Console

    from sft_pipeline.config import parse_config
    from sft_pipeline.train import train
    from sft_pipeline.training import builder

    if not keys.pop("share_prefix", True):

        @dataclass(frozen=True)
        class Unshared(builder.PackedCollator):
            share_prefix: bool = False

        builder.PackedCollator = Unshared  # type: ignore[misc]  # for this process, which is a benchmark's
    found = train(*parse_config(None, [f"--{key}={value}" for key, value in keys.items()]), Console(quiet=True))
    tokens = found["rows"]["train"]["tokens"]
    return {
        "tokens_per_second": found["tokens_per_second"],
        "step_seconds": round(tokens / found["tokens_per_second"] / found["steps"], 2),
        "peak_gib": found["peak_memory_gib"],
        "eval_loss": round(found["eval_loss"]["after"], 4),
        "steps": found["steps"],
    }


def table(found: dict[str, list[Run]]) -> Table:
    """Medians, and each over the first row's."""
    rows = []
    for name, runs in found.items():
        speed, peak = median(runs, "tokens_per_second"), median(runs, "peak_gib")
        times = [speed / median(found[FULL], "tokens_per_second"), peak / median(found[FULL], "peak_gib")]
        spent, loss = median(runs, "step_seconds"), median(runs, "eval_loss")
        figures = [f"{spent:.2f}", f"{speed:.0f}", f"{times[0]:.2f}x", f"{peak:.2f}", f"{times[1]:.2f}x", f"{loss:.4f}"]
        rows.append([name, *figures])
    return Table(["", "s/step", "tokens/s", "speed", "GiB", "memory", "held-out loss"], rows, FULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder or smollm2-135m")
    parser.add_argument("data", help="a JSON file of instruction rows, such as alpaca_en_demo.json")
    parser.add_argument("--rows", type=int, default=32, help="training rows, 8 a step")
    parser.add_argument("--held_out", type=int, default=24)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--without", type=lambda text: text.split(","), default=[], help=",".join(OPTIONS))
    parser.add_argument("--output", type=Path, help="write OUTPUT.json, OUTPUT.md and OUTPUT.png")
    args = parser.parse_args()
    names = [name for name in OPTIONS if name not in args.without or name == FULL]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.json"
        rows = json.loads(Path(args.data).read_text(encoding="utf-8"))[: args.rows + args.held_out]
        data.write_text(json.dumps(rows), encoding="utf-8")
        keys = config(args.model, str(data), str(Path(folder) / "run"), args.held_out)
        found = rounds(names, args.repeat, lambda name: run_child("options.py", json.dumps(keys | OPTIONS[name])))
    made = table(found)
    made.show()
    if args.output:
        write(args.output, {"model": args.model, "config": keys, "options": OPTIONS, "runs": found}, made.markdown())
        panels = {
            "tokens a second": "tokens_per_second",
            "memory at most, GiB": "peak_gib",
            "held-out loss": "eval_loss",
        }
        values = {title: [median(runs, key) for runs in found.values()] for title, key in panels.items()}
        bars(args.output.with_suffix(".png"), names, values, FULL)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("{"):
        print(json.dumps(child(json.loads(sys.argv[1]))))
    else:
        main()
