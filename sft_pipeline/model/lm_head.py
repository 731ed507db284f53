"""A causal language model split into backbone and head, so that the head runs only at positions that have a target.

head = split_head(model)                      # once, before the model is wrapped or sharded
hidden_states = head.compute_hidden_states(input_ids=..., position_ids=...)
loss = head.compute_loss(hidden_states.flatten(0, 1)[positions], targets, num_items=num_items_in_batch)
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
from sft_pipeline.utils.distributed import share_verdict
from sft_pipeline.utils.errors import SFTError

# The largest relative difference of logits that split_head accepts, by the dtype of the head.
LOGITS_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
LOW_PRECISION_TOLERANCE = 5e-2


@dataclass(frozen=True)
class LMHead:
    """The two parts of a causal language model: the backbone, which returns hidden states, and the linear head.

    The logits are `softcap * tanh(scale * linear(hidden_states) / softcap)`, without soft-capping if it is None.
    """

    backbone: PreTrainedModel
    linear: Any  # nn.Linear, or peft's wrapper of one of which single tokens are trained
    scale: float
    softcap: float | None

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.linear, "bias", None)

    def compute_hidden_states(self, **inputs: Any) -> Tensor:
        """Return the last hidden states (lines, length, hidden size) of the backbone.

        On the CPU a tied embedding gets a sparse gradient, which holds only the rows of tokens in the batch and is
        added to the head's gradient. A dense one would be a second matrix of vocabulary x hidden size to clear, fill
        and add; a GPU does that in less than a millisecond, but sums sparse rows in no fixed order.
        """
        embedding: Any = self.backbone.get_input_embeddings()
        is_tied = type(embedding) is nn.Embedding and embedding.weight is self.linear.weight
        is_sparse = is_tied and embedding.weight.device.type == "cpu"
        with replace_attribute(embedding, "sparse", True) if is_sparse else nullcontext():
            return self.backbone(use_cache=False, **inputs).last_hidden_state

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Return all logits (..., vocabulary) as the model itself computes them; meant for few positions."""
        logits = torch.nn.functional.linear(hidden_states, self.linear.weight, self.bias) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def compute_loss(self, hidden_states: Tensor, targets: Tensor, num_items: float | Tensor) -> Tensor:
        """Return the loss of hidden states (targets, hidden size) and ids (targets,), see `linear_cross_entropy`."""

        def forward(hidden_states: Tensor) -> Tensor:
            return linear_cross_entropy(
                hidden_states,
                targets,
                self.linear.weight,
                self.bias,
                num_items=num_items,
                scale=self.scale,
                softcap=self.softcap,
            )

        return self.run_as_forward(forward, hidden_states)

    def run_as_forward(self, function: Callable[[Tensor], Tensor], hidden_states: Tensor) -> Tensor:
        """Return `function(hidden_states)`, run in place of the forward of the head's linear layer.

        FSDP and ZeRO-3 gather the weights of a module only while it is called.
        """
        with replace_attribute(self.linear, "forward", function):
            return self.linear(hidden_states)


def split_head(model: nn.Module) -> LMHead:
    """Split `model` (a transformers causal LM, or one with LoRA from `peft`) into backbone and head.

    Scale and soft-capping of the logits are read from the config, then checked against the model's own logits on a
    few tokens: a model that changes its logits in another way raises SFTError. Call it before the model is wrapped
    or sharded. `peft`: LoRA layers inside the backbone need nothing; of a head in `modules_to_save` the trained copy is
    used, and where single tokens are trained the weights with these; a head with LoRA on it, and prompt learning, which
    changes the inputs, raise SFTError.
    """
    model = unwrap_peft(model)
    linear = _get_plain_linear(model.get_output_embeddings())
    if linear is None:
        raise SFTError(f"{type(model).__name__} has no plain linear head")
    config = model.config.get_text_config()
    backbone: Any = model.base_model
    head = LMHead(backbone, linear, _read_logit_scale(config), getattr(config, "final_logit_softcapping", None))
    difference = _compare_logits(model, head)
    if difference > LOGITS_TOLERANCE.get(linear.weight.dtype, LOW_PRECISION_TOLERANCE):
        raise SFTError(
            f"{type(model).__name__} changes its logits after the head in an unknown way: "
            f"they differ by {difference:.1g}"
        )
    return head


def _get_plain_linear(layer: Any) -> Any:
    """Return the linear layer that computes the logits; None if `layer` is anything else (LoRA, two layers).

    peft's wrapper of a layer of which single tokens are trained is one, too: its `weight` has these rows in it.
    """
    if hasattr(layer, "token_adapter"):
        return layer if type(layer.token_adapter.base_layer) is nn.Linear else None
    if hasattr(layer, "modules_to_save"):
        layer = layer.modules_to_save[layer.active_adapters[0]]
    return layer if type(layer) is nn.Linear else None


def _read_logit_scale(config: Any) -> float:
    """Return the factor of the logits: Cohere and Falcon-H1 have a multiplier in the config, Granite a divisor."""
    multiplier = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    return multiplier / (getattr(config, "logits_scaling", None) or 1.0)


@share_verdict
def _compare_logits(model: nn.Module, head: LMHead) -> float:
    """Return the largest difference between the model's logits and the head's on a few tokens.

    It is divided by the largest logit; infinite for a backbone that returns no hidden states.
    """
    input_ids = torch.arange(4, device=head.linear.weight.device)[None] % head.linear.weight.shape[0]
    with use_eval_mode(model):
        expected = model(input_ids=input_ids, use_cache=False).logits.float()
        hidden_states = getattr(head.backbone(input_ids=input_ids, use_cache=False), "last_hidden_state", None)
        if hidden_states is None:
            return float("inf")
        logits = head.compute_logits(hidden_states).float()
    return ((expected - logits).abs().max() / expected.abs().max().clamp_min(1e-9)).item()
