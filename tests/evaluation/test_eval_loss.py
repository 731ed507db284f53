"""Loss of reference answers: equal to plain forward passes."""

import math

import pytest
from support.model_comparison import build_conversations, plain_losses


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
