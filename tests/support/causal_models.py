"""Models of two layers and 64 tokens, of any family that transformers knows."""

import torch
from transformers import AutoModelForCausalLM

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tiny(config_class, **extra):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_class(**{**SHAPE, **extra})).float()
