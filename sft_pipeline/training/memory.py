"""Measure memory, report when it runs out, configure malloc, and rehearse the heaviest batch before training."""

from __future__ import annotations

import ctypes
import logging
import math
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from sft_pipeline.data.batch_sampler import StepBatchSampler
from sft_pipeline.utils.constants import IGNORED
from sft_pipeline.utils.errors import SFTError

logger = logging.getLogger(__name__)

GIB = 2**30
SEARCH_EPOCHS = 3  # the heaviest micro-batch is searched for in the first epochs only
# mallopt parameters of glibc's malloc.h: the maximum number of blocks allocated with mmap, and the free memory at
# the top of the heap above which it is returned to the kernel.
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1


# Limits and usage


def read_cgroup_limits(
    cgroup_file: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[float]:
    """Yield the bytes left under each memory limit of Slurm or a container, and infinity first.

    These are the limits of the process' control group (version 2) and of all its parents.
    """
    yield float("inf")
    lines = cgroup_file.read_text(encoding="utf-8").splitlines() if cgroup_file.is_file() else []
    name = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    for group in (root / name, *(root / name).parents):
        limit, usage = group / "memory.max", group / "memory.current"
        if root in (group, *group.parents) and limit.is_file() and limit.read_text().strip() != "max":
            yield int(limit.read_text()) - int(usage.read_text())


def measure_memory_gib(device: torch.device) -> tuple[float, float]:
    """Return GiB in use by this process and GiB still available: of the GPU, else of RAM under all limits."""
    if device.type == "cuda":
        used = torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - used
        return used / GIB, free / GIB
    return psutil.Process().memory_info().rss / GIB, min(psutil.virtual_memory().available, *read_cgroup_limits()) / GIB


def measure_peak_rss(status_file: Path = Path("/proc/self/status")) -> int:
    """Return the peak resident memory of this process in bytes.

    On Linux this is VmHWM: `ru_maxrss` also counts the process that started this one, as it survives an exec.
    """
    lines = status_file.read_text().splitlines() if status_file.is_file() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_peak_memory_gib() -> float:
    """Return the peak GiB allocated on the current GPU, or without one the peak resident memory of the process."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / GIB, 2)
    return round(measure_peak_rss() / GIB, 2)


# Out-of-memory errors


def describe_batch_remedy(size_key: str, args: TrainingArguments) -> str:
    """Return which keys to lower for a training step to need less memory. size_key: the key of the batch size."""
    checkpointing = "" if args.activation_checkpointing else ", or set activation_checkpointing: true"
    if size_key == "per_device_train_batch_size":
        size_key += " (and raise gradient_accumulation_steps by the same factor)"
    return f"lower {size_key} or max_length{checkpointing}"


@contextmanager
def handle_out_of_memory(where: str, remedy: str, args: TrainingArguments) -> Iterator[None]:
    """Raise SFTError with the remedy if memory runs out.

    With auto_find_batch_size the error is not converted: the library catches it and retries with smaller batches.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if args.auto_find_batch_size or not _is_out_of_memory(error):
            raise
        peak = measure_peak_memory_gib()
        raise SFTError(f"out of memory in {where} (peak {peak} GiB): {remedy}; checkpoints are kept") from error


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or should_reduce_batch_size(error)


# malloc


def set_malloc_options() -> bool:
    """Make malloc keep freed memory in the process; return whether the C library supports it (glibc only).

    A training step on a CPU allocates and frees some gigabytes of activations. By default glibc maps each large block
    with mmap and unmaps it when it is freed, so the kernel clears the same pages at every step: filling new tensors of
    10 MB takes four to five times as long as filling reused ones. Peak memory does not change.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


# Rehearsal of the heaviest batch


def rehearse_heaviest_batch(
    trainer: Trainer,
    model: nn.Module,
    batches: StepBatchSampler,
    step: Callable[..., Tensor],
    remedy: str,
    repeats: int = 1,
) -> float | None:
    """Run forward and backward on the micro-batch that needs the most memory, and log the peak.

    Every process runs `step(model, inputs, num_targets)` on the same micro-batch, `repeats` times. Returns the computed
    tokens per second of the last time. Weights, gradients, mode and random states are afterwards as before. Raises
    SFTError with `remedy` if memory runs out. Does nothing and returns None under DeepSpeed, whose backward pass may
    change weights.
    """
    if trainer.is_deepspeed_enabled:
        return None
    args = trainer.args
    longest_together = args.train_sampling_strategy == "group_by_length"
    rows = find_heaviest_batch(batches, math.ceil(args.num_train_epochs), args.max_steps, longest_together)
    dataset: Any = trainer.train_dataset
    inputs = trainer.data_collator([dataset[row] for row in rows])
    size, device = f"{len(rows)} rows, {inputs['input_ids'].numel()} tokens", trainer.args.device
    num_targets, was_training = inputs["labels"].ne(IGNORED).sum().clamp(min=1).to(device), model.training
    with handle_out_of_memory(f"the heaviest batch ({size})", remedy, trainer.args), restore_random_states(device):
        optimizer_state = _create_optimizer_state(trainer)
        for _ in range(repeats):
            start = time.perf_counter()
            step(model, inputs, num_targets).item()  # waits for the device
    tokens_per_second = batches.lengths[rows].sum() / (time.perf_counter() - start)
    model.zero_grad()
    model.train(was_training)
    _log_peak_memory(size, sum(map(_count_local_bytes, optimizer_state)) / GIB, device)
    return float(tokens_per_second)


def find_heaviest_batch(
    batches: StepBatchSampler, epochs: int = 1, max_steps: int = -1, longest_together: bool = False
) -> list[int]:
    """Return the row indices of the micro-batch with the most tokens, over all processes and the first epochs.

    Padding counts as tokens. With packing, only one step is split into micro-batches: the one with the most tokens per
    micro-batch, or with the longest row. epochs, max_steps (if positive): of the run. longest_together: whether the
    longest rows form a batch (group_by_length).
    """
    lengths = batches.lengths
    if longest_together:
        return np.argsort(lengths, kind="stable")[-batches.rows :].tolist()
    steps = [step for epoch in range(min(epochs, SEARCH_EPOCHS)) for step in batches.split_epoch(epoch)]
    steps = steps[:max_steps] if max_steps > 0 else steps

    def estimate_tokens(step: np.ndarray) -> float:
        return max(lengths[step].sum() / batches.count_micro_batches(step), lengths[step].max())

    def count_tokens(rows: list[int]) -> float:
        return lengths[rows].sum() if batches.packed else len(rows) * lengths[rows].max()

    if batches.packed:
        steps = [max(steps, key=estimate_tokens)]
    return max([rows for step in steps for rows in batches.split_step(step) if rows], key=count_tokens)


def _create_optimizer_state(trainer: Trainer) -> list[Tensor]:
    """Allocate as much as the state of Adam will take, two values per weight.

    Returns nothing if the state exists already, or for another optimizer, whose state size is unknown.
    """
    optimizer: Any = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    if optimizer.state or not isinstance(optimizer, torch.optim.Adam):
        return []
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return [torch.empty_like(weight) for weight in weights for _ in range(2)]


def _count_local_bytes(tensor: Tensor) -> int:
    """Return the bytes on this process, of a DTensor those of the local shard."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).nbytes


@contextmanager
def restore_random_states(device: torch.device) -> Iterator[None]:
    """Restore the random states of Python, NumPy, torch and the device when the context ends."""
    generators: list[Any] = [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    torch_states = [generator.get_rng_state() for generator in generators]
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for generator, state in zip(generators, torch_states, strict=True):
            generator.set_rng_state(state)


def _log_peak_memory(size: str, optimizer_gib: float, device: torch.device) -> None:
    """Log the peak of the heaviest batch and what is left, or warn if training will not fit.

    optimizer_gib: the optimizer state to come. The peak of a GPU includes it already; resident memory does not, since
    its pages have not been written to.
    """
    peak = measure_peak_memory_gib() + (0 if device.type == "cuda" else optimizer_gib)
    used, free = measure_memory_gib(device)
    remaining = used + free - peak
    if remaining < 0:
        message = "heaviest batch (%s): training needs %.2f GiB, %.2f GiB are available; the process may be killed"
        logger.warning(message, size, peak, used + free)
    else:
        logger.info("heaviest batch (%s): peak %.2f GiB, %.2f GiB left", size, peak, remaining)
