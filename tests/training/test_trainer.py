"""SupervisedTrainer: exact accumulation, evaluation weighted by tokens, best model and early stopping."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from support.trainers import IGNORED, UNEVEN, make_model, make_rows, make_trainer
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
)

from sft_pipeline.training.memory import measure_peak_memory_gib
from sft_pipeline.training.trainer import RunPlan, compute_eval_metrics, count_tokens
from sft_pipeline.utils.progress import TrainingProgress


def get_trained_ids(folder, **arguments) -> list[list[int]]:
    """Return the input_ids of the first epoch, one row per batch, in training order."""
    loader = make_trainer(folder, per_device_train_batch_size=1, **arguments).get_train_dataloader()
    return [batch["input_ids"][batch["attention_mask"].bool()].tolist() for batch in loader]


def test_row_order_follows_seed_and_sampling_strategy(tmp_path):
    rows = list(UNEVEN["input_ids"])
    shuffled = get_trained_ids(tmp_path, seed=5)
    assert sorted(shuffled) == sorted(rows) != shuffled != rows
    assert get_trained_ids(tmp_path, seed=9, data_seed=5) == shuffled != get_trained_ids(tmp_path, seed=9)
    assert get_trained_ids(tmp_path, train_sampling_strategy="sequential") == rows
    grouped = get_trained_ids(tmp_path, train_sampling_strategy="group_by_length")
    assert sorted(grouped) == sorted(rows) and len(grouped[0]) == max(map(len, rows)), "the sampler of the library"


class GradientRecorder(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters()}


def compute_step_gradients(folder, collator: str, size: int, accumulation: int) -> dict[str, torch.Tensor]:
    recorder = GradientRecorder()
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    make_trainer(folder, collator, callbacks=[recorder], **sizes).train()
    return recorder.gradients


@pytest.fixture(scope="module")
def reference_gradients() -> dict[str, torch.Tensor]:
    """Gradients of the mean loss over all targets of the eight rows, by the plain forward pass, row by row."""
    model = make_model()
    total = sum(label != IGNORED for row in UNEVEN["labels"] for label in row)
    for row in UNEVEN:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        (torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"]), reduction="sum") / total).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("collator", ["padded", "packed"])
@pytest.mark.parametrize(("size", "accumulation"), [(8, 1), (4, 2), (1, 8)])
def test_accumulated_gradients_equal_those_of_the_whole_batch(
    size, accumulation, collator, reference_gradients, tmp_path
):
    grads = compute_step_gradients(tmp_path, collator, size, accumulation)
    assert grads.keys() == reference_gradients.keys()
    for name, expected in reference_gradients.items():
        torch.testing.assert_close(grads[name], expected, rtol=0, atol=1e-5)
    assert max(g.abs().max() for g in grads.values()) > 1e-2  # else the tolerance would hide everything


@pytest.mark.parametrize("collator", ["padded", "packed"])
def test_activation_checkpointing_does_not_change_gradients(collator, reference_gradients, tmp_path, monkeypatch):
    """Each layer runs twice, in the forward and in the backward pass."""
    # The rehearsal computes the layers as well.
    monkeypatch.setattr("sft_pipeline.training.trainer.rehearse_heaviest_batch", lambda *_, **__: None)
    recorder, calls = GradientRecorder(), []
    options = {"per_device_train_batch_size": 8, "activation_checkpointing": True}
    trainer = make_trainer(tmp_path, collator, callbacks=[recorder], **options)
    for layer in trainer.model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert len(calls) == 2 * len(trainer.model.model.layers)
    for name, expected in reference_gradients.items():
        torch.testing.assert_close(recorder.gradients[name], expected, rtol=0, atol=1e-5)


def compute_reference_metrics(model, rows: Dataset) -> tuple[float, float]:
    """Return loss (nats per target) and token accuracy over all rows, by the plain forward pass, row by row."""
    nll = targets = correct = 0.0
    for row in rows:
        labels = torch.tensor(row["labels"])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        nll += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        targets += labels.ne(IGNORED).sum().item()
        correct += (logits.argmax(-1) == labels).sum().item()
    return nll / targets, correct / targets


@settings(deadline=None, max_examples=12)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 9)), min_size=1, max_size=9),
    size=st.integers(1, 10),
    collator=st.sampled_from(["padded", "packed"]),
)
def test_evaluation_is_weighted_by_tokens_for_any_batch_size(lengths, size, collator, tmp_path_factory):
    rows = make_rows(lengths)
    trainer = make_trainer(
        tmp_path_factory.getbasetemp() / "eval", collator, held_out=rows, per_device_eval_batch_size=size
    )
    metrics = trainer.evaluate()
    loss, accuracy = compute_reference_metrics(make_model().eval(), rows)
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert metrics["eval_token_accuracy"] == pytest.approx(accuracy)


def test_eval_metrics_sum_before_dividing():
    """The mean of the rows' means would be 2.5 here. A loss whose exponential overflows has infinite perplexity."""
    metrics = compute_eval_metrics(np.array([[4.0, 1, 0], [3.0, 3, 3]]))
    assert metrics == {"loss": 1.75, "perplexity": math.exp(1.75), "token_accuracy": 0.75}
    assert compute_eval_metrics(np.array([[800.0, 1, 0]]))["perplexity"] == math.inf


@pytest.mark.parametrize("collator", ["padded", "packed"])
def test_count_tokens_excludes_padding(collator, tmp_path):
    assert count_tokens(make_trainer(tmp_path, collator).data_collator(list(UNEVEN))) == sum(
        map(len, UNEVEN["input_ids"])
    )


@pytest.mark.parametrize("collator", ["padded", "packed"])
def test_tokens_per_second_counts_training_tokens(collator, tmp_path, monkeypatch):
    """Two epochs of eight rows, without evaluations; train() resets the count."""
    sizes = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = make_trainer(tmp_path, collator, held_out=UNEVEN, eval_strategy="steps", eval_steps=1, **sizes)
    trainer.train()
    assert trainer._num_tokens == 2 * sum(map(len, UNEVEN["input_ids"]))
    trainer.train()
    assert trainer._num_tokens == 2 * sum(map(len, UNEVEN["input_ids"]))
    # 10 seconds of training and 30 of evaluation.
    trainer._start_time, trainer._eval_seconds = 100.0, 30.0
    monkeypatch.setattr("sft_pipeline.training.trainer.time.perf_counter", lambda: 140.0)
    assert trainer.tokens_per_second() == pytest.approx(trainer._num_tokens / 10)


def test_the_first_evaluation_is_before_the_first_step(tmp_path):
    trainer = make_trainer(tmp_path, held_out=UNEVEN, eval_on_start=True, eval_strategy="steps", eval_steps=1)
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [0, 1]
    assert evaluations[0]["eval_loss"] == pytest.approx(
        compute_reference_metrics(make_model().eval(), UNEVEN)[0], rel=1e-5
    )
    [logged] = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged["tokens_per_second"] > 0 and logged["peak_memory_gib"] == pytest.approx(
        measure_peak_memory_gib(), abs=0.1
    )


# Training on random rows does not help on other random rows, so the held-out loss soon rises.
WORSENING = {
    "held_out": make_rows([(3, 9), (2, 12), (4, 7)], seed=4),
    "learning_rate": 1.0,
    "max_steps": 12,
    "eval_on_start": True,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 1,
    "load_best_model_at_end": True,
}


def test_early_stopping_ends_the_run_and_loads_the_best_model(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[EarlyStoppingCallback(2)], **WORSENING)
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e and e["step"]}
    best = min(losses, key=losses.get)
    assert trainer.state.global_step == best + 2 < WORSENING["max_steps"]
    assert trainer.state.best_metric == losses[best]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)


def test_progress_bar_shows_loss_speed_and_evaluations(tmp_path, capsys):
    arguments = {"disable_tqdm": False, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(tmp_path, held_out=UNEVEN, eval_on_start=True, **arguments)
    assert sum(isinstance(c, TrainingProgress) for c in trainer.callback_handler.callbacks) == 1
    trainer.train()
    output = "".join(capsys.readouterr())
    assert "training" in output and "tokens/s" in output and "loss" in output
    for step in (0, 1, 2):
        assert f"step {step}: held-out loss" in output


def test_no_progress_bar_with_disable_tqdm(tmp_path, capsys):
    trainer = make_trainer(tmp_path)
    assert not any(isinstance(c, TrainingProgress) for c in trainer.callback_handler.callbacks)
    trainer.train()
    assert "tokens/s" not in "".join(capsys.readouterr())


def test_a_dry_run_plans_the_steps_and_leaves_the_model_as_it_was(tmp_path):
    rows = make_rows([(3, 4), (2, 5), (5, 2), (1, 6), (3, 4)])
    keys = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_strategy": "steps"}
    trainer = make_trainer(tmp_path / "out", "packed", rows, max_steps=-1, num_train_epochs=3, **keys)
    weights = [weight.clone() for weight in trainer.model.parameters()]
    plan = trainer.dry_run()
    assert (plan.rows, plan.steps, plan.tokens) == (5, 6, 3 * 45) and plan.tokens_per_second > 0
    assert all(map(torch.equal, trainer.model.parameters(), weights))
    assert trainer.state.global_step == 0 and not trainer.state.log_history and not any((tmp_path / "out").iterdir())
    expected = make_trainer(tmp_path / "a", "packed", rows, max_steps=-1, num_train_epochs=3, **keys)
    expected.train()
    trainer.train()  # a dry run before it changes nothing
    assert all(map(torch.equal, trainer.model.parameters(), expected.model.parameters()))


def test_a_dry_run_of_max_steps_counts_the_rows_of_these_steps(tmp_path):
    rows = make_rows([(3, 4)] * 5)
    plan = make_trainer(tmp_path, "padded", rows, max_steps=7, per_device_train_batch_size=2).dry_run()
    assert (plan.steps, plan.tokens) == (7, 7 * 2 * 9)


def test_a_plan_tells_hours_or_minutes_or_that_it_does_not_know():
    assert str(RunPlan(10, 20, 7200, None)) == "10 rows, 20 steps, 7,200 tokens"
    assert "7,200 tokens: about 2.0 hours at 1 tokens/s" in str(RunPlan(10, 20, 7200, 1.0))
    assert "about 1.2 minutes at 100 tokens/s" in str(RunPlan(10, 20, 7200, 100.0))
