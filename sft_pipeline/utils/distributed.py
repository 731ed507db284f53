"""Work that one process does for all."""

from __future__ import annotations

from collections.abc import Callable

from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments


def run_on_main_process(training: TrainingArguments, look: Callable[[], str | None]) -> str | None:
    """What the first process finds, for all: it reads every byte of a checkpoint."""
    [found] = broadcast_object_list([look() if training.process_index == 0 else None])
    return found
