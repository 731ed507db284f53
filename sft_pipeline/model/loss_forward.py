"""Forward passes of a causal language model that return losses instead of logits, for training and evaluation.

    patch_loss_forward(model)
    model(input_ids=..., attention_mask=..., shift_labels=..., num_items_in_batch=n).loss     # training
    model(input_ids=..., attention_mask=..., shift_labels=..., return_row_losses=True).logits  # evaluation, (rows, 3)

Both also take packed batches (data/packing.py), which have `prefix_tree` instead of `attention_mask`, and their targets
as pairs of a position and an id: `target_positions` and `shift_labels`. `target_positions` of a padded batch are the
indices of its targets in the flattened `shift_labels`; where they are given, training reads nothing back from the
device. The rows of an evaluation are `target_counts` (rows,), the number of targets of each row in the order of the
targets; without it each line is a row.

Without `shift_labels` the model's own forward runs, so generation and saving are unchanged. The patch is on the model
itself, below any wrapper of `peft`, DDP or FSDP, so that their hooks see one ordinary forward pass.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from sft_pipeline.kernels.cpu_attention import AttentionTree
from sft_pipeline.model.lm_head import LOW_PRECISION_TOLERANCE, LMHead, split_head
from sft_pipeline.model.module_utils import adds_router_loss, unwrap_peft, use_eval_mode
from sft_pipeline.model.packed_attention import build_packed_arguments
from sft_pipeline.utils.constants import IGNORED
from sft_pipeline.utils.distributed import share_verdict
from sft_pipeline.utils.errors import SFTError, format_first_line

logger = logging.getLogger(__name__)

# The largest relative difference that the checks of a model accept in its loss and logits, by the dtype of its weights.
CHECK_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
CHUNK_POSITIONS = 1024  # positions whose logits are computed at a time in evaluation


def patch_loss_forward(model: PreTrainedModel) -> str | None:
    """Patch the forward of `model` to take the two calls above.

    Returns None, or the reason why the logits are computed at every position: its head cannot be split off, or its own
    forward adds the loss of its router. A model that is patched already stays as it is. Raises SFTError for a model
    that is not causal, and for one whose own loss is not the cross-entropy of its logits.
    """
    causal_lm = unwrap_peft(model)
    original_forward = causal_lm.forward
    if hasattr(original_forward, "head_obstacle"):
        return original_forward.head_obstacle
    if causal_lm.config.is_encoder_decoder:
        raise SFTError(f"{type(causal_lm).__name__} is an encoder-decoder; give a causal language model")
    has_router_loss = adds_router_loss(causal_lm)
    try:
        head, reason = split_head(model), None
    except SFTError as error:
        head, reason = None, str(error)
    if has_router_loss:
        head, reason = None, f"{type(causal_lm).__name__} adds a router loss (output_router_logits: true)"
    else:
        if hasattr(causal_lm.config.get_text_config(), "output_router_logits"):
            logger.info(
                "the router of the experts is trained without a loss of its own (output_router_logits: false in the "
                "model's config.json)"
            )
        _check_own_loss(causal_lm, reason)
    _check_causality(causal_lm)

    def forward(
        *args: Any,
        shift_labels: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        prefix_tree: AttentionTree | None = None,
        target_positions: Tensor | None = None,
        target_counts: Tensor | None = None,
        token_counts: Tensor | None = None,  # of interest to the trainer only
        return_row_losses: bool = False,
        **kwargs: Any,
    ) -> Any:
        if prefix_tree is not None:
            kwargs |= build_packed_arguments(prefix_tree, kwargs["input_ids"].device)
        if shift_labels is None:
            if labels is not None:
                kwargs["labels"] = labels
            return original_forward(*args, **kwargs)
        if head is None and prefix_tree is None and not return_row_losses:
            return _run_own_loss(original_forward, shift_labels, num_items_in_batch, has_router_loss, kwargs)
        targets = shift_labels.reshape(-1)
        if target_positions is None:
            target_positions = targets.ne(IGNORED).nonzero()[:, 0]
        if prefix_tree is None:
            targets = targets.index_select(0, target_positions)
        if head is None:
            states = original_forward(**kwargs, use_cache=False).logits
        else:
            states = head.compute_hidden_states(**kwargs)
        states = states.flatten(0, 1).index_select(0, target_positions)
        if return_row_losses:
            counts = shift_labels.ne(IGNORED).sum(1) if target_counts is None else target_counts
            if head is None:
                return CausalLMOutput(logits=sum_row_losses(states, targets, counts, None))
            row_losses = head.run_as_forward(lambda states: sum_row_losses(states, targets, counts, head), states)
            return CausalLMOutput(logits=row_losses)
        num_items = max(len(targets), 1) if num_items_in_batch is None else num_items_in_batch
        if head is None:
            return CausalLMOutput(
                loss=nn.functional.cross_entropy(states.float(), targets, reduction="sum") / num_items
            )
        return CausalLMOutput(loss=head.compute_loss(states, targets, num_items))

    forward.head_obstacle = reason  # type: ignore[attr-defined]  # marks the patch
    causal_lm.forward = forward
    return reason


@share_verdict
def _check_own_loss(model: PreTrainedModel, head_obstacle: str | None) -> None:
    """Raise SFTError if the model's own loss of a few tokens is not the cross-entropy of its logits.

    Such a model adds another loss, which we would drop; or, where we run its own forward because of `head_obstacle`, it
    does not take shifted labels.
    """
    weight = next(model.parameters())
    input_ids = torch.arange(4, device=weight.device)[None] % model.config.get_text_config().vocab_size
    labels: dict[str, Any] = {"labels": input_ids}
    if head_obstacle:
        shifted = torch.cat([input_ids[:, 1:], torch.full_like(input_ids[:, :1], IGNORED)], 1)
        labels = {"labels": shifted, "shift_labels": shifted, "num_items_in_batch": 3}
    name = type(model).__name__
    with use_eval_mode(model):
        try:
            output = model(input_ids=input_ids, use_cache=False, **labels)
        except TypeError as error:
            if not head_obstacle:
                return  # it has no loss of its own
            raise SFTError(
                f"{name} takes no shifted labels ({format_first_line(error)}), and {head_obstacle}"
            ) from error
    own_loss: Any = output.loss
    loss = torch.nn.functional.cross_entropy(output.logits[0, :-1].float(), input_ids[0, 1:])
    difference = (own_loss - loss).abs().item() / loss.clamp_min(1).item()
    if difference > CHECK_TOLERANCE.get(weight.dtype, LOW_PRECISION_TOLERANCE):
        raise SFTError(
            f"{name}: its own loss is not the cross-entropy of its logits (they differ by {difference:.1g}), and the "
            "rest of it would not be trained; train it with transformers.Trainer"
        )


@share_verdict
def _check_causality(model: PreTrainedModel) -> None:
    """Raise SFTError if the logits of a token depend on later tokens, which are its targets."""
    weight = next(model.parameters())
    input_ids = torch.arange(6, device=weight.device)[None] % model.config.get_text_config().vocab_size
    with use_eval_mode(model):
        logits, expected = (
            model(input_ids=ids, use_cache=False).logits[:, :3].float() for ids in (input_ids, input_ids[:, :3])
        )
    difference = ((logits - expected).abs().max() / expected.abs().max().clamp_min(1e-9)).item()
    if difference > CHECK_TOLERANCE.get(weight.dtype, LOW_PRECISION_TOLERANCE):
        raise SFTError(
            f"{type(model).__name__} attends to later tokens, which are the targets; give a causal language model (of "
            "BERT and its relatives: with is_decoder: true in its config)"
        )


def check_loss_forward(model: nn.Module) -> None:
    """Raise SFTError if the forward of `model`, or of the model inside its adapters, is not the patched one any more.

    Functions around it that tell what they wrap, such as those of mixed precision, are accepted.
    """
    causal_lm = unwrap_peft(model)
    forward = inspect.unwrap(causal_lm.forward, stop=lambda function: hasattr(function, "head_obstacle"))
    if not hasattr(forward, "head_obstacle"):
        name = f"{getattr(forward, '__module__', '')}.{getattr(forward, '__qualname__', type(forward).__name__)}"
        raise SFTError(
            f"the forward of {type(causal_lm).__name__} was replaced by {name} after the trainer prepared the model, "
            "and would train other losses; replace it before the trainer is built, or not at all"
        )


def _run_own_loss(
    original_forward: Callable[..., Any],
    labels: Tensor,
    num_items: int | Tensor | None,
    has_router_loss: bool,
    kwargs: dict[str, Any],
) -> Any:
    """Run the model's own forward over a padded batch, for a model whose head cannot be split off. labels: shifted.

    A router loss, which is a mean over tokens, is weighted by the batch's share of the step's targets. The library
    would add it once for each micro-batch and process.
    """
    if has_router_loss and num_items is not None:
        num_targets = labels.ne(IGNORED).sum()
        output = original_forward(
            **kwargs,
            use_cache=False,
            labels=labels,
            shift_labels=labels,
            num_items_in_batch=num_targets.clamp(min=1),
        )
        return CausalLMOutput(loss=output.loss * (num_targets / num_items))
    return original_forward(**kwargs, use_cache=False, labels=labels, shift_labels=labels, num_items_in_batch=num_items)


@torch.no_grad()
def sum_row_losses(states: Tensor, targets: Tensor, target_counts: Tensor, head: LMHead | None) -> Tensor:
    """Sum the losses of each row: (rows, 3) in float64.

    The columns are the summed negative log-likelihood in nats, the number of targets, and the number of targets that
    have the largest logit. states: (targets, hidden size), or the logits where `head` is None; targets: (targets,);
    target_counts: (rows,), the number of targets of each row, in their order.
    """
    metrics = []
    for start in range(0, len(targets), CHUNK_POSITIONS):
        chunk = slice(start, start + CHUNK_POSITIONS)
        logits = (states[chunk] if head is None else head.compute_logits(states[chunk])).float()
        nll = torch.nn.functional.cross_entropy(logits, targets[chunk], reduction="none")
        is_correct = (logits.argmax(-1) == targets[chunk]).float()
        metrics.append(torch.stack([nll, torch.ones_like(nll), is_correct], 1))
    # On the CPU, because MPS has no float64: only the result is rounded to float32 there.
    sums = torch.zeros(len(target_counts), 3, dtype=torch.float64)
    if metrics:
        row_indices = torch.arange(len(target_counts)).repeat_interleave(target_counts.cpu())
        sums.index_add_(0, row_indices, torch.cat(metrics).cpu().double())
    return sums.to(torch.float32 if targets.device.type == "mps" else torch.float64).to(targets.device)
