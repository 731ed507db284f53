"""A causal language model cut into backbone and head, so that the head runs only where there is a target.

head = split_head(model)                                    # once, before the model is wrapped for many devices
hidden = head.backbone(input_ids=..., position_ids=...).last_hidden_state
loss = head.loss(hidden, labels, num_items=num_items_in_batch)
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sft_pipeline.model.linear_cross_entropy import linear_cross_entropy
from sft_pipeline.model.module_utils import replace_attribute, unwrap_peft, use_eval_mode
from sft_pipeline.utils.errors import SFTError

CLOSE = {torch.float32: 1e-4, torch.float64: 1e-6}  # the largest difference of logits split_head accepts, relative


@dataclass(frozen=True)
class LMHead:
    """A causal language model cut in two: the backbone, which gives hidden states, and the head over them."""

    backbone: PreTrainedModel
    linear: nn.Linear
    scale: float
    softcap: float | None

    def hidden(self, **inputs: Any) -> Tensor:
        """The backbone's last hidden states (lines, length, hidden size).

        The gradient of a tied embedding is its rows that occurred, added to the head's gradient: a dense one would be
        a second matrix of vocabulary x hidden size to clear, fill and add.
        """
        embedding: Any = self.backbone.get_input_embeddings()
        tied = type(embedding) is nn.Embedding and embedding.weight is self.linear.weight
        with replace_attribute(embedding, "sparse", True) if tied else nullcontext():
            return self.backbone(use_cache=False, **inputs).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """All logits (..., vocabulary) of few positions, as the model itself gives them."""
        logits = torch.nn.functional.linear(hidden, self.linear.weight, self.linear.bias) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def loss(self, hidden: Tensor, labels: Tensor, num_items: float | Tensor) -> Tensor:
        """See `linear_cross_entropy`."""
        linear = self.linear
        options: dict[str, Any] = {"num_items": num_items, "scale": self.scale, "softcap": self.softcap}
        return self.call(
            lambda states: linear_cross_entropy(states, labels, linear.weight, linear.bias, **options), hidden
        )

    def call(self, function: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """`function(hidden)` in the place of the head's own forward pass.

        Where weights are divided among processes (FSDP, ZeRO-3), they are whole within their module's call alone.
        """
        with replace_attribute(self.linear, "forward", function):
            return self.linear(hidden)


def split_head(model: nn.Module) -> LMHead:
    """Cut `model` (a transformers causal LM, or one with LoRA from `peft`) into backbone and head.

    What the family does to its logits is read from the config and then checked against the model's own logits on a
    few tokens, so a family with another rule is refused (SFTError), never wrong. Call it before the model is wrapped
    or sharded. `peft`: LoRA layers sit inside the backbone and need nothing; a head in `modules_to_save` is trained
    as its copy; a head with LoRA on it, and prompt learning, which changes the inputs, are refused.
    """
    model = unwrap_peft(model)
    linear = _plain_linear(model.get_output_embeddings())
    if linear is None:
        raise SFTError(f"{type(model).__name__} has no plain linear head; set `packing: false` and use the full logits")
    config = model.config.get_text_config()
    backbone: Any = model.base_model
    head = LMHead(backbone, linear, _scale(config), getattr(config, "final_logit_softcapping", None))
    if (difference := _difference(model, head)) > CLOSE.get(linear.weight.dtype, 5e-2):
        raise SFTError(
            f"{type(model).__name__} changes its logits after the head in an unknown way "
            f"(they differ by {difference:.1g}); use the full logits for it"
        )
    return head


def _plain_linear(layer: Any) -> nn.Linear | None:
    """The linear layer that gives the logits; None if the head is something else (a LoRA layer, two layers)."""
    if hasattr(layer, "modules_to_save"):
        layer = layer.modules_to_save[layer.active_adapters[0]]
    return layer if type(layer) is nn.Linear else None


def _scale(config: Any) -> float:
    """What the logits are multiplied by: Cohere and Falcon-H1 name a factor, Granite a divisor."""
    factor = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    return factor / (getattr(config, "logits_scaling", None) or 1.0)


def _difference(model: nn.Module, head: LMHead) -> float:
    """The largest difference between the model's logits and the head's on a few tokens, over the largest logit."""
    ids = torch.arange(4, device=head.linear.weight.device)[None] % head.linear.weight.shape[0]
    with use_eval_mode(model):
        expected = model(input_ids=ids, use_cache=False).logits.float()
        hidden = getattr(head.backbone(input_ids=ids, use_cache=False), "last_hidden_state", None)
        if hidden is None:
            return float("inf")
        found = head.logits(hidden).float()
    return ((expected - found).abs().max() / expected.abs().max().clamp_min(1e-9)).item()
