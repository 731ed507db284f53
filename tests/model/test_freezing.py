"""Freezing all parameters but those that match a pattern."""

import pytest

from sft_pipeline.model.freezing import freeze_except
from sft_pipeline.utils.errors import SFTError


def test_parameters_that_match_one_of_the_patterns_are_trained(tiny_model):
    freeze_except(tiny_model, ["self_attn", r"layers\.1\.mlp"])
    trained = {name for name, weight in tiny_model.named_parameters() if weight.requires_grad}
    names = {name for name, _ in tiny_model.named_parameters()}
    assert trained == {name for name in names if "self_attn" in name or "layers.1.mlp" in name} and trained < names


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("no_such", "^trainable_modules no_such: matches no parameter name"), ("(", r"^trainable_modules \(: ")],
)
def test_patterns_that_select_nothing_are_refused(pattern, message, tiny_model):
    with pytest.raises(SFTError, match=message):
        freeze_except(tiny_model, ["self_attn", pattern])
