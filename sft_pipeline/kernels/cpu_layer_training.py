"""A Llama-like decoder layer for training over packed rows in fp32 on the CPU, with a hand-written backward pass.

Autograd keeps every intermediate of a layer and reads each of them several times, which outside the matrix products
costs a quarter of a step and half of its memory. Here a layer is two autograd functions, attention and MLP. Each saves
only the inputs of its matrix products, recomputes norms and activations in the backward pass, and runs activations over
blocks of tokens small enough for the CPU cache. The arithmetic is that of the modules; only the order of sums differs.

    use_fused_layers(model)        # after use_packed_attention and add_lora
    with disable_fused_layers(model): ...        # the layers' own forwards

Calls that are not packed, or not fp32 on the CPU, run the modules themselves.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from torch.utils.checkpoint import checkpoint

from sft_pipeline.kernels.cpu_attention import AttentionTree, compute_attention, compute_attention_grads
from sft_pipeline.kernels.cpu_layer_inference import AnyModule, can_fuse_layer
from sft_pipeline.utils.distributed import share_verdict

BLOCK_TOKENS = 128  # tokens per block in the activations of the MLP
ProjectionParams = list[Any]  # weight, bias, weight, bias, ...: tensors; a bias may be None


def use_fused_layers(model: nn.Module) -> int:
    """Replace the forward of every layer of `model` that can be fused; returns the number of these layers."""
    names = _find_layers_to_fuse(model)
    for name in names:
        layer = model.get_submodule(name)
        layer.forward = FusedTrainingForward(layer)
    return len(names)


@share_verdict
def _find_layers_to_fuse(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if can_fuse_layer(module)]


@contextmanager
def disable_fused_layers(model: nn.Module) -> Iterator[None]:
    """Within this block, the fused layers of `model` run the forwards of their classes."""
    layers = [module for module in model.modules() if isinstance(vars(module).get("forward"), FusedTrainingForward)]
    forwards = [vars(layer).pop("forward") for layer in layers]
    try:
        yield
    finally:
        for layer, forward in zip(layers, forwards):
            layer.forward = forward


def find_unused_forward(model: nn.Module) -> str | None:
    """Return the name of a module in a fused layer whose forward was replaced, as the fused layer does not call it."""
    for name, layer in model.named_modules():
        if isinstance(vars(layer).get("forward"), FusedTrainingForward):
            for module_name, module in layer.named_modules(prefix=name):
                if module is not layer and "forward" in vars(module):
                    return module_name
    return None


@dataclass(frozen=True, eq=False)
class FusedTrainingForward:
    """The fused forward of one decoder layer; calls that it does not support run the layer's own."""

    layer: AnyModule

    def __call__(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if kwargs.get("prefix_tree") is None or not self._can_run(hidden_states):
            return type(self.layer).forward(self.layer, hidden_states, **kwargs)
        if self.layer.gradient_checkpointing and self.layer.training:
            # The library does so in the forward of the layer's class, which is not called here. Nothing is random.
            return checkpoint(self._run, hidden_states, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return self._run(hidden_states, **kwargs)

    def _run(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        tree = kwargs["prefix_tree"]
        attention, mlp = self.layer.self_attn, self.layer.mlp
        input_norm, post_attention_norm = self.layer.input_layernorm, self.layer.post_attention_layernorm
        cos, sin = (t[0].unsqueeze(1) for t in kwargs["position_embeddings"])
        window = getattr(attention, "sliding_window", None)
        options = _AttentionOptions(
            tree, window, cos, sin, attention.head_dim, attention.scaling, input_norm.variance_epsilon
        )
        head_norms = [
            getattr(attention, name).weight if hasattr(attention, name) else None for name in ("q_norm", "k_norm")
        ]
        params = _list_params(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        x = _FusedAttention.apply(options, hidden_states[0], input_norm.weight, *head_norms, *params)
        params = _list_params(mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        return _FusedMLP.apply(post_attention_norm.variance_epsilon, x, post_attention_norm.weight, *params)

    def _can_run(self, hidden_states: Tensor) -> bool:
        """Return whether the fused functions compute what the modules of the layer would."""
        attention, mlp = self.layer.self_attn, self.layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        # Adapters may have replaced some of them since the layer was fused.
        all_linear = all(type(p) is nn.Linear for p in (*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        has_dropout = self.layer.training and attention.attention_dropout
        is_fp32_on_cpu = (
            hidden_states.dtype == torch.float32
            and hidden_states.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")
        )
        return all_linear and is_fp32_on_cpu and not has_dropout


def _list_params(*layers: nn.Linear) -> ProjectionParams:
    return [param for layer in layers for param in (layer.weight, layer.bias)]


@dataclass(frozen=True)
class _AttentionOptions:
    """The inputs of attention that need no gradient. cos and sin: (tokens, 1, head size)."""

    tree: AttentionTree
    window: int | None
    cos: Tensor
    sin: Tensor
    head_dim: int
    scaling: float
    epsilon: float


class _FusedAttention(torch.autograd.Function):
    """x + o_proj(attention(q, k, v of norm(x))): x (tokens, hidden size) -> (tokens, hidden size)."""

    @staticmethod
    def forward(
        ctx: Any,
        options: _AttentionOptions,
        x: Tensor,
        norm_weight: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        *params: Any,
    ) -> Tensor:
        *qkv_params, o_weight, o_bias = params
        qkv_weight, qkv_bias = _concat_projections(qkv_params)
        inv_rms = _compute_inv_rms(x, options.epsilon)
        qkv = linear(_apply_rms_norm(x, inv_rms, norm_weight), qkv_weight, qkv_bias)
        query, key, value = _prepare_heads(qkv, qkv_params, options, (q_norm, k_norm))
        attn_output = compute_attention(query, key, value, options.tree, options.scaling, options.window)[0].flatten(1)
        # Without head norms, backward needs only the rotated queries and keys: they have replaced those in qkv.
        ctx.save_for_backward(x, inv_rms, qkv, attn_output, norm_weight, q_norm, k_norm, *params)
        ctx.options = options
        output = torch.addmm(x, attn_output, o_weight.t())
        return output if o_bias is None else output.add_(o_bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, inv_rms, qkv, attn_output, norm_weight, q_norm, k_norm, *params = ctx.saved_tensors
        options, needs_grad = ctx.options, ctx.needs_input_grad
        *qkv_params, o_weight, o_bias = params
        qkv_weight, _ = _concat_projections(qkv_params)
        grad_o_weight = _compute_weight_grad(grad_output, attn_output, needs_grad[-2])
        grad_o_bias = _compute_bias_grad(grad_output, o_bias, needs_grad[-1])

        query, key, value = _prepare_heads(qkv, qkv_params, options, (q_norm, k_norm), is_rotated=True)
        grad_qkv = torch.empty_like(qkv)
        grad_heads = _split_heads(grad_qkv, qkv_params, options)
        grad_attn_output = (grad_output @ o_weight).view(1, len(x), -1, options.head_dim)
        grads_by_head = [grad.transpose(0, 1)[None] for grad in grad_heads]
        compute_attention_grads(
            query, key, value, grad_attn_output, options.tree, options.scaling, grads_by_head, options.window
        )
        grad_head_norms = _prepare_heads_backward(
            grad_heads, _split_heads(qkv, qkv_params, options), options, (q_norm, k_norm)
        )

        normalized = x * inv_rms
        grad_qkv_weight = _compute_weight_grad(grad_qkv, normalized * norm_weight, any(needs_grad[5:11:2]))
        grad_x, grad_norm = _rms_norm_backward(grad_qkv @ qkv_weight, normalized, inv_rms, norm_weight, grad_output)

        sizes = [weight.shape[0] for weight in qkv_params[::2]]
        grad_weights = [None] * 3 if grad_qkv_weight is None else grad_qkv_weight.split(sizes)
        grad_biases = [
            _compute_bias_grad(grad, bias, bias is not None)
            for grad, bias in zip(grad_qkv.split(sizes, 1), qkv_params[1::2])
        ]
        grad_qkv_params = [grad for pair in zip(grad_weights, grad_biases) for grad in pair]
        return None, grad_x, grad_norm, *grad_head_norms, *grad_qkv_params, grad_o_weight, grad_o_bias


class _FusedMLP(torch.autograd.Function):
    """x + down_proj(silu(gate_proj(n)) * up_proj(n)) with n = norm(x).

    x: (tokens, hidden size). Returns (1, tokens, hidden size), not as a view, of which FSDP2 warns.
    """

    @staticmethod
    def forward(
        ctx: Any,
        epsilon: float,
        x: Tensor,
        norm_weight: Tensor,
        gate_weight: Tensor,
        gate_bias: Tensor | None,
        up_weight: Tensor,
        up_bias: Tensor | None,
        down_weight: Tensor,
        down_bias: Tensor | None,
    ) -> Tensor:
        inv_rms = _compute_inv_rms(x, epsilon)
        normed = _apply_rms_norm(x, inv_rms, norm_weight)
        gate, up = linear(normed, gate_weight, gate_bias), linear(normed, up_weight, up_bias)
        intermediate = torch.empty_like(gate)
        for block in _split_tokens(len(x)):
            torch.mul(silu(gate[block]), up[block], out=intermediate[block])
        ctx.save_for_backward(x, inv_rms, gate, up, norm_weight, gate_weight, up_weight, down_weight)
        ctx.biases = gate_bias, up_bias, down_bias
        output = torch.addmm(x, intermediate, down_weight.t())
        return (output if down_bias is None else output.add_(down_bias)).unsqueeze_(0)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, inv_rms, gate, up, norm_weight, gate_weight, up_weight, down_weight = ctx.saved_tensors
        needs_grad, biases = ctx.needs_input_grad, ctx.biases
        grad_output = grad_output[0]
        intermediate, grad_gate, grad_up = _silu_mul_backward(gate, up, grad_output @ down_weight)
        grad_down_weight = _compute_weight_grad(grad_output, intermediate, needs_grad[7])
        del intermediate  # frees its memory for the products below

        normalized = x * inv_rms
        normed = normalized * norm_weight
        grad_gate_weight = _compute_weight_grad(grad_gate, normed, needs_grad[3])
        grad_up_weight = _compute_weight_grad(grad_up, normed, needs_grad[5])
        # The memory of `normed`, which is not needed any more, takes its gradient.
        grad_normed = torch.mm(grad_gate, gate_weight, out=normed).addmm_(grad_up, up_weight)
        grad_x, grad_norm = _rms_norm_backward(grad_normed, normalized, inv_rms, norm_weight, grad_output)

        grad_gate_bias, grad_up_bias, grad_down_bias = (
            _compute_bias_grad(grad, bias, bias is not None)
            for grad, bias in zip((grad_gate, grad_up, grad_output), biases)
        )
        return (
            None,
            grad_x,
            grad_norm,
            grad_gate_weight,
            grad_gate_bias,
            grad_up_weight,
            grad_up_bias,
            grad_down_weight,
            grad_down_bias,
        )


def _silu_mul_backward(gate: Tensor, up: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Recompute silu(gate) * up; returns it and the gradients of `gate` and `up`.

    grad_output: the gradient of the product; it is overwritten with that of `gate`.
    """
    output, grad_gate, grad_up = torch.empty_like(gate), grad_output, torch.empty_like(up)
    for block in _split_tokens(len(gate)):
        activated = silu(gate[block])
        torch.mul(activated, up[block], out=output[block])
        torch.mul(activated, grad_output[block], out=grad_up[block])
        grad_activated = grad_output[block] * up[block]
        torch.ops.aten.silu_backward.grad_input(grad_activated, gate[block], grad_input=grad_gate[block])
    return output, grad_gate, grad_up


def _split_tokens(num_tokens: int) -> list[slice]:
    return [slice(start, start + BLOCK_TOKENS) for start in range(0, num_tokens, BLOCK_TOKENS)]


def _concat_projections(qkv_params: ProjectionParams) -> tuple[Tensor, Tensor | None]:
    """Concatenate the weights and the biases of q_proj, k_proj and v_proj.

    One product is faster than three: those with few outputs run at half the rate.
    """
    weights, biases = qkv_params[::2], qkv_params[1::2]
    return torch.cat(weights), None if biases[0] is None else torch.cat(biases)


def _split_heads(qkv: Tensor, qkv_params: ProjectionParams, options: _AttentionOptions) -> list[Tensor]:
    """Split (tokens, outputs) into views of the queries, keys and values, each (tokens, heads, head size)."""
    num_heads = [weight.shape[0] // options.head_dim for weight in qkv_params[::2]]
    return list(qkv.unflatten(1, (-1, options.head_dim)).split(num_heads, 1))


def _prepare_heads(
    qkv: Tensor,
    qkv_params: ProjectionParams,
    options: _AttentionOptions,
    head_norms: tuple[Tensor | None, ...],
    is_rotated: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value (1, heads, tokens, head size) from the output `qkv` of the projections.

    Queries and keys are normed if the model has `head_norms` (the weights of q_norm and k_norm), then rotated by their
    positions. Without norms they are rotated in place; a later call with `is_rotated` takes them as they are.
    """
    *query_key, value = _split_heads(qkv, qkv_params, options)
    rotated = []
    for heads, norm_weight in zip(query_key, head_norms):
        if norm_weight is not None:
            normed = _apply_rms_norm(heads, _compute_inv_rms(heads, options.epsilon), norm_weight)
            rotated.append(_apply_rotary(normed, options.cos, options.sin))
        elif is_rotated:
            rotated.append(heads)
        else:
            rotated.append(heads.copy_(_apply_rotary(heads, options.cos, options.sin)))
    query, key, value = (heads.transpose(0, 1)[None] for heads in (*rotated, value))
    return query, key, value


def _prepare_heads_backward(
    grads: list[Tensor], qkv_heads: list[Tensor], options: _AttentionOptions, head_norms: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """Turn the gradients of the rotated queries and keys into those of the projections' outputs, in place.

    grads, qkv_heads: queries, keys and values, each (tokens, heads, head size). Returns the gradients of the weights of
    q_norm and k_norm. A rotation is linear and its transpose is the inverse rotation: the sines change their signs.
    """
    grad_head_norms = []
    for grad, heads, norm_weight in zip(grads, qkv_heads, head_norms):
        grad_heads = _apply_rotary(grad, options.cos, -options.sin)
        grad_norm = None
        if norm_weight is not None:
            inv_rms = _compute_inv_rms(heads, options.epsilon)
            grad_heads, grad_norm = _rms_norm_backward(grad_heads, heads * inv_rms, inv_rms, norm_weight)
        grad.copy_(grad_heads)
        grad_head_norms.append(grad_norm)
    return grad_head_norms


def _apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embeddings to x (tokens, heads, head size): x * cos + rotate_half(x) * sin."""
    output = x * cos
    half = x.shape[-1] // 2
    output[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    output[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return output


def _compute_inv_rms(x: Tensor, epsilon: float) -> Tensor:
    """Compute 1 / sqrt(mean(x^2) + epsilon) over the last dimension, which is kept."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()


def _apply_rms_norm(x: Tensor, inv_rms: Tensor, weight: Tensor) -> Tensor:
    return (x * inv_rms).mul_(weight)


def _rms_norm_backward(
    grad_output: Tensor, normalized: Tensor, inv_rms: Tensor, weight: Tensor, grad_residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the input x of an RMS norm and of its weight.

    normalized: x * inv_rms; grad_output: overwritten; grad_residual: added to the gradient of x.
    """
    grad_times_normalized = grad_output * normalized
    grad_weight = grad_times_normalized.flatten(0, -2).sum(0)
    coefficient = (grad_times_normalized @ weight).div_(-weight.shape[0]).unsqueeze(-1)
    grad_normalized = grad_output.mul_(weight).addcmul_(normalized, coefficient)
    if grad_residual is None:
        return grad_normalized.mul_(inv_rms), grad_weight
    return torch.addcmul(grad_residual, grad_normalized, inv_rms), grad_weight


def _compute_weight_grad(grad_output: Tensor, inputs: Tensor, needs_grad: bool) -> Tensor | None:
    return grad_output.t() @ inputs if needs_grad else None


def _compute_bias_grad(grad_output: Tensor, bias: Tensor | None, needs_grad: bool) -> Tensor | None:
    return grad_output.sum(0) if needs_grad and bias is not None else None
