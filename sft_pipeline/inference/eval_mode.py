"""A model lent for inference: evaluation mode, an attention function of our own, fast layers; given back as it was."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sft_pipeline.kernels.cpu_layer_inference import (
    build_layer_forward,
    build_linear_forward,
    can_fuse_layer,
    can_fuse_linear,
)
from sft_pipeline.kernels.cpu_layer_training import disable_fused_layers
from sft_pipeline.model.module_utils import use_eval_mode

ATTENTION = "sft_generation"


@contextmanager
def use_inference_mode(model: PreTrainedModel, attention: Callable) -> Iterator[None]:
    """Within this block, `model` runs without gradients or dropout and attends with `attention`.

    In fp32 on the CPU the linear layers' weights are also kept in the layout that is fastest for few tokens: another
    copy of them until the block ends. Afterwards mode, configuration and layers are as they were, also if the block
    raises.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(use_eval_mode(model))
        stack.enter_context(_attention(model, attention))
        stack.enter_context(disable_fused_layers(model))
        stack.enter_context(_fast_forwards(model, attention))
        yield


@contextmanager
def _attention(model: nn.Module, attention: Callable) -> Iterator[None]:
    """Register `attention` with transformers and let every configuration in `model` name it.

    No mask function is registered with it, so that transformers builds no mask.
    """
    configs: list[Any] = list({id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values())
    names = [(config, config._attn_implementation) for config in configs]
    ALL_ATTENTION_FUNCTIONS[ATTENTION] = attention
    try:
        for config in configs:
            config._attn_implementation = ATTENTION
        yield
    finally:
        for config, name in names:
            config._attn_implementation = name
        del ALL_ATTENTION_FUNCTIONS[ATTENTION]


@contextmanager
def _fast_forwards(model: nn.Module, attention: Callable) -> Iterator[None]:
    """Give the layers that `fused_layer` serves its forwards, and the other linear layers its product."""
    replaced: list[nn.Module] = []

    def replace(module: nn.Module, forward: Callable[..., Tensor]) -> None:
        module.forward = forward
        replaced.append(module)

    fused = [module for module in model.modules() if can_fuse_layer(module)]
    inside = {part for layer in fused for part in layer.modules()}
    try:
        for layer in fused:
            replace(layer, build_layer_forward(layer, attention))
        for module in model.modules():
            if module not in inside and can_fuse_linear(module):
                replace(module, build_linear_forward(module))
        yield
    finally:
        for module in replaced:
            del module.forward
