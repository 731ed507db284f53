"""Run torchrun, but exit with the status of the workers and without a traceback of the launcher.

    python -m sft_pipeline.training.launch --nproc_per_node 2 -m sft_pipeline train CONFIG

The options are those of torchrun. torchrun itself turns every failure into status 1, and kills workers 30 seconds after
SIGTERM. This launcher passes on 2 (bad input), 75 (saved, start again) and 128 + N (a worker was killed by signal N),
and after SIGTERM it waits until the workers have finished their step and saved.
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
    """Start the workers of the command line, wait for them, and exit with their status."""
    args = run.parse_args(None)
    args.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"  # for these torchrun stops its workers; SIGTERM is handled here
    signal.signal(signal.SIGTERM, _forward_signal)
    # Without this, restarted workers find the addresses of the previous ones in the shared store (torch 2.13).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # The workers print why they fail; torchrun would log the failure again, without the reason.
    logging.disable(logging.ERROR)
    try:
        run.run(args)
    except ChildFailedError as error:
        sys.exit(_report_failure(*error.get_first_failure()))
    except SignalException as error:
        sys.exit(128 + error.sigval)


def _forward_signal(number: int, frame: object) -> None:
    """Send the signal to the workers, but not to their own child processes; exit when the workers have ended."""
    workers = psutil.Process().children()
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.send_signal(number)
    psutil.wait_procs(workers)
    statuses = [_get_exit_status(worker.returncode or 0) for worker in workers] or [128 + number]
    sys.exit(min(filter(None, statuses), default=0))


def _report_failure(rank: int, failure: ProcessFailure) -> int:
    """Return the exit status of the worker that failed first; print a line if it was killed and could not."""
    if failure.exitcode < 0:
        print(f"sft-pipeline: process {rank} was killed by {failure.signal_name()}", file=sys.stderr)
    return _get_exit_status(failure.exitcode)


def _get_exit_status(exitcode: int) -> int:
    """Convert Python's -N for a process killed by signal N to the shell's 128 + N."""
    return exitcode if exitcode >= 0 else 128 - exitcode


if __name__ == "__main__":
    main()
