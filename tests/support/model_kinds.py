"""Tiny models of the kinds of docs/models.md, by family; each is a function that builds the model."""

import torch
import transformers as hf
from torch import nn
from transformers import AutoModelForCausalLM

VOCABULARY = 97
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
    "Mixtral": lambda window: from_config(hf.MixtralConfig(**HEADS, **LOCAL_EXPERTS, **window)),
    "Phi-3": lambda window: from_config(hf.Phi3Config(**SHAPE, **window)),
    "Qwen2": lambda window: from_config(
        hf.Qwen2Config(**SHAPE, **window, use_sliding_window=True, max_window_layers=1)
    ),
    "Qwen3": lambda window: from_config(
        hf.Qwen3Config(**HEADS, **window, use_sliding_window=True, max_window_layers=1)
    ),
    "Gemma 3 text": lambda window: from_config(hf.Gemma3TextConfig(**HEADS, **window)),
    "OLMo 3": lambda window: from_config(hf.Olmo3Config(**SHAPE, **window)),
    "Cohere 2": lambda window: from_config(hf.Cohere2Config(**SHAPE, **window)),
}
MASKED_WINDOWS = {
    "Phi-3.5-MoE": lambda: from_config(
        hf.PhimoeConfig(**SHAPE, **LOCAL_EXPERTS, **SHORT, router_jitter_noise=0.0, input_jitter_noise=0.0)
    ),
    "Qwen2-MoE": lambda: from_config(
        hf.Qwen2MoeConfig(
            **SHAPE,
            **EXPERTS,
            **SHORT,
            shared_expert_intermediate_size=16,
            use_sliding_window=True,
            max_window_layers=1,
        )
    ),
}
CHANGED_SCORES = {
    "Gemma 2": lambda: from_config(hf.Gemma2Config(**HEADS, **SHORT)),
    "GPT-OSS": lambda: from_config(hf.GptOssConfig(**HEADS, **LOCAL_EXPERTS, **SHORT)),
}
LINEAR_ATTENTION = {
    "Qwen3-Next": lambda: from_config(
        hf.Qwen3NextConfig(**HEADS, **EXPERTS, **LINEAR, shared_expert_intermediate_size=16)
    ),
    "Mamba": lambda: from_config(hf.MambaConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, state_size=4)),
    "Qwen3.5": lambda: from_config(hf.Qwen3_5TextConfig(**HEADS, **LINEAR)),
}
ALIBI = {"BLOOM": lambda: from_config(hf.BloomConfig(**TOKENS, hidden_size=32, n_layer=2, n_head=4))}
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

BERT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
NOT_CAUSAL = {
    "BERT": (
        lambda: hf.BertLMHeadModel(hf.BertConfig(**TOKENS, **BERT)),
        "^BertLMHeadModel attends to later tokens, which are the targets; give a causal language model",
    ),
    "T5": (
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, vocab_size=VOCABULARY)),
        "^T5ForConditionalGeneration is an encoder-decoder; give a causal language model$",
    ),
}


def make(build) -> nn.Module:
    """Build the model in training mode, with every parameter moved away from 0 and 1."""
    torch.manual_seed(0)
    model = build().float().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model
