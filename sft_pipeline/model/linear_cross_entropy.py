"""Cross-entropy at the supervised positions, without a tensor of rows x length x vocabulary.

Three savings, all exact: the head is applied only to the hidden states of positions that have a target; head and
cross-entropy run in chunks of positions; the forward pass also computes the gradients of the hidden states and of the
head from a chunk's probabilities, so that nothing is computed twice and the backward pass only scales them.

    loss = linear_cross_entropy(hidden_states[positions], targets, head.weight, num_items=num_items_in_batch)
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Of one chunk's float32 logits: large enough for full-rate products, small next to a model. On a GPU each chunk also
# passes once over the float32 gradient of the head, and products need far more rows for their full rate.
CHUNK_BYTES, CUDA_CHUNK_BYTES = 2**26, 2**30
CUDA_TILE = 128  # rows of a tile of matrix products: a chunk has a multiple of it


def linear_cross_entropy(
    hidden_states: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    num_items: float | Tensor,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Compute the sum of the cross-entropies of `targets`, in nats, divided by `num_items`: a scalar in float32.

    hidden_states: (targets, hidden size), at the positions that have a target; targets: (targets,), the ids to predict
    there; weight: (vocabulary, hidden size); bias: (vocabulary). The logits are
    `softcap * tanh(scale * (hidden_states @ weight.T + bias) / softcap)`. num_items: the number of targets of the whole
    optimizer step, so that the losses of its micro-batches add up. chunk_size: positions per chunk; by default those
    whose logits take CHUNK_BYTES, on CUDA CUDA_CHUNK_BYTES. Without any target the loss is a zero that depends on
    `hidden_states`, so that every process can run backward.
    """
    chunk_size = chunk_size or choose_chunk_size(weight)
    options = _Options(num_items, scale, softcap, chunk_size, _get_compute_dtype(weight), torch.is_grad_enabled())
    return _ChunkedCrossEntropy.apply(hidden_states, targets, weight, bias, options)


@dataclass(frozen=True)
class _Options:
    num_items: float | Tensor
    scale: float
    softcap: float | None
    chunk_size: int
    dtype: torch.dtype  # of the matrix products
    grad_enabled: bool


def choose_chunk_size(weight: Tensor) -> int:
    """Return the number of positions per chunk for a head (vocabulary, hidden size)."""
    if weight.device.type == "cuda":
        return max(1, CUDA_CHUNK_BYTES // (4 * weight.shape[0] * CUDA_TILE)) * CUDA_TILE
    return max(1, CHUNK_BYTES // (4 * weight.shape[0]))


def _get_compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of the matrix products: under autocast its dtype, as for a linear layer."""
    device_type = weight.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one pass: `backward` multiplies the gradients from `forward` by the loss's gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, options: _Options
    ) -> Tensor:
        needs_grad = [
            options.grad_enabled and tensor is not None and tensor.requires_grad
            for tensor in (hidden_states, weight, bias)
        ]
        with torch.autocast(hidden_states.device.type, enabled=False):
            loss, grads = _compute_loss_and_grads(hidden_states, targets, weight, bias, options, needs_grad)
        ctx.grads = [grad if needed else None for grad, needed in zip(grads, needs_grad)]
        ctx.save_for_backward()
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("the gradients of the loss were consumed by an earlier backward pass; compute it again")
        # On the CPU, reading the factor is free and may save a pass over the gradients; elsewhere it would synchronize.
        if grad_output.device.type != "cpu" or grad_output.item() != 1.0:
            grads = [grad if grad is None else grad.mul_(grad_output) for grad in grads]
        grad_hidden_states, grad_weight, grad_bias = grads
        return grad_hidden_states, None, grad_weight, grad_bias, None


def _compute_loss_and_grads(
    hidden_states: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: _Options,
    needs_grad: list[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the scalar loss and the gradients of hidden states, weight and bias: None for those not in needs_grad."""
    compute_weight = weight.to(options.dtype)
    total = hidden_states.new_zeros((), dtype=torch.float32)
    grads: list[Tensor | None] = [
        torch.empty_like(hidden_states) if needs_grad[0] else None,
        # Chunks are summed in float32 even for a head of 16 bits.
        torch.zeros_like(weight, dtype=torch.float32) if needs_grad[1] else None,
        torch.zeros_like(weight[:, 0], dtype=torch.float32) if needs_grad[2] else None,
    ]
    for start in range(0, len(hidden_states), options.chunk_size):
        chunk = slice(start, start + options.chunk_size)
        chunk_states = hidden_states[chunk].to(options.dtype)
        losses, grad_logits = _compute_chunk(
            chunk_states, targets[chunk], compute_weight, bias, options, any(needs_grad)
        )
        total += losses.sum()
        if grad_logits is not None:
            _add_chunk_grads(grads, chunk, chunk_states, grad_logits, compute_weight)
    factor = 1.0 / options.num_items
    for grad in grads:
        if grad is not None:
            grad.mul_(factor)
    return total * factor, [grads[0], *(grad if grad is None else grad.to(weight.dtype) for grad in grads[1:])]


def _compute_chunk(
    hidden_states: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: _Options,
    needs_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the losses (positions) and, if needed, the gradient of their sum (positions, vocabulary).

    The gradient is that of the head's raw outputs, before scaling and soft-capping.
    """
    outputs = hidden_states @ weight.T
    if bias is not None:
        outputs += bias.to(outputs.dtype)
    logits, tanh = outputs, None
    if options.scale != 1.0:
        logits = logits.float() * options.scale
    if options.softcap is not None:
        tanh = torch.tanh(logits.float() / options.softcap)
        logits = options.softcap * tanh
    index = targets[:, None]
    log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)  # reads logits of 16 bits as they are
    del outputs, logits
    losses = -log_probs.gather(1, index)[:, 0]
    if not needs_grad:
        return losses, None
    # softmax - one_hot(targets), in the memory of log_probs
    grad_logits = log_probs.exp_()
    grad_logits.scatter_add_(1, index, grad_logits.new_full((), -1.0).expand_as(index))
    if tanh is not None:
        grad_logits *= 1 - tanh.square()
    if options.scale != 1.0:
        grad_logits *= options.scale
    return losses, grad_logits.to(hidden_states.dtype)


def _add_chunk_grads(
    grads: list[Tensor | None], chunk: slice, hidden_states: Tensor, grad_logits: Tensor, weight: Tensor
) -> None:
    """Add a chunk's part to the gradients of hidden states, weight and bias, in place."""
    grad_hidden_states, grad_weight, grad_bias = grads
    if grad_hidden_states is not None:
        grad_hidden_states[chunk] = grad_logits @ weight
    if grad_weight is not None:
        _add_product(grad_weight, grad_logits.T, hidden_states)
    if grad_bias is not None:
        grad_bias += grad_logits.float().sum(0)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total`, a matrix in float32, in place.

    Products of 16 bits are added as they are accumulated, in float32. The CPU has no such function, so there each
    product is rounded to its 16 bits first.
    """
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif _accepts_float32_output(left.device, left.dtype):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total += left @ right


@cache
def _accepts_float32_output(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether `torch.addmm` adds a product of 16 bits to a float32 matrix: on CUDA, by the release of torch."""
    total, matrix = torch.zeros(16, 16, device=device), torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        torch.addmm(total, matrix, matrix, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True
