"""Low-rank adapters (LoRA, Hu et al. 2021) through `peft`: a few million parameters are trained instead of all."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import cast

from safetensors import SafetensorError
from transformers import PreTrainedModel

from sft_pipeline.utils.errors import SFTError, format_error, format_first_line


def add_lora(model: PreTrainedModel, rank: int, alpha: int, target_modules: list[str]) -> PreTrainedModel:
    """`model` frozen, with trainable adapters on `target_modules` (names of linear layers, or "all-linear").

    Raises SFTError where `peft` is missing or no layer has such a name.
    """
    _need_peft("lora: true")
    from peft import LoraConfig, get_peft_model

    targets = target_modules[0] if target_modules == ["all-linear"] else target_modules
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
    try:
        # Not one itself, but it hands on whatever it is asked for.
        return cast(PreTrainedModel, get_peft_model(model, config))
    except ValueError as error:
        raise SFTError(f"lora_target_modules {target_modules}: {format_first_line(error)}") from error


def find_base_model(folder: Path) -> str | None:
    """The folder or hub name of the model that the adapters in `folder` were trained on; None if it holds none.

    Raises SFTError where peft is missing, or the base is a folder that is not there.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    _need_peft(f"{folder}: holds adapters and")
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
        here = Path(base).expanduser().is_dir()
    except (ValueError, KeyError, TypeError) as error:
        raise SFTError(f"{file}: names no base_model_name_or_path; put the base model's folder there") from error
    if (base.startswith((".", "~")) or base.count("/") > 1) and not here:
        raise SFTError(f"{file}: the base model {base} is not there; set base_model_name_or_path to where it is")
    return base


def merge_adapters(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`base` with the adapters in `folder` added to its weights, trainable; adapters trained on it name `folder`.

    Raises SFTError for adapters that do not fit the base.
    """
    from peft import PeftModel

    try:
        model = PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise SFTError(f"{folder}: its adapters do not fit {base.name_or_path} ({format_error(error)})") from error
    model.name_or_path = str(folder)
    return model.requires_grad_(True)


def _need_peft(who: str) -> None:
    if importlib.util.find_spec("peft") is None:
        raise SFTError(f"{who} needs peft; install it with `pip install 'sft_pipeline[lora]'`")
