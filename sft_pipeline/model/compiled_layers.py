"""Decoder layers compiled in place by torch.compile, each for lines of any number of tokens.

    compile_layers(model)                 # after adapters; in place of use_fused_layers, which would not be called
    with run_layers_eagerly(): ...        # generation, a line of one token

Norms, rotary positions, activations and residual sums become a few kernels. Attention is not compiled with the layer:
its functions (packed_attention.py) are called from it, so that no kernel depends on how a batch is divided, and
FlexAttention is compiled once by itself. A layer, its attention and its MLP are compiled each by itself too: activation
checkpointing, which torch does not compile around such a call, runs the layer uncompiled and the others compiled.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def compile_layers(model: nn.Module, **options: Any) -> int:
    """Compile the decoder layers of `model` when they are first called; return their number.

    Layers whose forward was replaced, as by kernels/cpu_layer_training.py, stay as they are. options: of
    `torch.compile`.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and "forward" not in vars(module)
    ]
    for layer in layers:
        for module in (layer, *layer.children()):
            module.compile(dynamic=True, **options)
    return len(layers)


def run_layers_eagerly() -> AbstractContextManager[Any]:
    """Return a context in which compiled functions run as they were written, so that nothing is compiled for them."""
    return torch.compiler.set_stance("force_eager")
