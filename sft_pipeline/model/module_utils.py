"""Small helpers for models and their modules: the model inside a `peft` wrapper, temporary changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from sft_pipeline.utils.errors import SFTError


def unwrap_peft(model: Any) -> PreTrainedModel:
    """Return the causal LM inside a `peft` model; any other model is returned unchanged.

    Raises SFTError for prompt learning, which changes the model's inputs.
    """
    if not hasattr(model, "peft_config"):
        return model
    if any(getattr(config, "is_prompt_learning", False) for config in model.peft_config.values()):
        raise SFTError("prompt learning changes the inputs of the model; use `lora: true` instead")
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def adds_router_loss(model: PreTrainedModel) -> bool:
    """Return whether the forward of `model`, a mixture of experts, adds the loss of its router to that of the labels.

    It does so with `output_router_logits` in its config, in every family of transformers that has such a loss.
    """
    configs = (model.config, model.config.get_text_config())
    return any(getattr(config, "output_router_logits", False) for config in configs)


@contextmanager
def replace_attribute(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Within this block, the attribute `name` of the module instance is `value`."""
    previous = vars(module).get(name)
    vars(module)[name] = value
    try:
        yield
    finally:
        del vars(module)[name]
        if previous is not None:
            vars(module)[name] = previous


@contextmanager
def use_eval_mode(model: nn.Module) -> Iterator[None]:
    """Within this block, `model` is in evaluation mode without gradients; the mode of every module is restored."""
    training_modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, is_training in training_modes.items():
            module.training = is_training


@contextmanager
def restore_configs(model: nn.Module) -> Iterator[None]:
    """At the end of this block, the configs of `model` have the attributes they had before it.

    `set_attn_implementation` changes several configs, and transformers has no public way to read what they had.
    """
    attributes = [(config, dict(vars(config))) for config in find_configs(model)]
    try:
        yield
    finally:
        for config, values in attributes:
            vars(config).update(values)


@contextmanager
def use_portable_attention(model: PreTrainedModel, attn_implementation: str | None) -> Iterator[None]:
    """Within this block, a model whose `attn_implementation` may run on GPUs alone attends with sdpa.

    The checks of a model run where it was loaded: on the CPU.
    """
    if attn_implementation in (None, "eager", "sdpa"):
        yield
        return
    with restore_configs(model):
        unwrap_peft(model).set_attn_implementation("sdpa")
        yield


def find_configs(model: nn.Module) -> list[PreTrainedConfig]:
    """Return the configs of all modules, and the configs inside them, each once."""
    configs: dict[int, PreTrainedConfig] = {}
    values = [getattr(module, "config", None) for module in model.modules()]
    while values:
        value = values.pop()
        if isinstance(value, PreTrainedConfig) and id(value) not in configs:
            configs[id(value)] = value
            values.extend(vars(value).values())
    return list(configs.values())
