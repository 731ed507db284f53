"""Low-rank adapters (LoRA, Hu et al. 2021) through `peft`: a few million parameters are trained instead of all."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from sft_pipeline.model.module_utils import unwrap_peft
from sft_pipeline.model.moved_base import CONFIG_FILE, INIT, describe_as_lora, moves_base, read_init, save_as_lora
from sft_pipeline.model.new_tokens import count_saved_rows, resize_embeddings
from sft_pipeline.model.peft_config import SET_BY_RUN, check_peft
from sft_pipeline.model.quantization import get_quantization_kind, read_quantization_kind
from sft_pipeline.utils.errors import SFTError, format_error, format_first_line

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True)
class BaseModel:
    """The model that adapters belong to: its folder or hub name, and its revision on the hub."""

    name_or_path: str
    revision: str | None


def add_adapters(model: PreTrainedModel, config: PeftConfig) -> PreTrainedModel:
    """Freeze `model` and add trainable adapters. Raises SFTError for a config that does not fit, as if no layer has
    one of its names."""
    from peft import get_peft_model

    try:
        # A PeftModel is no PreTrainedModel, but passes attributes through to it.
        adapted = cast(PreTrainedModel, get_peft_model(model, config))
    except (ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError, ImportError) as error:
        # of a value that is wrong, or a model that this kind of adapters does not fit
        raise SFTError(f"peft: {format_first_line(error)}") from error
    if moves_base(config) and adapted.device.type != "meta":
        save_as_lora(adapted)
    return adapted


def check_saved_adapters(model: PreTrainedModel, checkpoint: Path) -> None:
    """Raise SFTError if `model` has other adapters than a checkpoint that it is to resume, or other weights below them.

    Without a config of adapters in it, as a checkpoint of shards has none, only their absence is checked.
    """
    file = checkpoint / CONFIG_FILE
    peft_model: Any = model
    if not hasattr(model, "peft_config"):
        if file.is_file():
            raise SFTError(f"{checkpoint}: has adapters, and this run trains none; set the keys lora or peft as before")
        return
    if not file.is_file():
        if any(checkpoint.glob("model*.safetensors")):
            raise SFTError(f"{checkpoint}: has a whole model, and this run trains adapters; remove lora and peft")
        return
    config = peft_model.active_peft_config
    saved, current = json.loads(file.read_text(encoding="utf-8")), _describe_config(config)
    saved[INIT], current[INIT] = read_init(checkpoint) or saved.get(INIT), getattr(config, INIT, None)
    kinds = (read_quantization_kind(checkpoint), get_quantization_kind(model))
    saved["quantization"], current["quantization"] = kinds
    for name in sorted((saved.keys() | current.keys()) - {*SET_BY_RUN, "inference_mode"}):
        values = [str(sorted(v) if isinstance(v, list) else v) for v in (saved.get(name), current.get(name))]
        if values[0] != values[1]:
            raise SFTError(
                f"{checkpoint}: its adapters were trained with {name}: {values[0]}, and this run has {values[1]}; set "
                "the keys of adapters as before, or start a new run"
            )


def _describe_config(config: PeftConfig) -> dict[str, Any]:
    """Return the content of the file that adapters of this config are saved with."""
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        content: dict[str, Any] = json.loads((Path(folder) / CONFIG_FILE).read_text(encoding="utf-8"))
    return describe_as_lora(content) if moves_base(config) else content


def round_frozen_layers(model: PreTrainedModel) -> int:
    """Round the float32 weights of frozen linear layers to bfloat16, in place; return the number of these layers.

    Autocast rounds them at every call, so losses and gradients keep their bits. Embeddings, also those whose weights
    are the head's, and norms stay float32: they set the precision of the hidden states.
    """
    embedding = unwrap_peft(model).get_input_embeddings()
    exact: set[Any] = {getattr(embedding, "original_module", embedding).weight}
    # A head of which single tokens are trained is rounded at each call, with these tokens in it.
    wrapped: list[Any] = [module for module in model.modules() if hasattr(module, "trainable_tokens_delta")]
    exact |= {module.base_layer.weight for module in wrapped}
    layers = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and not module.weight.requires_grad and module.weight not in exact
    ]
    for layer in layers:
        layer.weight.data = layer.weight.data.to(torch.bfloat16)
    return len(layers)


def find_base_model(folder: Path) -> BaseModel | None:
    """Return the model that the adapters in `folder` belong to; None if it has no adapters.

    Raises SFTError if `peft` is missing, or the base is a local folder that does not exist.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        return None
    check_peft(f"{folder}: holds adapters and")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        base = config["base_model_name_or_path"]
        is_folder = Path(base).expanduser().is_dir()
    except (ValueError, KeyError, TypeError) as error:
        raise SFTError(f"{file}: has no base_model_name_or_path; set it to the base model's folder") from error
    if (base.startswith((".", "~")) or base.count("/") > 1) and not is_folder:
        raise SFTError(f"{file}: no base model at {base}; set base_model_name_or_path to its folder")
    return BaseModel(base, config.get("revision"))


def merge_adapters(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Merge the adapters in `folder` into the weights of `base` and return it with all parameters trainable.

    Its `name_or_path` becomes `folder`: `peft` saves that as the base of adapters that are trained on the merged model.
    Raises SFTError for adapters that do not fit `base`.
    """
    from peft import PeftModel

    try:
        resize_embeddings(base, count_saved_rows(base, folder))
        model = PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise SFTError(f"{folder}: its adapters do not fit {base.name_or_path} ({format_error(error)})") from error
    model.name_or_path = str(folder)
    return model.requires_grad_(True)
