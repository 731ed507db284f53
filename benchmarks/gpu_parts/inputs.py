"""What the parts measure: models with random weights of known shapes, and rows of random ids. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scaling import LLAMA_8B, QWEN3, SMOLLM2, Shape, count_flops
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from sft_pipeline.data.padding import split_sequences
from sft_pipeline.data.prefix_tree import build_prefix_tree, count_tree_tokens
from sft_pipeline.utils.constants import IGNORED

Row = dict[str, list[int]]

SHAPES = {"smollm2": SMOLLM2, "qwen3": QWEN3, "llama8": replace(LLAMA_8B, name="Llama-3.1-8B, 8 layers", layers=8)}
# Each with the features of its namesake: with `--small` the parts run on a CPU within seconds.
SMALL_SHAPES = {
    "smollm2": Shape("SmolLM2, small", 2, 48, 64, 3, 1, 16, 300, tied=True),
    "qwen3": Shape("Qwen3, small", 2, 64, 96, 4, 2, 16, 512, tied=True, qk_norm=True),
    "llama8": Shape("Llama-3.1, small", 2, 64, 96, 4, 2, 16, 384, tied=False),
}
FIRST_ID = 8  # those below are control tokens
# Prompt and answer tokens of every 16th row of alpaca_en_demo.json in order of length, with SmolLM2's tokenizer, the
# role template and the reference's system prompt: 226 tokens a row in the mean, 67% of them supervised, as the 999.
ROW_SIZES = (
    *((70, 6), (69, 10), (75, 6), (75, 8), (76, 9), (67, 20), (80, 8), (77, 12), (77, 13), (79, 13), (82, 11)),
    *((77, 19), (68, 30), (90, 9), (64, 38), (92, 12), (66, 41), (87, 22), (61, 52), (99, 17), (93, 29), (105, 24)),
    *((67, 67), (105, 34), (68, 78), (66, 85), (64, 93), (74, 90), (66, 104), (89, 88), (66, 118), (117, 72)),
    *((105, 91), (62, 139), (66, 143), (66, 151), (66, 163), (69, 166), (97, 149), (90, 163), (71, 191), (66, 203)),
    *((84, 198), (60, 232), (66, 243), (65, 253), (61, 267), (64, 276), (74, 273), (72, 289), (70, 301), (64, 320)),
    *((74, 315), (67, 334), (67, 350), (65, 364), (62, 377), (62, 390), (75, 389), (68, 421), (71, 463), (70, 516)),
)
# Least and most tokens of a question (with what a chat template writes around it), a reasoning and an answer. So 8
# exchanges have about 3,990 tokens in 8 sequences, of which the tree computes 1,910; docs/speed.md's have
# 3,942 and 1,982.
EXCHANGE_SIZES = ((8, 24), (55, 100), (55, 100))


def build_config(shape: Shape, **keys: Any) -> PreTrainedConfig:
    return (Qwen3Config if shape.qk_norm else LlamaConfig)(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=32_768,
        **{"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0, **keys},
    )


def build_model(
    shape: Shape, device: torch.device, dtype: torch.dtype = torch.float32, attention: str = "sdpa", **keys: Any
) -> PreTrainedModel:
    """Build a model on the device, with the same random weights at every call. keys: of its config."""
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(build_config(shape, **keys), dtype=dtype, attn_implementation=attention)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of bytes, which the trainers want beside rows that are encoded already."""
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate([*control, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=32_768
    )


def build_rows(count: int, vocabulary: int, shared: int = 0, seed: int = 0, scale: float = 1.0) -> list[Row]:
    """Build rows of random ids with the lengths of ROW_SIZES times `scale`, in random order, in equal shares.

    shared: tokens that all rows begin with, added to their prompts. The answer is supervised.
    """
    random = np.random.default_rng(seed)
    start = draw_ids(random, shared, vocabulary)
    order = np.concatenate([random.permutation(len(ROW_SIZES)) for _ in range(-(-count // len(ROW_SIZES)))])[:count]
    sizes = [tuple(max(1, round(scale * size)) for size in ROW_SIZES[index]) for index in order]
    return [join([(start + draw_ids(random, sum(size), vocabulary), size[1])]) for size in sizes]


def build_conversations(count: int, vocabulary: int, turns: int = 8, seed: int = 0, scale: float = 1.0) -> list[Row]:
    """Build conversations of random ids that share what those of benchmarks/task.py do (`build_conversations`).

    Each answer is a sequence: the questions and answers before it, the question, and as its targets reasoning and
    answer. The reasoning is left out of later sequences.
    """
    random = np.random.default_rng(seed)
    conversations = []
    for _ in range(count):
        history: list[int] = []
        sequences = []
        for _ in range(turns):
            sizes = [max(1, round(scale * random.integers(low, high + 1))) for low, high in EXCHANGE_SIZES]
            question, reasoning, answer = (draw_ids(random, size, vocabulary) for size in sizes)
            history = history + question
            sequences.append((history + reasoning + answer, len(reasoning + answer)))
            history = history + answer
        conversations.append(join(sequences))
    return conversations


def draw_ids(random: np.random.Generator, count: int, vocabulary: int) -> list[int]:
    return random.integers(FIRST_ID, vocabulary, count).tolist()


def join(sequences: Sequence[tuple[list[int], int]]) -> Row:
    """Join sequences, each ids and the number of targets at its end, to a row with shifted labels."""
    labels = [[IGNORED] * (len(ids) - targets - 1) + ids[-targets:] + [IGNORED] for ids, targets in sequences]
    return {
        "input_ids": [token for ids, _ in sequences for token in ids],
        "labels": [label for line in labels for label in line],
        "sequence_lengths": [len(ids) for ids, _ in sequences],
        "computed_tokens": count_tree_tokens([np.array(ids) for ids, _ in sequences]),  # type: ignore[dict-item]
    }


def iterate_sequences(rows: Sequence[Row]) -> Iterator[tuple[list[int], list[int]]]:
    """Iterate over ids and shifted labels of every sequence of the rows."""
    yield from ((ids.tolist(), labels.tolist()) for row in rows for ids, labels in split_sequences(row))


def split_batches(rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def count_work(shape: Shape, batches: Sequence[Sequence[Row]], share: bool) -> dict[str, float]:
    """Count the tokens of all sequences, those computed, the targets, and the FLOP that these need at least.

    As benchmarks/scaling.py does: nothing for padding, for masked scores and for what is computed again. share:
    whether the prefixes that the sequences of a batch share are computed once.
    """
    tokens = computed = pairs = targets = 0
    for batch in batches:
        sequences = list(iterate_sequences(batch))
        depths = build_prefix_tree([np.array(ids) for ids, _ in sequences], share).depths
        tokens += sum(len(ids) for ids, _ in sequences)
        computed += len(depths)
        pairs += int((depths + 1).sum())
        targets += sum(label != IGNORED for _, labels in sequences for label in labels)
    # The row length whose tokens see as many keys in the mean, (length + 1) / 2.
    flops = computed * count_flops(shape, 2 * pairs / computed - 1, targets / computed)  # type: ignore[arg-type]
    return {"tokens": tokens, "computed_tokens": computed, "targets": targets, "flops": flops}
