"""Fused layers in generation: the layers and the precisions that they leave to the modules."""

import torch
from support.generation import GREEDY, LLAMA, PROMPTS, make_model

from sft_pipeline.inference.engine import generate


def test_half_precision_and_hooked_layers_are_supported():
    model = make_model("llama").to(torch.bfloat16)
    assert all(len(c.ids) == 12 for c in generate(model, PROMPTS, [], GREEDY, batch_size=3))
    hooked, calls = make_model("llama"), []
    hooked.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    expected = generate(LLAMA, PROMPTS[:1], [], GREEDY)[0].ids
    assert generate(hooked, PROMPTS[:1], [], GREEDY)[0].ids == expected
    assert len(calls) == GREEDY.max_new_tokens


def test_autocast_is_followed():
    with torch.autocast("cpu", torch.bfloat16):
        completions = generate(LLAMA, PROMPTS, [], GREEDY, batch_size=3)
    assert all(len(c.ids) == 12 for c in completions)
