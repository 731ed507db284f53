"""Run work on one process of a distributed run for all, or a share of it on each.

An error of one process is raised on all of them, so that none waits for a process that has ended. While one process
works, the others wait as long as it takes: not in a collective of the training, which NCCL would end with the whole run
after `ddp_timeout` (https://github.com/hiyouga/LLaMA-Factory/issues/2424).

    with main_process_first(args):
        rows = encode_rows()
    reason = run_on_main_process(args, lambda: find_damage(checkpoint))
    sums = run_on_all_processes(args, lambda: hash_share(args.process_index))

Checks that need a model's weights are decorated with `share_verdict`. Where one process alone has the weights
(training/fsdp.py), they are made there, and the others take its verdict:

    with use_verdicts_of_main_process(args):
        reason = find_packing_obstacle(model)
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch.distributed as dist
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainingArguments

from sft_pipeline.utils.errors import format_error

T = TypeVar("T")
P = ParamSpec("P")

LONGEST_WAIT = timedelta(days=7)  # a process that has ended is noticed at once, as its connections close


def wait_for_everyone() -> None:
    """Return when all processes have called this, however much later than the others the last one comes."""
    if dist.is_initialized():
        group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
        dist.barrier(group)
        dist.destroy_process_group(group)


@contextmanager
def main_process_first(training: TrainingArguments) -> Iterator[None]:
    """Run the block on the first process of each machine, and then, also if it has failed, on the others.

    As the method of TrainingArguments, but without a limit on the time that the first one takes.
    """
    if training.local_process_index:
        wait_for_everyone()
    try:
        yield
    finally:
        if not training.local_process_index:
            wait_for_everyone()


def run_on_main_process(training: TrainingArguments, function: Callable[[], T]) -> T:
    """Call `function` on the first process; return its result, or raise its error, on all processes.

    The result is pickled. For work that one process does for all, such as reading every byte of a checkpoint.
    """
    is_main = training.process_index == 0
    outcome: _Outcome = _call(function) if is_main else _Outcome()
    wait_for_everyone()
    [received] = broadcast_object_list([outcome.make_picklable()])
    return (outcome if is_main else received).get_result()


def run_on_all_processes(training: TrainingArguments, function: Callable[[], T]) -> list[T]:
    """Call `function` on each process and return all results, in the order of the processes, on all of them.

    The results are pickled. If it fails anywhere, the error of the first process that failed is raised on all.
    """
    outcome: _Outcome = _call(function)
    outcomes = gather_object([outcome.make_picklable()])
    outcomes[training.process_index if len(outcomes) > 1 else 0] = outcome  # with its traceback
    failed = next((outcome for outcome in outcomes if outcome.error), None)
    return [outcome.get_result() for outcome in ([failed] if failed else outcomes)]


@dataclass(frozen=True)
class _Outcome:
    """What a call returned or raised."""

    result: Any = None
    error: Exception | None = None

    def get_result(self) -> Any:
        if self.error:
            raise self.error
        return self.result

    def make_picklable(self) -> _Outcome:
        """Replace an error that cannot be sent to another process by one that can."""
        if self.error is None:
            return self
        try:
            pickle.loads(pickle.dumps(self.error))
            return self
        except Exception:  # pickling calls the code of any class
            return _Outcome(error=RuntimeError(f"{type(self.error).__name__}: {format_error(self.error)}"))


def _call(function: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(function())
    except Exception as error:  # raised again on every process
        return _Outcome(error=error)


def _run_here(function: Callable[[], Any]) -> Any:
    return function()


_run_check: ContextVar[Callable[[Callable[[], Any]], Any]] = ContextVar("run_check", default=_run_here)


def share_verdict(check: Callable[P, T]) -> Callable[P, T]:
    """Decorate a check of a model that needs its weights.

    Within `use_verdicts_of_main_process` the first process makes it, with the checks that it calls itself, and all
    processes get its result, which is pickled, or its error.
    """

    @wraps(check)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        def run_check() -> T:
            token = _run_check.set(_run_here)
            try:
                return check(*args, **kwargs)
            finally:
                _run_check.reset(token)

        return _run_check.get()(run_check)

    return run


@contextmanager
def use_verdicts_of_main_process(training: TrainingArguments) -> Iterator[None]:
    """Within this block, the first process alone makes the checks that are decorated with `share_verdict`."""
    token = _run_check.set(partial(run_on_main_process, training))
    try:
        yield
    finally:
        _run_check.reset(token)
