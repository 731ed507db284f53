"""A decoder layer of Llama's kind for training over packed rows in fp32 on the CPU: forward and backward by hand.

Autograd keeps every intermediate of a layer and walks over each of them several times, which between the products
costs a quarter of a step and half of its memory. Here a layer is two functions, attention and MLP. Each keeps the
inputs of its products alone, forms norms and activations again in the backward pass, and runs activations over blocks
of tokens small enough for the processor's cache. The arithmetic is that of the modules; only the order of sums differs.

    use_fused_layers(model)        # after use_packed_attention and LoRA
    with fused_layers_set_aside(model): ...        # the modules as they were

Calls that are not packed, or not fp32 on the CPU, go to the modules themselves.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from sft_pipeline.kernels.cpu_attention import PackedRows, attend, attend_backward
from sft_pipeline.kernels.cpu_layer_inference import Part, can_fuse_layer

TOKENS = 128  # at a time in the activations of the MLP
Pairs = list[Any]  # weight, bias, weight, bias, ...: tensors, a bias may be None


def use_fused_layers(model: nn.Module) -> int:
    """Give every layer of `model` that can take it the forward below; returns how many did."""
    layers = [module for module in model.modules() if can_fuse_layer(module)]
    for layer in layers:
        layer.forward = FusedTrainingForward(layer)
    return len(layers)


@contextmanager
def disable_fused_layers(model: nn.Module) -> Iterator[None]:
    """Within this block the layers of `model` have the forwards of their classes."""
    aside = [
        (m, vars(m).pop("forward")) for m in model.modules() if isinstance(vars(m).get("forward"), FusedTrainingForward)
    ]
    try:
        yield
    finally:
        for layer, forward in aside:
            layer.forward = forward


@dataclass(frozen=True, eq=False)
class FusedTrainingForward:
    """The forward of one decoder layer."""

    layer: Part

    def __call__(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        rows = kwargs.get("packed_rows")
        if rows is None or not self._serves(hidden_states):
            return type(self.layer).forward(self.layer, hidden_states, **kwargs)
        attention, mlp = self.layer.self_attn, self.layer.mlp
        before, after = self.layer.input_layernorm, self.layer.post_attention_layernorm
        cosine, sine = (t[0].unsqueeze(1) for t in kwargs["position_embeddings"])
        shape = _Shape(rows, cosine, sine, attention.head_dim, attention.scaling, before.variance_epsilon)
        norms = [getattr(attention, name).weight if hasattr(attention, name) else None for name in ("q_norm", "k_norm")]
        parameters = _weights(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        x = _Attention.apply(shape, hidden_states[0], before.weight, *norms, *parameters)
        parameters = _weights(mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        return _MLP.apply(after.variance_epsilon, x, after.weight, *parameters)[None]

    def _serves(self, x: Tensor) -> bool:
        attention, mlp = self.layer.self_attn, self.layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        # Adapters may have been put in since.
        untouched = all(type(p) is nn.Linear for p in (*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        dropout = self.layer.training and attention.attention_dropout
        plain = x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        return untouched and plain and not dropout


def _weights(*layers: nn.Linear) -> Pairs:
    return [tensor for layer in layers for tensor in (layer.weight, layer.bias)]


@dataclass(frozen=True)
class _Shape:
    """What attention needs beside tensors that have a gradient. cosine, sine: (tokens, 1, head size)."""

    rows: PackedRows
    cosine: Tensor
    sine: Tensor
    head_size: int
    scaling: float
    epsilon: float


class _Attention(torch.autograd.Function):
    """x + o(attention(q, k, v of norm(x))): x (tokens, hidden size) -> (tokens, hidden size)."""

    @staticmethod
    def forward(
        ctx: Any,
        shape: _Shape,
        x: Tensor,
        norm: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        *projections: Any,
    ) -> Tensor:
        *qkv, output, output_bias = projections
        weight, bias = _joined(qkv)
        scale = _inverse_rms(x, shape.epsilon)
        raw = linear(_normed(x, scale, norm), weight, bias)
        query, key, value = _turned(raw, qkv, shape, (q_norm, k_norm))
        mixed = attend(query, key, value, shape.rows, shape.scaling)[0].flatten(1)
        # Without norms of heads the turned queries and keys are all that is needed: raw was turned in place.
        ctx.save_for_backward(x, scale, raw, mixed, norm, q_norm, k_norm, *projections)
        ctx.shape = shape
        result = torch.addmm(x, mixed, output.t())
        return result if output_bias is None else result.add_(output_bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, raw, mixed, norm, q_norm, k_norm, *projections = ctx.saved_tensors
        shape, needs = ctx.shape, ctx.needs_input_grad
        *qkv, output, output_bias = projections
        weight, _ = _joined(qkv)
        output_grads = [_weight_slope(grad, mixed, needs[-2]), _bias_slope(grad, output_bias, needs[-1])]
        parts = _turned(raw, qkv, shape, (q_norm, k_norm), again=True)
        slope = torch.empty_like(raw)
        slopes = _heads(slope, qkv, shape)
        mixed_slope = (grad @ output).view(1, len(x), -1, shape.head_size)
        by_head = [t.transpose(0, 1)[None] for t in slopes]
        attend_backward(*parts, mixed_slope, shape.rows, shape.scaling, (by_head[0], by_head[1], by_head[2]))
        head_norms = _turned_back(slopes, _heads(raw, qkv, shape), shape, (q_norm, k_norm))
        unit = x * scale
        projection_slope = _weight_slope(slope, unit * norm, any(needs[5:11:2]))
        x_slope, norm_slope = _norm_slopes(slope @ weight, unit, scale, norm, grad)
        sizes = [w.shape[0] for w in qkv[::2]]
        weights = [None] * 3 if projection_slope is None else projection_slope.split(sizes)
        biases = [_bias_slope(part, b, b is not None) for part, b in zip(slope.split(sizes, 1), qkv[1::2])]
        pairs = [t for pair in zip(weights, biases) for t in pair]
        return None, x_slope, norm_slope, *head_norms, *pairs, *output_grads


class _MLP(torch.autograd.Function):
    """x + down(silu(gate(n)) * up(n)) with n = norm(x): x (tokens, hidden size) -> (tokens, hidden size)."""

    @staticmethod
    def forward(
        ctx: Any,
        epsilon: float,
        x: Tensor,
        norm: Tensor,
        gate: Tensor,
        gate_bias: Tensor | None,
        up: Tensor,
        up_bias: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
    ) -> Tensor:
        scale = _inverse_rms(x, epsilon)
        normed = _normed(x, scale, norm)
        gated, raised = linear(normed, gate, gate_bias), linear(normed, up, up_bias)
        inner = torch.empty_like(gated)
        for part in _token_blocks(len(x)):
            torch.mul(silu(gated[part]), raised[part], out=inner[part])
        ctx.save_for_backward(x, scale, gated, raised, norm, gate, up, down)
        ctx.biases = gate_bias, up_bias, down_bias
        result = torch.addmm(x, inner, down.t())
        return result if down_bias is None else result.add_(down_bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, gated, raised, norm, gate, up, down = ctx.saved_tensors
        needs, (gate_bias, up_bias, down_bias) = ctx.needs_input_grad, ctx.biases
        inner, gated_slope, raised_slope = _silu_slopes(gated, raised, grad @ down)
        down_grad = _weight_slope(grad, inner, needs[7])
        del inner
        unit = x * scale
        normed = unit * norm
        gate_grad, up_grad = _weight_slope(gated_slope, normed, needs[3]), _weight_slope(raised_slope, normed, needs[5])
        slope = torch.mm(gated_slope, gate, out=normed).addmm_(raised_slope, up)
        x_slope, norm_slope = _norm_slopes(slope, unit, scale, norm, grad)
        biases = zip((gated_slope, raised_slope, grad), (gate_bias, up_bias, down_bias))
        gate_b, up_b, down_b = (_bias_slope(g, b, b is not None) for g, b in biases)
        return None, x_slope, norm_slope, gate_grad, gate_b, up_grad, up_b, down_grad, down_b


def _silu_slopes(gated: Tensor, raised: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """silu(gated) * raised, and the gradients of both factors by `slope`, that of their product, which is used up."""
    inner, gated_slope, raised_slope = torch.empty_like(gated), slope, torch.empty_like(raised)
    for part in _token_blocks(len(gated)):
        active = silu(gated[part])
        torch.mul(active, raised[part], out=inner[part])
        torch.mul(active, slope[part], out=raised_slope[part])
        by_active = slope[part] * raised[part]
        torch.ops.aten.silu_backward.grad_input(by_active, gated[part], grad_input=gated_slope[part])
    return inner, gated_slope, raised_slope


def _token_blocks(tokens: int) -> list[slice]:
    return [slice(at, at + TOKENS) for at in range(0, tokens, TOKENS)]


def _joined(qkv: Pairs) -> tuple[Tensor, Tensor | None]:
    """The three projections as one: a product with few outputs runs at half the rate."""
    weights, biases = qkv[::2], qkv[1::2]
    return torch.cat(weights), None if biases[0] is None else torch.cat(biases)


def _heads(joined: Tensor, qkv: Pairs, shape: _Shape) -> list[Tensor]:
    """Views of (tokens, outputs) as queries, keys and values, each (tokens, heads, head size)."""
    counts = [weight.shape[0] // shape.head_size for weight in qkv[::2]]
    return list(joined.unflatten(1, (-1, shape.head_size)).split(counts, 1))


def _turned(
    raw: Tensor, qkv: Pairs, shape: _Shape, norms: tuple[Tensor | None, ...], again: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys normed where they have norms, and turned by their positions; values. (1, heads, tokens, size).

    Without norms the queries and keys are turned in place, and `again` finds them turned.
    """
    *parts, value = _heads(raw, qkv, shape)
    turned = []
    for part, norm in zip(parts, norms):
        if norm is not None:
            turned.append(_turn(_normed(part, _inverse_rms(part, shape.epsilon), norm), shape.cosine, shape.sine))
        elif again:
            turned.append(part)
        else:
            turned.append(part.copy_(_turn(part, shape.cosine, shape.sine)))
    query, key, value = (t.transpose(0, 1)[None] for t in (*turned, value))
    return query, key, value


def _turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions: x (tokens, heads, size) * cosine + its halves exchanged, the second negative, * sine."""
    result = x * cosine
    half = x.shape[-1] // 2
    result[..., :half].addcmul_(x[..., half:], sine[..., :half], value=-1)
    result[..., half:].addcmul_(x[..., :half], sine[..., half:])
    return result


def _turned_back(
    slopes: list[Tensor], raw: list[Tensor], shape: _Shape, norms: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """The way back of `_turned`: makes the slopes of queries and keys those of `raw`, in place; the norms' gradients.

    The turn is linear, so its transpose turns the other way: the sines change their signs.
    """
    grads = []
    for slope, part, norm in zip(slopes, raw, norms):
        turned = _turn(slope, shape.cosine, -shape.sine)
        grad = None
        if norm is not None:
            scale = _inverse_rms(part, shape.epsilon)
            turned, grad = _norm_slopes(turned, part * scale, scale, norm)
        slope.copy_(turned)
        grads.append(grad)
    return grads


def _inverse_rms(x: Tensor, epsilon: float) -> Tensor:
    """1 / sqrt(mean(x^2) + epsilon) over the last dimension, which is kept."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()


def _normed(x: Tensor, scale: Tensor, norm: Tensor) -> Tensor:
    return (x * scale).mul_(norm)


def _norm_slopes(
    slope: Tensor, unit: Tensor, scale: Tensor, norm: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of x (added to `residual`) and of the norm's weight; `unit` is x * scale, `slope` is used up."""
    by_unit = slope * unit
    norm_slope = by_unit.flatten(0, -2).sum(0)
    along = (by_unit @ norm).div_(-norm.shape[0]).unsqueeze(-1)
    slope.mul_(norm).addcmul_(unit, along)
    return (slope.mul_(scale) if residual is None else torch.addcmul(residual, slope, scale)), norm_slope


def _weight_slope(slope: Tensor, inputs: Tensor, needed: bool) -> Tensor | None:
    return slope.t() @ inputs if needed else None


def _bias_slope(slope: Tensor, bias: Tensor | None, needed: bool) -> Tensor | None:
    return slope.sum(0) if needed and bias is not None else None
