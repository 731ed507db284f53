"""What the value of `optim` needs, checked before rows are encoded and the model is loaded.

docs/optimizers.md lists what was run here.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from typing import Any

import torch

from sft_pipeline.config import SFTConfig
from sft_pipeline.utils.errors import SFTError

logger = logging.getLogger(__name__)

# The module and the package of optimizers whose names begin so; the longest beginning counts.
PACKAGES = {
    **dict.fromkeys(
        ("adamw_bnb", "adamw_8bit", "paged", "lion", "ademamix", "rmsprop_bnb"), ("bitsandbytes", "bitsandbytes")
    ),
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), ("torchao", "torchao")),
    "adamw_torch_xla": ("torch_xla", "torch_xla"),
    "adamw_torch_npu": ("torch_npu", "torch_npu"),
    "adamw_anyprecision": ("torchdistx", "torchdistx"),
    "galore": ("galore_torch", "galore-torch"),
    "apollo": ("apollo_torch", "apollo-torch"),
    "schedule_free": ("schedulefree", "schedulefree"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "stable_adamw": ("optimi", "torch-optimi"),
}
LOW_RANK = ("galore", "apollo")
ON_CUDA_ALONE = ("galore_adamw_8bit",)
# The class of each in the state of its optimizer, beside tensors and numbers.
PROJECTORS = {"galore": "galore_torch.galore_projector.GaLoreProjector"}
PROJECTORS["apollo"] = "apollo_torch.random_projector.GradientProjector"


def check_optimizer(args: SFTConfig) -> None:
    """Raise SFTError if `optim` cannot train here: its package is missing, it needs another device or another key, or
    it changes weights during the backward pass."""
    name = get_optimizer_name(args)
    if "layerwise" in name or name in ("lomo", "adalomo"):
        # A rehearsed batch would be a step, and so would each micro-batch. The library saves no state of them.
        remedy = name.removesuffix("_layerwise") if "layerwise" in name else "adamw_8bit, or lora: true"
        raise SFTError(
            f"optim: {name} changes weights during the backward pass, where gradients are neither clipped nor summed "
            f"over a step; use {remedy}"
        )
    packages = [package for start, package in PACKAGES.items() if name.startswith(start)]
    if packages and importlib.util.find_spec(packages[0][0]) is None:
        raise SFTError(f"optim: {name} needs {packages[0][0]}; install it with `pip install {packages[0][1]}`")
    if name in ON_CUDA_ALONE and args.device.type != "cuda":
        raise SFTError(f"optim: {name} runs on CUDA alone, and this run is on {args.device.type}; use galore_adamw")
    if name.startswith(LOW_RANK) and not args.optim_target_modules:
        raise SFTError(
            f"optim: {name} needs optim_target_modules, the linear layers whose gradients it projects: [self_attn, mlp]"
        )
    if name.startswith(LOW_RANK) and args.weight_decay:
        raise SFTError(f"weight_decay is not read by optim: {name}; remove it")
    if name == "grokadamw":
        logger.warning("optim: grokadamw does not resume exactly: its averages, which no checkpoint holds, start again")
    allow_optimizer_state(name)


def get_optimizer_name(args: SFTConfig) -> str:
    return str(getattr(args.optim, "value", args.optim))


def allow_optimizer_state(name: str) -> None:
    """Let torch read the projectors in the state of GaLore and APOLLO from a checkpoint, which else would be refused.

    Their attributes are numbers and tensors; no code of theirs is run when they are read.
    """
    for start, path in PROJECTORS.items():
        module, _, class_name = path.rpartition(".")
        if name.startswith(start):
            projector: Any = getattr(importlib.import_module(module), class_name)
            torch.serialization.add_safe_globals([projector])


def use_evaluated_weights(optimizer: Any) -> None:
    """Replace the weights by the averages that are evaluated, with a schedule-free optimizer; others have no such mode.

    The library does so for an evaluation, but not before a model is saved or the best one is loaded.
    """
    if hasattr(optimizer, "eval"):
        optimizer.eval()
