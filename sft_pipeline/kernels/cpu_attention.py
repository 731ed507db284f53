"""Causal attention over packed rows in float32 on the CPU: batched matrix products over blocks of queries.

    output = compute_attention(query, key, value, rows, scaling)
    compute_attention_grads(query, key, value, grad_output, rows, scaling, out=(grad_query, grad_key, grad_value))

Every row attends to the shared prefix and to itself, so the cost is the sum of the squared row lengths. Only the
inputs are saved for the backward pass, which recomputes the attention probabilities block by block: one of its five
matrix products. Key-value heads are repeated for the query heads of their group, because the BLAS runs many small
products in parallel faster than a few large ones.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_QUERIES = 128  # queries per block: scores above the diagonal are computed only within a block


class PackedRows(NamedTuple):
    """How a line of tokens is divided: first the shared prefix, then what follows the prefix in each row."""

    prefix_length: int
    lengths: tuple[int, ...]  # of each row, without the prefix

    def get_spans(self) -> list[tuple[int, int]]:
        """Return the start and end of each row in the line, without the prefix."""
        spans, end = [], self.prefix_length
        for length in self.lengths:
            spans.append((end, end + length))
            end += length
        return spans


def compute_attention(query: Tensor, key: Tensor, value: Tensor, rows: PackedRows, scaling: float) -> Tensor:
    """Compute the attention output of every row over the shared prefix and itself.

    query: (1, heads, tokens, head size); key and value: (1, key-value heads, tokens, head size).
    Returns (1, tokens, heads, head size).
    """
    output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
    output_by_head = output[0].transpose(0, 1)
    for span, keys, values in _iterate_segments(rows, query.shape[1], key[0], value[0]):
        for block, num_keys in _iterate_blocks(span, keys.shape[1]):
            probs = _compute_probs(query[0, :, block], keys[:, :num_keys], scaling)
            output_by_head[:, block] = torch.bmm(probs, values[:, :num_keys])
    return output


def compute_attention_grads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    rows: PackedRows,
    scaling: float,
    out: Sequence[Tensor],
) -> None:
    """Compute the gradients of query, key and value, and write them into the three tensors of `out`.

    query, key, value: as for `compute_attention`; grad_output: (1, tokens, heads, head size). The tensors of `out` have
    the shapes of query, key and value.
    """
    grad_output_by_head = grad_output[0].transpose(0, 1)
    grad_query, grad_key, grad_value = (grad[0] for grad in out)
    grad_key.zero_()
    grad_value.zero_()
    for span, keys, values in _iterate_segments(rows, query.shape[1], key[0], value[0]):
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        for block, num_keys in _iterate_blocks(span, keys.shape[1]):
            grad_query[:, block] = _compute_block_grads(
                query[0, :, block],
                keys[:, :num_keys],
                values[:, :num_keys],
                grad_output_by_head[:, block],
                scaling,
                grad_keys[:, :num_keys],
                grad_values[:, :num_keys],
            )
        _add_segment_grad(grad_key, grad_keys, span)
        _add_segment_grad(grad_value, grad_values, span)


def _compute_block_grads(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    grad_output: Tensor,
    scaling: float,
    grad_keys: Tensor,
    grad_values: Tensor,
) -> Tensor:
    """Return the gradient of a block of queries; add those of its keys and values to `grad_keys` and `grad_values`."""
    probs = _compute_probs(query, keys, scaling)
    grad_values.baddbmm_(probs.transpose(1, 2), grad_output)
    grad_probs = torch.bmm(grad_output, values.transpose(1, 2))
    grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, grad_probs.dtype)
    del grad_probs  # as large as the scores; the two products below need the cache
    grad_keys.baddbmm_(grad_scores.transpose(1, 2), query, alpha=scaling)
    return torch.baddbmm(query.new_empty(()), grad_scores, keys, beta=0, alpha=scaling)


def _compute_probs(query: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Compute the attention probabilities (heads, queries, keys) of a block.

    The last keys are those of the block's own tokens, so that the causal mask covers only this square of the scores.
    """
    num_queries = query.shape[1]
    scores = torch.baddbmm(query.new_empty(()), query, keys.transpose(1, 2), beta=0, alpha=scaling)
    scores[..., -num_queries:] += _build_causal_mask(num_queries, query.dtype, query.device)
    return torch.softmax(scores, -1)


@cache
def _build_causal_mask(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Build a mask to add to the scores: minus infinity above the diagonal. At most BLOCK_QUERIES sizes are cached."""
    return torch.full((size, size), float("-inf"), dtype=dtype, device=device).triu(1)


def _iterate_segments(
    rows: PackedRows, num_heads: int, key: Tensor, value: Tensor
) -> Iterator[tuple[tuple[int, int], Tensor, Tensor]]:
    """Iterate over the prefix (unless it is empty) and the rows.

    Yields the span of the segment's queries in the line, and the keys and values that they attend to: those of the
    prefix and of the segment itself, repeated to (heads, keys, head size).
    """
    group_size = num_heads // key.shape[0]
    prefix = rows.prefix_length
    if prefix:
        keys, values = (t[:, :prefix].repeat_interleave(group_size, 0) for t in (key, value))
        yield (0, prefix), keys, values
    for start, end in rows.get_spans():
        keys, values = (
            torch.cat((t[:, :prefix], t[:, start:end]), 1).repeat_interleave(group_size, 0) for t in (key, value)
        )
        yield (start, end), keys, values


def _iterate_blocks(span: tuple[int, int], num_keys: int) -> Iterator[tuple[slice, int]]:
    """Iterate over blocks of a segment's queries; yields each with the number of keys up to the end of the block.

    num_keys: of the whole segment, prefix included.
    """
    start, end = span
    for block_start in range(start, end, BLOCK_QUERIES):
        block_end = min(block_start + BLOCK_QUERIES, end)
        yield slice(block_start, block_end), num_keys - (end - block_end)


def _add_segment_grad(grad: Tensor, segment_grad: Tensor, span: tuple[int, int]) -> None:
    """Add the gradient of a segment's keys or values to that of the whole line, in place.

    grad: (key-value heads, tokens, head size); segment_grad: (heads, prefix and segment, head size). The gradients of
    the heads of a group are summed.
    """
    start, end = span
    segment_grad = segment_grad.unflatten(0, (grad.shape[0], -1)).sum(1)
    prefix = segment_grad.shape[1] - (end - start)
    grad[:, start:end] += segment_grad[:, prefix:]
    grad[:, :prefix] += segment_grad[:, :prefix]
