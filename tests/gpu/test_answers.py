"""Decoded answers against transformers' `generate`."""

import pytest
import torch
from generate import Comparison
from gpu_parts import decode
from gpu_parts.inputs import SMALL_SHAPES, build_model


@pytest.mark.parametrize("shape", SMALL_SHAPES)
def test_answers_are_those_of_transformers_up_to_ties(shape, device):
    torch.set_float32_matmul_precision("highest")
    small = SMALL_SHAPES[shape]
    model = build_model(small, device, initializer_range=0.2).eval()
    prompts = decode.build_prompts(6, small.vocabulary, scale=0.3)
    result = decode.compare_answers(Comparison(model, stop_token_id=2), prompts, new_tokens=12)
    assert result["answers"] == 6 and result["differ_elsewhere"] == 0, result
    assert result["equal"] >= 5
