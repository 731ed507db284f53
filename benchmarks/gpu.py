"""Measure this project on one GPU (or, with small shapes, on a CPU), part by part; docs/gpu.md says how to read it.

    python benchmarks/gpu.py exact --shape smollm2
    python benchmarks/gpu.py speed --shape qwen3 --output outputs/gpu/speed
    python benchmarks/gpu.py all --seconds 540 --output outputs/gpu/all
    python benchmarks/gpu.py all --small --device cpu

Models have random weights in the shapes of SmolLM2-135M, Qwen3-0.6B and eight layers of Llama-3.1-8B, rows random ids:
nothing is downloaded. A part ends at its time limit with what it has. `all` runs every part in a process of its own,
the most important first, until --seconds are over; called again with the same --output, it goes on with those that are
not there yet. --output writes OUTPUT.json and OUTPUT.md after every part.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import ROOT, Run, Table, build_environment, describe_machine

PARTS = ("exact", "head", "attention", "speed", "memory", "recompile", "decode", "fsdp")
# What `all` runs, in this order: the part, the shape of its models, and the seconds it may take.
PLAN = (
    ("exact", "smollm2", 150),
    ("speed", "qwen3", 300),
    ("head", "qwen3", 60),
    ("attention", "qwen3", 60),
    ("recompile", "qwen3", 120),
    ("speed", "llama8", 240),
    ("memory", "qwen3", 60),
    ("decode", "qwen3", 100),
    ("exact", "qwen3", 150),
    ("fsdp", "smollm2", 120),
    ("memory", "llama8", 60),
    ("speed", "smollm2", 240),
    ("attention", "llama8", 60),
    ("decode", "smollm2", 100),
)
SHAPES = ("smollm2", "qwen3", "llama8")
SHORTEST = 20  # seconds below which no part is started


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3", help="of the models, not for `all` (qwen3)")
    parser.add_argument("--seconds", type=float, default=300, help="time limit of the part, or of `all` (300)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds over what is compared (2)")
    parser.add_argument("--device", help="cuda or cpu (cuda if there is one)")
    parser.add_argument("--small", action="store_true", help="tiny models and rows, for seconds on a CPU")
    parser.add_argument(
        "--peak", type=float, default=989, help="TFLOP/s of the device in bf16, for MFU (989, H100 SXM)"
    )
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)  # where a part of `all` writes what it has
    return parser.parse_args()


def run_part(part: str, args: argparse.Namespace) -> Run:
    """Run a part in this process."""
    import torch
    from gpu_parts.measuring import Setting

    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu" and not args.small:
        sys.exit("benchmarks/gpu.py: there is no CUDA device; add --small for a try on a CPU")
    device = torch.device(name)
    setting = Setting(
        device,
        args.shape,
        small=args.small,
        seconds=args.seconds,
        rounds=args.rounds,
        peak_flops=1e12 * args.peak,
        file=args.results,
    )
    module = importlib.import_module(f"gpu_parts.{part}")
    return setting.describe() | module.measure(setting)


def run_in_process(part: str, shape: str, seconds: float, args: argparse.Namespace) -> Run:
    """Run a part in a process of its own, which is ended after `seconds`; return what it has by then."""
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "results.json", Path(folder) / "log"
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), part, "--shape", shape, "--results", str(file)]
        # Importing and starting take some of the time.
        command += ["--seconds", str(seconds - 10), "--rounds", str(args.rounds), "--peak", str(args.peak)]
        command += ["--small"] * args.small + (["--device", args.device] if args.device else [])
        end = ""
        with log.open("w", errors="replace") as lines:
            # A group of its own, so that the processes that it starts end with it.
            child = subprocess.Popen(
                command, stdout=lines, stderr=lines, env=build_environment(), start_new_session=True
            )
            try:
                if child.wait(timeout=seconds):
                    end = (log.read_text(errors="replace").strip().splitlines() or [f"status {child.returncode}"])[-1]
            except subprocess.TimeoutExpired:
                end = f"ended after {seconds:.0f} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return results | ({"ended": end[:300]} if end else {})


def run_all(args: argparse.Namespace) -> dict[str, Run]:
    """Run the parts of PLAN that --output does not have yet, until the time is over."""
    start_time, results = time.monotonic(), read_results(args.output)
    for part, shape, seconds in PLAN:
        name = f"{part} {shape}"
        left = args.seconds - (time.monotonic() - start_time)
        if name in results:
            continue
        if left < SHORTEST:
            print(f"{name}: no time left; call again with the same --output", flush=True)
            break
        results[name] = run_in_process(part, shape, min(seconds, left), args)
        results[name]["seconds"] = round(time.monotonic() - start_time - (args.seconds - left), 1)
        report(name, results[name])
        write_output(args.output, results)
    return results


def read_results(output: Path | None) -> dict[str, Run]:
    """Return the parts that an earlier call wrote, without those that have no measurement."""
    file = output.with_suffix(".json") if output else None
    if not file or not file.is_file():
        return {}
    parts: dict[str, Run] = json.loads(file.read_text(encoding="utf-8"))["parts"]
    return {name: part for name, part in parts.items() if part.get("measurements")}


def build_tables(name: str, results: Run) -> list[Table]:
    if not results.get("measurements"):
        return []
    module: Any = importlib.import_module(f"gpu_parts.{name.split()[0]}")
    return module.build_tables(results)


def describe_end(results: Run) -> str:
    """Describe in a line what is missing and why, or return ''."""
    lines = [*results.get("missing", []), *(str(results[key]) for key in ("unfinished", "ended") if key in results)]
    return f"Missing: {'; '.join(lines)}" if lines else ""


def report(name: str, results: Run) -> None:
    print(f"\n{name}: {results.get('seconds', '')} s", flush=True)
    for table in build_tables(name, results):
        table.print()
    if end := describe_end(results):
        print(end, flush=True)


def write_output(output: Path | None, results: dict[str, Run]) -> None:
    """Write every measurement to OUTPUT.json and the tables to OUTPUT.md."""
    if not output:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    cards = [part["gpu"] for part in results.values() if "gpu" in part]
    content = {
        "facts": {**describe_machine(), "gpu": cards[-1] if cards else None},
        "command": " ".join(["python", *sys.argv]),
        "parts": results,
    }
    output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    texts = []
    for name, part in results.items():
        title = f"## {name}\n\n{part.get('gpu', {}).get('name', '')}{', small shapes' * part.get('small', False)}\n"
        tables = [table.format_markdown() for table in build_tables(name, part)]
        texts.append("\n".join([title, *tables, *[f"{describe_end(part)}\n"] * bool(describe_end(part))]))
    output.with_suffix(".md").write_text("\n".join(texts) + "\n", encoding="utf-8")


def main() -> None:
    args = parse_arguments()
    if args.part == "all":
        run_all(args)
        return
    start_time = time.monotonic()
    results = run_part(args.part, args)
    results["seconds"] = round(time.monotonic() - start_time, 1)
    if args.results:
        args.results.write_text(json.dumps(results), encoding="utf-8")
        return
    name = f"{args.part} {args.shape}"
    report(name, results)
    write_output(args.output, {name: results})


if __name__ == "__main__":
    main()
