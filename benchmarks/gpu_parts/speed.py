"""Training steps of this project, `Trainer` and TRL in turns A B A B, on the same ids: tokens/s, MFU and peak memory.

Weights in float32 under bf16 autocast (float32 on a CPU), fused AdamW, no clipping, no gradient checkpointing. Rows
have no shared start and 226 tokens in the mean; conversations have 8 turns. `trainer` is transformers' Trainer on
padded batches with sdpa, `trainer-liger` the same with all of Liger's kernels, `trl-liger` TRL packed (bfd) with
Liger's, with FlashAttention if it is installed, else with sdpa, `trl-liger-flex` with FlexAttention. Each has a
process of its own, which stays. MFU counts the arithmetic that the rows need at least (benchmarks/scaling.py); for the
tree only that of the tokens that it computes.
"""

from __future__ import annotations

import contextlib
import json
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any

from report import ROOT, Run, Table, build_environment

from gpu_parts.measuring import Setting

NAMES = ("ours", "ours-compiled", "trainer", "trainer-liger", "trl-liger", "trl-liger-flex")
OTHERS = {"trainer", "trainer-liger", "trl", "trl-liger", "trl-liger-flex"}
# What is measured, the most important first: the time may not be enough for all.
CASES = (("rows", 16_384), ("conversations", 16_384), ("rows", 8192), ("rows", 2048))
SMALL_CASES = (("rows", 800), ("conversations", 4000))  # times the scale
STEPS, WARM_UP = 8, 3
RESULT = "RESULT "
SCRIPT = ROOT / "benchmarks" / "gpu_parts" / "trainers.py"
SHORTEST = 5.0  # seconds below which no training is started


class Worker:
    """A process of benchmarks/gpu_parts/trainers.py."""

    def __init__(self, name: str, setting: Setting) -> None:
        self.name, self.setting = name, setting
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # until `stop`
        command = [sys.executable, str(SCRIPT), name]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        self._process = subprocess.Popen(command, text=True, env=build_environment(), **pipes)
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith(RESULT):
                self._lines.put(line.removeprefix(RESULT))
        self._lines.put(None)  # the process has ended

    def train(self, data: str, tokens: int) -> Run:
        """Return the results of a training, or its error: also if the process ends or takes too long."""
        setting = self.setting
        request = {"shape": setting.shape_name, "small": setting.small, "device": str(setting.device)}
        request |= {"data": data, "tokens": tokens, "steps": setting.choose(STEPS, 2)}
        request |= {"warm_up": setting.choose(WARM_UP, 1)}
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=max(0.1, setting.seconds_left))
        except (OSError, queue.Empty) as error:
            line = None
            if isinstance(error, queue.Empty):
                return {"error": "not finished in time"}
        if line is None:
            self._lines.put(None)  # for later requests, which a process that is ending may still take
            return {"error": f"the process ended: {self._read_log()}"}
        return json.loads(line)

    def _read_log(self) -> str:
        self._log.seek(0)
        return (self._log.read().strip().splitlines() or ["without a message"])[-1][:200]

    def stop(self) -> None:
        self._process.kill()
        with contextlib.suppress(OSError), self._process:  # closes the pipes; a request may not have been read
            self._reader.join()
        self._log.close()


@contextmanager
def start_workers(names: list[str], setting: Setting) -> Iterator[dict[str, Worker]]:
    """Start the processes side by side, and end them."""
    with ExitStack() as stack:
        workers = {}
        for name in names:
            workers[name] = worker = Worker(name, setting)
            stack.callback(worker.stop)
        yield workers


def choose_names(setting: Setting) -> tuple[list[str], list[str]]:
    """Return the trainers that can run here, and those that cannot, with the reason."""
    if setting.device.type != "cuda":
        # Liger has no kernels for a CPU, and compiling there takes longer than all of the rest.
        names = ["ours", "trainer", *["trl"] * bool(find_spec("trl"))]
        return names, ["those with Liger, which needs a GPU", "ours-compiled: left out on a CPU"]
    reasons = {package: f"{package} is not installed" for package in ("liger_kernel", "trl") if not find_spec(package)}
    missing: dict[str, str] = {}
    for name in NAMES:
        for package, reason in reasons.items():
            if package.split("_")[0] in name:
                missing[name] = reason
    return [name for name in NAMES if name not in missing], [f"{name}: {reason}" for name, reason in missing.items()]


def measure(setting: Setting) -> Run:
    names, missing = choose_names(setting)
    peak = setting.peak_flops
    results: Run = {"shape": setting.shape.name, "missing": missing, "peak_flops": peak, "measurements": []}
    with start_workers(names, setting) as workers:
        for data, tokens in setting.choose(CASES, SMALL_CASES):
            tokens = round(setting.choose(1.0, setting.scale) * tokens)
            for number in range(setting.rounds):
                for name, worker in workers.items():
                    if setting.seconds_left < SHORTEST:
                        results["unfinished"] = f"from {data}, {tokens} tokens, round {number + 1}, {name} on"
                        return results
                    run = {"data": data, "tokens": tokens, "name": name, "round": number + 1}
                    results["measurements"].append(run | worker.train(data, tokens))
                    setting.save(results)
    return results


def build_tables(results: Run) -> list[Table]:
    """Build a table for each kind of batch: medians of the rounds, and each speed over the best of the others'."""
    cases: dict[tuple[str, int], dict[str, list[Run]]] = {}
    for run in results["measurements"]:
        cases.setdefault((run["data"], run["tokens"]), {}).setdefault(run["name"], []).append(run)
    return [
        build_case_table(f"{results['shape']}, {data}, {tokens:,} tokens", runs, results["peak_flops"])
        for (data, tokens), runs in cases.items()
    ]


def build_case_table(title: str, runs: dict[str, list[Run]], peak_flops: float) -> Table:
    finished = {name: [run for run in group if "error" not in run] for name, group in runs.items()}

    def compute(name: str, key: str) -> float:
        return statistics.median(run[key] for run in finished[name])

    others = [name for name in finished if name in OTHERS and finished[name]]
    best = max((compute(name, "tokens_per_second") for name in others), default=0.0)
    rows = []
    for name, group in runs.items():
        if not finished[name]:
            rows.append([name, group[0]["error"], "", "", "", "", "", ""])
            continue
        speeds = [run["tokens_per_second"] for run in finished[name]]
        speed = compute(name, "tokens_per_second")
        cells = [f"{speed:,.0f}", f"{min(speeds):,.0f}-{max(speeds):,.0f}", f"{compute(name, 'step_seconds'):.3f}"]
        cells += [f"{compute(name, 'flops_per_second') / peak_flops:.1%}", f"{compute(name, 'peak_gib'):.2f}"]
        cells += [f"{compute(name, 'loss'):.4f}", f"{speed / best:.2f}x" if best else ""]
        rows.append([name, *cells])
    header = [title, "tokens/s", "range", "s/step", "MFU", "GiB", "loss", "of the best other"]
    return Table(header, rows, "ours")
