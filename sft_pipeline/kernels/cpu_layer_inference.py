"""A decoder layer of Llama's kind for inference in fp32 on the CPU: the same arithmetic in a third of the operations.

Decoding one row spends a quarter of its time between the products: forty small operations a layer, each a few
microseconds of dispatch. Here the three projections of attention are one product, activations and residual sums are
done inside the products by oneDNN, and modules are not called one by one.

On the CPU, `torch.nn.functional.linear` in fp32 also calls a BLAS that reads the weights of a decoding step at less
than half the memory's bandwidth. oneDNN, which torch ships, reads them at full bandwidth from its own layout. The
arithmetic is fp32 either way; only the order of the sums differs.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

# Layers that compute norm, attention with rotary positions, sum, norm, silu-gated MLP, sum (and Qwen3's norms of
# heads).
FAMILY = ("LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
Part = Any  # a module of such a layer: torch types what it is made of as tensors or modules, whichever it is

# What oneDNN is told of the number of tokens. Its layout for 16 is as fast on 1 as that for 1, and faster on more.
LAYOUT_TOKENS = 16


class OneDnnLinear:
    """x W^T + b of linear layers that share their input x, with W in a layout of oneDNN's."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        weight = layers[0].weight if len(layers) == 1 else torch.cat([layer.weight for layer in layers])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, LAYOUT_TOKENS)
        self.bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
        self.multiply = torch.ops.mkldnn._linear_pointwise.default
        self.multiply_with = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, x: Tensor, then: str = "none") -> Tensor:
        """`then` is oneDNN's name of what is done to the product: "none" or "swish"."""
        return self.multiply(x, self.weight, self.bias, then, [], "")

    def with_(self, x: Tensor, other: Tensor, operation: str) -> Tensor:
        """The product plus ("add") or times ("mul") `other`."""
        return self.multiply_with(x, other, self.weight, self.bias, operation)


def can_fuse_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether `layer` is a plain fp32 linear layer on the CPU. One of another class, or whose forward is already
    replaced, is someone else's; a build of torch without the operators of its inductor for oneDNN keeps its own
    product."""
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        return False
    ours = layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32
    return ours and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def can_fuse_layer(layer: Part) -> bool:
    """Whether `layer` is of the family, untouched: no adapter in it, no hook on it, nothing that a fused layer would
    skip."""
    if type(layer).__name__ not in FAMILY or not type(layer).__module__.startswith("transformers."):
        return False
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in layer.modules()):
        return False
    attention, mlp = layer.self_attn, layer.mlp
    qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
    if not all(map(can_fuse_linear, [*qkv, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj])):
        return False
    return len({projection.bias is None for projection in qkv}) == 1 and attention.config.hidden_act == "silu"


def build_linear_forward(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """A forward for a linear layer: oneDNN's product, and torch's own under autocast."""
    product = OneDnnLinear([layer])

    def forward(x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return linear(x, layer.weight, layer.bias)
        return product(x)

    return forward


def build_layer_forward(layer: Part, attend: Callable) -> Callable[..., Tensor]:
    """A forward for a decoder layer that `can_fuse_layer`; `attend` is an attention function of transformers'
    interface."""
    self_attention, mlp = _attention(layer.self_attn, attend), _mlp(layer.mlp)
    before, after = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)

    def forward(hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], **kwargs: object) -> Tensor:
        if hidden_states.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return type(layer).forward(layer, hidden_states, position_embeddings=position_embeddings, **kwargs)
        hidden_states = self_attention(before(hidden_states), hidden_states, *position_embeddings)
        return mlp(after(hidden_states), hidden_states)

    return forward


def _norm(norm: Part) -> Callable[[Tensor], Tensor]:
    shape, weight, epsilon = tuple(norm.weight.shape), norm.weight, norm.variance_epsilon
    return lambda x: torch.rms_norm(x, shape, weight, epsilon)


def _attention(module: Part, attend: Callable) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    project, output = OneDnnLinear([module.q_proj, module.k_proj, module.v_proj]), OneDnnLinear([module.o_proj])
    size = module.head_dim
    heads, shared = module.q_proj.out_features // size, module.k_proj.out_features // size
    norms = [_norm(getattr(module, name)) for name in ("q_norm", "k_norm") if hasattr(module, name)]
    window = getattr(module, "sliding_window", None)

    def forward(x: Tensor, residual: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """`x` and `residual` are (1, tokens, hidden size), `cosine` and `sine` (1, tokens, head size)."""
        queries_keys, value = project(x).unflatten(-1, (-1, size)).split([heads + shared, shared], 2)
        if norms:
            parts = queries_keys.split([heads, shared], 2)
            queries_keys = torch.cat([norm(part) for norm, part in zip(norms, parts)], 2)
        first, second = queries_keys.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
        queries_keys = queries_keys * cosine.unsqueeze(2) + turned * sine.unsqueeze(2)
        query, key = queries_keys.transpose(1, 2).split([heads, shared], 1)
        mixed, _ = attend(module, query, key, value.transpose(1, 2), None, module.scaling, window)
        return output.with_(mixed.flatten(2), residual, "add")

    return forward


def _mlp(module: Part) -> Callable[[Tensor, Tensor], Tensor]:
    gate, up, down = (OneDnnLinear([layer]) for layer in (module.gate_proj, module.up_proj, module.down_proj))
    return lambda x, residual: down.with_(up.with_(x, gate(x, "swish"), "mul"), residual, "add")
