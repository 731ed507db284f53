"""Tokens that are added to a tokenizer and its model: `add_tokens: ["<tool>", "</tool>"]`.

They are ordinary tokens, not special ones: a text that spells one becomes it, and a decoded answer shows it. Their
embeddings begin as transformers' `resize_token_embeddings` draws them, and are trained: with all others in full
training, and alone beside adapters, in the head too.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sft_pipeline.utils.errors import SFTError

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> None:
    """Add to `tokenizer` those of `tokens` that it does not have, and log which it has.

    Raises SFTError for one that is a special token of the tokenizer.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    for token in tokens:
        if token in special:
            raise SFTError(f"add_tokens: {token!r} is a special token of the tokenizer; remove it")
    vocabulary = tokenizer.get_vocab()
    if known := [token for token in tokens if token in vocabulary]:
        logger.info("add_tokens: the tokenizer already has %s", ", ".join(map(repr, known)))
    if missing := [token for token in tokens if token not in vocabulary]:
        tokenizer.add_tokens(missing)
        logger.info("%s tokens added: %s", len(missing), ", ".join(map(repr, missing)))


def resize_embeddings(model: PreTrainedModel, rows: int, seed: int = 0) -> None:
    """Give the embeddings and the head of `model` at least so many rows, as transformers does.

    The new rows are drawn around the mean of the others, the same on every process and after a resume; those of a model
    without weights stay empty. Rows that a model has beyond its tokenizer keep their values.
    """
    embeddings: Any = model.get_input_embeddings()
    if rows <= embeddings.weight.shape[0]:
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.resize_token_embeddings(rows, mean_resizing=model.device.type != "meta")


def train_tokens(config: PeftConfig, model: PreTrainedModel, token_ids: list[int]) -> PeftConfig:
    """Return a copy of the adapters' config that also trains the embeddings of these tokens, in the head too.

    Raises SFTError for a kind of adapters that cannot train single tokens, or that trains the embeddings as a whole.
    """
    if not hasattr(config, "trainable_token_indices"):
        raise SFTError("add_tokens: of the adapters, only LoRA trains new tokens; remove peft_type, or add_tokens")
    if config.trainable_token_indices:
        raise SFTError("add_tokens sets trainable_token_indices of peft; remove one of them")
    names = _name_embeddings(model)
    leaves = {name.rpartition(".")[2] for name in names}
    if whole := sorted(leaves & {*(getattr(config, "modules_to_save", None) or ())}):
        raise SFTError(
            f"add_tokens trains the new tokens alone, and modules_to_save all of {whole[0]}; remove {whole[0]} there"
        )
    head: Any = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise SFTError("add_tokens: the head has a bias, which peft would leave out; train without adapters")
    config = copy.deepcopy(config)
    config.trainable_token_indices = {name: sorted(token_ids) for name in names}
    return config


def save_without_embeddings(model: Any) -> None:
    """Let `model`, a PeftModel with new tokens, save their rows alone.

    peft would add the whole embeddings, as they are larger than those of the base.
    """
    save = model.save_pretrained

    def save_pretrained(folder: str, *args: Any, **kwargs: Any) -> None:
        save(folder, *args, **kwargs | {"save_embedding_layers": False})

    model.save_pretrained = save_pretrained


def count_saved_rows(model: PreTrainedModel, folder: Path) -> int:
    """Return how many rows of the embeddings the adapters in `folder` need: 0 if they have none.

    model: their base.
    """
    from peft import PeftConfig

    indices = getattr(PeftConfig.from_pretrained(str(folder)), "trainable_token_indices", None) or []
    rows = [1 + max(ids) for ids in (indices.values() if isinstance(indices, dict) else [indices]) if ids]
    names = {f"base_model.model.{name}.weight" for name in _name_embeddings(model)}
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        rows += [file.get_slice(name).get_shape()[0] for name in file.keys() if name in names]  # noqa: SIM118
    return max(rows, default=0)


def _name_embeddings(model: PreTrainedModel) -> list[str]:
    """Return the names of the embeddings and of a head that is not tied to them."""
    layers: list[nn.Module | None] = [model.get_input_embeddings()]
    if not model.config.get_text_config().tie_word_embeddings:
        layers.append(model.get_output_embeddings())
    return [name for name, module in model.named_modules() if any(module is layer for layer in layers)]
