"""Adapters that begin with a part of the base: PiSSA and OLoRA take it out of the weights that they adapt.

Such a weight W becomes R = W - s B0 A0, and the model that is trained is R + s B A. What is saved is LoRA of twice the
rank on the base as it was: W + s [B, -B0] [A; A0], which every tool loads. The file holds both pairs of factors as
they are, so that a resumed run goes on with the bits of one that was not interrupted.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sft_pipeline.utils.errors import SFTError

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"  # peft's
INIT = "init_lora_weights"
Factors = dict[str, Tensor]  # "….lora_A.weight" (rank, inputs) and "….lora_B.weight" (outputs, rank), by peft's names


def moves_base(config: PeftConfig) -> bool:
    """Return whether adapters of this config change the weights of the base when they are added."""
    return str(getattr(config, INIT, "")).lower().startswith(("pissa", "olora"))


def save_as_lora(model: Any) -> None:
    """Let `model`, a PeftModel whose adapters have just been added, save LoRA on the unchanged base, and load it.

    Raises SFTError for weights in which the change of the base would be rounded away.
    """
    layers = [module for module in model.modules() if getattr(module, "lora_A", None)]
    if any(layer.get_base_layer().weight.dtype != torch.float32 for layer in layers):
        raise SFTError("peft: init_lora_weights: pissa and olora need a base in float32; use true, or dtype: float32")
    initial = _clone_factors(model)
    save, load_original = model.save_pretrained, model.load_adapter

    def save_pretrained(folder: str, *args: Any, is_main_process: bool = True, **kwargs: Any) -> None:
        save(folder, *args, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            _write_as_lora(Path(folder), initial)

    def load_adapter(folder: str, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if adapter_name not in model.peft_config:
            return load_original(folder, adapter_name, *args, **kwargs)
        from peft import set_peft_model_state_dict

        weights, saved_initial = _read_factors(Path(folder), initial)
        if any(not torch.equal(saved_initial[name], initial[name]) for name in initial):
            _move_base(model, initial, saved_initial, folder)
        initial.update(saved_initial)
        return set_peft_model_state_dict(model, weights, adapter_name=adapter_name)

    model.save_pretrained, model.load_adapter = save_pretrained, load_adapter


def _clone_factors(model: Any) -> Factors:
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: weight.detach().cpu().clone() for name, weight in state.items() if _is_factor(name)}


def _is_factor(name: str) -> bool:
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def _write_as_lora(folder: Path, initial: Factors) -> None:
    """Rewrite the adapters that peft has saved in `folder`."""
    weights = load_file(folder / WEIGHTS_FILE)
    for name, factor in initial.items():
        is_first = ".lora_A." in name
        weights[name] = torch.cat([weights[name], factor if is_first else -factor], 0 if is_first else 1)
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt", INIT: config[INIT]})
    text = json.dumps(describe_as_lora(config), indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def describe_as_lora(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of the adapters as they are saved, from the one that they are trained with, as peft writes it.

    The scaling stays: alpha / rank, or alpha / sqrt(rank).
    """
    alpha_factor = math.sqrt(2) if config["use_rslora"] else 2
    config = config | {INIT: True, "r": 2 * config["r"], "lora_alpha": alpha_factor * config["lora_alpha"]}
    for key, multiplier in (("rank_pattern", 2), ("alpha_pattern", alpha_factor)):
        config[key] = {name: multiplier * value for name, value in (config[key] or {}).items()}
    return config


def read_init(folder: Path) -> str | None:
    """Return the `init_lora_weights` of the saved adapters that took a part out of their base; None of all others."""
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        return (file.metadata() or {}).get(INIT)


def _read_factors(folder: Path, initial: Factors) -> tuple[Factors, Factors]:
    """Return (all weights as they were trained, the factors that the adapters began with) of a saved folder."""
    weights, saved_initial = load_file(folder / WEIGHTS_FILE), {}
    for name, factor in initial.items():
        is_first = ".lora_A." in name
        dim, rank = (0, factor.shape[0]) if is_first else (1, factor.shape[1])
        trained, start = (part.contiguous() for part in weights[name].split(rank, dim))
        weights[name], saved_initial[name] = trained, start if is_first else -start
    return weights, saved_initial


def _move_base(model: Any, initial: Factors, saved_initial: Factors, folder: str) -> None:
    """Change the base from what it is without `initial` to what it is without `saved_initial`, up to rounding."""
    logger.warning(
        "%s: the parts taken out of the base were computed with another seed or machine; its base is restored from "
        "them, up to rounding",
        folder,
    )
    for name, layer in model.named_modules():
        if f"{name}.lora_A.weight" not in initial:
            continue
        weight = layer.get_base_layer().weight
        if weight.dtype != torch.float32:
            raise SFTError(
                f"{folder}: its base cannot be restored in {weight.dtype}; resume with its seed on a machine of the "
                "same kind, or with bf16: false"
            )
        products = [part[f"{name}.lora_B.weight"] @ part[f"{name}.lora_A.weight"] for part in (initial, saved_initial)]
        delta = layer.scaling[model.active_adapter] * (products[0] - products[1])
        weight.data += (delta.T if layer.fan_in_fan_out else delta).to(weight.device)
