"""Causal attention over a tree of shared prefixes in float32 on the CPU: batched products over blocks of queries.

    tree = build_attention_tree(subtree_end)                # on the host, by the collator
    output = compute_attention(query, key, value, tree, scaling)
    compute_attention_grads(query, key, value, grad_output, tree, scaling, out=(grad_query, grad_key, grad_value))

Both take `window`: a token then sees itself and the window - 1 tokens before it in its sequence.

The line of tokens (data/prefix_tree.py) is divided into segments. Each attends to its ancestors, which are a few spans
of the line, and to itself, so only scores that some token needs are computed, and those above the diagonal of a block.
The keys of a segment are in the order of their depth, so a window is a band: a block of queries begins at the first key
that one of them sees. Only the inputs are saved for the backward pass, which recomputes the attention probabilities
block by block: one of its five matrix products. Key-value heads are repeated for the query heads of their group,
because the BLAS runs many small products in parallel faster than a few large ones.
"""

import bisect
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK_QUERIES = 128  # queries per block: scores above the diagonal are computed only within a block

Span = tuple[int, int]  # start and end (exclusive) in the line of tokens


class Segment(NamedTuple):
    """A path without branches in the tree: its span in the line, and the spans of its ancestors, from the root on."""

    start: int
    end: int
    ancestors: tuple[Span, ...]


class AttentionTree:
    """How a line of tokens is divided: part of a packed batch, on the host whatever the device of the model.

    segments: of the whole line, in its order. subtree_end, depths: (tokens,) int64, see data/prefix_tree.py.

    Compared by identity, so that what is built from it is cached for all layers of a batch. A plain class, which
    `Trainer`, accelerate, DDP and FSDP pass on as it is: they rebuild dataclasses, tuples and dicts among the arguments
    of a model, to move or to cast the tensors in them.
    """

    def __init__(self, segments: Sequence[Segment], subtree_end: np.ndarray, depths: np.ndarray) -> None:
        self.segments = tuple(segments)
        self.subtree_end = subtree_end
        self.depths = depths


def build_attention_tree(subtree_end: np.ndarray) -> AttentionTree:
    """Divide a line of tokens, laid out depth first, into segments. subtree_end: (tokens,), see data/prefix_tree.py.

    A token continues the segment of the one before it unless that one's subtree has ended.
    """
    ends, depths = subtree_end.tolist(), np.empty_like(subtree_end)
    starts = [0, *(index for index in range(1, len(ends)) if ends[index - 1] <= index), len(ends)]
    segments: list[Segment] = []
    path: list[Span] = []  # spans of the segment before and of its ancestors
    for start, end in pairwise(starts):
        while path and ends[path[-1][0]] <= start:
            path.pop()
        if path:
            # Subtrees end the earlier the deeper they begin.
            first, last = path.pop()
            path.append((first, bisect.bisect_left(range(last), -start, first, key=lambda index: -ends[index])))
        segments.append(Segment(start, end, tuple(path)))
        depth = sum(last - first for first, last in path)
        depths[start:end] = np.arange(depth, depth + end - start)
        path.append((start, end))
    return AttentionTree(segments, subtree_end, depths)


def limit_segments(tree: AttentionTree, window: int | None) -> Sequence[Segment]:
    """Return the segments of the tree with only those of their ancestors that their first token sees."""
    if window is None:
        return tree.segments
    return [Segment(start, end, _limit_ancestors(ancestors, window - 1)) for start, end, ancestors in tree.segments]


def _limit_ancestors(ancestors: tuple[Span, ...], num_tokens: int) -> tuple[Span, ...]:
    """Return the last spans of `ancestors`, `num_tokens` tokens in all or fewer."""
    limited: list[Span] = []
    for start, end in reversed(ancestors):
        first = max(start, end - num_tokens)
        if first < end:
            limited.append((first, end))
        num_tokens -= end - first
    return tuple(reversed(limited))


def compute_attention(
    query: Tensor, key: Tensor, value: Tensor, tree: AttentionTree, scaling: float, window: int | None = None
) -> Tensor:
    """Compute the attention output of every token over its ancestors in the tree and itself.

    query: (1, heads, tokens, head size); key and value: (1, key-value heads, tokens, head size).
    Returns (1, tokens, heads, head size).
    """
    output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
    output_by_head = output[0].transpose(0, 1)
    repeated_key, repeated_value = _repeat_heads(query, key), _repeat_heads(query, value)
    for segment in limit_segments(tree, window):
        keys, values = _gather_path(repeated_key, segment), _gather_path(repeated_value, segment)
        for block, seen in _iterate_blocks(segment, keys.shape[1], window):
            probs = _compute_probs(query[0, :, block], keys[:, seen], scaling, window)
            output_by_head[:, block] = torch.bmm(probs, values[:, seen])
    return output


def compute_attention_grads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    tree: AttentionTree,
    scaling: float,
    out: Sequence[Tensor],
    window: int | None = None,
) -> None:
    """Compute the gradients of query, key and value, and write them into the three tensors of `out`.

    query, key, value: as for `compute_attention`; grad_output: (1, tokens, heads, head size). The tensors of `out` have
    the shapes of query, key and value.
    """
    grad_output_by_head = grad_output[0].transpose(0, 1)
    repeated_key, repeated_value = _repeat_heads(query, key), _repeat_heads(query, value)
    grad_key, grad_value = torch.zeros_like(repeated_key), torch.zeros_like(repeated_value)
    for segment in limit_segments(tree, window):
        keys, values = _gather_path(repeated_key, segment), _gather_path(repeated_value, segment)
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        for block, seen in _iterate_blocks(segment, keys.shape[1], window):
            out[0][0, :, block] = _compute_block_grads(
                query[0, :, block],
                keys[:, seen],
                values[:, seen],
                grad_output_by_head[:, block],
                scaling,
                window,
                grad_keys[:, seen],
                grad_values[:, seen],
            )
        _add_path_grad(grad_key, grad_keys, segment)
        _add_path_grad(grad_value, grad_values, segment)
    for grad, repeated_grad in ((out[1][0], grad_key), (out[2][0], grad_value)):
        torch.sum(repeated_grad.unflatten(0, (grad.shape[0], -1)), 1, out=grad)


def _compute_block_grads(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    grad_output: Tensor,
    scaling: float,
    window: int | None,
    grad_keys: Tensor,
    grad_values: Tensor,
) -> Tensor:
    """Return the gradient of a block of queries; add those of its keys and values to `grad_keys` and `grad_values`."""
    probs = _compute_probs(query, keys, scaling, window)
    grad_values.baddbmm_(probs.transpose(1, 2), grad_output)
    grad_probs = torch.bmm(grad_output, values.transpose(1, 2))
    grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, grad_probs.dtype)
    del grad_probs  # as large as the scores; the two products below need the cache
    grad_keys.baddbmm_(grad_scores.transpose(1, 2), query, alpha=scaling)
    return torch.baddbmm(query.new_empty(()), grad_scores, keys, beta=0, alpha=scaling)


def _compute_probs(query: Tensor, keys: Tensor, scaling: float, window: int | None) -> Tensor:
    """Compute the attention probabilities (heads, queries, keys) of a block.

    The last keys are those of the block's own tokens, so that the causal mask covers only this square of the scores;
    the first ones are those that some queries do not see any more, because of the window.
    """
    num_queries, num_keys = query.shape[1], keys.shape[1]
    scores = torch.baddbmm(query.new_empty(()), query, keys.transpose(1, 2), beta=0, alpha=scaling)
    scores[..., -num_queries:] += _build_causal_mask(num_queries, query.dtype, query.device)
    if window is not None and num_keys > window:
        scores[..., :-window] += _build_window_mask(num_queries, num_keys - window, query.dtype, query.device)
    return torch.softmax(scores, -1)


@cache
def _build_causal_mask(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Build a mask to add to the scores: minus infinity above the diagonal. At most BLOCK_QUERIES sizes are cached."""
    return torch.full((size, size), float("-inf"), dtype=dtype, device=device).triu(1)


@cache
def _build_window_mask(num_queries: int, num_keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Build a mask to add to the scores of all keys of a block but the last `window` ones, which its last query sees.

    Each earlier query sees one more. At most BLOCK_QUERIES**2 / 2 sizes are cached.
    """
    return torch.full((num_queries, num_keys), float("-inf"), dtype=dtype, device=device).tril(num_keys - num_queries)


def _repeat_heads(query: Tensor, key: Tensor) -> Tensor:
    """Repeat the key-value heads of keys or values (1, heads, tokens, head size): (query heads, tokens, head size)."""
    return key[0].repeat_interleave(query.shape[1] // key.shape[1], 0)


def _gather_path(key: Tensor, segment: Segment) -> Tensor:
    """Return the keys or values that a segment attends to: those of its ancestors and its own.

    key: (heads, tokens, head size), of the whole line. A segment without ancestors gets a view.
    """
    own_key = key[:, segment.start : segment.end]
    if not segment.ancestors:
        return own_key
    return torch.cat([*(key[:, start:end] for start, end in segment.ancestors), own_key], 1)


def _iterate_blocks(segment: Segment, num_keys: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Iterate over blocks of a segment's queries; yields each with the keys that some of its queries see.

    num_keys: of the whole segment, ancestors included.
    """
    for block_start in range(segment.start, segment.end, BLOCK_QUERIES):
        block_end = min(block_start + BLOCK_QUERIES, segment.end)
        last = num_keys - (segment.end - block_end)
        first = 0 if window is None else max(0, last - (block_end - block_start) - window + 1)
        yield slice(block_start, block_end), slice(first, last)


def _add_path_grad(grad: Tensor, path_grad: Tensor, segment: Segment) -> None:
    """Add the gradient of the keys or values that a segment attends to, to that of the whole line, in place.

    Both are (heads, tokens, head size).
    """
    first = 0
    for start, end in (*segment.ancestors, (segment.start, segment.end)):
        grad[:, start:end] += path_grad[:, first : first + end - start]
        first += end - start
