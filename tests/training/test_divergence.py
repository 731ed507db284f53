"""Divergence: a loss or gradient that is not finite or explodes stops the run and names its rows."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.resuming import ROWS, build
from transformers import TrainerCallback

from sft_pipeline.runs.checkpoints import find_newest_checkpoint
from sft_pipeline.training.divergence import describe_divergence, detect_divergence
from sft_pipeline.training.trainer import StepSums, SupervisedTrainer
from sft_pipeline.utils.errors import SFTError


class Poison(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 4:
            next(model.parameters()).data[3:] = float("nan")


@pytest.mark.parametrize("saved", [True, False])
def test_a_nan_loss_stops_the_run_names_its_rows_and_keeps_the_last_checkpoint(saved, tmp_path):
    trainer = build(tmp_path, [Poison()], save_strategy="steps" if saved else "no", save_total_limit=1)
    rows = trainer.build_batch_sampler().split_epoch(1)[1].tolist()
    numbers = ", ".join(map(str, rows))
    last_checkpoint = f"the last checkpoint is {tmp_path / 'checkpoint-4'}" if saved else "no checkpoint was saved"
    with pytest.raises(SFTError) as raised:
        trainer.train()
    assert raised.value.status == 2
    assert str(raised.value) == (
        f"step 5: the loss is nan, in training rows {numbers} (see {tmp_path / 'diverged.jsonl'}); {last_checkpoint}; "
        "lower learning_rate or max_grad_norm, or check these rows"
    )
    lines = [json.loads(line) for line in (tmp_path / "diverged.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == rows
    assert [line["input_ids"] for line in lines] == [ROWS[row]["input_ids"] for row in rows]
    assert find_newest_checkpoint(tmp_path) == (str(tmp_path / "checkpoint-4") if saved else None)


def test_an_exploding_loss_stops_the_run_and_is_not_saved(tmp_path):
    class Explode(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.lm_head.weight.data *= 1e3

    message = r"^step 3: the loss exploded: \d+\.\d nats per token, a uniform guess has 4\.6, in training rows \d+, "
    with pytest.raises(SFTError, match=message):
        build(tmp_path, [Explode()]).train()
    assert (
        find_newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2") and (tmp_path / "diverged.jsonl").is_file()
    )


def test_a_gradient_that_is_nan_is_not_saved(tmp_path):
    class Hook(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                next(model.parameters()).register_hook(lambda gradient: gradient * float("nan"))

    message = r"^step 2: the loss is \d+\.\d{3}, but the gradient norm is nan, in training rows"
    with pytest.raises(SFTError, match=message):
        build(tmp_path, [Hook()]).train()
    assert find_newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


class ReadLate(TrainerCallback):
    """Stand in for a device: what a step sums is on the host only when the next step ends."""

    def __init__(self, monkeypatch):
        self.read_at: list[tuple[int, int]] = []  # (step read, global step then)
        reduce_step, read = SupervisedTrainer._reduce_step, StepSums.read

        def reduce_late(trainer):
            self.trainer = trainer
            return replace(reduce_step(trainer), copied=SimpleNamespace(synchronize=lambda: None))

        def note_read(sums):
            self.read_at.append((sums.step, self.trainer.state.global_step))
            return read(sums)

        monkeypatch.setattr(SupervisedTrainer, "_reduce_step", reduce_late)
        monkeypatch.setattr(StepSums, "read", note_read)


def test_on_a_device_a_step_is_read_one_step_late_unless_something_is_due(tmp_path, monkeypatch):
    expected = build(tmp_path / "a", save_strategy="epoch")
    expected.train()
    late = ReadLate(monkeypatch)
    trainer = build(tmp_path / "b", save_strategy="epoch")
    trainer.train()
    # Logged at steps 2, 4 and 6; epochs end after steps 3 and 6; the last step is 7.
    assert late.read_at == [(1, 2), (2, 2), (3, 3), (4, 4), (5, 6), (6, 6), (7, 7)]
    losses, others = ([e["loss"] for e in t.state.log_history if "loss" in e] for t in (expected, trainer))
    assert losses == others and len(losses) > 2


def test_on_a_device_a_nan_loss_of_the_step_before_is_neither_logged_nor_saved(tmp_path, monkeypatch):
    ReadLate(monkeypatch)
    trainer = build(tmp_path, [Poison()], save_steps=2, logging_steps=2)
    with pytest.raises(SFTError, match=r"^step 5: the loss is nan, in training rows"):
        trainer.train()
    assert trainer.state.global_step == 6 and find_newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert all(entry["step"] <= 4 for entry in trainer.state.log_history)


def test_what_is_divergence():
    assert detect_divergence(9.0, 1e9, vocab_size=100) is None
    assert detect_divergence(float("inf"), 1.0, 100) == "the loss is inf"
    assert detect_divergence(1.0, float("inf"), 100) == "the loss is 1.000, but the gradient norm is inf"
    assert detect_divergence(9.3, 1.0, 100) == "the loss exploded: 9.3 nats per token, a uniform guess has 4.6"


def test_many_rows_are_not_all_named(tmp_path):
    assert ", 18, 19 and 5 more (see " in describe_divergence(tmp_path, 1, "the loss is nan", list(range(25)))
    assert "the loss is nan, in unknown training rows; no" in describe_divergence(tmp_path, 1, "the loss is nan", [])
