"""Progress bars for saving, loading and training. `console.py` writes them to logs."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

UPDATE_SECONDS = 1.0  # between updates of the elapsed time
EVAL_LOSS = re.compile(r"eval_(?:(.+)_)?loss")  # the name of the loss of all held-out rows, or of one held-out set


@contextmanager
def show_elapsed_time(description: str, disable: bool = False) -> Iterator[None]:
    """Show the elapsed time while the block runs, for work whose progress is unknown, such as saving."""
    with (
        tqdm(desc=description, bar_format="{desc}: {elapsed}", leave=False, disable=disable) as bar,
        _update_regularly(bar),
    ):
        yield


@contextmanager
def _update_regularly(bar: tqdm) -> Iterator[None]:
    """Update the bar from a thread every UPDATE_SECONDS while the block runs."""
    finished = threading.Event()

    def update_bar() -> None:
        while not finished.wait(UPDATE_SECONDS):
            bar.update()

    thread = threading.Thread(target=update_bar, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


class TrainingProgress(ProgressCallback):
    """Show one bar with loss, tokens per second and remaining time, and print a line for each evaluation."""

    training_bar: Any  # annotated as None in transformers
    prediction_bar: Any

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("training")

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        super().on_prediction_step(*args, **kwargs)
        if self.prediction_bar is not None:
            self.prediction_bar.set_description("held-out loss", refresh=False)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if self.training_bar is None:
            return
        if "eval_loss" in logs:
            for match in filter(None, map(EVAL_LOSS.fullmatch, logs)):
                name, step = match[1], str(state.global_step)
                self.training_bar.write(
                    f"step {f'{step}, {name}' if name else step}: held-out loss {logs[match[0]]:.4f}, "
                    f"token accuracy {logs[match[0].removesuffix('loss') + 'token_accuracy']:.1%}"
                )
        elif "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}, {logs['tokens_per_second']:.0f} tokens/s")
