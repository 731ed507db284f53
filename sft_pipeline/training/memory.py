"""How much memory a process takes, how much is left, and what to lower when it runs out."""

from __future__ import annotations

import ctypes
import logging
import random
import resource
import sys
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
from sft_pipeline.utils.errors import SFTError

GIB = 2**30


def measure_peak_memory_gib() -> float:
    """The most memory that was in use: of the device where it keeps count, else of the process."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / GIB, 2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (GIB if sys.platform == "darwin" else 2**20), 2)


def measure_memory_gib(device: torch.device) -> tuple[float, float]:
    """What the process has now, and what it could still get: of a GPU, else of memory under all limits."""
    if device.type == "cuda":
        taken = torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - taken
        return taken / GIB, free / GIB
    return psutil.Process().memory_info().rss / GIB, min(psutil.virtual_memory().available, *read_cgroup_limits()) / GIB


def read_cgroup_limits(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[float]:
    """Bytes under each limit of Slurm or a container (control groups, version 2), from the process' own group up."""
    yield float("inf")
    lines = own.read_text(encoding="utf-8").splitlines() if own.is_file() else []
    name = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    for group in (root / name, *(root / name).parents):
        limit, used = group / "memory.max", group / "memory.current"
        if root in (group, *group.parents) and limit.is_file() and limit.read_text().strip() != "max":
            yield int(limit.read_text()) - int(used.read_text())


def describe_batch_remedy(size: str, args: TrainingArguments) -> str:
    """What to lower, where a training step takes too much; `size` is the key that says how much a batch holds."""
    checkpointing = "" if args.activation_checkpointing else ", or set activation_checkpointing: true"
    return f"lower {size} (and raise gradient_accumulation_steps by as much) or max_length{checkpointing}"


@contextmanager
def handle_out_of_memory(where: str, remedy: str, args: TrainingArguments) -> Iterator[None]:
    """Raises SFTError where memory runs out.

    With auto_find_batch_size the error passes: the library begins again with fewer rows.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if args.auto_find_batch_size or not _ran_out(error):
            raise
        peak = f"{measure_peak_memory_gib()} GiB at most until then"
        raise SFTError(f"memory ran out in {where} ({peak}): {remedy}; checkpoints are kept") from error


def _ran_out(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or should_reduce_batch_size(error)


# glibc's malloc.h: mallopt's names for "most blocks in mappings of their own" and "free memory that is given back".
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1


def set_malloc_options() -> bool:
    """Let freed memory stay with the process; returns whether the C library could be told so (glibc alone).

    A training step on the CPU allocates and frees some gigabytes of activations. By default glibc maps each large
    block anew and gives it back when it is freed, so the kernel clears the same pages at every step: filling fresh
    tensors of 10 MB takes four to five times as long as filling kept ones. The peak stays what it was.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


logger = logging.getLogger(__name__)

EPOCHS = 3  # the heaviest micro-batch is looked for in so many


def rehearse_heaviest_batch(
    trainer: Trainer, model: nn.Module, batches: StepBatchSampler, step: Callable[..., Tensor], remedy: str
) -> None:
    """`step(model, inputs, targets)` with the same micro-batch in every process.

    Raises SFTError where memory runs out; `remedy` is what to do then.
    """
    if _steps_while_going_back(trainer):
        return
    rows = find_heaviest_batch(batches, longest_together=trainer.args.train_sampling_strategy == "group_by_length")
    dataset: Any = trainer.train_dataset
    inputs = trainer.data_collator([dataset[row] for row in rows])
    what, device = f"{len(rows)} rows, {inputs['input_ids'].numel()} tokens", trainer.args.device
    targets, was_training = trainer._get_num_items_in_batch([inputs], device), model.training
    with handle_out_of_memory(f"the heaviest batch ({what})", remedy, trainer.args), restore_random_states(device):
        kept = _optimizer_state(trainer)
        step(model, inputs, targets)
    model.zero_grad()
    model.train(was_training)
    _say(what, sum(map(_local_bytes, kept)) / GIB, device)


def find_heaviest_batch(batches: StepBatchSampler, longest_together: bool = False) -> list[int]:
    """The rows of the micro-batch with the most tokens, over all processes and the first epochs.

    Of packed rows, one of the step that has the most tokens a micro-batch, or the longest row.
    """
    lengths = batches.lengths
    if longest_together:
        return np.argsort(lengths, kind="stable")[-batches.rows :].tolist()
    found = [step for epoch in range(min(batches.epochs, EPOCHS)) for step in batches.split_epoch(epoch)]
    found = found[: batches.max_steps] if batches.max_steps > 0 else found
    if batches.packed:
        found = [
            max(
                found,
                key=lambda step: max(lengths[step].sum() / batches.count_micro_batches(step), lengths[step].max()),
            )
        ]
    divided = [rows for step in found for rows in batches.split_step(step) if rows]
    return max(divided, key=lambda rows: lengths[rows].sum() if batches.packed else len(rows) * lengths[rows].max())


def _steps_while_going_back(trainer: Trainer) -> bool:
    """Whether a backward pass alone changes weights: DeepSpeed's engine, and optimizers that step layer by layer."""
    optimizer = str(trainer.args.optim)
    return trainer.is_deepspeed_enabled or "lomo" in optimizer or "layerwise" in optimizer


def _optimizer_state(trainer: Trainer) -> list[Tensor]:
    """As much as Adam will keep, two numbers a weight, if it has not yet; of other optimizers it is not known."""
    optimizer: Any = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    if optimizer.state or not isinstance(optimizer, torch.optim.Adam):
        return []
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return [torch.empty_like(weight) for weight in weights for _ in range(2)]


def _local_bytes(tensor: Tensor) -> int:
    """Of a tensor that is divided among processes, this one's part."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).nbytes


@contextmanager
def restore_random_states(device: torch.device) -> Iterator[None]:
    """All random states are afterwards what they were."""
    generators: list[Any] = [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]
    before, of_numpy, states = random.getstate(), np.random.get_state(), [one.get_rng_state() for one in generators]
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(of_numpy)
        for one, state in zip(generators, states, strict=True):
            one.set_rng_state(state)


def _say(what: str, kept: float, device: torch.device) -> None:
    """kept: GiB of the optimizer to come. A GPU's peak holds them already; memory not yet written to is not taken."""
    peak = measure_peak_memory_gib() + (0 if device.type == "cuda" else kept)
    taken, free = measure_memory_gib(device)
    left = taken + free - peak
    if left < 0:
        logger.warning(
            "heaviest batch (%s): training needs %.2f GiB and %.2f are there; it may be killed",
            what,
            peak,
            taken + free,
        )
    else:
        logger.info("heaviest batch (%s): %.2f GiB at most, %.2f stay free", what, peak, left)
