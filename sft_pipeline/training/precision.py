"""The precision of a run: what the weights are kept in, and what is said about it."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from sft_pipeline.config import SFTConfig, shards_model
from sft_pipeline.model.module_utils import unwrap_peft
from sft_pipeline.model.quantization import is_quantized
from sft_pipeline.utils.errors import SFTError


def take_model_dtype(args: SFTConfig, model: PreTrainedModel) -> None:
    """Set the key `dtype` to that of a model that is given as an object, which keeps its dtype and its attention.

    Raises SFTError for keys that ask for others.
    """
    if args.attn_implementation:
        raise SFTError("attn_implementation: the model is given as an object; set it there, or give the model's name")
    if args.dtype == "bfloat16" and model.dtype != torch.bfloat16:
        raise SFTError(f"dtype: the model is given as an object in {model.dtype}; convert it, or give the model's name")
    args.dtype = "bfloat16" if model.dtype == torch.bfloat16 else "float32"


def should_round_frozen_layers(model: PreTrainedModel, args: SFTConfig) -> bool:
    """Return whether frozen weights can be kept in bfloat16: under LoRA and bf16 autocast.

    Not if the adapters will be merged into them, and not where they are sharded, which wants one dtype.
    """
    return hasattr(model, "peft_config") and bool(args.bf16) and not args.lora_merge and not shards_model(args)


def describe_precision(model: PreTrainedModel, args: SFTConfig) -> str:
    """Return the dtype of the trained weights, that of autocast, and the bits of a quantized base.

    Example: "float32 (bf16 autocast), on weights in 4 bits".
    """
    dtype = next(weight.dtype for weight in model.parameters() if weight.requires_grad)
    autocast = "" if args.mixed_precision == "no" else f" ({args.mixed_precision} autocast)"
    base = ""
    if is_quantized(model):
        base = f", on weights in {4 if unwrap_peft(model).config.quantization_config.load_in_4bit else 8} bits"
    return f"{str(dtype).removeprefix('torch.')}{autocast}{base}"
