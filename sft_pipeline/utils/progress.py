"""Progress of what takes longer than a second; console.py says how bars look in a log."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

TICK = 1.0  # seconds


@contextmanager
def show_elapsed_time(what: str, disable: bool = False) -> Iterator[None]:
    """The seconds that go by while something is done whose share cannot be told, such as saving."""
    with tqdm(desc=what, bar_format="{desc}: {elapsed}", leave=False, disable=disable) as bar, _ticking(bar):
        yield


@contextmanager
def _ticking(bar: tqdm) -> Iterator[None]:
    done = threading.Event()

    def tick() -> None:
        while not done.wait(TICK):
            bar.update()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class TrainingProgress(ProgressCallback):
    """One bar with loss, tokens a second and time left; a line for each evaluation."""

    training_bar: Any  # the library says None, until there is one
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
            self.training_bar.write(
                f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}, "
                f"token accuracy {logs['eval_token_accuracy']:.1%}"
            )
        elif "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}, {logs['tokens_per_second']:.0f} tokens/s")
