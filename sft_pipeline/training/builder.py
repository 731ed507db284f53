"""The trainer of a run, from its model, rows and arguments."""

from __future__ import annotations

import logging
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from sft_pipeline.config import SFTArguments
from sft_pipeline.data.batch_sampler import count_row_tokens
from sft_pipeline.data.chat_templates import Template
from sft_pipeline.data.collators import choose_collator
from sft_pipeline.data.packing import PackedCollator, describe_savings
from sft_pipeline.data.padding import PaddingCollator
from sft_pipeline.data.pipeline import PreparedData
from sft_pipeline.kernels.cpu_layer_training import use_fused_layers
from sft_pipeline.model.freezing import freeze_except
from sft_pipeline.model.lora import add_lora
from sft_pipeline.model.loss_forward import patch_loss_forward
from sft_pipeline.training.fsdp import gather_weights
from sft_pipeline.training.memory import set_malloc_options
from sft_pipeline.training.trainer import SupervisedTrainer
from sft_pipeline.utils.errors import SFTError

logger = logging.getLogger(__name__)

SAMPLE = 1000  # rows on which the savings are counted


def build_trainer(
    sft: SFTArguments, training: TrainingArguments, model: PreTrainedModel, template: Template, data: PreparedData
) -> SupervisedTrainer:
    """The trainer over the prepared rows; says what it trains and how."""
    with gather_weights(model):
        reason = patch_loss_forward(model)
        collator = build_collator(sft, model, template, data)
    if reason:
        logger.info("the head is computed at every position: %s", reason)
    if sft.lora:
        model = add_lora(model, sft.lora_rank, sft.lora_alpha, sft.lora_target_modules)
    if sft.trainable_modules:
        freeze_except(model, sft.trainable_modules)
    # ZeRO-3 gathers the weights of a module when it is called; a fused layer calls none of its own.
    fusible = isinstance(collator, PackedCollator) and not is_deepspeed_zero3_enabled()
    fused = use_fused_layers(model) if fusible else 0
    callbacks = [EarlyStoppingCallback(sft.early_stopping_patience)] if sft.early_stopping_patience else []
    # Rows of like length side by side need less padding; the order of held-out rows changes no figure.
    held_out = data.held_out and data.held_out.select(np.argsort(count_row_tokens(data.held_out), kind="stable"))
    # The rows have no other columns, and the library looks for their names in the model's own forward signature.
    training.remove_unused_columns = False
    # One process a device: the old way of one process for all devices would split a packed batch.
    training._n_gpu = min(1, training.n_gpu)
    # Every forward pass uses every parameter, also one without a target: no need to walk the graph for unused ones.
    training.ddp_find_unused_parameters = bool(training.ddp_find_unused_parameters)
    training.dataloader_pin_memory &= torch.accelerator.is_available()
    if training.device.type == "cpu":
        set_malloc_options()
    trainable, parameters = count_trainable_parameters(model), model.num_parameters()
    logger.info("training %s of %s parameters in %s", f"{trainable:,}", f"{parameters:,}", model.dtype)
    trainer = SupervisedTrainer(
        model=model,
        args=training,
        data_collator=collator,
        train_dataset=data.train,
        eval_dataset=held_out,
        processing_class=template.tokenizer,
        callbacks=callbacks,
        tokens_per_batch=sft.tokens_per_batch,
    )
    log_processes(trainer)
    if sft.lora_merge and trainer.is_fsdp_enabled:
        raise SFTError("lora_merge: true merges whole weights, and fsdp divides them; leave one out")
    if isinstance(collator, PackedCollator):
        batches = trainer.training_batches()
        sample = islice(batches, -(-len(batches) * SAMPLE // len(data.train)))
        logger.info("%s; forward and backward are fused in %s layers", describe_savings(data.train, sample), fused)
    return trainer


def build_collator(
    sft: SFTArguments, model: PreTrainedModel, template: Template, data: PreparedData
) -> PackedCollator | PaddingCollator:
    """Packed batches where they were asked for and the model can take them; says why not."""
    accounts = [account for account in (data.train_stats, data.held_out_stats) if account]
    longest = max(account.length_quantiles["most"] for account in accounts)
    pad_token_id: Any = template.tokenizer.pad_token_id
    collator, reason = choose_collator(model, longest, pad_token_id, sft.pad_to_multiple_of, sft.packing)
    if reason and sft.tokens_per_batch:
        raise SFTError(
            f"tokens_per_batch: {sft.tokens_per_batch} needs packed rows, which are off ({reason}); set it to 0"
        )
    if reason:
        logger.info("batches are padded: %s", reason)
    return collator


def log_processes(trainer: SupervisedTrainer) -> None:
    """How many there are, which a launcher may have taken otherwise, and what each holds."""
    args = trainer.args
    if args.world_size > 1:
        holds = "the model divided among them (FSDP2)" if trainer.is_fsdp_enabled else "the whole model on each"
        logger.info("%s processes (%s), %s", args.world_size, args.distributed_state.backend, holds)


def count_trainable_parameters(model: PreTrainedModel) -> int:
    return sum(getattr(w, "ds_numel", w.numel()) for w in model.parameters() if w.requires_grad)
