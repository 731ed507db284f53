"""Small context managers and lookups over a model's modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sft_pipeline.utils.errors import SFTError


def unwrap_peft(model: Any) -> PreTrainedModel:
    """The causal LM inside a `peft` model."""
    if not hasattr(model, "peft_config"):
        return model
    if any(getattr(c, "is_prompt_learning", False) for c in model.peft_config.values()):
        raise SFTError("prompt learning changes the inputs of the model; use `lora: true` instead")
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def replace_attribute(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Inside, the module's own attribute `name` is `value`."""
    before = vars(module).get(name)
    vars(module)[name] = value
    try:
        yield
    finally:
        del vars(module)[name]
        if before is not None:
            vars(module)[name] = before


@contextmanager
def use_eval_mode(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; every module's mode is put back."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in training.items():
            module.training = flag
