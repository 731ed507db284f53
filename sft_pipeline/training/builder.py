"""Build the trainer of a run from its model, data and arguments."""

from __future__ import annotations

import logging
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import Dataset
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

SAMPLE_ROWS = 1000  # about as many rows are packed to measure what packing saves


def build_trainer(
    sft: SFTArguments, training: TrainingArguments, model: PreTrainedModel, template: Template, data: PreparedData
) -> SupervisedTrainer:
    """Return the trainer of the prepared rows, and log what is trained and how.

    Raises SFTError for `lora_merge` with FSDP, and for `tokens_per_batch` where rows cannot be packed.
    """
    with gather_weights(model):
        reason = patch_loss_forward(model)
        collator = build_collator(sft, model, template, data)
    if reason:
        logger.info("logits are computed at every position: %s", reason)
    if sft.lora:
        model = add_lora(model, sft.lora_rank, sft.lora_alpha, sft.lora_target_modules)
    if sft.trainable_modules:
        freeze_except(model, sft.trainable_modules)
    packed = isinstance(collator, PackedCollator)
    # ZeRO-3 gathers the weights of a module when it is called, and a fused layer does not call its submodules.
    num_fused_layers = use_fused_layers(model) if packed and not is_deepspeed_zero3_enabled() else 0
    update_training_arguments(training)
    trainable, parameters = count_trainable_parameters(model), model.num_parameters()
    logger.info("training %s of %s parameters in %s", f"{trainable:,}", f"{parameters:,}", model.dtype)
    trainer = SupervisedTrainer(
        model=model,
        args=training,
        data_collator=collator,
        train_dataset=data.train,
        eval_dataset=data.held_out and sort_by_length(data.held_out),
        processing_class=template.tokenizer,
        callbacks=[EarlyStoppingCallback(sft.early_stopping_patience)] if sft.early_stopping_patience else [],
        tokens_per_batch=sft.tokens_per_batch,
    )
    log_processes(trainer)
    if sft.lora_merge and trainer.is_fsdp_enabled:
        raise SFTError("lora_merge: adapters cannot be merged into weights sharded by fsdp; turn one of the two off")
    if packed:
        batches = trainer.build_batch_sampler()
        sample = islice(batches, -(-len(batches) * SAMPLE_ROWS // len(data.train)))
        savings = describe_savings(data.train, sample)
        logger.info("%s; forward and backward are fused in %s layers", savings, num_fused_layers)
    return trainer


def build_collator(
    sft: SFTArguments, model: PreTrainedModel, template: Template, data: PreparedData
) -> PackedCollator | PaddingCollator:
    """Return the packing collator if `packing` is on and the model supports it, else the padding one; log why not.

    Raises SFTError for `tokens_per_batch` without packing.
    """
    longest = max(stats.length_quantiles["most"] for stats in (data.train_stats, data.held_out_stats) if stats)
    pad_token_id: Any = template.tokenizer.pad_token_id
    collator, reason = choose_collator(model, longest, pad_token_id, sft.pad_to_multiple_of, sft.packing)
    if reason and sft.tokens_per_batch:
        raise SFTError(f"tokens_per_batch: {sft.tokens_per_batch} needs packing, which is off ({reason}); set it to 0")
    if reason:
        logger.info("batches are padded: %s", reason)
    return collator


def update_training_arguments(training: TrainingArguments) -> None:
    """Set in place the arguments that follow from our model and data; on a CPU also configure malloc."""
    # All columns are inputs of the patched forward; the library would drop those not in the signature of the original.
    training.remove_unused_columns = False
    # One process per device: DataParallel, the library's default for several visible GPUs, would split a packed batch.
    training._n_gpu = min(1, training.n_gpu)
    # Every forward pass uses every parameter, also for a batch without targets, so DDP need not search for unused ones.
    training.ddp_find_unused_parameters = bool(training.ddp_find_unused_parameters)
    training.dataloader_pin_memory &= torch.accelerator.is_available()
    if training.device.type == "cpu":
        set_malloc_options()


def sort_by_length(dataset: Dataset) -> Dataset:
    """Sort rows by number of tokens, so that evaluation batches need less padding; metrics stay the same."""
    return dataset.select(np.argsort(count_row_tokens(dataset), kind="stable"))


def log_processes(trainer: SupervisedTrainer) -> None:
    """Log the number of processes, if more than one, and whether the model is replicated or sharded."""
    args = trainer.args
    if args.world_size > 1:
        layout = "the model sharded across them (FSDP2)" if trainer.is_fsdp_enabled else "the whole model on each"
        logger.info("%s processes (%s), %s", args.world_size, args.distributed_state.backend, layout)


def count_trainable_parameters(model: PreTrainedModel) -> int:
    """Count parameters that require gradients; `ds_numel` is the full size of one sharded by ZeRO-3."""
    return sum(getattr(w, "ds_numel", w.numel()) for w in model.parameters() if w.requires_grad)
