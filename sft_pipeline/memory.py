"""How much memory a process takes, how much is left, and what to lower when it runs out."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import TrainingArguments

from sft_pipeline.errors import SFTError

GIB = 2**30


def peak_memory_gib() -> float:
    """The most memory that was in use: of the device where it keeps count, else of the process."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / GIB, 2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (GIB if sys.platform == "darwin" else 2**20), 2)


def taken_and_free_gib(device: torch.device) -> tuple[float, float]:
    """What the process has now, and what it could still get: of a GPU, else of memory under all limits."""
    if device.type == "cuda":
        taken = torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - taken
        return taken / GIB, free / GIB
    return psutil.Process().memory_info().rss / GIB, min(psutil.virtual_memory().available, *left_in_groups()) / GIB


def left_in_groups(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[float]:
    """Bytes under each limit of Slurm or a container (control groups, version 2), from the process' own group up."""
    yield float("inf")
    lines = own.read_text(encoding="utf-8").splitlines() if own.is_file() else []
    name = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    for group in (root / name, *(root / name).parents):
        limit, used = group / "memory.max", group / "memory.current"
        if root in (group, *group.parents) and limit.is_file() and limit.read_text().strip() != "max":
            yield int(limit.read_text()) - int(used.read_text())


def less_a_batch(size: str, args: TrainingArguments) -> str:
    """What to lower, where a training step takes too much; `size` is the key that says how much a batch holds."""
    checkpointing = "" if args.activation_checkpointing else ", or set activation_checkpointing: true"
    return f"lower {size} (and raise gradient_accumulation_steps by as much) or max_length{checkpointing}"


@contextmanager
def enough_memory(where: str, remedy: str, args: TrainingArguments) -> Iterator[None]:
    """Raises SFTError where memory runs out.

    With auto_find_batch_size the error passes: the library begins again with fewer rows.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if args.auto_find_batch_size or not _ran_out(error):
            raise
        peak = f"{peak_memory_gib()} GiB at most until then"
        raise SFTError(f"memory ran out in {where} ({peak}): {remedy}; checkpoints are kept") from error


def _ran_out(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or should_reduce_batch_size(error)
