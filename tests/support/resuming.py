"""A run of seven steps that saves each, cuts at any write, and the comparison of two ends."""

import json
import os
from pathlib import Path

import pytest
from support.trainers import make_rows, make_trainer

from sft_pipeline.commands.verify_resume import compare_checkpoints

ROWS = make_rows([(3, 1), (2, 20), (5, 2), (1, 9), (7, 1), (4, 3), (2, 14), (6, 5), (9, 1), (1, 1)])

HELD_OUT = make_rows([(3, 9), (2, 12)], seed=4)

STEPS = 7  # three an epoch, the third of two rows

LOGGED_EVERY = 2


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def cut_off(monkeypatch: pytest.MonkeyPatch, number: int, *more: tuple[type, str]) -> list[str]:
    """Let the first `number` calls that change the disk pass; raise Killed at each later one. Returns the calls."""
    calls: list[str] = []

    def count_calls(name, function):
        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) > number:
                raise Killed
            return function(*args, **kwargs)

        return call

    for owner, name in ((os, "fsync"), (os, "unlink"), (os, "rmdir"), (Path, "rename"), (Path, "write_text"), *more):
        monkeypatch.setattr(owner, name, count_calls(name, getattr(owner, name)))
    return calls


def build(folder: Path, callbacks=(), **arguments):
    more = {"optim": "adamw_torch", "max_grad_norm": 1.0, "max_steps": STEPS, "lr_scheduler_type": "cosine"}
    more |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.01}
    more |= {"save_strategy": "steps", "save_steps": 1, "logging_steps": LOGGED_EVERY}
    return make_trainer(folder, "packed", rows=ROWS, callbacks=callbacks, **{**more, **arguments})


def assert_same_end(whole: Path, resumed: Path) -> None:
    compared, differ = compare_checkpoints(whole / f"checkpoint-{STEPS}", resumed / f"checkpoint-{STEPS}")
    # save_steps differs in the two runs, as the resumed one saves at its end alone.
    assert [name for name in differ if "save_steps" not in name] == [] and compared > 100
    history = json.loads((resumed / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history] == [2, 4, 6]
