"""Adapters on a base with weights in 4 or 8 bits, by bitsandbytes (QLoRA, Dettmers et al. 2023).

    config = build_quantization_config(args)             # None without load_in_4bit or load_in_8bit
    model = load_model(path, quantization_config=config)
    set_up_quantized_layers(model)
    model = dequantize_base(peft_model, torch.float32)   # before a merge: weights of 4 bits cannot hold the adapters

The linear layers but the head are quantized. Their products are those of the dequantized weights, in training as in
evaluation and on every device: packed rows equal padded ones, and a model with merged adapters equals the trained one.

peft's `prepare_model_for_kbit_training` is not called. It freezes the base, which adding adapters does; it makes norms,
embeddings and head float32, which they are unless `dtype: bfloat16` asks for another type; and it turns activation
checkpointing on, which has a key of its own and works without gradients of the inputs.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel

from sft_pipeline.config import SFTConfig
from sft_pipeline.model.module_utils import unwrap_peft
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.files import write_json

QUANTIZATION_FILE = "quantization_config.json"  # beside adapters: how the weights of their base were quantized


def build_quantization_config(args: SFTConfig) -> BitsAndBytesConfig | None:
    """Build the config of `load_in_4bit` (nf4 and double quantization, as in the paper) or `load_in_8bit`, if one is
    set.

    Products are computed in the precision of the run. Raises SFTError if bitsandbytes is missing.
    """
    key = args.quantization_key
    if key is None:
        return None
    _check_bitsandbytes(f"{key}: true")
    if key == "load_in_8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision, args.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def is_quantized(model: PreTrainedModel) -> bool:
    """Return whether the weights of `model`, or of the base of its adapters, are quantized."""
    return bool(getattr(unwrap_peft(model), "is_quantized", False))


def find_quantization_method(path: str, trust_remote_code: bool, revision: str | None) -> str | None:
    """Return how the weights of a model folder or hub name are quantized as they are saved (gptq, awq, ...), or None.

    None too where there is no config to read, as in a folder of adapters: loading the model says why.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, revision=revision or "main")
    except (OSError, ValueError):
        return None
    saved = getattr(config, "quantization_config", None)
    return None if saved is None else str(saved.get("quant_method", "unknown"))


def set_up_quantized_layers(model: PreTrainedModel) -> None:
    """Make the quantized layers of `model` compute with their dequantized weights always, in place.

    Layers of 8 bits would round their inputs to 8 bits too, with a scale that depends on the other rows of the batch:
    always on a GPU, and in evaluations on a CPU. Layers of 4 bits would, on a CPU with AVX512-BF16, change the layout
    of their weights in an evaluation to one without gradients.
    """
    if not is_quantized(model):
        return
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, Linear8bitLt):
            vars(module)["forward"] = Int8Forward(module)


class Int8Forward:
    """The forward of a linear layer with weights in 8 bits: x W^T + b, with W dequantized for this product alone."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        output: Tensor = _Int8Linear.apply(x, self.layer.weight.data, _get_scales(self.layer))
        return output if self.layer.bias is None else output + self.layer.bias.to(output.dtype)


class _Int8Linear(torch.autograd.Function):
    """x (..., inputs) times the transpose of int8 weights (outputs, inputs) with float32 scales (outputs,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scales)
        return nn.functional.linear(x, _dequantize_int8(weight, scales, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        weight, scales = ctx.saved_tensors
        return grad_output @ _dequantize_int8(weight, scales, grad_output.dtype), None, None


def _get_scales(layer: Any) -> Tensor:
    """Return the scales (outputs,) of a layer of 8 bits: bitsandbytes moves them from the weight to its state."""
    scales: Tensor = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
    return scales


def _dequantize_int8(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """A row of int8 weights reaches from -127 to 127; its scale is the largest absolute weight."""
    return (weight * (scales / 127)[:, None]).to(dtype)


def dequantize_layer(layer: nn.Module) -> nn.Linear | None:
    """Return a linear layer in float32 that computes what a quantized layer on the CPU does; None for other layers."""
    name = type(layer).__name__  # peft's wrappers have the same ones
    if name not in ("Linear4bit", "Linear8bitLt") or not type(layer).__module__.startswith("bitsandbytes."):
        return None
    quantized: Any = layer
    weight = quantized.weight
    if weight.device.type != "cpu" or getattr(quantized, "compute_dtype", None) not in (None, torch.float32):
        return None
    if name == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        values = dequantize_4bit(weight.data, weight.quant_state).float()
    else:
        values = _dequantize_int8(weight.data, _get_scales(quantized), torch.float32)
    plain = nn.Linear(quantized.in_features, quantized.out_features, bias=False, device="meta")
    plain.weight, plain.bias = nn.Parameter(values, requires_grad=False), quantized.bias
    return plain


def dequantize_base(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return `model` with weights of `dtype` in place of the quantized ones, in place; its adapters stay unmerged.

    model: with adapters of peft or without.
    """
    if not hasattr(model, "peft_config"):
        return _dequantize(model, dtype)
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    # Adapters on quantized layers are modules of another class: they are taken off, and put on the plain layers.
    peft_model: Any = model
    config = peft_model.active_peft_config
    state = get_peft_model_state_dict(peft_model, save_embedding_layers=False)  # of `add_tokens` it has the rows
    plain: Any = PeftModel(_dequantize(peft_model.unload(), dtype), config)
    set_peft_model_state_dict(plain, state)
    return plain


def _dequantize(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    model = model.dequantize(dtype=dtype)
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"):  # transformers leaves them, and accelerate reads them
        vars(model).pop(name, None)
    return model


def save_quantization(model: PreTrainedModel, folder: Path) -> None:
    """Write QUANTIZATION_FILE to the folder of adapters that were trained on quantized weights."""
    if is_quantized(model):
        write_json(folder / QUANTIZATION_FILE, unwrap_peft(model).config.quantization_config.to_dict())


def read_quantization(folder: Path) -> BitsAndBytesConfig | None:
    """Read how the base of the adapters in `folder` was quantized; None if it was not.

    Raises SFTError if the file is not readable, or bitsandbytes is missing.
    """
    file = folder / QUANTIZATION_FILE
    if not file.is_file():
        return None
    remedy = f"delete {file} to put the adapters on the plain base, which they were not trained on"
    _check_bitsandbytes(f"{folder}: was trained on quantized weights and", f"; or {remedy}")
    try:
        config: Any = BitsAndBytesConfig.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError) as error:
        raise SFTError(f"{file}: not as a run writes it ({error!r}); {remedy}") from error
    return config


def get_quantization_kind(model: PreTrainedModel) -> str | None:
    """Return load_in_4bit or load_in_8bit, as the base of adapters was loaded, or None."""
    return _get_kind(unwrap_peft(model).config.quantization_config.to_dict()) if is_quantized(model) else None


def read_quantization_kind(folder: Path) -> str | None:
    """Return the same of the base that the adapters in `folder` were trained on."""
    file = folder / QUANTIZATION_FILE
    return _get_kind(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def _get_kind(config: dict[str, Any]) -> str | None:
    return next((key for key in ("load_in_4bit", "load_in_8bit") if config.get(key)), None)


def _check_bitsandbytes(feature: str, more: str = "") -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SFTError(f"{feature} needs bitsandbytes; install it with `pip install 'sft_pipeline[qlora]'`{more}")
