"""This project's trainer as the parts use it: through its public class, on rows that are encoded already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from task import get_shared_settings
from transformers import PreTrainedModel, TrainerCallback

from gpu_parts.inputs import Row, build_tokenizer
from sft_pipeline import SFTConfig, SFTTrainer


def build_our_trainer(
    model: PreTrainedModel | str,
    rows: Sequence[Row],
    folder: str,
    device_type: str,
    callbacks: Sequence[TrainerCallback] = (),
    **keys: Any,
) -> SFTTrainer:
    """Build the trainer in bf16 on CUDA and in float32 on a CPU. model: or its folder, with the tokenizer."""
    settings = get_shared_settings(use_cpu=device_type == "cpu")
    settings |= {"template": "role", "bf16": device_type != "cpu", **keys}
    tokenizer: Any = None if isinstance(model, str) else build_tokenizer()
    return SFTTrainer(
        model,
        SFTConfig(folder, **settings),
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
