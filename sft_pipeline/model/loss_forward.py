"""The seam between a causal language model and its training: forward passes that end in a loss, not in logits.

    supervise(model)
    model(input_ids=..., attention_mask=..., shift_labels=..., num_items_in_batch=n).loss     # training
    model(input_ids=..., attention_mask=..., shift_labels=..., return_row_losses=True).logits  # evaluation, (rows, 3)

Both also take packed batches (data/packing.py), whose `row_lengths` stand in the place of `attention_mask`.

Without `shift_labels` the model is what it was, so generation and saving see no difference. The method stays on the
model itself, below any wrapper of `peft`, DDP or FSDP, whose hooks therefore see one ordinary forward pass.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from sft_pipeline.model.lm_head import LMHead, split_head
from sft_pipeline.model.module_utils import unwrap_peft
from sft_pipeline.model.packed_attention import build_packed_arguments
from sft_pipeline.utils.constants import IGNORED
from sft_pipeline.utils.errors import SFTError

logger = logging.getLogger(__name__)

POSITIONS = 1024  # positions at a time whose logits are formed in evaluation


def patch_loss_forward(model: PreTrainedModel) -> str | None:
    """Teach `model` the two calls above. Returns why it stays with full logits instead, or None."""
    try:
        head, reason = split_head(model), None
    except SFTError as error:
        head, reason = None, str(error)
    inner = unwrap_peft(model)
    plain = inner.forward

    def forward(
        *args: Any,
        shift_labels: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        row_lengths: Tensor | None = None,
        return_row_losses: bool = False,
        **kwargs: Any,
    ) -> Any:
        if shift_labels is None:
            return plain(*args, **kwargs) if labels is None else plain(*args, labels=labels, **kwargs)
        if row_lengths is not None:
            kwargs |= build_packed_arguments(row_lengths)
        if head is None:
            return _with_full_logits(plain, shift_labels, num_items_in_batch, row_lengths, return_row_losses, kwargs)
        hidden = head.hidden(**kwargs)
        if return_row_losses:
            sums = head.call(lambda states: sum_row_losses(states, shift_labels, row_lengths, head), hidden)
            return CausalLMOutput(logits=sums)
        count = num_items_in_batch
        if count is None:
            count = shift_labels.ne(IGNORED).sum().clamp(min=1)
        return CausalLMOutput(loss=head.loss(hidden, shift_labels, count))

    inner.forward = forward
    return reason


def _with_full_logits(
    plain: Any, labels: Tensor, count: Any, row_lengths: Tensor | None, return_row_losses: bool, kwargs: dict[str, Any]
) -> Any:
    """The library's own way, for a model whose head cannot be taken apart."""
    if not return_row_losses:
        return plain(**kwargs, use_cache=False, labels=labels, shift_labels=labels, num_items_in_batch=count)
    logits = plain(**kwargs, use_cache=False).logits
    return CausalLMOutput(logits=sum_row_losses(logits, labels, row_lengths, None))


@torch.no_grad()
def sum_row_losses(hidden: Tensor, labels: Tensor, row_lengths: Tensor | None, head: LMHead | None) -> Tensor:
    """(rows, 3) in float64: summed nll in nats, targets, and targets that were the likeliest id, of each row.

    hidden: (lines, length, hidden size), or the logits themselves where `head` is None; labels: (lines, length),
    shifted. A line is a row, or with `row_lengths` the one line that holds them all.
    """
    numbers = _row_numbers(labels, row_lengths)
    lines, columns = labels.ne(IGNORED).nonzero(as_tuple=True)
    # Apple's devices have no float64; the sums go there where they can be exact.
    sums = torch.zeros(len(labels) if row_lengths is None else len(row_lengths) - 1, 3, dtype=torch.float64)
    for at in range(0, len(lines), POSITIONS):
        where = lines[at : at + POSITIONS], columns[at : at + POSITIONS]
        states, target = hidden[where], labels[where]
        logits = (states if head is None else head.logits(states)).float()
        nll = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        correct = (logits.argmax(-1) == target).float()
        metrics = torch.stack([nll, torch.ones_like(nll), correct], 1)
        sums.index_add_(0, numbers[where].cpu(), metrics.cpu().double())
    return sums.to(torch.float32 if labels.device.type == "mps" else torch.float64).to(labels.device)


def _row_numbers(labels: Tensor, row_lengths: Tensor | None) -> Tensor:
    """For each position the row it belongs to; the shared prefix, which has no targets, counts to the first."""
    if row_lengths is None:
        return torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)
    own = torch.arange(len(row_lengths) - 1, device=labels.device)
    return torch.cat([own[:1], own]).repeat_interleave(row_lengths)[None]
