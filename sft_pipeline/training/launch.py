"""Start training as torchrun or `accelerate launch` does, but exit with the status of the workers and no traceback.

    python -m sft_pipeline.training.launch --nproc_per_node 2 -m sft_pipeline train CONFIG
    python -m sft_pipeline.training.launch --config_file FILE --num_processes 2 -m sft_pipeline train CONFIG

The options are those of torchrun, or with `--config_file`, a config file of accelerate, those of `accelerate launch`.
These turn every failure into status 1, and kill or leave behind workers that are still saving after SIGTERM. This
launcher passes on 2 (bad input), 75 (saved, start again) and 128 + N (a worker was killed by signal N), and after
SIGTERM it waits until the workers have finished their step and saved.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import takewhile

import psutil
from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from sft_pipeline.utils.errors import SFTError, format_error

HANDLED_SIGNALS = "SIGINT,SIGHUP,SIGQUIT"  # for these torchrun stops its workers; SIGTERM is handled here


def main() -> None:
    """Start the workers of the command line, wait for them, and exit with their status."""
    signal.signal(signal.SIGTERM, _forward_signal)
    # Without this, restarted workers find the addresses of the previous ones in the shared store (torch 2.13).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # The workers print why they fail; torchrun would log the failure again, without the reason.
    logging.disable(logging.ERROR)
    try:
        if any(word.startswith("--config_file") for word in takewhile(lambda word: word != "-m", sys.argv[1:])):
            _launch_with_accelerate(sys.argv[1:])
        else:
            args = run.parse_args(None)
            args.signals_to_handle = HANDLED_SIGNALS
            run.run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        sys.exit(_report_failure(rank, failure.exitcode))
    except subprocess.CalledProcessError as error:  # accelerate starts a single worker without torchrun
        sys.exit(_report_failure(0, error.returncode))
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except SFTError as error:
        print(f"sft-pipeline: {error}", file=sys.stderr)
        sys.exit(error.status)


def _launch_with_accelerate(words: Sequence[str]) -> None:
    """Start the workers as `accelerate launch` with these options does. Raises SFTError for a bad config file."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import DistributedType

    args = launch_command_parser().parse_args(words)
    args.signals_to_handle = HANDLED_SIGNALS
    if not os.path.isfile(args.config_file):
        raise SFTError(f"{args.config_file}: no such file; give one such as configs/accelerate/fsdp2.yaml")
    try:
        config = load_config_from_file(args.config_file)
    except Exception as error:  # of many types, as PyYAML and the constructors of enums and classes raise them
        raise SFTError(f"{args.config_file}: no config file of accelerate: {format_error(error)}") from error
    if config.distributed_type == DistributedType.MULTI_CPU and not config.mpirun_config:
        raise SFTError(
            f"{args.config_file}: distributed_type MULTI_CPU starts one process, unless mpirun_config is set; "
            "use MULTI_GPU, as in configs/accelerate/cpu.yaml"
        )
    if config.use_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # accelerate itself sets it for a single process only
    # As torchrun does on one machine: on a free port, and without the addresses of workers that were restarted.
    args.standalone = (args.num_machines or config.num_machines) == 1
    try:
        launch_command(args)
    except (ValueError, ImportError, ConnectionError) as error:
        raise SFTError(f"{args.config_file}: {format_error(error)}") from error


def _forward_signal(number: int, frame: object) -> None:
    """Send the signal to the workers, but not to their own child processes; exit when the workers have ended."""
    workers = psutil.Process().children()
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.send_signal(number)
    psutil.wait_procs(workers)
    statuses = [_get_exit_status(worker.returncode or 0) for worker in workers] or [128 + number]
    sys.exit(min(filter(None, statuses), default=0))


def _report_failure(rank: int, exitcode: int) -> int:
    """Return the exit status of the worker that failed first; print a line if it was killed and could not."""
    if exitcode < 0:
        print(f"sft-pipeline: process {rank} was killed by {signal.Signals(-exitcode).name}", file=sys.stderr)
    return _get_exit_status(exitcode)


def _get_exit_status(exitcode: int) -> int:
    """Convert Python's -N for a process killed by signal N to the shell's 128 + N."""
    return exitcode if exitcode >= 0 else 128 - exitcode


if __name__ == "__main__":
    main()
