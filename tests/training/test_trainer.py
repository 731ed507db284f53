"""SupervisedTrainer: accumulation is exact, evaluation weighs tokens, best models and early stopping work."""

import math

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from support.trainers import COLLATORS, IGNORED, UNEVEN, make_model, make_rows, make_trainer
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
)
from transformers.trainer_utils import EvalPrediction

from sft_pipeline.training.memory import measure_peak_memory_gib
from sft_pipeline.training.trainer import compute_eval_metrics, count_tokens
from sft_pipeline.utils.progress import TrainingProgress


def trained_ids(folder, **arguments) -> list[list[int]]:
    """The first epoch's rows in order, a row a batch."""
    loader = make_trainer(folder, per_device_train_batch_size=1, **arguments).get_train_dataloader()
    return [batch["input_ids"][batch["attention_mask"].bool()].tolist() for batch in loader]


def test_rows_come_in_the_order_that_was_asked_for(tmp_path):
    rows = list(UNEVEN["input_ids"])
    shuffled = trained_ids(tmp_path, seed=5)
    assert sorted(shuffled) == sorted(rows) != shuffled != rows
    assert trained_ids(tmp_path, seed=9, data_seed=5) == shuffled != trained_ids(tmp_path, seed=9)
    assert trained_ids(tmp_path, train_sampling_strategy="sequential") == rows
    grouped = trained_ids(tmp_path, train_sampling_strategy="group_by_length")
    assert sorted(grouped) == sorted(rows) and len(grouped[0]) == max(map(len, rows)), "the library's own"


class KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters()}


def step_gradients(folder, collator: str, size: int, accumulation: int) -> dict[str, torch.Tensor]:
    keep = KeepGradients()
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    make_trainer(folder, collator, callbacks=[keep], **sizes).train()
    return keep.gradients


@pytest.fixture(scope="module")
def reference_gradients() -> dict[str, torch.Tensor]:
    """Of the mean over all targets of the eight rows, from the plain model, a row at a time."""
    model = make_model()
    total = sum(label != IGNORED for row in UNEVEN["labels"] for label in row)
    for row in UNEVEN:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        (torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"]), reduction="sum") / total).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("collator", COLLATORS)
@pytest.mark.parametrize(("size", "accumulation"), [(8, 1), (4, 2), (1, 8)])
def test_accumulated_gradients_are_the_whole_batchs(size, accumulation, collator, reference_gradients, tmp_path):
    found = step_gradients(tmp_path, collator, size, accumulation)
    assert found.keys() == reference_gradients.keys()
    for name, expected in reference_gradients.items():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-5)
    assert max(g.abs().max() for g in found.values()) > 1e-2  # else the tolerance would hide everything


@pytest.mark.parametrize("collator", COLLATORS)
def test_checkpointed_gradients_are_the_same(collator, reference_gradients, tmp_path, monkeypatch):
    """Each layer is computed again in the backward pass, and nothing else changes."""
    # The rehearsal computes the layers as well.
    monkeypatch.setattr("sft_pipeline.training.trainer.rehearse_heaviest_batch", lambda *_: None)
    keep, calls = KeepGradients(), []
    options = {"per_device_train_batch_size": 8, "activation_checkpointing": True}
    trainer = make_trainer(tmp_path, collator, callbacks=[keep], **options)
    for layer in trainer.model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert len(calls) == 2 * len(trainer.model.model.layers)
    for name, expected in reference_gradients.items():
        torch.testing.assert_close(keep.gradients[name], expected, rtol=0, atol=1e-5)


def plain_figures(model, rows: Dataset) -> tuple[float, float]:
    """Loss in nats a target and share of hits over all rows, each run alone through the plain forward pass."""
    nll = targets = hits = 0.0
    for row in rows:
        labels = torch.tensor(row["labels"])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        nll += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        targets += labels.ne(IGNORED).sum().item()
        hits += (logits.argmax(-1) == labels).sum().item()
    return nll / targets, hits / targets


@settings(deadline=None, max_examples=12)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 9)), min_size=1, max_size=9),
    size=st.integers(1, 10),
    collator=st.sampled_from(list(COLLATORS)),
)
def test_evaluation_weighs_tokens_whatever_the_batch(lengths, size, collator, tmp_path_factory):
    rows = make_rows(lengths)
    trainer = make_trainer(
        tmp_path_factory.getbasetemp() / "eval", collator, held_out=rows, per_device_eval_batch_size=size
    )
    metrics = trainer.evaluate()
    loss, accuracy = plain_figures(make_model().eval(), rows)
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert metrics["eval_token_accuracy"] == pytest.approx(accuracy)


def test_token_weighted_sums_before_it_divides():
    """A mean of the rows' means would be 2.5 here; a loss beyond a double's exponent has no finite perplexity."""
    metrics = compute_eval_metrics(EvalPrediction(torch.tensor([[4.0, 1, 0], [3.0, 3, 3]]).double().numpy(), None))
    assert metrics == {"loss": 1.75, "perplexity": math.exp(1.75), "token_accuracy": 0.75}
    assert compute_eval_metrics(EvalPrediction(torch.tensor([[800.0, 1, 0]]).numpy(), None))["perplexity"] == math.inf


@pytest.mark.parametrize("collator", COLLATORS)
def test_real_tokens_are_the_rows_own(collator):
    assert count_tokens(COLLATORS[collator](list(UNEVEN))) == sum(map(len, UNEVEN["input_ids"]))


@pytest.mark.parametrize("collator", COLLATORS)
def test_tokens_of_the_steps_are_counted(collator, tmp_path, monkeypatch):
    """Two passes over eight rows, evaluation not among them; train() starts the count anew."""
    sizes = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = make_trainer(tmp_path, collator, held_out=UNEVEN, eval_strategy="steps", eval_steps=1, **sizes)
    trainer.train()
    assert trainer._tokens == 2 * sum(map(len, UNEVEN["input_ids"]))
    trainer.train()
    assert trainer._tokens == 2 * sum(map(len, UNEVEN["input_ids"]))
    # 10 seconds of training and 30 of evaluation.
    trainer._started, trainer._paused_seconds = 100.0, 30.0
    monkeypatch.setattr("sft_pipeline.training.trainer.time.perf_counter", lambda: 140.0)
    assert trainer.tokens_per_second() == pytest.approx(trainer._tokens / 10)


def test_the_first_evaluation_is_before_the_first_step(tmp_path):
    trainer = make_trainer(tmp_path, held_out=UNEVEN, eval_on_start=True, eval_strategy="steps", eval_steps=1)
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [0, 1]
    assert evaluations[0]["eval_loss"] == pytest.approx(plain_figures(make_model().eval(), UNEVEN)[0], rel=1e-5)
    [logged] = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged["tokens_per_second"] > 0 and logged["peak_memory_gib"] == pytest.approx(
        measure_peak_memory_gib(), abs=0.1
    )


# Random rows teach nothing about other random rows, so the held-out loss soon rises.
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


def test_early_stopping_ends_the_run_and_the_best_model_stays(tmp_path):
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
    shown = "".join(capsys.readouterr())
    assert "training" in shown and "tokens/s" in shown and "loss" in shown
    for step in (0, 1, 2):
        assert f"step {step}: held-out loss" in shown


def test_no_bar_where_it_was_turned_off(tmp_path, capsys):
    trainer = make_trainer(tmp_path)
    assert not any(isinstance(c, TrainingProgress) for c in trainer.callback_handler.callbacks)
    trainer.train()
    assert "tokens/s" not in "".join(capsys.readouterr())


def test_memory_is_the_devices_where_it_keeps_count(monkeypatch):
    assert 0.05 < measure_peak_memory_gib() < 1000
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**29)
    assert measure_peak_memory_gib() == 1.5
