"""Peak memory of real training steps beside the estimate from the shapes (benchmarks/scaling.py).

Each run trains two steps of about as many tokens, with float32 weights under bf16 autocast and AdamW.
"""

from __future__ import annotations

import tempfile
from typing import Any

from report import Run, Table
from scaling import Shape, count_activation_bytes, count_lora_state_bytes, count_state_bytes

from gpu_parts.inputs import build_model, build_rows
from gpu_parts.measuring import GIB, Setting, get_peak_gib, record_errors, reset_peak
from gpu_parts.ours import build_our_trainer

CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "activation_checkpointing": {"activation_checkpointing": True},
    "lora": {"lora": True, "lora_rank": 16},
}
TOKENS = (4096, 16_384)
MEAN_TOKENS = 226


def estimate_bytes(shape: Shape, name: str, tokens: int) -> float:
    """Estimate the bytes of one device, as docs/scaling.md does for bf16 autocast over float32 weights."""
    state = count_lora_state_bytes(shape, 1) if name == "lora" else count_state_bytes(shape, 1)
    return state + tokens * count_activation_bytes(shape, name == "activation_checkpointing")


def measure_peak(setting: Setting, keys: dict[str, Any], tokens: int) -> Run:
    device, shape = setting.device, setting.shape
    count = max(1, round(tokens / (MEAN_TOKENS * setting.scale)))
    rows = build_rows(2 * count, shape.vocabulary, scale=setting.scale)
    keys = {"tokens_per_batch": 0, "per_device_train_batch_size": count, **keys}
    reset_peak(device)
    with tempfile.TemporaryDirectory() as folder:
        build_our_trainer(build_model(shape, device), rows, folder, device.type, **keys).train()
    return {"gib": get_peak_gib(device), "row_tokens": max(len(row["input_ids"]) for row in rows)}


def measure(setting: Setting) -> Run:
    results: Run = {"shape": setting.shape.name, "device": setting.device.type, "measurements": []}
    for tokens in setting.choose(TOKENS, (round(800 * setting.scale),)):
        for name, keys in CASES.items():
            run: Run = {"name": name, "tokens": tokens}
            run["estimated_gib"] = estimate_bytes(setting.shape, name, tokens) / GIB
            with record_errors(run):
                run |= measure_peak(setting, keys, tokens)
            results["measurements"].append(run)
            setting.save(results)
    return results


def build_tables(results: Run) -> list[Table]:
    rows = []
    for run in results["measurements"]:
        title, estimate = f"{run['name']}, {run['tokens']:,} tokens", run["estimated_gib"]
        if "error" in run:
            rows.append([title, f"{estimate:.2f}", run["error"], ""])
            continue
        rows.append([title, f"{estimate:.2f}", f"{run['gib']:.2f}", f"{estimate / run['gib']:.2f}x"])
    measured = "peak GiB" if results["device"] == "cuda" else "peak GiB of the process"
    return [Table([results["shape"], "estimated GiB", measured, "estimate over peak"], rows)]
