"""Attention over packed rows with a shared prefix, at the cost of the sum of the squared row lengths.

For packed rows, transformers itself builds a mask of tokens x tokens and computes every score under it. Here each row
attends to the prefix and to itself, row by row, without such a mask. The function is registered in transformers'
attention interface, so it works for every model that uses the interface. Calls without packed rows (padded batches,
generation) run plain `sdpa`.

    reason = find_packing_obstacle(model)            # None, or why the model needs padded batches
    use_packed_attention(model)
    model(input_ids=..., position_ids=..., **build_packed_arguments(row_lengths), use_cache=False)
"""

from functools import cache, lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from sft_pipeline.kernels.cpu_attention import PackedRows, compute_attention, compute_attention_grads
from sft_pipeline.model.module_utils import adds_router_loss, restore_configs, unwrap_peft, use_eval_mode
from sft_pipeline.utils.errors import SFTError, format_first_line

ATTN_IMPLEMENTATION = "sft_packed"  # its name in transformers' attention interface

# The largest relative difference of hidden states, packed and not, that find_packing_obstacle accepts.
FLOAT32_TOLERANCE, LOW_PRECISION_TOLERANCE = 1e-4, 5e-2


def build_packed_arguments(row_lengths: Tensor) -> dict[str, Any]:
    """Build the arguments of a packed batch for the model from `row_lengths` (1 + rows) = [prefix, rest of row 1, ...].

    The lengths are copied from the device here, once for all layers. The empty mask has four dimensions, which
    transformers takes for a finished mask, so that it builds none.
    """
    prefix, *lengths = row_lengths.tolist()
    mask = torch.empty((1, 1, 0, 0), dtype=torch.bool, device=row_lengths.device)
    return {"packed_rows": PackedRows(prefix, tuple(lengths)), "attention_mask": mask}


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_rows: PackedRows | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention for transformers' attention interface.

    query: (1, heads, tokens, head size); key and value: (1, key-value heads, tokens, head size).
    Returns (1, tokens, heads, head size), and None for the attention weights, which are not kept.
    """
    if packed_rows is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type == "cuda" and not dropout:
        return _attend_flex(query, key, value, packed_rows, scaling), None
    if _is_float32(query, key, value) and not dropout:
        return _BlockAttention.apply(query, key, value, packed_rows, scaling), None
    return _attend_sdpa(query, key, value, packed_rows, scaling, dropout), None


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


def find_packing_obstacle(model: PreTrainedModel, longest: int | None = None) -> str | None:
    """Return the reason why packed rows would not be exact for `model`, in one clause, or None.

    longest: tokens of the longest row; a sliding window at least as long hides nothing. The config rules out what
    short rows do not show. Everything else (a model that ignores positions, keeps a state, adds a bias to the scores)
    is found by a comparison of the model's hidden states for three short rows, run one by one and packed.
    """
    model = unwrap_peft(model)
    if reason := _find_unsupported_feature(model, longest):
        return reason
    try:
        with restore_configs(model), use_eval_mode(model):
            use_packed_attention(model)
            difference = _measure_packing_difference(model.base_model)
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
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    if window and getattr(config, "use_sliding_window", True) and (longest is None or longest > window):
        return f"{name} attends within a window of {window} tokens"
    return None


def _measure_packing_difference(backbone: Any) -> float:
    """Return the largest difference of hidden states between three rows run one by one and packed.

    It is divided by the largest hidden state.
    """
    device = next(backbone.parameters()).device
    prefix, lengths = 3, (4, 2, 5)
    input_ids = torch.arange(prefix + sum(lengths), device=device)[None] % backbone.config.get_text_config().vocab_size
    positions = torch.cat([torch.arange(prefix), *(torch.arange(prefix, prefix + length) for length in lengths)])
    arguments = build_packed_arguments(torch.tensor([prefix, *lengths], device=device))
    packed_states = backbone(
        input_ids=input_ids, position_ids=positions[None].to(device), use_cache=False, **arguments
    ).last_hidden_state
    max_difference, max_state = 0.0, 1e-9
    for start, end in PackedRows(prefix, lengths).get_spans():
        row_ids = torch.cat((input_ids[:, :prefix], input_ids[:, start:end]), 1)
        row_states = backbone(input_ids=row_ids, use_cache=False).last_hidden_state[:, prefix:].float()
        difference = (packed_states[:, start:end].float() - row_states).abs().max().item()
        max_difference = max(max_difference, difference)
        max_state = max(max_state, row_states.abs().max().item())
    return max_difference / max_state


def _is_float32(*tensors: Tensor) -> bool:
    """Return whether all tensors are float32 and autocast is off."""
    return all(t.dtype == torch.float32 for t in tensors) and not torch.is_autocast_enabled(tensors[0].device.type)


def _attend_sdpa(query: Tensor, key: Tensor, value: Tensor, rows: PackedRows, scaling: float, dropout: float) -> Tensor:
    """Compute attention with torch's own function, row by row: for any device and dtype, with dropout."""
    group_size = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group_size, 1), value.repeat_interleave(group_size, 1)
    sdpa = partial(F.scaled_dot_product_attention, scale=scaling, dropout_p=dropout)
    outputs = []
    if prefix := rows.prefix_length:
        prefix_qkv = (tensor[:, :, :prefix] for tensor in (query, key, value))
        outputs.append(sdpa(*prefix_qkv, is_causal=True))
    for start, end in rows.get_spans():
        keys, values = (torch.cat((t[:, :, :prefix], t[:, :, start:end]), 2) for t in (key, value))
        # A plain tensor: torch's CausalBias refuses the mixed dtypes that autocast passes here.
        mask = torch.ones(end - start, prefix + end - start, dtype=torch.bool, device=query.device).tril(prefix)
        outputs.append(sdpa(query[:, :, start:end], keys, values, attn_mask=mask))
    return torch.cat(outputs, 2).transpose(1, 2)


def _attend_flex(query: Tensor, key: Tensor, value: Tensor, rows: PackedRows, scaling: float) -> Tensor:
    """Compute attention on CUDA with FlexAttention, which skips blocks of scores that no row needs.

    The tests, which run on the CPU, cover only its mask.
    """
    flex_attention = _compile_flex_attention()
    block_mask = _build_flex_mask(rows, query.device)
    enable_gqa = query.shape[1] != key.shape[1]
    output = flex_attention(query, key, value, block_mask=block_mask, scale=scaling, enable_gqa=enable_gqa)
    return output.transpose(1, 2)


@cache
def _compile_flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


@lru_cache(maxsize=4)
def _build_flex_mask(rows: PackedRows, device: torch.device) -> Any:
    """Build the block mask of a batch: causal, and within one row or from a row to the prefix, which is row 0.

    Cached, so that all layers share it.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    lengths = torch.tensor([rows.prefix_length, *rows.lengths], device=device)
    row_index = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
    num_tokens = len(row_index)

    def is_visible(batch: Tensor, head: Tensor, q_index: Tensor, kv_index: Tensor) -> Tensor:
        same_row_or_prefix = (row_index[q_index] == row_index[kv_index]) | (row_index[kv_index] == 0)
        return (q_index >= kv_index) & same_row_or_prefix

    return create_block_mask(is_visible, None, None, num_tokens, num_tokens, device=device)


class _BlockAttention(torch.autograd.Function):
    """The attention of kernels/cpu_attention.py as an autograd function; only its inputs are saved for backward."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, rows: PackedRows, scaling: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.rows, ctx.scaling = rows, scaling
        return compute_attention(query, key, value, rows, scaling)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors  # read only once: a checkpointed layer recomputes them on access
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        compute_attention_grads(query, key, value, grad_output, ctx.rows, ctx.scaling, out=grads)
        return *grads, None, None
