"""Attention over packed rows against the padded batch: logits, gradients, isolation, and what is refused."""

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.causal_models import tiny
from transformers import (
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from sft_pipeline.kernels import cpu_attention
from sft_pipeline.kernels.cpu_attention import PackedRows
from sft_pipeline.model import packed_attention
from sft_pipeline.model.packed_attention import (
    ATTN_IMPLEMENTATION,
    build_packed_arguments,
    find_packing_obstacle,
    use_packed_attention,
)

DRY = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SERVED = [(LlamaConfig, {}), (Qwen3Config, {}), (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, **DRY})]


def rows_of(prefix, lengths, seed=0):
    draw = torch.Generator().manual_seed(seed)
    start = torch.randint(3, 64, (prefix,), generator=draw)
    return [torch.cat([start, torch.randint(3, 64, (n,), generator=draw)]) for n in lengths]


def packed(model, rows, prefix):
    """The model's output at every row's own positions, row by row."""
    own = [len(row) - prefix for row in rows]
    ids = torch.cat([rows[0][:prefix], *(row[prefix:] for row in rows)])[None]
    positions = torch.cat([torch.arange(prefix), *(torch.arange(prefix, prefix + n) for n in own)])[None]
    output = model(
        input_ids=ids, position_ids=positions, use_cache=False, **build_packed_arguments(torch.tensor([prefix, *own]))
    )
    return output.logits[0, prefix:].split(own)


def padded(model, rows, prefix):
    """The same of the plain path: right padding, a mask, `sdpa`."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return [line[prefix : len(row)] for line, row in zip(logits, rows)]


def loss_and_grads(model, outputs, rows, prefix):
    model.zero_grad()
    targets = [row[prefix:] for row in rows]
    loss = sum(F.cross_entropy(out, target, reduction="sum") for out, target in zip(outputs, targets)) / 10
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(actual, expected):
    assert abs(actual[0] - expected[0]) <= 1e-5 * max(1.0, expected[0].item())
    for name, grad in expected[1].items():
        # Gradients that are exactly zero (q and k of rows of one token) are float32 noise of about 1e-8 when padded.
        assert (actual[1][name] - grad).abs().max() <= 1e-4 * grad.abs().max().clamp_min(1e-3), name


MODELS = {config.__name__: tiny(config, **extra) for config, extra in SERVED}


@pytest.mark.parametrize("name", MODELS)
@settings(deadline=None, max_examples=15)
@given(st.integers(0, 9), st.lists(st.integers(1, 14), min_size=1, max_size=4), st.integers(1, 8), st.integers(0, 99))
def test_packed_rows_have_the_loss_and_gradients_of_the_padded_batch(name, prefix, lengths, block, seed):
    model, rows = MODELS[name], rows_of(prefix, lengths, seed)
    model.set_attn_implementation("sdpa")
    expected = loss_and_grads(model, padded(model, rows, prefix), rows, prefix)
    use_packed_attention(model)
    default_block, cpu_attention.BLOCK_QUERIES = cpu_attention.BLOCK_QUERIES, block
    try:
        assert_same(loss_and_grads(model, packed(model, rows, prefix), rows, prefix), expected)
    finally:
        cpu_attention.BLOCK_QUERIES = default_block


@pytest.mark.parametrize("name", MODELS)
def test_the_row_by_row_path_is_the_same(name, monkeypatch):
    model, rows = MODELS[name], rows_of(4, [3, 1, 6])
    use_packed_attention(model)
    expected = loss_and_grads(model, packed(model, rows, 4), rows, 4)
    monkeypatch.setattr(packed_attention, "_is_float32", lambda *tensors: False)
    assert_same(loss_and_grads(model, packed(model, rows, 4), rows, 4), expected)


def test_no_row_sees_another():
    model, rows = MODELS["LlamaConfig"], rows_of(3, [5, 4, 6])
    use_packed_attention(model)
    with torch.no_grad():
        outputs = packed(model, rows, 3)
        rows[1][3:] = 63 - rows[1][3:]
        changed = packed(model, rows, 3)
    assert torch.equal(outputs[0], changed[0]) and torch.equal(outputs[2], changed[2])
    assert not torch.allclose(outputs[1], changed[1])


def test_ten_steps_packed_are_ten_steps_padded():
    losses = []
    for run in (packed, padded):
        model, rows = tiny(LlamaConfig), rows_of(3, [5, 2, 7])
        if run is packed:
            use_packed_attention(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses.append([])
        for _ in range(10):
            loss, _ = loss_and_grads(model, run(model, rows, 3), rows, 3)
            optimizer.step()
            losses[-1].append(loss)
    assert torch.allclose(torch.stack(losses[0]), torch.stack(losses[1]), rtol=1e-5)
    assert losses[0][-1] < losses[0][0]


def test_autocast_and_bfloat16_models_stay_close():
    model, rows = MODELS["LlamaConfig"], rows_of(4, [6, 3])
    use_packed_attention(model)
    with torch.no_grad():
        exact = torch.cat(packed(model, rows, 4))
        with torch.autocast("cpu", torch.bfloat16):
            mixed = torch.cat(packed(model, rows, 4)).float()
        half = torch.cat(packed(tiny_half(), rows, 4)).float()
    assert (mixed - exact).abs().max() < 0.05 and (half - exact).abs().max() < 0.05


def tiny_half():
    model = tiny(LlamaConfig).bfloat16()
    use_packed_attention(model)
    return model


def test_attention_dropout_is_applied():
    model, rows = tiny(LlamaConfig, attention_dropout=0.5), rows_of(4, [6, 3])
    use_packed_attention(model)
    first, second = (torch.cat(packed(model, rows, 4)) for _ in range(2))
    assert not torch.allclose(first, second)
    model.eval()
    first, second = (torch.cat(packed(model, rows, 4)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", MODELS)
def test_other_batches_are_plain_sdpa(name):
    model, rows = MODELS[name].eval(), rows_of(2, [6, 3])
    outputs, answers = [], []
    for implementation in ("sdpa", ATTN_IMPLEMENTATION):
        use_packed_attention(model)
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            outputs.append(torch.cat(padded(model, rows, 0)))
        answers.append(model.generate(rows[0][None], max_new_tokens=4, do_sample=False))
    model.train()
    assert torch.equal(*outputs) and torch.equal(*answers)


def test_the_build_flex_mask_lets_a_row_see_the_prefix_and_itself():
    rows = PackedRows(2, (2, 3))
    mask = packed_attention._build_flex_mask(rows, torch.device("cpu"))
    index = torch.arange(7)
    visible = mask.mask_mod(0, 0, index[:, None], index[None])
    expected = torch.zeros(7, 7, dtype=torch.bool)
    for start, end in ((0, 2), *rows.get_spans()):
        expected[start:end, :2] = expected[start:end, start:end] = True
    assert torch.equal(visible, expected.tril())
    assert packed_attention._build_flex_mask(rows, torch.device("cpu")) is mask, "made once for all layers"


EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("config", "extra"), [*SERVED, (MistralConfig, {"sliding_window": None}), (Qwen3MoeConfig, EXPERTS)]
)
def test_models_that_can_be_packed(config, extra):
    model = tiny(config, **extra)
    assert find_packing_obstacle(model) is None
    assert model.config._attn_implementation == "sdpa" and model.training, "asking changes nothing"


def test_a_window_is_refused_unless_every_row_fits_it():
    model = tiny(MistralConfig, sliding_window=16)
    assert find_packing_obstacle(model) == "MistralForCausalLM attends within a window of 16 tokens"
    assert find_packing_obstacle(model, longest=17) is not None
    assert find_packing_obstacle(model, longest=16) is None


REFUSED = [
    (BloomConfig, {"n_layer": 2, "n_head": 4}, "does not use transformers' attention interface"),
    (Gemma2Config, {}, "changes its attention scores"),
    (LlamaConfig, {"layer_types": ["full_attention", "linear_attention"]}, r"not attention \(linear_attention\)"),
    (Llama4TextConfig, {"num_local_experts": 2, "attention_chunk_size": None}, "does not accept packed rows"),
]


@pytest.mark.parametrize(("config", "extra", "reason"), REFUSED)
def test_models_that_are_refused(config, extra, reason):
    assert re.search(reason, find_packing_obstacle(tiny(config, **extra)))


def test_an_encoder_decoder_is_refused():
    model = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=64))
    assert find_packing_obstacle(model) == "T5ForConditionalGeneration is an encoder-decoder"


def test_a_model_that_ignores_positions_is_refused():
    model = tiny(LlamaConfig)
    rotate = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: rotate(x, torch.arange(x.shape[1])[None])
    assert "packing changes what LlamaForCausalLM computes" in find_packing_obstacle(model)


# The warning is of peft itself, which reads a name that transformers has renamed.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_lora_model_can_be_packed():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    assert find_packing_obstacle(peft.get_peft_model(tiny(LlamaConfig), config)) is None
