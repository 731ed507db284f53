"""Two processes against one: losses, seconds and memory with the whole model on each (DDP), and sharded (FSDP2).

    python benchmarks/gpu_parts/fsdp.py REQUEST    # one of the processes; `measure` starts it

With two GPUs over NCCL. With one GPU both processes use it, over gloo, which NCCL refuses: the losses and the memory
mean something there, the seconds do not.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from report import Run, Table, build_environment, find_free_port

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "two, whole": (2, {}),
    "two, sharded": (2, {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}),
}
SCRIPT = Path(__file__).resolve()
ROWS, STEPS = 8, 4  # rows of a step, over all processes
LOSS_LIMIT = 1e-3  # relative, in bf16: the processes round in another order


def train(request: Run) -> Run:
    """Train in this process, one of `processes`, and return the losses, seconds a step and the peak memory."""
    from gpu_parts.inputs import build_rows
    from gpu_parts.measuring import Setting, StepClock, get_peak_gib
    from gpu_parts.ours import build_our_trainer

    device = torch.device(request["device"])
    setting = Setting(device, request["shape"], request["small"])
    rows = build_rows(ROWS * STEPS, setting.shape.vocabulary, scale=setting.scale)
    keys = {"logging_strategy": "steps", "logging_steps": 1, "overwrite_output_dir": True, **request["keys"]}
    keys |= {"per_device_train_batch_size": ROWS // request["processes"], "ddp_backend": request["backend"]}
    clock = StepClock(device, 1)
    trainer = build_our_trainer(request["model"], rows, request["folder"], device.type, [clock], **keys)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "step_seconds": clock.seconds / clock.steps, "peak_gib": get_peak_gib(device)}


def run_processes(request: Run, folder: Path, seconds: float) -> Run:
    """Start the processes of a case and return what they report: the losses and seconds of the first, all peaks."""
    count, gpus = request["processes"], torch.cuda.device_count()
    share_gpu = request["device"] != "cpu" and gpus < count
    request["backend"] = None if count == 1 else "gloo" if share_gpu or request["device"] == "cpu" else "nccl"
    port = find_free_port()
    processes, files = [], []
    for rank in range(count):
        # Both processes that share a GPU are told that they are the first of their machine.
        ranks = {"RANK": rank, "LOCAL_RANK": 0 if share_gpu else rank, "WORLD_SIZE": count, "MASTER_PORT": port}
        own = {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"}
        files.append([(folder / f"{rank}.{end}").open("w+", errors="replace") for end in ("out", "err")])
        command = [sys.executable, str(SCRIPT), json.dumps(request)]
        variables = build_environment() | (own if count > 1 else {})
        processes.append(subprocess.Popen(command, env=variables, stdout=files[-1][0], stderr=files[-1][1]))
    try:
        statuses = [process.wait(timeout=max(1.0, seconds)) for process in processes]
    except subprocess.TimeoutExpired:
        return {"error": "not finished in time"}
    finally:
        for process in processes:
            process.kill()
            process.wait()
        texts = [[read_last_line(file) for file in pair] for pair in files]
    for status, (_, error) in zip(statuses, texts):
        if status:
            return {"error": f"status {status}: {error[:200]}"}
    reports = [json.loads(output) for output, _ in texts]
    return reports[0] | {"peak_gib": [report["peak_gib"] for report in reports], "backend": request["backend"]}


def read_last_line(file: Any) -> str:
    with file:
        file.seek(0)
        return (file.read().strip().splitlines() or [""])[-1]


def measure(setting: Any) -> Run:
    from gpu_parts.inputs import build_model, build_tokenizer

    results: Run = {"shape": setting.shape.name, "measurements": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_model(setting.shape, torch.device("cpu")).save_pretrained(folder / "model")
        build_tokenizer().save_pretrained(folder / "model")
        for case, (count, keys) in CASES.items():
            request: Run = {"processes": count, "keys": keys, "model": str(folder / "model")}
            request |= {"shape": setting.shape_name, "small": setting.small, "device": setting.device.type}
            request["folder"] = str(folder / "run")
            run: Run = {"name": case, "processes": count}
            run |= run_processes(request, folder, setting.seconds_left)
            results["measurements"].append(run)
            setting.save(results)
    first = results["measurements"][0].get("losses")
    for run in results["measurements"][1:]:
        if first and "losses" in run:
            run["loss_error"] = max(abs(loss / expected - 1) for loss, expected in zip(run["losses"], first))
            run["is_equal"] = len(run["losses"]) == len(first) and run["loss_error"] <= LOSS_LIMIT
    return results


def build_tables(results: Run) -> list[Table]:
    from gpu_parts.measuring import build_table

    header = [results["shape"], "backend", "s/step", "peak GiB", "difference of losses"]
    return [build_table(header, results["measurements"], "{name}", format_cells)]


def format_cells(run: Run) -> list[str]:
    peaks = ", ".join(f"{peak:.2f}" for peak in run["peak_gib"])
    error = f"{run['loss_error']:.1e}" if "loss_error" in run else ""
    return [run["backend"] or "", f"{run['step_seconds']:.3f}", peaks, error]


if __name__ == "__main__":
    print(json.dumps(train(json.loads(sys.argv[1]))))
