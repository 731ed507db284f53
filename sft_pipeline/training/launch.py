"""torchrun that ends as its workers did: with their exit status, and without a traceback of its own.

    python -m sft_pipeline.training.launch --nproc_per_node 2 -m sft_pipeline train CONFIG

The options are torchrun's. On its own it makes status 1 of every other one, and kills workers 30 seconds after SIGTERM.
Here 2 (bad input) and 75 (saved: start me again) come through, as does 128 + N from a worker that signal N has killed,
and after SIGTERM the workers have the time they need to end their step and save.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import suppress

import psutil
from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure


def main() -> None:
    """Start the workers that the command line asks for, and wait."""
    args = run.parse_args(None)
    args.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"  # what torchrun ends its workers for; SIGTERM is ours
    signal.signal(signal.SIGTERM, _pass_on)
    # Else (torch 2.13) workers that are started again find the addresses of those before them in the store.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # The workers have said why they end; torchrun would say it again, without the reason.
    logging.disable(logging.ERROR)
    try:
        run.run(args)
    except ChildFailedError as error:
        sys.exit(_failed(*error.get_first_failure()))
    except SignalException as told:
        sys.exit(128 + told.sigval)


def _pass_on(number: int, frame: object) -> None:
    """Tell the workers, but not the processes that they have started, and end when they have."""
    workers = psutil.Process().children()
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.send_signal(number)
    psutil.wait_procs(workers)
    statuses = [_status(worker.returncode or 0) for worker in workers] or [128 + number]
    sys.exit(min(filter(None, statuses), default=0))


def _failed(rank: int, failure: ProcessFailure) -> int:
    """The status after the first failure, which is told where the worker could not."""
    if failure.exitcode < 0:
        print(f"sft-pipeline: process {rank} was killed by {failure.signal_name()}", file=sys.stderr)
    return _status(failure.exitcode)


def _status(exitcode: int) -> int:
    """As a shell has it: Python counts signals from 0 down."""
    return exitcode if exitcode >= 0 else 128 - exitcode


if __name__ == "__main__":
    main()
