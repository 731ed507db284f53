"""Handle SIGTERM during training: finish the step and save before the process exits.

The trainer asks after each step whether a process received SIGTERM, and then lets `PreemptionCallback` stop the run
with the controls that `Trainer` gives its callbacks. Slurm and torchrun send SIGTERM to the workers of data loaders
too, which go on until their process ends them (`guard_workers`).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft_pipeline.config import get_output_dir
from sft_pipeline.utils.errors import RunPreempted


class SigtermHandler:
    """Context manager that sets `received` on SIGTERM instead of ending the process.

    Only the main thread can handle signals; in any other thread this does nothing.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous_handler: Any = None

    def __enter__(self) -> None:
        self.received = False
        if threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGTERM, self._receive)

    def __exit__(self, *exc_info: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._previous_handler or signal.SIG_DFL)

    def _receive(self, *signal_and_frame: object) -> None:
        self.received = True


def guard_workers(loader: DataLoader) -> DataLoader:
    """Let SIGTERM end the workers of a loader only where their process sends it; one that ends would end the run."""
    base = getattr(loader, "base_dataloader", loader)  # what accelerate has prepared is a wrapper
    base.worker_init_fn = partial(_start_worker, base.worker_init_fn)
    return loader


def _start_worker(start: Callable[[int], None] | None, worker: int) -> None:
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_sigterm_of_parent, daemon=True).start()
    if start is not None:
        start(worker)


def _await_sigterm_of_parent() -> None:
    parent = multiprocessing.parent_process()
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != (parent and parent.pid):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


class PreemptionCallback(TrainerCallback):
    """Save and stop after the step in which `stop` was called. Raises RunPreempted when the step is saved."""

    def __init__(self) -> None:
        self._stopping = False

    def stop(self, args: TrainingArguments, control: TrainerControl) -> None:
        """Let `Trainer` save the step that has just ended, and train no other."""
        self._stopping = True
        control.should_save = control.should_training_stop = True
        if args.metric_for_best_model is None:
            # Seconds may be left until SIGKILL, and the resumed run starts with this evaluation (train.py). It is made
            # now only where it decides which model is the best.
            control.should_evaluate = False

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """A trainer that was stopped may train again."""
        self._stopping = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._stopping:
            checkpoint = get_output_dir(args) / f"checkpoint-{state.global_step}"
            raise RunPreempted(f"SIGTERM: saved {checkpoint}; resume with --resume_from_checkpoint auto")

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save now if the step was not: with `save_strategy: best` an evaluation without a better model prevents it."""
        if self._stopping:
            control.should_evaluate, control.should_save = False, True
