"""A process of a distributed run that hangs or is gone: which one, in the place of a library's page of addresses.

Every collective of torch.distributed waits `ddp_timeout` seconds (of TrainingArguments; 1800) for all processes. Where
gloo gives up, each process that did arrive says so in the run's store, and whoever is missing there is named. NCCL ends
the whole process by itself instead, after lines of its own (`Watchdog caught collective operation timeout`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

from sft_pipeline.utils.errors import SFTError

GAVE_UP = re.compile(r"timed out|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)
GRACE = timedelta(seconds=10)  # between the first process that gives up and the last


@contextmanager
def report_lost_ranks() -> Iterator[None]:
    """Raises SFTError that names the ranks that did not arrive where the others had to."""
    try:
        yield
    except RuntimeError as error:
        if not is_collective_timeout(error):
            raise
        raise SFTError(
            f"{_who()}; see its log; ddp_timeout says how long is waited, and checkpoints are kept"
        ) from error


def is_collective_timeout(error: BaseException) -> bool:
    """Whether a collective waited in vain."""
    return isinstance(error, RuntimeError) and dist.is_initialized() and bool(GAVE_UP.search(str(error)))


def _who() -> str:
    ranks = [str(rank) for rank in find_missing_ranks(GRACE)]
    if not ranks:
        return "the processes lost each other, and all of them still answer: the network failed, or one was too slow"
    return f"rank {', '.join(ranks)} did not arrive where the other processes wait: it hangs or is gone"


def find_missing_ranks(grace: timedelta) -> list[int]:
    """The ranks that do not say within `grace` that they gave up too; rank 0 if the store, which it holds, is gone."""
    own, names = dist.get_rank(), [f"sft_pipeline/gave_up/{rank}" for rank in range(dist.get_world_size())]
    try:
        store = distributed_c10d._get_default_store()
        store.set(names[own], "1")
        with suppress(RuntimeError):  # not all of them came
            store.wait(names, grace)
        return [rank for rank, name in enumerate(names) if not store.check([name])]
    except RuntimeError:
        return [0]
