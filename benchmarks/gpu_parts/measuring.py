"""How the parts measure: settings and deadline, time, peak memory, synchronizations, compilations."""

from __future__ import annotations

import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from report import Run, Table
from scaling import PEAK, Shape
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from gpu_parts.inputs import SHAPES, SMALL_SHAPES
from sft_pipeline.training.memory import GIB, measure_peak_rss


@dataclass
class Setting:
    """What a part is asked for. file: where its results are written after each measurement, if anywhere."""

    device: torch.device
    shape_name: str = "qwen3"
    small: bool = False
    seconds: float = 300.0
    rounds: int = 2
    peak_flops: float = PEAK
    file: Path | None = None
    start_time: float = field(default_factory=time.monotonic)

    @property
    def shape(self) -> Shape:
        return (SMALL_SHAPES if self.small else SHAPES)[self.shape_name]

    @property
    def seconds_left(self) -> float:
        return self.start_time + self.seconds - time.monotonic()

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def scale(self) -> float:
        """The factor of all lengths of rows. Small batches on CUDA still have several blocks of 128 tokens."""
        return 1.0 if not self.small else 0.5 if self.on_cuda else 0.05

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what is compared: bf16 on CUDA, and float32 on a CPU, which may only emulate it."""
        return torch.bfloat16 if self.on_cuda else torch.float32

    def choose(self, size: Any, small_size: Any) -> Any:
        return small_size if self.small else size

    def describe(self) -> Run:
        return {"gpu": describe_device(self.device), "small": self.small}

    def save(self, results: Run) -> None:
        """Write what there is, so that it is not lost if the part is ended at its time limit."""
        if self.file:
            partial = self.file.with_suffix(".new")
            partial.write_text(json.dumps(self.describe() | results), encoding="utf-8")
            partial.replace(self.file)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_call(function: Callable[[], Any], device: torch.device, repeat: int = 10, warm_up: int = 3) -> float:
    """Return the median milliseconds of a call, without the first ones. Each is timed until the device is done."""
    for _ in range(warm_up):
        function()
    milliseconds = []
    for _ in range(repeat):
        synchronize(device)
        start_time = time.perf_counter()
        function()
        synchronize(device)
        milliseconds.append(1000 * (time.perf_counter() - start_time))
    return statistics.median(milliseconds)


def reset_peak(device: torch.device) -> None:
    """Free what is not used any more, and begin a new peak. On a CPU the peak is the whole process's."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def get_peak_gib(device: torch.device) -> float:
    """Return the peak allocated on the device since `reset_peak`; on a CPU the process's peak resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return measure_peak_rss() / GIB


@contextmanager
def record_errors(result: Run) -> Iterator[None]:
    """Put the first line of an error into `result`, so that the other measurements are still made."""
    try:
        yield
    except Exception as error:
        name = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
        result["error"] = f"{name}: {(str(error).splitlines() or [''])[0][:200]}"


def count_compilations() -> int:
    """Return how many graphs torch.compile has compiled in this process."""
    return counters["stats"]["unique_graphs"]


@contextmanager
def count_synchronizations(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yield a function that returns how often the host has waited for the device so far; 0 on a CPU."""
    if device.type != "cuda":
        yield lambda: 0
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: sum("synchroniz" in str(warning.message) for warning in caught)
        finally:
            torch.cuda.set_sync_debug_mode("default")


class StepClock(TrainerCallback):
    """Time the steps after the first `warm_up`. Waits for the device at the start and the end of them only."""

    def __init__(self, device: torch.device, warm_up: int) -> None:
        self.device, self.warm_up, self.steps = device, warm_up, 0
        self.start_time = self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.warm_up:
            synchronize(self.device)
            self.start_time = time.perf_counter()
        if state.global_step == state.max_steps:
            synchronize(self.device)
            self.seconds = time.perf_counter() - self.start_time
            self.steps = state.global_step - self.warm_up


def describe_device(device: torch.device) -> Run:
    """Return the card's name, memory, driver and releases, for the JSON of the results."""
    if device.type != "cuda":
        return {"name": "no GPU"}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / GIB, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "devices": torch.cuda.device_count(),
    }


def build_table(header: list[str], runs: list[Run], title: str, format_cells: Callable[[Run], list[str]]) -> Table:
    """Build a table with a row for each run: its title, a format string over it, and its cells, or else its error."""
    rows = []
    for run in runs:
        cells = [run["error"]] if "error" in run else format_cells(run)
        rows.append([title.format(**run), *cells, *[""] * (len(header) - 1 - len(cells))])
    return Table(header, rows)
