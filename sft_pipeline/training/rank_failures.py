"""Name the ranks that hang or have exited, in one line instead of a library's traceback.

Every collective of torch.distributed waits `ddp_timeout` seconds (of TrainingArguments; 1800) for all ranks. When gloo
times out, each rank that was waiting sets a key in the store of the process group, and the ranks without a key are the
missing ones. NCCL ends the whole process instead, after log lines of its own (`Watchdog caught collective operation
timeout`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

from sft_pipeline.utils.errors import SFTError

TIMEOUT_ERROR = re.compile(r"timed out|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)
GRACE_PERIOD = timedelta(seconds=10)  # between the timeouts of the first rank and the last


@contextmanager
def report_lost_ranks() -> Iterator[None]:
    """Raise SFTError naming the ranks that did not reach a collective, in place of its RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        if not is_collective_timeout(error):
            raise
        raise SFTError(
            f"{_describe_missing_ranks()}; see its log; ddp_timeout sets how long ranks wait; checkpoints are kept"
        ) from error


def is_collective_timeout(error: BaseException) -> bool:
    """Whether a collective timed out or lost its connection to another rank."""
    return isinstance(error, RuntimeError) and dist.is_initialized() and bool(TIMEOUT_ERROR.search(str(error)))


def _describe_missing_ranks() -> str:
    ranks = [str(rank) for rank in find_missing_ranks(GRACE_PERIOD)]
    if not ranks:
        return "a collective timed out, but all ranks still respond: the network failed, or a rank was too slow"
    return f"rank {', '.join(ranks)} did not reach the collective that the other ranks wait in: it hangs or has exited"


def find_missing_ranks(grace_period: timedelta) -> list[int]:
    """Return the ranks that do not report a timeout within the grace period.

    That is rank 0, which holds the store, if the store cannot be reached.
    """
    keys = [f"sft_pipeline/timed_out/{rank}" for rank in range(dist.get_world_size())]
    own_key = keys[dist.get_rank()]
    try:
        store = distributed_c10d._get_default_store()
        store.set(own_key, "1")
        with suppress(RuntimeError):  # some keys are missing
            store.wait(keys, grace_period)
        return [rank for rank, key in enumerate(keys) if not store.check([key])]
    except RuntimeError:
        return [0]
