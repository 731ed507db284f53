"""Attention over packed rows in float32 on the CPU: batched matrix products over blocks of queries.

    output = attend(query, key, value, rows, scaling)
    attend_backward(query, key, value, grad, rows, scaling, slopes)      # writes the three gradients into `slopes`

Every row attends to the shared prefix and to itself, so the cost is the sum of the rows' squares. Nothing is kept for
the backward pass but the inputs: it forms a block's probabilities again, one product in five. Key-value heads are
repeated for their queries, since the BLAS runs more and smaller products side by side faster than few large ones.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128  # queries at a time: scores above the diagonal are computed only within a block


class PackedRows(NamedTuple):
    """How a line of tokens is divided: the shared prefix, then the rest of each row."""

    prefix: int
    lengths: tuple[int, ...]

    def spans(self) -> Iterator[tuple[int, int]]:
        """Start and end of each row's own tokens."""
        end = self.prefix
        for length in self.lengths:
            yield end, end + length
            end += length


def attend(query: Tensor, key: Tensor, value: Tensor, rows: PackedRows, scaling: float) -> Tensor:
    """query (1, heads, tokens, size), key and value with their own fewer heads -> (1, tokens, heads, size)."""
    output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
    by_head = output[0].transpose(0, 1)
    for span, keys, values in _segments(rows, query.shape[1], key[0], value[0]):
        for block, seen in _blocks(span, keys.shape[1]):
            weights = _weights(query[0, :, block], keys[:, :seen], scaling)
            by_head[:, block] = torch.bmm(weights, values[:, :seen])
    return output


def attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    rows: PackedRows,
    scaling: float,
    slopes: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Gradients of query, key and value by `grad` (1, tokens, heads, size), written into `slopes` of their shapes."""
    grads = grad[0].transpose(0, 1)
    query_slope, key_slope, value_slope = (slope[0] for slope in slopes)
    key_slope.zero_()
    value_slope.zero_()
    for span, keys, values in _segments(rows, query.shape[1], key[0], value[0]):
        sums = torch.zeros_like(keys), torch.zeros_like(values)
        for block, seen in _blocks(span, keys.shape[1]):
            part = query[0, :, block], keys[:, :seen], values[:, :seen], grads[:, block]
            query_slope[:, block] = _block_slope(*part, scaling, sums)
        for slope, total in zip((key_slope, value_slope), sums):
            _scatter(slope, total, span)


def _block_slope(
    query: Tensor, keys: Tensor, values: Tensor, grad: Tensor, scaling: float, sums: tuple[Tensor, Tensor]
) -> Tensor:
    """One block's gradient of the queries; those of the keys and values it has seen are added to `sums`."""
    weights = _weights(query, keys, scaling)
    seen = keys.shape[1]
    sums[1][:, :seen].baddbmm_(weights.transpose(1, 2), grad)
    slope = torch.bmm(grad, values.transpose(1, 2))
    slope = torch._softmax_backward_data(slope, weights, -1, slope.dtype)
    sums[0][:, :seen].baddbmm_(slope.transpose(1, 2), query, alpha=scaling)
    return torch.baddbmm(query.new_empty(()), slope, keys, beta=0, alpha=scaling)


def _weights(query: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Probabilities (heads, queries, keys): the last keys are the block's own, under the diagonal."""
    own = query.shape[1]
    scores = torch.baddbmm(query.new_empty(()), query, keys.transpose(1, 2), beta=0, alpha=scaling)
    scores[..., -own:] += _diagonal(own, query.dtype, query.device)
    return torch.softmax(scores, -1)


@cache
def _diagonal(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Minus infinity above the diagonal; at most BLOCK different ones are kept."""
    return torch.full((size, size), float("-inf"), dtype=dtype, device=device).triu(1)


def _segments(
    rows: PackedRows, heads: int, key: Tensor, value: Tensor
) -> Iterator[tuple[tuple[int, int], Tensor, Tensor]]:
    """For the prefix and each row: its span, and the keys and values (heads, seen, size) that it sees: the prefix's
    and its own."""
    group = heads // key.shape[0]
    prefix = rows.prefix
    if prefix:
        keys, values = (t[:, :prefix].repeat_interleave(group, 0) for t in (key, value))
        yield (0, prefix), keys, values
    for start, end in rows.spans():
        seen = (torch.cat((t[:, :prefix], t[:, start:end]), 1) for t in (key, value))
        keys, values = (t.repeat_interleave(group, 0) for t in seen)
        yield (start, end), keys, values


def _blocks(span: tuple[int, int], keys: int) -> Iterator[tuple[slice, int]]:
    """Blocks of a row's queries, with the number of its keys up to the block's end."""
    start, end = span
    for at in range(start, end, BLOCK):
        stop = min(at + BLOCK, end)
        yield slice(at, stop), keys - (end - stop)


def _scatter(slope: Tensor, total: Tensor, span: tuple[int, int]) -> None:
    """Add a segment's gradients (heads, prefix + own, size) to those of the whole line (key-value heads, ...)."""
    start, end = span
    total = total.unflatten(0, (slope.shape[0], -1)).sum(1)
    prefix = total.shape[1] - (end - start)
    slope[:, start:end] += total[:, prefix:]
    slope[:, :prefix] += total[:, :prefix]
