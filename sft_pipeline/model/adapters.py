"""Low-rank adapters (LoRA, Hu et al. 2021) through `peft`: a few million parameters are trained instead of all."""

from __future__ import annotations

import importlib.util

from transformers import PreTrainedModel

from sft_pipeline.errors import SFTError


def add_lora(model: PreTrainedModel, rank: int, alpha: int, target_modules: list[str]) -> PreTrainedModel:
    """`model` frozen, with trainable adapters on `target_modules` (names of linear layers, or "all-linear").

    Raises SFTError where `peft` is missing or no layer has such a name.
    """
    if importlib.util.find_spec("peft") is None:
        raise SFTError("lora: true needs peft; install it with `pip install 'sft_pipeline[lora]'`")
    from peft import LoraConfig, get_peft_model

    targets = target_modules[0] if target_modules == ["all-linear"] else target_modules
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise SFTError(f"lora_target_modules {target_modules}: {str(error).splitlines()[0]}") from error
