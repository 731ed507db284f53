"""Trees of packed rows against the padded batch: loss, gradients, sums, isolation, and what is refused."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.causal_models import tiny
from support.trees import build_row, build_visibility, rows_of_sequences, split_ids
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

from sft_pipeline.data import prefix_tree
from sft_pipeline.data.packing import pack_rows
from sft_pipeline.data.padding import PaddingCollator
from sft_pipeline.data.prefix_tree import build_prefix_tree
from sft_pipeline.kernels import cpu_attention
from sft_pipeline.kernels.cpu_attention import build_attention_tree
from sft_pipeline.kernels.cpu_layer_training import disable_fused_layers, use_fused_layers
from sft_pipeline.model import packed_attention
from sft_pipeline.model.loss_forward import patch_loss_forward
from sft_pipeline.model.packed_attention import (
    ATTN_IMPLEMENTATION,
    build_packed_arguments,
    find_packing_obstacle,
    use_packed_attention,
)

DRY = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SERVED = [(LlamaConfig, {}), (Qwen3Config, {}), (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, **DRY})]


MODELS = {config.__name__: tiny(config, **extra) for config, extra in SERVED}
for model in MODELS.values():
    patch_loss_forward(model)
    use_packed_attention(model)
    use_fused_layers(model)  # of Llama and Qwen3

# Three sequences that share 5 tokens, two of them 8; one begins another; each has targets, some within what is shared.
ROWS = [
    build_row(([5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [False] * 4 + [True] * 6)),
    build_row(
        ([5, 6, 7, 8, 9, 10, 11, 12, 20, 21, 22], [False] * 5 + [True] * 6),
        ([5, 6, 7, 8, 9, 30, 31, 32], [False] * 3 + [True] * 5),
    ),
    build_row(([5, 6, 7, 8, 9, 10, 11], [False] * 6 + [True])),
]


@pytest.fixture(autouse=True)
def share_every_token():
    """Open branches wherever tokens are shared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_tree, "MIN_SHARED", 1)
        yield


def run(model, batch):
    """Return the loss of a batch and every parameter's gradient."""
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=7).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compute_logits(model, rows):
    """Return the logits (tokens, vocabulary) of each sequence of the rows, from their tree."""
    tree = build_prefix_tree(split_ids(rows))
    output = model(
        input_ids=torch.from_numpy(tree.input_ids)[None],
        position_ids=torch.from_numpy(tree.depths)[None],
        use_cache=False,
        **build_packed_arguments(build_attention_tree(tree.subtree_end), torch.device("cpu")),
    )
    return [output.logits[0, positions] for positions in tree.positions]


def assert_same(actual, expected):
    assert abs(actual[0] - expected[0]) <= 1e-5 * max(1.0, expected[0].item())
    assert actual[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        # Gradients that are exactly zero (q and k of rows of one token) are float32 noise of about 1e-8 when padded.
        assert (actual[1][name] - grad).abs().max() <= 1e-4 * grad.abs().max().clamp_min(1e-3), name


@pytest.mark.parametrize("name", MODELS)
@settings(deadline=None, max_examples=25)
@given(rows_of_sequences(), st.integers(1, 6), st.integers(1, 8))
def test_a_tree_has_the_loss_gradients_and_sums_of_the_padded_batch(name, rows, min_shared, block):
    model, padded = MODELS[name], PaddingCollator(0, 1)(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_tree, "MIN_SHARED", min_shared)
        patch.setattr(cpu_attention, "BLOCK_QUERIES", block)
        packed = pack_rows(rows)
        assert_same(run(model, packed), run(model, padded))
        sums, expected = (model(**batch, return_row_losses=True).logits for batch in (packed, padded))
        torch.testing.assert_close(sums[:, :2], expected[:, :2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_path_through_sdpa_is_the_same(name, monkeypatch):
    model, batch = MODELS[name], pack_rows(ROWS)
    assert batch["input_ids"].numel() == 16 and batch["target_positions"].unique().numel() < batch["labels"].numel()
    with disable_fused_layers(model):
        expected = run(model, batch)
        monkeypatch.setattr(packed_attention, "_is_float32", lambda *tensors: False)
        assert_same(run(model, batch), expected)


def test_a_branch_changes_no_other():
    model = MODELS["LlamaConfig"]
    with torch.no_grad():
        outputs = compute_logits(model, ROWS)
        changed_rows = [dict(row) for row in ROWS]
        changed_rows[1]["input_ids"] = [5, 6, 7, 8, 9, 10, 11, 12, 40, 41, 42, 5, 6, 7, 8, 9, 30, 31, 32]
        changed = compute_logits(model, changed_rows)
    for index in (0, 2, 3):
        assert torch.equal(outputs[index], changed[index])
    assert torch.equal(outputs[1][:8], changed[1][:8]) and not torch.allclose(outputs[1][8:], changed[1][8:])


def test_ten_steps_of_a_tree_are_ten_steps_padded():
    losses = []
    for collate in (pack_rows, PaddingCollator(0)):
        model = tiny(LlamaConfig)
        patch_loss_forward(model)
        use_packed_attention(model)
        use_fused_layers(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses.append([])
        for _ in range(10):
            loss, _ = run(model, collate(ROWS))
            optimizer.step()
            losses[-1].append(loss)
    assert torch.allclose(torch.stack(losses[0]), torch.stack(losses[1]), rtol=1e-5)
    assert losses[0][-1] < losses[0][0]


def test_autocast_and_bfloat16_models_stay_close():
    model = MODELS["LlamaConfig"]
    with torch.no_grad():
        exact = torch.cat(compute_logits(model, ROWS))
        with torch.autocast("cpu", torch.bfloat16):
            mixed = torch.cat(compute_logits(model, ROWS)).float()
        half_model = tiny(LlamaConfig).bfloat16()
        use_packed_attention(half_model)
        half = torch.cat(compute_logits(half_model, ROWS)).float()
    assert (mixed - exact).abs().max() < 0.05 and (half - exact).abs().max() < 0.05


def test_attention_dropout_is_applied():
    model = tiny(LlamaConfig, attention_dropout=0.5)
    use_packed_attention(model)
    first, second = (torch.cat(compute_logits(model, ROWS)) for _ in range(2))
    assert not torch.allclose(first, second)
    model.eval()
    first, second = (torch.cat(compute_logits(model, ROWS)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", MODELS)
def test_other_batches_are_plain_sdpa(name):
    model, prompt = MODELS[name].eval(), torch.tensor([ROWS[0]["input_ids"]])
    batch = PaddingCollator(0)(ROWS)
    outputs, answers = [], []
    for implementation in ("sdpa", ATTN_IMPLEMENTATION):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            outputs.append(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits)
        answers.append(model.generate(prompt, max_new_tokens=4, do_sample=False))
    model.train()
    assert torch.equal(*outputs) and torch.equal(*answers)


@settings(deadline=None, max_examples=60)
@given(rows_of_sequences(), st.booleans())
def test_segments_and_their_ancestors_are_the_mask(rows, share):
    batch = pack_rows(rows, share)
    tree, num_tokens = batch["prefix_tree"], batch["input_ids"].numel()
    visible = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    assert [segment.start for segment in tree.segments] == [0, *(segment.end for segment in tree.segments)][:-1]
    for start, end, ancestors in tree.segments:
        visible[start:end, start:end] = True
        for first, last in ancestors:
            visible[start:end, first:last] = True
    assert torch.equal(visible.tril(), build_visibility(tree.subtree_end))
    assert tree.depths.tolist() == batch["position_ids"][0].tolist()


EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("config", "extra"),
    [
        *SERVED,
        (MistralConfig, {"sliding_window": None}),
        (MistralConfig, {"sliding_window": 16}),
        (Qwen3MoeConfig, EXPERTS),
    ],
)
def test_models_that_can_be_packed(config, extra):
    model = tiny(config, **extra)
    assert find_packing_obstacle(model) is None
    assert model.config._attn_implementation == "sdpa" and model.training, "asking changes nothing"


REFUSED = [
    (BloomConfig, {"n_layer": 2, "n_head": 4}, "does not use transformers' attention interface"),
    (Gemma2Config, {}, "changes its attention scores"),
    (LlamaConfig, {"layer_types": ["full_attention", "linear_attention"]}, r"not attention \(linear_attention\)"),
    (Llama4TextConfig, {"num_local_experts": 2, "attention_chunk_size": None}, "does not accept packed rows"),
    (Llama4TextConfig, {"num_local_experts": 2, "attention_chunk_size": 16}, "attends within chunks of 16 tokens"),
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
