"""Set up a model for inference: eval mode, a custom attention function and fused layers. All is restored afterwards."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sft_pipeline.kernels.cpu_layer_inference import (
    build_layer_forward,
    build_linear_forward,
    can_fuse_layer,
    can_fuse_linear,
)
from sft_pipeline.kernels.cpu_layer_training import disable_fused_layers
from sft_pipeline.model.compiled_layers import run_layers_eagerly
from sft_pipeline.model.module_utils import replace_attribute, restore_configs, use_eval_mode
from sft_pipeline.model.quantization import dequantize_layer

ATTENTION = "sft_generation"


@contextmanager
def use_inference_mode(model: PreTrainedModel, attention: Callable) -> Iterator[None]:
    """Context in which `model` runs in inference mode, without dropout, and attends with `attention`.

    In fp32 on the CPU, the context also holds a second copy of the linear layers' weights, in the memory layout that is
    fastest for few tokens. Training mode, configuration and layers are restored at the end, also if the block raises.
    """
    with ExitStack() as stack:
        stack.enter_context(_merge_tokens(model))
        # ZeRO-3 keeps small weights that it gathered within the block; as inference tensors they could not be trained.
        stack.enter_context(torch.no_grad() if is_deepspeed_zero3_enabled() else torch.inference_mode())
        stack.enter_context(use_eval_mode(model))
        stack.enter_context(_use_attention(model, attention))
        stack.enter_context(disable_fused_layers(model))
        stack.enter_context(run_layers_eagerly())
        stack.enter_context(_use_fused_layers(model, attention))
        yield


@contextmanager
def _merge_tokens(model: nn.Module) -> Iterator[None]:
    """Within this block, tokens that adapters train are rows of the embeddings and of the head.

    Elsewhere peft copies both matrices in every forward pass to put them there.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "trainable_tokens_delta")]
    for layer in layers:
        layer.merge()
    try:
        yield
    finally:
        for layer in layers:
            layer.unmerge()


@contextmanager
def use_bf16_weights(model: nn.Module) -> Iterator[None]:
    """Within this block, the float32 weights of `model` are bfloat16 copies, and autocast around its forward is off.

    Autocast would round them for every token. The weights themselves stay in memory, and are there again with the same
    bits at the end, also if the block raises; the copies are then freed.
    """
    forward = vars(model).pop("forward", None)
    if forward is not None:
        # accelerate wraps the forward in autocast; a class' own forward, which is found again without it, has no patch.
        patched = inspect.unwrap(forward)  # wrappers have the attributes of what they wrap
        if hasattr(patched, "head_obstacle"):
            vars(model)["forward"] = patched
    weights = [(weight, weight.data) for weight in model.parameters() if weight.dtype == torch.float32]
    try:
        for weight, data in weights:
            weight.data = data.to(torch.bfloat16)
        yield
    finally:
        for weight, data in weights:
            weight.data = data
        vars(model).pop("forward", None)
        if forward is not None:
            vars(model)["forward"] = forward


@contextmanager
def _use_attention(model: PreTrainedModel, attention: Callable) -> Iterator[None]:
    """Register `attention` with transformers and select it in all configurations of `model`.

    No mask function is registered, so that transformers builds no attention mask.
    """
    ALL_ATTENTION_FUNCTIONS[ATTENTION] = attention
    try:
        with restore_configs(model):
            # The backbone's: transformers reads the source of the class, which a head defined in a notebook lacks.
            cast(PreTrainedModel, model.base_model).set_attn_implementation(ATTENTION)
            yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[ATTENTION]


@contextmanager
def _use_fused_layers(model: nn.Module, attention: Callable) -> Iterator[None]:
    """Replace the forwards of decoder layers and of other linear layers by those of `cpu_layer_inference`, where it
    supports them. Quantized layers on the CPU compute with dequantized weights, which are made once for the block."""
    fused_layers = [module for module in model.modules() if can_fuse_layer(module)]
    fused_modules = {module for layer in fused_layers for module in layer.modules()}
    with ExitStack() as stack:
        for layer in fused_layers:
            stack.enter_context(replace_attribute(layer, "forward", build_layer_forward(layer, attention)))
        for module in model.modules():
            plain = dequantize_layer(module) or module
            if module not in fused_modules and can_fuse_linear(plain):
                own_forward: Any = module.forward
                stack.enter_context(replace_attribute(module, "forward", build_linear_forward(plain, own_forward)))
        yield
