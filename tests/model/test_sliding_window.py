"""Packed rows of models with a sliding window against the padded batch, in which transformers' own masks apply."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.causal_models import tiny
from support.trees import rows_of_sequences
from transformers import Gemma3TextConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen2MoeConfig

from sft_pipeline.data import prefix_tree
from sft_pipeline.data.packing import pack_rows
from sft_pipeline.data.padding import PaddingCollator
from sft_pipeline.inference.engine import generate
from sft_pipeline.inference.sampling import SamplingParams
from sft_pipeline.kernels import cpu_attention
from sft_pipeline.kernels.cpu_attention import limit_segments
from sft_pipeline.kernels.cpu_layer_training import disable_fused_layers, use_fused_layers
from sft_pipeline.model import packed_attention
from sft_pipeline.model.loss_forward import patch_loss_forward
from sft_pipeline.model.packed_attention import find_packing_obstacle, use_packed_attention

WINDOWS = (2, 5, 9)
QWEN2 = {"use_sliding_window": True, "max_window_layers": 1}  # the second layer of two has the window
GEMMA3 = {"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}
FAMILIES = {"mistral": (MistralConfig, {}), "gemma3": (Gemma3TextConfig, GEMMA3), "qwen2": (Qwen2Config, QWEN2)}


def build_model(name, window):
    config, extra = FAMILIES[name]
    model = tiny(config, sliding_window=window, initializer_range=0.3, **extra)
    patch_loss_forward(model)
    use_packed_attention(model)
    assert use_fused_layers(model) == (2 if name == "qwen2" else 0)
    return model


MODELS = {(name, window): build_model(name, window) for name in FAMILIES for window in WINDOWS}


def run(model, batch):
    """Return the loss of a batch and every parameter's gradient."""
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=7).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, expected):
    assert abs(actual[0] - expected[0]) <= 1e-5 * max(1.0, expected[0].item())
    assert actual[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        # Gradients that are exactly zero (q and k of rows of one token) are float32 noise of about 1e-6 when padded.
        assert (actual[1][name] - grad).abs().max() <= 1e-4 * grad.abs().max().clamp_min(2e-2), name


@pytest.mark.parametrize("name", FAMILIES)
@settings(deadline=None, max_examples=15)
@given(rows_of_sequences(), st.sampled_from(WINDOWS), st.integers(1, 6), st.integers(1, 8))
def test_a_tree_has_the_loss_and_gradients_of_the_padded_batch(name, rows, window, min_shared, block):
    model, padded = MODELS[name, window], PaddingCollator(0, 1)(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_tree, "MIN_SHARED", min_shared)
        patch.setattr(cpu_attention, "BLOCK_QUERIES", block)
        packed, expected = pack_rows(rows), run(model, padded)
        assert_same(run(model, packed), expected)
        with disable_fused_layers(model):
            assert_same(run(model, packed), expected)
        patch.setattr(packed_attention, "_is_float32", lambda *tensors: False)  # torch's own function
        with disable_fused_layers(model):
            assert_same(run(model, packed), expected)


@settings(deadline=None, max_examples=60)
@given(rows_of_sequences(), st.integers(1, 20))
def test_a_segment_keeps_the_ancestors_within_its_window(rows, window):
    tree = pack_rows(rows)["prefix_tree"]
    for (start, end, ancestors), (_, _, limited) in zip(tree.segments, limit_segments(tree, window), strict=True):
        positions, kept = ([i for first, last in spans for i in range(first, last)] for spans in (ancestors, limited))
        assert kept == (positions[-(window - 1) :] if window > 1 else [])
        assert tree.depths[start] == len(positions) and tree.depths[end - 1] == len(positions) + end - start - 1


@pytest.mark.parametrize("name", FAMILIES)
def test_a_window_is_packed_whatever_the_length_of_the_rows(name):
    model = build_model(name, 512)
    assert find_packing_obstacle(model) is None and find_packing_obstacle(model, longest=4096) is None
    windows = {getattr(module, "sliding_window", None) for module in (model.config, *model.modules())}
    assert windows <= {512, None}, "asking changes nothing"


def test_a_window_that_attention_is_not_told_of_is_refused_unless_every_row_fits_it():
    """Qwen2-MoE has it in its masks alone."""
    model = tiny(Qwen2MoeConfig, sliding_window=16, **QWEN2, num_experts=4, moe_intermediate_size=16,
                 shared_expert_intermediate_size=16, num_experts_per_tok=2)  # fmt: skip
    assert find_packing_obstacle(model).startswith("packing changes what Qwen2MoeForCausalLM computes (")
    assert find_packing_obstacle(model, longest=17) is not None
    assert find_packing_obstacle(model, longest=16) is None


def test_phi_3_is_packed():
    assert find_packing_obstacle(tiny(Phi3Config, sliding_window=8)) is None


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_keeps_to_the_window(name):
    model, prompt = MODELS[name, 5].eval(), [3, 9, 4, 11, 5, 8, 30, 12, 6, 17]
    [answer] = generate(model, [prompt], [], SamplingParams(max_new_tokens=8))
    with torch.no_grad():
        for index, token in enumerate(answer.ids):
            ids = torch.tensor([prompt + answer.ids[:index]])
            assert model(input_ids=ids, use_cache=False).logits[0, -1].argmax() == token
    model.train()
