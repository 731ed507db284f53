"""Peak memory of real training steps beside what was estimated before the weights were loaded.

Each run trains two steps of about as many tokens, with float32 weights under bf16 autocast and AdamW. The estimate is
that which `SFTTrainer` logs (sft_pipeline/training/memory_estimate.py), of the largest micro-batch.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from report import Run, Table

from gpu_parts.inputs import build_model, build_rows, build_tokenizer
from gpu_parts.measuring import GIB, Setting, build_table, get_peak_gib, record_errors, reset_peak
from gpu_parts.ours import build_our_trainer
from sft_pipeline.training.memory_estimate import estimate_memory

CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "activation_checkpointing": {"activation_checkpointing": True},
    "lora": {"lora": True, "lora_rank": 16},
}
TOKENS = (4096, 16_384)
MEAN_TOKENS = 226


def measure_peak(setting: Setting, model: str, keys: dict[str, Any], tokens: int) -> Run:
    """Train the model of a folder, and return the estimate and the peak."""
    device = setting.device
    count = max(1, round(tokens / (MEAN_TOKENS * setting.scale)))
    rows = build_rows(2 * count, setting.shape.vocabulary, scale=setting.scale)
    batches = (rows[:count], rows[count:])
    largest = max(sum(len(row["input_ids"]) for row in batch) for batch in batches)
    supervised = max(sum(label >= 0 for row in batch for label in row["labels"]) for batch in batches)
    keys = {"tokens_per_batch": 0, "per_device_train_batch_size": count, **keys}
    reset_peak(device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_our_trainer(model, rows, folder, device.type, **keys)
        share = supervised / largest
        estimate = estimate_memory(trainer.model, trainer.args, largest, packed=True, supervised_share=share)
        trainer.train()
    return {"estimated_gib": estimate.total / GIB, "gib": get_peak_gib(device), "largest_tokens": largest}


def measure(setting: Setting) -> Run:
    results: Run = {"shape": setting.shape.name, "device": setting.device.type, "measurements": []}
    with tempfile.TemporaryDirectory() as name:
        folder = str(Path(name) / "model")
        build_model(setting.shape, setting.device).save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
        for tokens in setting.choose(TOKENS, (round(800 * setting.scale),)):
            for case, keys in CASES.items():
                run: Run = {"name": case, "tokens": tokens}
                with record_errors(run):
                    run |= measure_peak(setting, folder, keys, tokens)
                results["measurements"].append(run)
                setting.save(results)
    return results


def build_tables(results: Run) -> list[Table]:
    measured = "peak GiB" if results["device"] == "cuda" else "peak GiB of the process"
    header = [results["shape"], "estimated GiB", measured, "estimate over peak"]
    return [build_table(header, results["measurements"], "{name}, {tokens:,} tokens", format_cells)]


def format_cells(run: Run) -> list[str]:
    estimate, peak = run["estimated_gib"], run["gib"]
    return [f"{estimate:.2f}", f"{peak:.2f}", f"{estimate / peak:.2f}x"]
