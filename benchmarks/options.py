"""Measure what each option of a run costs: seconds, memory and held-out loss, through the real `train`.

    pip install -e ".[lora,qlora,bench]"
    python benchmarks/options.py smollm2-135m alpaca_en_demo.json --output docs/options

Each option changes one to three config keys of the first. Every run has a process of its own; all run once, then all
again. LoRA gets ten times the learning rate, as is usual for adapters; all else is the same. Seconds and tokens/s are
those of training, without evaluation and saving; memory is the process's peak. The picture of --output needs the extra
`bench` (matplotlib), the options `lora` and `load_in_*` the extras `lora` and `qlora`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import (
    SYSTEM_PROMPT,
    Run,
    Table,
    compute_median,
    draw_bars,
    require_bench_extra,
    run_child,
    run_rounds,
    write_results,
)

FULL = "full"
OPTIONS: dict[str, dict[str, Any]] = {
    FULL: {},
    "lora": {"lora": True, "learning_rate": 1e-3},
    "load_in_4bit": {"lora": True, "learning_rate": 1e-3, "load_in_4bit": True},
    "load_in_8bit": {"lora": True, "learning_rate": 1e-3, "load_in_8bit": True},
    "checkpointing": {"activation_checkpointing": True},
    "packing: false": {"packing": False},
    "share_prefixes: false": {"share_prefixes": False},
    "bf16 (autocast)": {"bf16": True},
}


def build_shared_keys(model: str, data: str, folder: str, held_out: int) -> dict[str, Any]:
    """Return the config keys that all runs share."""
    return {
        "model_name_or_path": model,
        "train_data": data,
        "held_out": held_out,
        "template": "role",
        "system_prompt": SYSTEM_PROMPT,
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


def run_option(keys: dict[str, Any]) -> Run:
    from rich.console import Console

    from sft_pipeline.config import parse_config
    from sft_pipeline.train import train

    results = train(parse_config(None, [f"--{key}={value}" for key, value in keys.items()]), Console(quiet=True))
    tokens = results["rows"]["train"]["tokens"]
    return {
        "tokens_per_second": results["tokens_per_second"],
        "step_seconds": round(tokens / results["tokens_per_second"] / results["steps"], 2),
        "peak_gib": results["peak_memory_gib"],
        "eval_loss": round(results["eval_loss"]["after"], 4),
        "steps": results["steps"],
    }


def build_table(results: dict[str, list[Run]]) -> Table:
    """Build the table of medians, with speed and memory also relative to the first row."""
    full_speed = compute_median(results[FULL], "tokens_per_second")
    full_peak = compute_median(results[FULL], "peak_gib")
    rows = []
    for name, runs in results.items():
        speed, peak = compute_median(runs, "tokens_per_second"), compute_median(runs, "peak_gib")
        seconds, loss = compute_median(runs, "step_seconds"), compute_median(runs, "eval_loss")
        cells = [f"{seconds:.2f}", f"{speed:.0f}", f"{speed / full_speed:.2f}x"]
        cells += [f"{peak:.2f}", f"{peak / full_peak:.2f}x", f"{loss:.4f}"]
        rows.append([name, *cells])
    return Table(["", "s/step", "tokens/s", "speed", "GiB", "memory", "held-out loss"], rows, FULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder or smollm2-135m")
    parser.add_argument("data", help="a JSON file of instruction rows, such as alpaca_en_demo.json")
    parser.add_argument("--rows", type=int, default=32, help="training rows, 8 per step (32)")
    parser.add_argument("--held_out", type=int, default=24, help="held-out rows (24)")
    parser.add_argument("--repeat", type=int, default=2, help="rounds over all options (2)")
    parser.add_argument(
        "--without", type=lambda text: text.split(","), default=[], help=f"options to skip: {','.join(OPTIONS)}"
    )
    parser.add_argument("--output", type=Path, help="write OUTPUT.json, OUTPUT.md and OUTPUT.png")
    args = parser.parse_args()
    if unknown := set(args.without) - set(OPTIONS):
        parser.error(f"--without: unknown {', '.join(sorted(unknown))}; choose from {', '.join(OPTIONS)}")
    if args.output:
        require_bench_extra("matplotlib")
    names = [name for name in OPTIONS if name not in args.without or name == FULL]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.json"
        rows = json.loads(Path(args.data).read_text(encoding="utf-8"))[: args.rows + args.held_out]
        data.write_text(json.dumps(rows), encoding="utf-8")
        keys = build_shared_keys(args.model, str(data), str(Path(folder) / "run"), args.held_out)
        results = run_rounds(names, args.repeat, lambda name: run_child("options.py", json.dumps(keys | OPTIONS[name])))
    table = build_table(results)
    table.print()
    if args.output:
        record = {"model": args.model, "config": keys, "options": OPTIONS, "runs": results}
        write_results(args.output, record, table.format_markdown())
        panels = {
            "tokens/s": "tokens_per_second",
            "peak memory, GiB": "peak_gib",
            "held-out loss": "eval_loss",
        }
        values = {title: [compute_median(runs, key) for runs in results.values()] for title, key in panels.items()}
        draw_bars(args.output.with_suffix(".png"), names, values, FULL)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("{"):  # a child process, which gets its config as JSON
        print(json.dumps(run_option(json.loads(sys.argv[1]))))
    else:
        main()
