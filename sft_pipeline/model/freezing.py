"""Partial fine-tuning: frozen parameters have no gradient and no optimizer state."""

from __future__ import annotations

import logging
import re
from itertools import zip_longest

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sft_pipeline.model.module_utils import unwrap_peft, use_eval_mode
from sft_pipeline.utils.distributed import share_verdict
from sft_pipeline.utils.errors import SFTError

logger = logging.getLogger(__name__)


def freeze_except(model: nn.Module, patterns: list[str]) -> None:
    """Freeze all parameters but those whose name a regular expression in `patterns` is found in.

    Examples: "self_attn", or r"layers\\.(28|29)\\.". The head of a model with tied embeddings has the name of the
    embedding. Raises SFTError for a pattern that is not a regular expression or that matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        try:
            has_match = any(re.search(pattern, name) for name in names)
        except re.error as error:
            raise SFTError(f"trainable_modules {pattern}: not a regular expression ({error})") from error
        if not has_match:
            raise SFTError(
                f"trainable_modules {pattern}: matches no parameter name; names are {names[0]}, …, {names[-1]}"
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad = any(re.search(pattern, name) for pattern in patterns)


def freeze_unreached(model: PreTrainedModel) -> None:
    """Freeze the parameters outside the text model that text does not reach, such as those of a vision tower.

    They would have no gradient, for which DDP waits. Which they are is found by the gradient of the logits of a few
    tokens; those of the text model are not looked at, as a few tokens do not reach every expert. Raises SFTError if
    none is left to train.
    """
    causal_lm = unwrap_peft(model)
    trainable = {name: parameter for name, parameter in causal_lm.named_parameters() if parameter.requires_grad}
    unreached = _find_unreached(model)
    if not unreached:
        return
    if len(unreached) == len(trainable):
        raise SFTError(f"nothing to train: rows of text do not reach {unreached[0]} and the other trainable parameters")
    for name in unreached:
        trainable[name].requires_grad = False
    modules = dict.fromkeys(".".join(name.split(".")[:2]) for name in unreached)
    count = sum(trainable[name].numel() for name in unreached)
    logger.info("frozen, as rows of text do not reach them: %s parameters (%s)", f"{count:,}", ", ".join(modules))


@share_verdict
def _find_unreached(model: PreTrainedModel) -> list[str]:
    """Return the names of the trainable parameters outside the text model that get no gradient from text."""
    causal_lm = unwrap_peft(model)
    text_modules = (causal_lm.get_decoder(), causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings())
    text_parameters = {parameter for module in text_modules if module is not None for parameter in module.parameters()}
    trainable = {name: parameter for name, parameter in causal_lm.named_parameters() if parameter.requires_grad}
    outside = {name: parameter for name, parameter in trainable.items() if parameter not in text_parameters}
    if not outside:
        return []
    input_ids = torch.arange(4, device=causal_lm.device)[None] % causal_lm.config.get_text_config().vocab_size
    grads: tuple[Tensor | None, ...] = ()
    with use_eval_mode(model), torch.enable_grad():
        logits = causal_lm(input_ids=input_ids, use_cache=False).logits
        if logits.requires_grad:  # else no trainable parameter is reached at all
            grads = torch.autograd.grad(logits.sum(), list(outside.values()), allow_unused=True)
    return [name for name, grad in zip_longest(outside, grads) if grad is None]
