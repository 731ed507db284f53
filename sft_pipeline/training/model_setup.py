"""The model of a run, from its name to a model that is ready to be trained, and the collator of its batches.

model, collator = set_up_model("Qwen/Qwen3-0.6B", path, args, template, data, peft_config=None)
"""

from __future__ import annotations

import copy
import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_liger_kernel_available

from sft_pipeline.config import SFTConfig, shards_model
from sft_pipeline.data.collators import choose_collator
from sft_pipeline.data.packing import PackingCollator
from sft_pipeline.data.padding import PaddingCollator
from sft_pipeline.data.pipeline import PreparedData
from sft_pipeline.data.template import Template
from sft_pipeline.kernels.cpu_layer_training import use_fused_layers
from sft_pipeline.model.compiled_layers import compile_layers
from sft_pipeline.model.freezing import freeze_except, freeze_unreached
from sft_pipeline.model.loading import build_empty_model, load_model, set_special_tokens
from sft_pipeline.model.lora import add_adapters, round_frozen_layers
from sft_pipeline.model.loss_forward import patch_loss_forward
from sft_pipeline.model.module_utils import unwrap_peft, use_portable_attention
from sft_pipeline.model.moved_base import moves_base
from sft_pipeline.model.new_tokens import resize_embeddings, save_without_embeddings, train_tokens
from sft_pipeline.model.peft_config import build_peft_config, check_peft_config
from sft_pipeline.model.quantization import (
    build_quantization_config,
    find_quantization_method,
    is_quantized,
    set_up_quantized_layers,
)
from sft_pipeline.training.fsdp import gather_weights
from sft_pipeline.training.memory_estimate import check_memory
from sft_pipeline.training.precision import should_round_frozen_layers
from sft_pipeline.training.sharded_loading import (
    align_with_main_process,
    load_on_main_process,
    loads_on_main_process,
)
from sft_pipeline.utils.distributed import use_verdicts_of_main_process
from sft_pipeline.utils.errors import SFTError

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)

LIGER_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")
LIGER_DEVICES = ("cuda", "xpu", "npu")
TOKENS_PER_BATCH = 16_384  # of a micro-batch on CUDA


def set_up_model(
    source: str | PreTrainedModel,
    path: str,
    args: SFTConfig,
    template: Template,
    data: PreparedData,
    peft_config: PeftConfig | None,
) -> tuple[PreTrainedModel, PackingCollator | PaddingCollator]:
    """Load the model, unless `source` is one, and prepare it for training; return it with the collator of its batches.

    path: of the model, or ""; data: the rows that it will be trained on. Before the weights are loaded, the memory of
    a step is estimated. Raises SFTError for a model or settings that cannot be trained.
    """
    peft_config = choose_peft_config(args, peft_config)
    check_new_tokens(source, args, peft_config)
    for config in getattr(source, "peft_config", {}).values():
        check_peft_config(config)
        if moves_base(config):
            raise SFTError("init_lora_weights: pissa and olora: give the base model, and the adapters as peft_config")
    is_named = isinstance(source, str)
    on_main_process = is_named and loads_on_main_process(args)
    if is_named:
        estimate_step(path, args, template, data, peft_config)
    if isinstance(source, str):
        model = load_model_for_run(path, args, template, on_main_process)
    else:
        model = resize_for_tokens(source, args, template)
    set_up_quantized_layers(model)
    set_special_tokens(unwrap_peft(model), template.tokenizer, template.stop_token_ids)
    if args.use_liger_kernel:
        set_liger_arguments(args)
    with use_verdicts_of_main_process(args) if on_main_process else nullcontext():
        model, collator = prepare_model(model, args, template, data, peft_config)
    if on_main_process:
        align_with_main_process(args, model)
    if is_named and should_round_frozen_layers(model, args):
        logger.info("the frozen weights of %s layers are in bfloat16", round_frozen_layers(model))
    return model, collator


def choose_peft_config(args: SFTConfig, peft_config: PeftConfig | None) -> PeftConfig | None:
    """Return the config of the adapters: the one that is given, that of the keys, or None.

    Raises SFTError if both describe adapters, and for adapters that cannot be trained.
    """
    if args.has_adapters and peft_config:
        raise SFTError(f"{'peft' if args.peft else 'lora'} and peft_config both describe adapters; remove one of them")
    if peft_config:
        check_peft_config(peft_config)
    config = build_peft_config(args) if args.has_adapters else peft_config
    if config and moves_base(config) and shards_model(args):
        raise SFTError("peft: init_lora_weights: pissa and olora change the base, which is sharded; use true")
    return config


def check_new_tokens(source: str | PreTrainedModel, args: SFTConfig, peft_config: PeftConfig | None) -> None:
    """Raise SFTError for `add_tokens` where the new embeddings would not be trained."""
    if not args.add_tokens:
        return
    if hasattr(source, "peft_config"):
        raise SFTError("add_tokens: the model has adapters already; give the base model, and peft_config")
    if args.deepspeed_plugin is not None or (peft_config and shards_model(args)):
        raise SFTError("add_tokens was not tried with deepspeed, nor with adapters under fsdp; train without them")
    if args.trainable_modules:
        logger.warning("add_tokens: the new embeddings are trained only if trainable_modules matches them")


def resize_for_tokens(model: PreTrainedModel, args: SFTConfig, template: Template) -> PreTrainedModel:
    """Return `model` with rows for the tokens of `add_tokens`."""
    if args.add_tokens:
        resize_embeddings(model, len(template.tokenizer), args.seed)
    return model


def add_adapters_for_tokens(
    model: PreTrainedModel, peft_config: PeftConfig, args: SFTConfig, template: Template
) -> PreTrainedModel:
    """Add adapters, which also train the tokens of `add_tokens`."""
    if not args.add_tokens:
        return add_adapters(model, copy.deepcopy(peft_config))
    ids: Any = template.tokenizer.convert_tokens_to_ids(args.add_tokens)
    model = add_adapters(model, train_tokens(peft_config, model, ids))
    save_without_embeddings(model)
    return model


def check_quantization(
    source: str | PreTrainedModel, path: str, args: SFTConfig, peft_config: PeftConfig | None
) -> None:
    """Raise SFTError for quantized weights without adapters, weights that are saved quantized, and a model given as an
    object that the keys are to quantize."""
    key = args.quantization_key
    if key and not isinstance(source, str):
        raise SFTError(
            f"{key}: the model is given as an object; load it with its quantization_config, or give its name"
        )
    quantizes = build_quantization_config(args) or (not isinstance(source, str) and is_quantized(source))
    if quantizes and not (args.has_adapters or peft_config):
        raise SFTError(
            f"{key or 'the model'}: quantized weights are not trained, only adapters on them; set lora: true"
        )
    if quantizes and args.torch_compile:
        raise SFTError(f"{key or 'the model'}: layers with quantized weights are not compiled; turn torch_compile off")
    if isinstance(source, str) and (method := find_quantization_method(path, args.trust_remote_code, args.revision)):
        remedy = "give the unquantized model, with load_in_4bit: true and lora: true for adapters on weights in 4 bits"
        raise SFTError(f"{path}: its weights are saved quantized ({method}); {remedy}")


def estimate_step(
    path: str, args: SFTConfig, template: Template, data: PreparedData, peft_config: PeftConfig | None
) -> None:
    """Log the memory of a step before the weights are loaded; raises SFTError where they are known not to fit.

    Not for DeepSpeed, whose stages and offloading are its own.
    """
    if args.deepspeed_plugin is not None:
        return
    try:
        model = resize_for_tokens(build_empty_model(path, args.trust_remote_code, args.revision), args, template)
    except (OSError, ValueError):
        return  # loading it will say why
    with torch.device("meta"):
        if peft_config:
            try:
                model = add_adapters_for_tokens(model, peft_config, args, template)
            except SFTError as error:
                if isinstance(error.__cause__, RuntimeError):
                    return  # some kinds cannot be added to a model without weights
                raise
        if args.trainable_modules:
            freeze_except(model, args.trainable_modules)
    packed = args.packing and args.attn_implementation is None
    budget = choose_token_budget(args) if args.tokens_per_batch is None else args.tokens_per_batch
    check_memory(model, args, data.train_stats, budget if packed else 0, packed)


def load_model_for_run(path: str, args: SFTConfig, template: Template, on_main_process: bool) -> PreTrainedModel:
    """Load the model of a folder or hub name; with `on_main_process` only there, and without weights elsewhere."""
    options = args.trust_remote_code, args.revision, getattr(torch, args.dtype), args.attn_implementation
    quantization_config = build_quantization_config(args)

    def build_whole() -> PreTrainedModel:
        model = load_model(path, *options, quantization_config, args.device)
        return resize_for_tokens(model, args, template)

    def build_empty() -> PreTrainedModel:
        return resize_for_tokens(build_empty_model(path, *options), args, template)

    return load_on_main_process(args, build_whole, build_empty) if on_main_process else build_whole()


def prepare_model(
    model: PreTrainedModel, args: SFTConfig, template: Template, data: PreparedData, peft_config: PeftConfig | None
) -> tuple[PreTrainedModel, PackingCollator | PaddingCollator]:
    """Add adapters, patch the model's loss, attention and layers in place, freeze; return the model and its collator.

    The packing collator is chosen if `packing` is on and the model supports it, else the padding one; logs why not.
    Raises SFTError for `tokens_per_batch` where rows cannot be packed.
    """
    longest = max(stats.length_quantiles["most"] for stats in (data.train_stats, data.held_out_stats) if stats)
    pad_token_id: Any = template.tokenizer.pad_token_id
    if peft_config:
        # First: the head may be one of the modules that they replace.
        model = add_adapters_for_tokens(model, peft_config, args, template)
    packing = args.packing and args.attn_implementation is None
    with gather_weights(model), use_portable_attention(model, args.attn_implementation):
        reason = patch_loss_forward(model)
        if reason:
            logger.info("logits are computed at every position: %s", reason)
        collator, reason = choose_collator(
            model, longest, pad_token_id, args.pad_to_multiple_of, packing, args.share_prefixes
        )
    if args.packing and not packing:
        reason = f"attn_implementation is {args.attn_implementation}, and packed rows have an attention of their own"
    if reason and args.tokens_per_batch:
        raise SFTError(f"tokens_per_batch: {args.tokens_per_batch} needs packing, which is off ({reason}); set it to 0")
    if reason:
        logger.info("batches are padded: %s", reason)
    if args.trainable_modules:
        freeze_except(model, args.trainable_modules)
    with gather_weights(model):
        freeze_unreached(model)
    if args.torch_compile:
        options = {"backend": args.torch_compile_backend or "inductor", "mode": args.torch_compile_mode}
        logger.info("%s layers are compiled when they first run", compile_layers(model, **options))
    # A fused layer does not call its submodules: not Liger's, and not those whose weights ZeRO-3 gathers at their call.
    elif isinstance(collator, PackingCollator) and not is_deepspeed_zero3_enabled() and not args.use_liger_kernel:
        logger.info("forward and backward are fused in %s layers", use_fused_layers(model))
    return model, collator


def choose_token_budget(args: SFTConfig) -> int:
    """Return the default of `tokens_per_batch` for packed rows: enough tokens to keep a CUDA device busy, else 0.

    It needs steps that this project divides into micro-batches.
    """
    has_own_steps = str(args.train_sampling_strategy) in ("random", "sequential") and args.deepspeed_plugin is None
    if args.device.type != "cuda" or args.auto_find_batch_size or not has_own_steps:
        return 0
    return max(TOKENS_PER_BATCH, args.max_length)


def set_liger_arguments(args: SFTConfig) -> None:
    """Take Liger's norms, activations and rotary positions without its losses, as the loss is ours.

    Raises SFTError for a config that asks for them, and where Liger is missing or cannot run.
    """
    kernels = args.liger_kernel_config or {}
    if losses := [name for name in LIGER_LOSSES if kernels.get(name)]:
        raise SFTError(f"liger_kernel_config: {losses[0]} would replace our loss; set it to false, or leave it out")
    if not is_liger_kernel_available():
        raise SFTError("use_liger_kernel: liger-kernel is not installed; `pip install liger-kernel`, or remove the key")
    if args.device.type not in LIGER_DEVICES:
        raise SFTError(f"use_liger_kernel: its kernels do not run on the device {args.device.type}; remove the key")
    args.liger_kernel_config = kernels | dict.fromkeys(LIGER_LOSSES, False)
