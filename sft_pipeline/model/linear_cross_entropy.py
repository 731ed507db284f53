"""Cross-entropy at the supervised positions: no tensor of rows x length x vocabulary, nothing computed twice.

Three savings, all exact: hidden states are gathered where there is a target before the head is applied; the head and
the cross-entropy run in chunks of positions; the gradients of the hidden states and of the head are taken while a
chunk's probabilities are at hand, in the forward pass, so that the backward pass only scales them.

    loss = supervised_loss(hidden, labels, head.weight, num_items=num_items_in_batch)
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sft_pipeline.utils.constants import IGNORED

CHUNK_BYTES = 2**26  # of one chunk's float32 logits: large enough for full-rate products, small beside a model


def linear_cross_entropy(
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    num_items: float | Tensor,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Sum of the cross-entropies of `labels`, in nats, over `num_items`: a scalar in float32.

    hidden: (..., hidden size); labels: (...), already shifted, -100 where there is no target; weight: (vocabulary,
    hidden size); bias: (vocabulary). The logits are `softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`.
    num_items: the targets of the whole optimizer step, so that parts of a step add up. chunk: positions at a time.
    Without any target the loss is a zero that depends on `hidden`, so that every process can run backward.
    """
    where = labels.reshape(-1).ne(IGNORED).nonzero()[:, 0]
    states = hidden.reshape(-1, hidden.shape[-1]).index_select(0, where)
    targets = labels.reshape(-1).index_select(0, where)
    rows = chunk or max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    options = _Options(num_items, scale, softcap, rows, _compute_dtype(weight), torch.is_grad_enabled())
    return _ChunkedCrossEntropy.apply(states, targets, weight, bias, options)


@dataclass(frozen=True)
class _Options:
    num_items: float | Tensor
    scale: float
    softcap: float | None
    rows: int
    dtype: torch.dtype
    grad: bool


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """The type of the products: autocast's where it is on, as for a linear layer."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one pass; `backward` multiplies what `forward` has kept by the loss's gradient."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, options: _Options
    ) -> Tensor:
        needs = [options.grad and t is not None and t.requires_grad for t in (states, weight, bias)]
        with torch.autocast(states.device.type, enabled=False):
            loss, grads = _loss_and_grads(states, targets, weight, bias, options, needs)
        ctx.grads = [g if n else None for g, n in zip(grads, needs)]
        ctx.save_for_backward()
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # On CPU reading the factor is free and saves a pass over the head's gradient; elsewhere it would synchronize.
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("the loss's gradients were used up by an earlier backward pass")
        if grad.device.type != "cpu" or grad.item() != 1.0:
            grads = [g if g is None else g.mul_(grad) for g in grads]
        states, weight, bias = grads
        return states, None, weight, bias, None


def _loss_and_grads(
    states: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, options: _Options, needs: list[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """The scalar loss and the gradients of states, weight and bias (those that are needed)."""
    matrix, total = weight.to(options.dtype), states.new_zeros((), dtype=torch.float32)
    grads: list[Tensor | None] = [
        torch.empty_like(states) if needs[0] else None,
        # Chunks are summed in float32 even for a head of 16 bits.
        torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None,
        torch.zeros_like(weight[:, 0], dtype=torch.float32) if needs[2] else None,
    ]
    for at in range(0, len(states), options.rows):
        part = slice(at, at + options.rows)
        chunk = states[part].to(options.dtype)
        losses, slope = _chunk(chunk, targets[part], matrix, bias, options, any(needs))
        total += losses.sum()
        if slope is not None:
            _add_grads(grads, part, chunk, slope, matrix)
    factor = 1.0 / options.num_items
    for grad in grads:
        if grad is not None:
            grad.mul_(factor)
    return total * factor, [grads[0], *(g if g is None else g.to(weight.dtype) for g in grads[1:])]


def _chunk(
    states: Tensor, targets: Tensor, matrix: Tensor, bias: Tensor | None, options: _Options, slopes: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses (positions) and, if asked, the slope of their sum by the head's raw outputs (positions, vocabulary)."""
    outputs = states @ matrix.T
    if bias is not None:
        outputs += bias.to(outputs.dtype)
    logits = outputs.float()
    if options.scale != 1.0:
        logits = logits * options.scale
    curve = None
    if options.softcap is not None:
        curve = torch.tanh(logits / options.softcap)
        logits = options.softcap * curve
    at = targets[:, None]
    logarithms = torch.log_softmax(logits, dim=-1)
    losses = -logarithms.gather(1, at)[:, 0]
    if not slopes:
        return losses, None
    slope = logarithms.exp_()
    slope.scatter_add_(1, at, slope.new_full((), -1.0).expand_as(at))
    if curve is not None:
        slope *= 1 - curve.square()
    if options.scale != 1.0:
        slope *= options.scale
    return losses, slope.to(states.dtype)


def _add_grads(grads: list[Tensor | None], part: slice, states: Tensor, slope: Tensor, matrix: Tensor) -> None:
    """Add one chunk's share to the gradients of states, weight and bias, in place."""
    if grads[0] is not None:
        grads[0][part] = slope @ matrix
    if grads[1] is not None:
        if slope.dtype == torch.float32:
            grads[1].addmm_(slope.T, states)
        else:
            grads[1] += slope.T @ states
    if grads[2] is not None:
        grads[2] += slope.float().sum(0)
