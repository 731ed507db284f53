"""Attention over a tree of shared prefixes on CUDA, by functions of torch. Not run on a GPU so far.

    output = attend_flex(query, key, value, tree, scaling, window)
    if can_use_varlen(query, key, value, tree):              # 16 bits, and no sequence shares a prefix
        output = attend_varlen(query, key, value, tree, scaling, window)

FlexAttention takes any tree: its mask is `subtree_end`, and the depths for a sliding window; the blocks of scores that
it skips are found on the host, from the tree. Both copy what they need of a tree to the device once for all layers, and
wait for nothing there. On the CPU, the tests compare FlexAttention's forward pass, its mask and the calls of both.
"""

import inspect
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sft_pipeline.kernels.cpu_attention import AttentionTree

FLEX_BLOCK = 128  # tokens per block of scores in FlexAttention; its default
VARLEN_HEAD_DIM = 256  # the largest that FlashAttention takes; a head has a multiple of 8 values


def attend_flex(
    query: Tensor, key: Tensor, value: Tensor, tree: AttentionTree, scaling: float, window: int | None
) -> Tensor:
    """Compute attention with FlexAttention, which skips blocks of scores that no token needs.

    query: (1, heads, tokens, head size); key and value: (1, key-value heads, tokens, head size). Returns (1, tokens,
    heads, head size). Its compiled kernels are for any number of tokens above FLEX_BLOCK: fewer would compile others.
    """
    flex_attention = compile_flex_attention()
    block_mask = build_flex_mask(tree, query.device, window)
    enable_gqa = query.shape[1] != key.shape[1]
    output = flex_attention(query, key, value, block_mask=block_mask, scale=scaling, enable_gqa=enable_gqa)
    return output.transpose(1, 2)


@cache
def compile_flex_attention() -> Callable[..., Tensor]:
    """Return FlexAttention, compiled at its first call for any number of tokens."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


@lru_cache(maxsize=2)
def build_flex_mask(tree: AttentionTree, device: torch.device, window: int | None = None) -> Any:
    """Build the block mask of a batch on `device`.

    Cached, so that all layers share it: one for those with a window, one for those without.
    """
    from torch.nn.attention.flex_attention import BlockMask

    num_tokens = len(tree.subtree_end)
    subtree_end = copy_to_device(tree.subtree_end, device)

    def is_visible(batch: Tensor, head: Tensor, q_index: Tensor, kv_index: Tensor) -> Tensor:
        return (q_index >= kv_index) & (q_index < subtree_end[kv_index])

    mask_mod = is_visible
    if window is not None:
        # A token sees depths from this one on. As a tensor, so that the kernel is the same for every window.
        first_depth = copy_to_device(tree.depths - window + 1, device)
        depths = copy_to_device(tree.depths, device)

        def is_within_window(batch: Tensor, head: Tensor, q_index: Tensor, kv_index: Tensor) -> Tensor:
            return is_visible(batch, head, q_index, kv_index) & (depths[kv_index] >= first_depth[q_index])

        mask_mod = is_within_window

    partial_blocks, full_blocks = find_flex_blocks(tree, window)
    lists: dict[str, Any] = {}
    for name, blocks in (
        ("kv", partial_blocks),
        ("full_kv", full_blocks),
        ("q", np.ascontiguousarray(partial_blocks.T)),
        ("full_q", np.ascontiguousarray(full_blocks.T)),
    ):
        counts, indices = _list_blocks(blocks)
        lists[f"{name}_num_blocks"] = copy_to_device(counts[None, None], device)
        lists[f"{name}_indices"] = copy_to_device(indices[None, None], device)
    for tensor in lists.values():
        # Else kernels compiled for as many blocks as there are heads, or values of a head, are for that number alone.
        torch._dynamo.maybe_mark_dynamic(tensor, list(range(2, tensor.dim())))
    return BlockMask(
        seq_lengths=(num_tokens, num_tokens), BLOCK_SIZE=(FLEX_BLOCK, FLEX_BLOCK), mask_mod=mask_mod, **lists
    )


def find_flex_blocks(tree: AttentionTree, window: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return which blocks of (queries, keys) have some and which have only visible pairs: two (blocks, blocks) arrays.

    Blocks with visible pairs alone are in the second array only; the last block, if it is not complete, is none, as in
    torch's `create_block_mask`. With a window some blocks of the first array may have no visible pair.
    """
    starts = np.arange(0, len(tree.subtree_end), FLEX_BLOCK)
    is_before = starts[None] < starts[:, None]  # the block of keys lies before that of queries
    is_seen = np.maximum.reduceat(tree.subtree_end, starts)[None] > starts[:, None]
    is_full = is_before & (np.minimum.reduceat(tree.subtree_end, starts)[None] >= starts[:, None] + FLEX_BLOCK)
    if window is not None:
        least, most = np.minimum.reduceat(tree.depths, starts), np.maximum.reduceat(tree.depths, starts)
        is_seen &= least[:, None] - most[None] < window
        is_full &= most[:, None] - least[None] < window
    return (is_before & is_seen & ~is_full) | np.eye(len(starts), dtype=bool), is_full


def _list_blocks(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each row of blocks the number of those that are True, and their indices first in a row, as int32."""
    return blocks.sum(1, dtype=np.int32), np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)


def can_use_varlen(query: Tensor, key: Tensor, value: Tensor, tree: AttentionTree) -> bool:
    """Return whether `attend_varlen` computes attention over this tree: its home case, causal rows side by side."""
    head_dim = query.shape[-1]
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and query.dtype == key.dtype == value.dtype
        and head_dim == value.shape[-1] <= VARLEN_HEAD_DIM
        and head_dim % 8 == 0
        and not any(segment.ancestors for segment in tree.segments)
        and find_varlen_attention(query.device) is not None
    )


def attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, tree: AttentionTree, scaling: float, window: int | None
) -> Tensor:
    """Compute attention with torch's variable-length attention, where `can_use_varlen`. Shapes as for `attend_flex`."""
    varlen_attention: Any = find_varlen_attention(query.device)
    starts, longest = build_varlen_lengths(tree, query.device)
    # Its window is the number of tokens to the left; (-1, 0) is causal without one.
    window_size = (-1, 0) if window is None else (window - 1, 0)
    by_token = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    return varlen_attention(*by_token, starts, starts, longest, longest, scale=scaling, window_size=window_size)[None]


@lru_cache(maxsize=1)
def build_varlen_lengths(tree: AttentionTree, device: torch.device) -> tuple[Tensor, int]:
    """Return where the segments begin and the last ends, (segments + 1,) int32 on `device`, and the longest length."""
    starts = np.array([0, *(segment.end for segment in tree.segments)], np.int32)
    return copy_to_device(starts, device), int(np.diff(starts).max())


@cache
def find_varlen_attention(device: torch.device) -> Callable[..., Any] | None:
    """Return torch's variable-length attention, or None where the device or the release of torch does not have it.

    It runs FlashAttention, which needs compute capability 8. Earlier releases have no scale and no window, later ones
    have to be asked for fewer key-value heads.
    """
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= parameters.keys():
        return None
    if "enable_gqa" not in parameters:
        return varlen_attn
    return lambda *args, **kwargs: varlen_attn(*args, **kwargs, enable_gqa=True)


def copy_to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array of the host to `device`, on CUDA without waiting for what runs there."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
