"""Attention over a tree of shared prefixes (data/prefix_tree.py), at the cost of the scores that its tokens need.

For a packed batch, transformers itself builds a mask of tokens x tokens and computes every score under it. Here each
segment of the tree attends to its ancestors and to itself, without such a mask. The function is registered in
transformers' attention interface, so it works for every model that uses the interface. Calls without a tree (padded
batches, generation) run plain `sdpa`.

    reason = find_packing_obstacle(model)            # None, or why the model needs padded batches
    use_packed_attention(model)
    model(input_ids=..., position_ids=..., **build_packed_arguments(tree, device), use_cache=False)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from sft_pipeline.kernels.cpu_attention import (
    AttentionTree,
    build_attention_tree,
    compute_attention,
    compute_attention_grads,
    limit_segments,
)
from sft_pipeline.kernels.cuda_attention import FLEX_BLOCK, attend_flex, attend_varlen, can_use_varlen
from sft_pipeline.model.module_utils import (
    adds_router_loss,
    find_configs,
    restore_configs,
    unwrap_peft,
    use_eval_mode,
)
from sft_pipeline.utils.distributed import share_verdict
from sft_pipeline.utils.errors import SFTError, format_first_line

ATTN_IMPLEMENTATION = "sft_packed"  # its name in transformers' attention interface

CHECKED_WINDOW = 3  # tokens of the sliding window in the comparison of short rows

# The largest relative difference of hidden states, packed and not, that find_packing_obstacle accepts.
FLOAT32_TOLERANCE, LOW_PRECISION_TOLERANCE = 1e-4, 5e-2


def build_packed_arguments(tree: AttentionTree, device: torch.device) -> dict[str, Any]:
    """Build the arguments of a packed batch for a model on `device`.

    The empty mask has four dimensions, which transformers takes for a finished mask, so that it builds none.
    """
    return {"prefix_tree": tree, "attention_mask": torch.empty((1, 1, 0, 0), dtype=torch.bool, device=device)}


@torch.compiler.disable  # called from compiled layers (compiled_layers.py), not compiled with them
def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    prefix_tree: AttentionTree | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention for transformers' attention interface.

    query: (1, heads, tokens, head size); key and value: (1, key-value heads, tokens, head size). sliding_window: a
    token sees itself and the sliding_window - 1 tokens before it in its sequence.
    Returns (1, tokens, heads, head size), and None for the attention weights, which are not kept.
    """
    if prefix_tree is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, sliding_window=sliding_window, **kwargs
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = cast_to_one_dtype(query, key, value)
    arguments = query, key, value, prefix_tree, scaling, sliding_window
    # A block or less is no work for a GPU, and FlexAttention would compile other kernels for it.
    if dropout or (runs_on_cuda(query.device) and query.shape[2] <= FLEX_BLOCK):
        output = _attend_sdpa(*arguments, dropout)
    elif runs_on_cuda(query.device):
        attend = attend_varlen if can_use_varlen(query, key, value, prefix_tree) else attend_flex
        output = attend(*arguments)
    elif _is_float32(query):
        output = _BlockAttention.apply(*arguments)
    else:
        output = _attend_sdpa(*arguments)
    return _OwnTensor.apply(output.contiguous()), None


def cast_to_one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast to the dtype of autocast, or else of the values, as torch's own functions do not all do.

    Under autocast queries and keys leave their rotation in float32, and values a linear layer in 16 bits.
    """
    device_type = query.device.type
    is_autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if is_autocast else value.dtype
    return query.to(dtype), key.to(dtype), value.to(dtype)


def use_packed_attention(model: PreTrainedModel) -> None:
    """Make `model`, a transformers model, attend over packed rows; other batches run `sdpa` as before."""
    AttentionInterface.register(ATTN_IMPLEMENTATION, packed_attention_forward)
    AttentionMaskInterface.register(ATTN_IMPLEMENTATION, sdpa_mask)
    model.set_attn_implementation(ATTN_IMPLEMENTATION)


def check_packed_attention(model: nn.Module) -> None:
    """Raise SFTError if the attention of `model` is not the one that `use_packed_attention` has set any more."""
    causal_lm = unwrap_peft(model)
    name = causal_lm.config.get_text_config()._attn_implementation
    if name != ATTN_IMPLEMENTATION:
        raise SFTError(
            f"the attention of {type(causal_lm).__name__} was set to {name} after the trainer prepared the model, and "
            "would mix packed rows; set packing: false to use it"
        )


@share_verdict
def find_packing_obstacle(model: PreTrainedModel, longest: int | None = None) -> str | None:
    """Return the reason why packed rows would not be exact for `model`, in one clause, or None.

    longest: tokens of the longest row; a sliding window or a chunk at least as long hides nothing. The config rules out
    what short rows do not show. Everything else (a model that ignores positions, keeps a state, adds a bias to the
    scores) is found by a comparison of the model's hidden states for four short rows, run one by one and packed: with
    its own sliding window, and with a shorter one.
    """
    model = unwrap_peft(model)
    if reason := _find_unsupported_feature(model, longest):
        return reason
    try:
        with restore_configs(model), use_eval_mode(model):
            use_packed_attention(model)
            difference = _measure_packing_difference(model.base_model)
            if _uses_window(model, longest):
                with _shorten_window(model):
                    difference = max(difference, _measure_packing_difference(model.base_model))
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        return f"{type(model).__name__} does not accept packed rows ({format_first_line(error)})"
    is_float32 = next(model.parameters()).dtype == torch.float32
    if difference < (FLOAT32_TOLERANCE if is_float32 else LOW_PRECISION_TOLERANCE):
        return None
    return f"packing changes what {type(model).__name__} computes ({difference:.1g})"


def _find_unsupported_feature(model: PreTrainedModel, longest: int | None) -> str | None:
    """Return the reason that the model's class or config gives against packing, or None."""
    config, name = model.config.get_text_config(), type(model).__name__
    if model.config.is_encoder_decoder:
        return f"{name} is an encoder-decoder"
    if not model.is_backend_compatible():
        return f"{name} does not use transformers' attention interface"
    if adds_router_loss(model):
        return f"{name} adds a router loss over the tokens of a padded batch (output_router_logits: true)"
    has_sdpa = model.get_correct_attn_implementation(None) == "sdpa"  # transformers' default, where a model has it
    if not has_sdpa or getattr(config, "attn_logit_softcapping", None):
        return f"{name} changes its attention scores (soft-capping or sinks)"
    attention_types = {"full_attention", "sliding_attention", "chunked_attention"}
    if unsupported_types := set(getattr(config, "layer_types", None) or ()) - attention_types:
        return f"{name} has layers that are not attention ({', '.join(sorted(unsupported_types))})"
    chunk_size = getattr(config, "attention_chunk_size", None)
    if chunk_size and (longest is None or longest > chunk_size):
        return f"{name} attends within chunks of {chunk_size} tokens"
    return None


def _uses_window(model: PreTrainedModel, longest: int | None) -> bool:
    """Return whether some layer of `model` has a sliding window that is shorter than the longest row."""
    config = model.config.get_text_config()
    window: int | None = getattr(config, "sliding_window", None)
    return window is not None and (longest is None or longest > window)


@contextmanager
def _shorten_window(model: PreTrainedModel) -> Iterator[None]:
    """Within this block, the sliding window of `model`, which configs and layers have, is CHECKED_WINDOW tokens."""
    candidates: list[Any] = [*find_configs(model), *model.modules()]
    owners = [owner for owner in candidates if vars(owner).get("sliding_window")]
    windows = [owner.sliding_window for owner in owners]
    try:
        for owner in owners:
            owner.sliding_window = CHECKED_WINDOW
        yield
    finally:
        for owner, window in zip(owners, windows):
            owner.sliding_window = window


def _measure_packing_difference(backbone: Any) -> float:
    """Return the largest difference of hidden states between short rows run one by one and packed.

    It is divided by the largest hidden state.
    """
    row_states, packed_states = (compute_check_states(backbone, packed) for packed in (False, True))
    return ((packed_states - row_states).abs().max() / row_states.abs().max().clamp(min=1e-9)).item()


def compute_check_states(
    backbone: Any, packed: bool, share: bool = True, run: Callable[..., Any] | None = None
) -> Tensor:
    """Return the hidden states (24, hidden size) of four short rows, run packed or one by one, in float32.

    The rows are a tree of depth 2: two hang off the first, one of them has a branch itself; without `share` they lie
    side by side. On CUDA the packed line has as many copies of them as reach the kernels that train, and the states
    are those of the last copy. run: calls the backbone, where it cannot be called by itself.
    """
    run = run or backbone
    device = next(backbone.parameters()).device
    rows = [[*range(7)], [0, 1, 2, 7, 8, 9, 10], [0, 1, 2, 7, 8, 11], [0, 1, 12, 13]]  # positions in the tree's line
    ids = np.array([*range(7), *range(3, 7), 11, 12, 13]) % backbone.config.get_text_config().vocab_size
    if not packed:
        inputs = [torch.from_numpy(ids[row])[None].to(device) for row in rows]
        return torch.cat([run(input_ids=row, use_cache=False).last_hidden_state[0] for row in inputs]).float()
    depths, positions = np.array([*range(7), *range(3, 7), 5, 2, 3]), np.concatenate(rows)
    subtree_end = np.array([14, 14, 12, 7, 7, 7, 7, 12, 12, 11, 11, 12, 14, 14])
    if not share:
        ids, depths, lengths = ids[positions], depths[positions], [len(row) for row in rows]
        subtree_end, positions = np.cumsum(lengths).repeat(lengths), np.arange(sum(lengths))
    copies = FLEX_BLOCK // len(ids) + 1 if runs_on_cuda(device) else 1
    subtree_end = np.concatenate([subtree_end + copy * len(ids) for copy in range(copies)])
    positions = positions + (copies - 1) * len(ids)
    input_ids, position_ids = (torch.from_numpy(np.tile(array, copies))[None].to(device) for array in (ids, depths))
    arguments = build_packed_arguments(build_attention_tree(subtree_end), device)
    output = run(input_ids=input_ids, position_ids=position_ids, use_cache=False, **arguments)
    return output.last_hidden_state[0, torch.from_numpy(positions).to(device)].float()


def runs_on_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def _is_float32(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32


def _attend_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: AttentionTree,
    scaling: float,
    window: int | None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute attention with torch's own function, segment by segment: for any device and dtype, with dropout."""
    group_size = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group_size, 1), value.repeat_interleave(group_size, 1)
    sdpa = partial(F.scaled_dot_product_attention, scale=scaling, dropout_p=dropout)
    outputs = []
    for start, end, ancestors in limit_segments(tree, window):
        own_query, own_key, own_value = (tensor[:, :, start:end] for tensor in (query, key, value))
        if not ancestors and (window is None or end - start <= window):
            outputs.append(sdpa(own_query, own_key, own_value, is_causal=True))
            continue
        keys, values = (
            torch.cat([*(tensor[:, :, first:last] for first, last in ancestors), own], 2)
            for tensor, own in ((key, own_key), (value, own_value))
        )
        num_queries, num_keys = end - start, keys.shape[2]
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_queries)
        if window is not None:
            mask = mask.triu(num_keys - num_queries - window + 1)
        outputs.append(sdpa(own_query, keys, values, attn_mask=mask))
    return torch.cat(outputs, 2).transpose(1, 2)


class _OwnTensor(torch.autograd.Function):
    """The same values as a tensor that is no view.

    torch.compile looks at what a view is a view of, which differs between the functions of attention: compiled layers
    would be compiled once more when another of them comes first in the middle of a run.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return grad_output


class _BlockAttention(torch.autograd.Function):
    """The attention of kernels/cpu_attention.py as an autograd function; only its inputs are saved for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tree: AttentionTree,
        scaling: float,
        window: int | None,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.tree, ctx.scaling, ctx.window = tree, scaling, window
        return compute_attention(query, key, value, tree, scaling, window)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors  # read only once: a checkpointed layer recomputes them on access
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        compute_attention_grads(query, key, value, grad_output, ctx.tree, ctx.scaling, grads, ctx.window)
        return *grads, None, None, None
