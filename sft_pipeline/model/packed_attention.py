"""Attention over packed rows with a shared prefix, at the cost of the sum of the rows' squares.

transformers' own path for packed rows builds one mask of tokens x tokens and computes every score under it. Here each
row attends to the prefix and to itself, row by row, and no such mask exists. The function is registered through
transformers' attention interface, so it serves every model that uses it; without packed rows in the call (evaluation,
generation) it is plain `sdpa`.

    reason = why_not_packable(model)            # None, or why the model must stay with padded batches
    use_packed_attention(model)
    model(input_ids=..., position_ids=..., **packed_arguments(row_lengths), use_cache=False)
"""

from functools import cache, lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from sft_pipeline.kernels.cpu_attention import PackedRows, attend, attend_backward
from sft_pipeline.model.module_utils import unwrap_peft, use_eval_mode
from sft_pipeline.utils.errors import format_first_line

NAME = "sft_packed"


def build_packed_arguments(row_lengths: Tensor) -> dict[str, Any]:
    """What a packed batch passes to the model: `row_lengths` (1 + rows) = [prefix, rest of row 1, ...].

    The lengths are read here once for all layers. The empty mask has four dimensions, which transformers takes as a
    finished mask: it builds none.
    """
    prefix, *lengths = row_lengths.tolist()
    mask = torch.empty((1, 1, 0, 0), dtype=torch.bool, device=row_lengths.device)
    return {"packed_rows": PackedRows(prefix, tuple(lengths)), "attention_mask": mask}


def attend_packed(
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
    """transformers' attention function: query (1, heads, tokens, head size), key and value with their own fewer heads.

    Returns (1, tokens, heads, head size) and None for the weights, which are never formed.
    """
    if packed_rows is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type == "cuda" and not dropout:
        return _flex(query, key, value, packed_rows, scaling), None
    if _plain_float32(query, key, value) and not dropout:
        return _BlockAttention.apply(query, key, value, packed_rows, scaling), None
    return _sdpa_rows(query, key, value, packed_rows, scaling, dropout), None


def use_packed_attention(model: PreTrainedModel) -> None:
    """Let `model`, a transformers model, attend over packed rows; it keeps serving every other batch as `sdpa` does."""
    AttentionInterface.register(NAME, attend_packed)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def find_packing_obstacle(model: PreTrainedModel, longest: int | None = None) -> str | None:
    """Why packed rows would not be exact for `model`, in one clause, or None. Asked before training.

    longest: tokens of the longest row; a sliding window at least as long hides nothing. The config rules out what
    short rows don't show; everything else (a model that ignores positions, keeps a state, adds a bias to the scores)
    is found by comparing the model's own hidden states of three short rows with those of the packed line.
    """
    model = unwrap_peft(model)
    if reason := _unservable(model, longest):
        return reason
    before = model.config._attn_implementation
    try:
        use_packed_attention(model)
        with use_eval_mode(model):
            difference = _packing_difference(model.base_model)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        return f"{type(model).__name__} does not take packed rows ({format_first_line(error)})"
    finally:
        model.set_attn_implementation(before)
    close = 1e-4 if next(model.parameters()).dtype == torch.float32 else 5e-2
    return None if difference < close else f"packing changes what {type(model).__name__} computes ({difference:.1g})"


def _unservable(model: PreTrainedModel, longest: int | None) -> str | None:
    """The reason that can be read from the model's class and config."""
    config, name = model.config.get_text_config(), type(model).__name__
    if model.config.is_encoder_decoder:
        return f"{name} is an encoder-decoder"
    if not (model._supports_attention_backend and model._can_set_attn_implementation()):
        return f"{name} does not use transformers' attention interface"
    if not model._supports_sdpa or getattr(config, "attn_logit_softcapping", None):
        return f"{name} changes its attention scores (soft-capping or sinks)"
    windows = {"full_attention", "sliding_attention", "chunked_attention"}
    if others := set(getattr(config, "layer_types", None) or ()) - windows:
        return f"{name} has layers that are not attention ({', '.join(sorted(others))})"
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    if window and getattr(config, "use_sliding_window", True) and (longest is None or longest > window):
        return f"{name} attends within a window of {window} tokens"
    return None


def _packing_difference(backbone: Any) -> float:
    """The largest difference of hidden states between three rows run alone and packed, over the largest state."""
    device = next(backbone.parameters()).device
    prefix, lengths = 3, (4, 2, 5)
    ids = torch.arange(prefix + sum(lengths), device=device)[None] % backbone.config.get_text_config().vocab_size
    rows = PackedRows(prefix, lengths)
    positions = torch.cat([torch.arange(prefix), *(torch.arange(prefix, prefix + n) for n in lengths)])
    arguments = build_packed_arguments(torch.tensor([prefix, *lengths], device=device))
    packed = backbone(input_ids=ids, position_ids=positions[None].to(device), use_cache=False, **arguments)
    worst, largest = 0.0, 1e-9
    for start, end in rows.spans():
        alone = torch.cat((ids[:, :prefix], ids[:, start:end]), 1)
        expected = backbone(input_ids=alone, use_cache=False).last_hidden_state[:, prefix:].float()
        worst = max(worst, (packed.last_hidden_state[:, start:end].float() - expected).abs().max().item())
        largest = max(largest, expected.abs().max().item())
    return worst / largest


def _plain_float32(*tensors: Tensor) -> bool:
    return all(t.dtype == torch.float32 for t in tensors) and not torch.is_autocast_enabled(tensors[0].device.type)


def _sdpa_rows(query: Tensor, key: Tensor, value: Tensor, rows: PackedRows, scaling: float, dropout: float) -> Tensor:
    """torch's attention row by row: any device, any type, dropout."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    attend = partial(F.scaled_dot_product_attention, scale=scaling, dropout_p=dropout)
    outputs = []
    if prefix := rows.prefix:
        first = (t[:, :, :prefix] for t in (query, key, value))
        outputs.append(attend(*first, is_causal=True))
    for start, end in rows.spans():
        own = query[:, :, start:end]
        keys, values = (torch.cat((t[:, :, :prefix], t[:, :, start:end]), 2) for t in (key, value))
        # A tensor, not torch's CausalBias, which refuses the mixed types that autocast brings here.
        mask = torch.ones(end - start, prefix + end - start, dtype=torch.bool, device=query.device).tril(prefix)
        outputs.append(attend(own, keys, values, attn_mask=mask))
    return torch.cat(outputs, 2).transpose(1, 2)


def _flex(query: Tensor, key: Tensor, value: Tensor, rows: PackedRows, scaling: float) -> Tensor:
    """FlexAttention over the whole line on CUDA: blocks of scores that no row needs are skipped. Not run here."""
    from torch.nn.attention.flex_attention import flex_attention

    attend = _compiled(flex_attention)
    mask = _flex_mask(rows, query.device)
    output = attend(query, key, value, block_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    return output.transpose(1, 2)


@cache
def _compiled(function: Any) -> Any:
    return torch.compile(function, dynamic=True)


@lru_cache(maxsize=4)
def _flex_mask(rows: PackedRows, device: torch.device) -> Any:
    """Made once a batch, for all layers: causal, and within one row or from a row to the prefix (row 0)."""
    from torch.nn.attention.flex_attention import create_block_mask

    lengths = torch.tensor([rows.prefix, *rows.lengths], device=device)
    number = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
    size = len(number)

    def seen(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & ((number[q] == number[k]) | (number[k] == 0))

    return create_block_mask(seen, None, None, size, size, device=device)


class _BlockAttention(torch.autograd.Function):
    """kernels/cpu_attention.py for autograd; keeps the inputs alone."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, rows: PackedRows, scaling: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.rows, ctx.scaling = rows, scaling
        return attend(query, key, value, rows, scaling)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors  # once: a checkpointed layer computes them at the first access
        slopes = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        attend_backward(query, key, value, grad, ctx.rows, ctx.scaling, slopes)
        return *slopes, None, None
