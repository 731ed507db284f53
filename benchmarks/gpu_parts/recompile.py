"""Compilations and synchronizations of a run over a dozen different layouts of a batch.

Rows, shared starts of several lengths, conversations of 2 to 8 turns, alone and together: every step has another
number of tokens and another tree. A compilation is late if it comes after the first half of the steps. Synchronizations
are the times that the host waited for the device within a step, as torch's `set_sync_debug_mode` reports them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

from report import Run, Table
from transformers import TrainerCallback

from gpu_parts.inputs import Row, build_conversations, build_model, build_rows
from gpu_parts.measuring import (
    Setting,
    build_table,
    count_compilations,
    count_synchronizations,
    record_errors,
    reset_peak,
)
from gpu_parts.ours import build_our_trainer

BATCH_ROWS = 4
# Four graphs of layers and one of FlexAttention, each with gradients, and without for the first checks.
MAX_COMPILATIONS, MAX_SYNCHRONIZATIONS = 10, 1
CASES: dict[str, dict[str, Any]] = {"eager layers": {}, "compiled layers": {"torch_compile": True}}


def build_layouts(vocabulary: int, scale: float) -> list[Row]:
    """Build a dozen batches of BATCH_ROWS rows, one after the other, each laid out in another way."""
    layouts: list[list[Row]] = []
    for seed in range(6):
        layouts.append(
            build_rows(BATCH_ROWS, vocabulary, shared=(seed % 3) * round(200 * scale), seed=seed, scale=scale)
        )
        turns = (2, 5, 8)[seed % 3]
        conversations = build_conversations(2 + seed // 3, vocabulary, turns=turns, seed=seed, scale=scale)
        rows = build_rows(BATCH_ROWS - len(conversations), vocabulary, seed=100 + seed, scale=scale)
        layouts.append(conversations + rows)
    return [row for layout in layouts for row in layout]


class StepCounter(TrainerCallback):
    """Record how many compilations and synchronizations there were at the end of each step."""

    def __init__(self, count_syncs: Callable[[], int]) -> None:
        self.count_syncs = count_syncs
        self.compilations: list[int] = []
        self.synchronizations: list[int] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.compilations.append(count_compilations())
        self.synchronizations.append(self.count_syncs())


def measure_run(setting: Setting, keys: dict[str, Any]) -> Run:
    device, shape = setting.device, setting.shape
    rows = build_layouts(shape.vocabulary, setting.scale)
    reset_peak(device)
    before = count_compilations()
    with tempfile.TemporaryDirectory() as folder, count_synchronizations(device) as count_syncs:
        counter = StepCounter(count_syncs)
        keys = {"per_device_train_batch_size": BATCH_ROWS, **keys}
        build_our_trainer(build_model(shape, device), rows, folder, device.type, [counter], **keys).train()
    compilations = [count - before for count in counter.compilations]
    half = len(compilations) // 2
    # The first step has no step end before it, and the last one reads what is left.
    syncs = [later - earlier for earlier, later in zip(counter.synchronizations, counter.synchronizations[1:])]
    return {
        "steps": len(compilations),
        "compilations": compilations[-1],
        "late_compilations": compilations[-1] - compilations[half - 1],
        "compilations_by_step": compilations,
        "synchronizations_by_step": syncs,
        "synchronizations": max(syncs[half:], default=0),
    }


def measure(setting: Setting) -> Run:
    results: Run = {"shape": setting.shape.name, "device": setting.device.type, "measurements": []}
    # On a CPU nothing is compiled unless asked for, and compiling takes minutes.
    for name, keys in list(CASES.items())[: None if setting.on_cuda else 1]:
        run: Run = {"name": name}
        with record_errors(run):
            run |= measure_run(setting, keys)
        results["measurements"].append(run)
        setting.save(results)
    return results


def build_tables(results: Run) -> list[Table]:
    def format_cells(run: Run) -> list[str]:
        syncs = str(run["synchronizations"]) if results["device"] == "cuda" else ""
        return [*(str(run[key]) for key in ("steps", "compilations", "late_compilations")), syncs]

    header = [results["shape"], "layouts", "compilations", "late", "most syncs a step"]
    return [build_table(header, results["measurements"], "{name}", format_cells)]
