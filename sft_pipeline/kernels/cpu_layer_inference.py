"""A Llama-like decoder layer for inference in fp32 on the CPU: the same arithmetic in a third of the operations.

Between the matrix products, decoding one row spends a quarter of its time on some forty small operations a layer, each
with a few microseconds of dispatch. Here query, key and value are one product, oneDNN applies activations and residual
sums inside the products, and the submodules are not called one by one.

In fp32 on the CPU, `torch.nn.functional.linear` also calls a BLAS that reads the weights of a decoding step at less
than half the memory's bandwidth. oneDNN, which ships with torch, reads them at full bandwidth from its own layout. The
arithmetic is fp32 either way; only the order of the sums differs.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

# Layers that compute norm, attention with rotary positions, residual sum, norm, silu-gated MLP, residual sum; in Qwen3
# queries and keys are normed as well.
LAYER_CLASSES = ("LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
AnyModule = Any  # a decoder layer or a module inside it: torch types the attributes of a module as Tensor | Module

# The number of tokens that oneDNN picks a weight layout for. The layout for 16 is as fast on 1 token as the layout for
# 1, and faster on more.
LAYOUT_TOKENS = 16


class OneDnnLinear:
    """x W^T + b of linear layers that share their input x, with W in oneDNN's own layout."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        weight = layers[0].weight if len(layers) == 1 else torch.cat([layer.weight for layer in layers])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, LAYOUT_TOKENS)
        self.bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
        linear_pointwise = torch.ops.mkldnn._linear_pointwise
        self.linear, self.linear_binary = linear_pointwise.default, linear_pointwise.binary

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        """Return activation(x W^T + b). `activation` is a name of oneDNN's: "none", or "swish" for silu."""
        return self.linear(x, self.weight, self.bias, activation, [], "")

    def compute_binary(self, x: Tensor, operand: Tensor, operation: str) -> Tensor:
        """Return x W^T + b plus ("add") or times ("mul") `operand`."""
        return self.linear_binary(x, operand, self.weight, self.bias, operation)


def can_fuse_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether `layer` is a plain fp32 linear layer on the CPU that oneDNN can compute.

    Subclasses of nn.Linear, layers whose weight is sharded and layers whose forward is already replaced are not, nor is
    any layer in a build of torch without the oneDNN operators of its inductor.
    """
    if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter or "forward" in vars(layer):
        return False
    if layer.weight.dim() != 2:  # DeepSpeed's ZeRO-3 leaves an empty vector on a process between two uses
        return False
    is_fp32_on_cpu = layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32
    return is_fp32_on_cpu and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def can_fuse_layer(layer: AnyModule) -> bool:
    """Return whether `layer` is one of LAYER_CLASSES without adapters, hooks or replaced forwards in it."""
    if type(layer).__name__ not in LAYER_CLASSES or not type(layer).__module__.startswith("transformers."):
        return False
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in layer.modules()):
        return False
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    if not all("variance_epsilon" in vars(norm) for norm in norms):
        return False  # adapters of a norm
    attention, mlp = layer.self_attn, layer.mlp
    qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
    if not all(map(can_fuse_linear, [*qkv, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj])):
        return False
    return len({projection.bias is None for projection in qkv}) == 1 and attention.config.hidden_act == "silu"


def build_linear_forward(layer: nn.Linear, own_forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Build a forward for a linear layer: oneDNN's product, and its own forward under autocast or for other dtypes."""
    onednn_linear = OneDnnLinear([layer])

    def forward(x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return own_forward(x)
        return onednn_linear(x)

    return forward


def build_layer_forward(layer: AnyModule, attention_function: Callable) -> Callable[..., Tensor]:
    """Build a forward for a decoder layer that `can_fuse_layer` accepts.

    attention_function: a function of transformers' attention interface. Under autocast or for other dtypes than
    float32 the layer's own forward runs.
    """
    apply_attention = _build_attention(layer.self_attn, attention_function)
    apply_mlp = _build_mlp(layer.mlp)
    apply_input_norm = _build_norm(layer.input_layernorm)
    apply_post_attention_norm = _build_norm(layer.post_attention_layernorm)

    def forward(hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], **kwargs: object) -> Tensor:
        if hidden_states.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return type(layer).forward(layer, hidden_states, position_embeddings=position_embeddings, **kwargs)
        hidden_states = apply_attention(apply_input_norm(hidden_states), hidden_states, *position_embeddings)
        return apply_mlp(apply_post_attention_norm(hidden_states), hidden_states)

    return forward


def _build_norm(norm: AnyModule) -> Callable[[Tensor], Tensor]:
    shape, weight, epsilon = tuple(norm.weight.shape), norm.weight, norm.variance_epsilon
    return lambda x: torch.rms_norm(x, shape, weight, epsilon)


def _build_attention(
    module: AnyModule, attention_function: Callable
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    qkv_proj, o_proj = OneDnnLinear([module.q_proj, module.k_proj, module.v_proj]), OneDnnLinear([module.o_proj])
    head_dim = module.head_dim
    num_heads, num_kv_heads = module.q_proj.out_features // head_dim, module.k_proj.out_features // head_dim
    head_norms = [_build_norm(getattr(module, name)) for name in ("q_norm", "k_norm") if hasattr(module, name)]
    sliding_window = getattr(module, "sliding_window", None)

    def forward(x: Tensor, residual: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x and residual: (1, tokens, hidden size); cos and sin: (1, tokens, head size)."""
        query_key, value = qkv_proj(x).unflatten(-1, (-1, head_dim)).split([num_heads + num_kv_heads, num_kv_heads], 2)
        if head_norms:
            parts = query_key.split([num_heads, num_kv_heads], 2)
            query_key = torch.cat([apply_norm(part) for apply_norm, part in zip(head_norms, parts)], 2)
        first_half, second_half = query_key.chunk(2, -1)
        rotated_half = torch.cat((-second_half, first_half), -1)
        query_key = query_key * cos.unsqueeze(2) + rotated_half * sin.unsqueeze(2)
        query, key = query_key.transpose(1, 2).split([num_heads, num_kv_heads], 1)
        attn_output, _ = attention_function(
            module, query, key, value.transpose(1, 2), None, scaling=module.scaling, sliding_window=sliding_window
        )
        return o_proj.compute_binary(attn_output.flatten(2), residual, "add")

    return forward


def _build_mlp(module: AnyModule) -> Callable[[Tensor, Tensor], Tensor]:
    gate_proj, up_proj, down_proj = (
        OneDnnLinear([layer]) for layer in (module.gate_proj, module.up_proj, module.down_proj)
    )

    def forward(x: Tensor, residual: Tensor) -> Tensor:
        intermediate = up_proj.compute_binary(x, gate_proj(x, "swish"), "mul")
        return down_proj.compute_binary(intermediate, residual, "add")

    return forward
