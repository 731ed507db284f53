"""The kinds of models of docs/models.md: loss and gradients of the library's own forward, or the refusal."""

import logging
import types

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import AutoModelForCausalLM

from sft_pipeline.data.collators import choose_collator
from sft_pipeline.data.packing import PackingCollator
from sft_pipeline.data.padding import PaddingCollator
from sft_pipeline.kernels.cpu_layer_training import use_fused_layers
from sft_pipeline.model.freezing import freeze_unreached
from sft_pipeline.model.loss_forward import patch_loss_forward
from sft_pipeline.utils.errors import SFTError

IGNORED, VOCABULARY = -100, 97
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE = TOKENS | SIZES | {"intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.2}
HEADS = SHAPE | {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
QWEN2_VISION = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 14}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
DRY = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0}
LONG, SHORT = {"sliding_window": 32}, {"sliding_window": 8}  # the longest row has 17 tokens


def build_gemma3(window: dict[str, int]) -> nn.Module:
    tokens = {"mm_tokens_per_image": 4, "image_token_index": 96, "boi_token_index": 95, "eoi_token_index": 94}
    return from_config(hf.Gemma3Config(text_config=HEADS | window, vision_config=VISION, **tokens))


def build_qwen2_vl() -> nn.Module:
    text = SHAPE | {"rope_parameters": MROPE}
    return hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(text_config=text, vision_config=QWEN2_VISION))


def build_llava() -> nn.Module:
    text, vision = hf.LlamaConfig(**HEADS), hf.CLIPVisionConfig(**VISION)
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=96)
    )


def build_double_heads() -> nn.Module:
    return hf.GPT2DoubleHeadsModel(hf.GPT2Config(**TOKENS, **GPT2, **DRY, num_labels=1))


def from_config(config) -> nn.Module:
    return AutoModelForCausalLM.from_config(config)


# Each is a function that builds the model.
EXPERTS_PACKED = {
    "Mixtral": lambda: from_config(hf.MixtralConfig(**HEADS, **LOCAL_EXPERTS, sliding_window=None)),
    "Qwen2-MoE": lambda: from_config(hf.Qwen2MoeConfig(**SHAPE, **EXPERTS, shared_expert_intermediate_size=16)),
    "Qwen3-MoE": lambda: from_config(hf.Qwen3MoeConfig(**HEADS, **EXPERTS)),
    "OLMoE": lambda: from_config(hf.OlmoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2)),
    "Phi-3.5-MoE": lambda: from_config(
        hf.PhimoeConfig(**SHAPE, **LOCAL_EXPERTS, router_jitter_noise=0.0, input_jitter_noise=0.0)
    ),
    "Granite-MoE": lambda: from_config(hf.GraniteMoeConfig(**SHAPE, **LOCAL_EXPERTS)),
    "DeepSeek-V3": lambda: from_config(
        hf.DeepseekV3Config(**{**SHAPE, "num_key_value_heads": 4}, **LATENT, **GROUPS, moe_intermediate_size=16)
    ),
}
WINDOWS = {
    "Mistral": lambda window: from_config(hf.MistralConfig(**HEADS, **window)),
    "Gemma 3 text": lambda window: from_config(hf.Gemma3TextConfig(**HEADS, **window)),
    "OLMo 3": lambda window: from_config(hf.Olmo3Config(**SHAPE, **window)),
    "Cohere 2": lambda window: from_config(hf.Cohere2Config(**SHAPE, **window)),
}
CHANGED_SCORES = {
    "Gemma 2": lambda: from_config(hf.Gemma2Config(**HEADS, **SHORT)),
    "GPT-OSS": lambda: from_config(hf.GptOssConfig(**HEADS, **LOCAL_EXPERTS, **SHORT)),
}
LINEAR_ATTENTION = {
    "Qwen3-Next": lambda: from_config(
        hf.Qwen3NextConfig(**HEADS, **EXPERTS, **LINEAR, shared_expert_intermediate_size=16)
    ),
    "Qwen3.5": lambda: from_config(hf.Qwen3_5TextConfig(**HEADS, **LINEAR)),
}
LLAMA4 = {"Llama 4": lambda: from_config(hf.Llama4TextConfig(**HEADS, num_local_experts=2, attention_chunk_size=32))}
ROUTER_LOSS = {
    "Mixtral": lambda: from_config(
        hf.MixtralConfig(**HEADS, **LOCAL_EXPERTS, sliding_window=None, output_router_logits=True)
    ),
    "Qwen3-MoE": lambda: from_config(hf.Qwen3MoeConfig(**HEADS, **EXPERTS, output_router_logits=True)),
    "OLMoE": lambda: from_config(
        hf.OlmoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, output_router_logits=True)
    ),
    "GPT-OSS": lambda: from_config(hf.GptOssConfig(**HEADS, **LOCAL_EXPERTS, output_router_logits=True)),
}
WITH_TOWERS = {
    "Gemma 3": (lambda: build_gemma3(LONG), "model.vision_tower, model.multi_modal_projector"),
    "Qwen2-VL": (build_qwen2_vl, "model.visual"),
    "LLaVA": (build_llava, "model.vision_tower, model.multi_modal_projector"),
}


def make(build) -> nn.Module:
    """Build the model in training mode, with every parameter moved away from 0 and 1."""
    torch.manual_seed(0)
    model = build().float().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def make_rows() -> list[dict[str, list[int]]]:
    """Rows of at most 17 tokens with a common start, of uneven lengths and numbers of targets."""
    random = torch.Generator().manual_seed(1)
    rows = []
    for length, first in ((9, 5), (17, 8), (6, 4), (12, 11)):
        ids = [1, 2, 3, 4, *torch.randint(4, 90, (length - 4,), generator=random).tolist()]
        rows.append({"input_ids": ids, "labels": [IGNORED] * (first - 1) + ids[first:] + [IGNORED]})
    return rows


ROWS = make_rows()
TARGETS = sum(label != IGNORED for row in ROWS for label in row["labels"])


def compute_expected(model: nn.Module, num_items: int | None = TARGETS) -> torch.Tensor:
    """Compute the loss that plain transformers computes: padded ids, and labels that are not shifted."""
    batch = PaddingCollator(0)(ROWS)
    labels = torch.full_like(batch["labels"], IGNORED)
    labels[:, 1:] = batch["labels"][:, :-1]
    options = {} if num_items is None else {"num_items_in_batch": num_items}
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    return model(**inputs, labels=labels, use_cache=False, **options).loss


def prepare(model: nn.Module) -> tuple[PackingCollator | PaddingCollator, str | None, str | None]:
    """Prepare the model as SFTTrainer does; return the collator, and why the head and the rows are as they are."""
    head_obstacle = patch_loss_forward(model)
    collator, packing_obstacle = choose_collator(model, max(len(row["input_ids"]) for row in ROWS), 0)
    freeze_unreached(model)
    if packing_obstacle is None:
        use_fused_layers(model)
    return collator, head_obstacle, packing_obstacle


def assert_same_step(build, num_items: int = TARGETS) -> tuple[str | None, str | None]:
    """Compare loss and every gradient with those of the library; return why head and rows are as they are."""
    plain, ours = make(build), make(build)
    collator, *obstacles = prepare(ours)
    expected, actual = compute_expected(plain, num_items), ours(**collator(ROWS), num_items_in_batch=num_items).loss
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    expected.backward(), actual.backward()
    compared = 0
    for (name, theirs), (_, own) in zip(plain.named_parameters(), ours.named_parameters(), strict=True):
        if theirs.grad is None:
            assert own.grad is None or not own.grad.any(), name
            assert not own.requires_grad, f"{name} would have no gradient, for which DDP waits"
            continue
        scale = theirs.grad.abs().max().clamp_min(1e-3)
        assert (own.grad - theirs.grad).abs().max() <= 1e-3 * scale, name
        compared += 1
    assert compared > 8
    return tuple(obstacles)


@pytest.mark.parametrize("name", EXPERTS_PACKED)
def test_experts_are_packed(name):
    assert assert_same_step(EXPERTS_PACKED[name]) == (None, None)


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_is_packed_where_every_row_fits_it(name):
    assert assert_same_step(lambda: WINDOWS[name](LONG)) == (None, None)


@pytest.mark.parametrize("name", WINDOWS)
def test_a_shorter_window_is_padded(name):
    head, rows = assert_same_step(lambda: WINDOWS[name](SHORT))
    assert head is None and "attends within a window of 8 tokens" in rows


@pytest.mark.parametrize("name", CHANGED_SCORES)
def test_soft_capping_and_sinks_are_padded(name):
    head, rows = assert_same_step(CHANGED_SCORES[name])
    assert head is None and "changes its attention scores (soft-capping or sinks)" in rows


@pytest.mark.parametrize("name", LINEAR_ATTENTION)
def test_linear_attention_is_padded(name):
    head, rows = assert_same_step(LINEAR_ATTENTION[name])
    assert head is None and "does not use transformers' attention interface" in rows


@pytest.mark.parametrize("name", LLAMA4)
def test_a_head_that_cannot_be_split_off_is_computed_everywhere(name):
    head, rows = assert_same_step(LLAMA4[name])
    assert "changes its logits after the head" in head and "does not accept packed rows" in rows


@pytest.mark.parametrize("name", ROUTER_LOSS)
def test_a_router_loss_is_added_to_the_padded_batch(name):
    head, rows = assert_same_step(ROUTER_LOSS[name])
    assert "adds a router loss" in head and "adds a router loss" in rows
    without = make(ROUTER_LOSS[name])
    without.config.output_router_logits = False
    assert compute_expected(make(ROUTER_LOSS[name])) - compute_expected(without) > 1e-3


def test_a_router_loss_is_weighted_by_the_targets_of_its_batch():
    """Of 2 * TARGETS in the step, the batch has a half: the library's loss for the batch alone counts by a half."""
    model = make(ROUTER_LOSS["Mixtral"])
    expected = compute_expected(model)
    collator, _, _ = prepare(model)
    assert model(**collator(ROWS), num_items_in_batch=2 * TARGETS).loss.item() == pytest.approx(expected.item() / 2)
    assert model(**collator(ROWS)).loss.item() == pytest.approx(expected.item())
    assert model(**collator([]), num_items_in_batch=TARGETS).loss.item() == 0


@pytest.mark.parametrize("name", WITH_TOWERS)
def test_towers_for_images_are_frozen_and_the_text_model_is_packed(name, caplog):
    build, modules = WITH_TOWERS[name]
    with caplog.at_level(logging.INFO, logger="sft_pipeline"):
        assert assert_same_step(build) == (None, None)
    [message] = [record.getMessage() for record in caplog.records if "do not reach" in record.getMessage()]
    assert message.startswith("frozen, as rows of text do not reach them: ") and message.endswith(f"({modules})")


def test_a_second_head_is_frozen_and_the_first_is_packed():
    assert assert_same_step(build_double_heads) == (None, None)
    model = make(build_double_heads)
    freeze_unreached(model)
    frozen = {name.split(".")[0] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"multiple_choice_head"}


def test_parameters_that_text_does_not_reach_cannot_be_trained_alone():
    model = make(build_llava)
    model.requires_grad_(False)
    model.model.vision_tower.requires_grad_(True)
    with pytest.raises(SFTError, match=r"^nothing to train: rows of text do not reach model\.vision_tower\."):
        freeze_unreached(model)


def test_a_loss_of_another_head_is_refused():
    """As a head that predicts the tokens after the next would add it."""
    model = make(lambda: WINDOWS["Mistral"](LONG))
    own_forward = model.forward

    def forward(self, labels=None, **kwargs):
        output = own_forward(labels=labels, **kwargs)
        if labels is not None:
            output.loss = output.loss + 0.3 * output.logits.logsumexp(-1).mean()
        return output

    model.forward = types.MethodType(forward, model)
    with pytest.raises(
        SFTError, match="MistralForCausalLM: its own loss is not the cross-entropy of its logits"
    ) as error:
        patch_loss_forward(model)
    assert "\n" not in str(error.value)


def test_a_head_that_cannot_be_split_off_has_to_take_shifted_labels():
    model = make(lambda: WINDOWS["Mistral"](LONG))
    own_forward = model.forward
    model.lm_head = nn.Sequential(model.lm_head)
    model.forward = lambda input_ids, labels=None, use_cache=None: own_forward(input_ids=input_ids, labels=labels)
    with pytest.raises(SFTError, match="^MistralForCausalLM takes no shifted labels .*, and MistralForCausalLM has no"):
        patch_loss_forward(model)
