"""Run work on one process of a distributed run."""

from __future__ import annotations

from collections.abc import Callable

from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments


def run_on_main_process(training: TrainingArguments, function: Callable[[], str | None]) -> str | None:
    """Call `function` on the first process and return its result on all processes.

    For checks that read every byte of a checkpoint, which one process does for all.
    """
    [result] = broadcast_object_list([function() if training.process_index == 0 else None])
    return result
