"""Loss of reference answers: equal to plain forward passes."""

import math

import pytest
from support.agent import CONVERSATIONS, OSLO, assistant, save_agent, user
from support.model_comparison import build_conversations, plain_losses

from sft_pipeline.evaluation.eval_loss import compute_reference_losses
from sft_pipeline.model.loss_forward import patch_loss_forward
from sft_pipeline.runs.trained_model import load_trained


@pytest.mark.parametrize("index", range(4))
def test_losses_equal_plain_forward_passes(index, evaluated, comparison, model_folder, other_folder):
    questions, records = evaluated
    folder, template = (model_folder, "chat") if index < 2 else (other_folder, "role")
    plain = plain_losses(folder, build_conversations(questions, index), template)
    for loss, (nll, tokens, correct) in zip(records[index].losses, plain, strict=True):
        assert loss.nll_nats == pytest.approx(nll, rel=1e-4) and (loss.tokens, loss.correct) == (tokens, correct)
    nll, tokens, correct = map(sum, zip(*plain))
    size = sum(len(reference.encode()) for reference in questions.references)
    metrics = comparison.entries[index].metrics
    assert metrics["nll_nats_per_token"] == pytest.approx(nll / tokens, rel=1e-4)
    assert metrics["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-3)
    assert metrics["bits_per_byte"] == pytest.approx(nll / math.log(2) / size, rel=1e-4)
    assert metrics["token_accuracy"] == correct / tokens


def test_losses_of_calls_and_reasoning(model_folder, tmp_path):
    folder = save_agent(model_folder, tmp_path / "agent")
    model, template, _ = load_trained(str(folder))
    patch_loss_forward(model)
    excluded = {"messages": [user("Hi"), assistant("", OSLO) | {"train": False}]}
    first, *others = compute_reference_losses(model, template, [excluded, *CONVERSATIONS], batch_size=2)
    assert first is None
    for loss, (nll, tokens, correct) in zip(others, plain_losses(folder, CONVERSATIONS, "chat"), strict=True):
        assert loss.nll_nats == pytest.approx(nll, rel=1e-4) and (loss.tokens, loss.correct) == (tokens, correct)
    reasoning, call = "<think>\nI must look.\n</think>\n\n", '{"name": "get_weather", "arguments": {"city": "Oslo"}}'
    texts = [
        f"{reasoning}<tool_call>\n{call}\n</tool_call>",
        "<think>\n4 is cold.\n</think>\n\nYes, 4 degrees.",
        "the text",
    ]
    assert [loss.utf8_bytes for loss in others] == [len(text) for text in texts]


def test_a_row_beyond_the_positions_has_no_loss(model_folder, tmp_path):
    model, template, _ = load_trained(str(save_agent(model_folder, tmp_path / "agent")))
    patch_loss_forward(model)
    model.config.max_position_embeddings = 100
    assert [loss is None for loss in compute_reference_losses(model, template, CONVERSATIONS)] == [True, True, False]
