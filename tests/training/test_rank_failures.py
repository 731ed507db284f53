"""Rank failures: the ranks that hang or have exited are named."""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from support.processes import run_ranks
from support.resuming import build
from support.trainers import CallBeforeStep

from sft_pipeline.runs.checkpoints import find_newest_checkpoint
from sft_pipeline.training import rank_failures
from sft_pipeline.training.rank_failures import find_missing_ranks, report_lost_ranks
from sft_pipeline.utils.errors import SFTError


def run_worker(process: int, folder: str) -> None:
    """Train in one of two processes; the second sleeps in the third step for longer than the timeout."""
    rank_failures.GRACE_PERIOD = timedelta(seconds=1)
    group = torch.distributed.distributed_c10d
    callbacks = [CallBeforeStep(1, lambda: group._set_pg_timeout(timedelta(seconds=5)))]
    if process == 1:
        callbacks.append(CallBeforeStep(2, lambda: time.sleep(30)))
    try:
        with report_lost_ranks():
            build(Path(folder), callbacks, gradient_accumulation_steps=1, ddp_backend="gloo").train()
    except SFTError as error:
        (Path(folder) / f"error_{process}").write_text(str(error))
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.real
def test_the_rank_that_hangs_is_named(tmp_path):
    context = run_ranks(run_worker, 2, str(tmp_path), join=False)
    while context.processes[0].is_alive():
        time.sleep(0.1)
    for process in context.processes:
        process.kill()
    assert (tmp_path / "error_0").read_text() == (
        "rank 1 did not reach the collective that the other ranks wait in: it hangs or has exited; see its log; "
        "ddp_timeout sets how long ranks wait; checkpoints are kept"
    )
    assert find_newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


class Store:
    """A stand-in for the store of a process group. unreachable: the process that holds it has exited."""

    def __init__(self, *arrived: int, unreachable: bool = False):
        self.keys, self.unreachable = {f"sft_pipeline/timed_out/{rank}" for rank in arrived}, unreachable

    def set(self, key, value):
        if self.unreachable:
            raise torch.distributed.DistNetworkError("connection reset")
        self.keys.add(key)

    def wait(self, keys, timeout):
        if not self.keys >= set(keys):
            raise torch.distributed.DistStoreError("wait timeout")

    def check(self, keys):
        return self.keys >= set(keys)


@pytest.mark.parametrize(
    ("store", "ranks"), [(Store(1), [2, 3]), (Store(1, 2, 3), []), (Store(unreachable=True), [0]), (Store(3, 2), [1])]
)
def test_find_missing_ranks(store, ranks, monkeypatch):
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_store", lambda: store)
    assert find_missing_ranks(timedelta(seconds=1)) == ranks


def test_errors_of_one_process_are_not_converted():
    for text in ("Timed out waiting 5ms for recv operation", "shapes do not fit"):  # no process group here
        with pytest.raises(RuntimeError, match=text), report_lost_ranks():
            raise RuntimeError(text)
