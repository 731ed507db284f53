"""What tests of generation share: a small model per family, prompts, settings, and a decoder of ids."""

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sft_pipeline.inference.sampling import SamplingParams

VOCABULARY, POSITIONS = 61, 256
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.4,  # wide, so that the tokens' logits lie apart and depend on what came before
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def make_gpt2() -> GPT2LMHeadModel:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "vocab_size": VOCABULARY}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.4, bos_token_id=None, eos_token_id=None))


MAKERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "gpt2": make_gpt2,
    "sliding": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=5)),
}


def make_model(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MAKERS[name]()
        for parameter in model.parameters():  # biases and norms start at 0 and 1, which would hide a mistake in them
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


MODELS = {name: make_model(name) for name in MAKERS}
LLAMA = MODELS["llama"]
GREEDY = SamplingParams(max_new_tokens=12)


def make_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


PROMPTS = make_prompts(3, 17, 1, 40, 8, 2, 25, 9)


def decode(ids: list[int]) -> str:
    """A vocabulary of one letter an id, and two for the last ids."""
    return "".join(chr(97 + i) if i < 26 else chr(65 + i % 26) + "." for i in ids)
