"""Supervised fine-tuning of causal language models with transformers' Trainer. The public names are listed here.

They are imported at their first use, so that `import sft_pipeline` loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sft_pipeline.config import SFTConfig
    from sft_pipeline.data.chat_templates import build_template
    from sft_pipeline.data.encode import Encoder, build_input_ids_and_labels, encode_dataset
    from sft_pipeline.data.messages import Conversation
    from sft_pipeline.data.packing import PackingCollator
    from sft_pipeline.data.padding import PaddingCollator
    from sft_pipeline.data.sources import load_conversations
    from sft_pipeline.data.template import Template
    from sft_pipeline.inference.answers import Answer, answer_prompts
    from sft_pipeline.inference.engine import Completion, generate
    from sft_pipeline.inference.sampling import SamplingParams
    from sft_pipeline.runs.trained_model import load_trained
    from sft_pipeline.training.evaluation_callback import EvaluationCallback
    from sft_pipeline.training.sft_trainer import SFTTrainer
    from sft_pipeline.utils.errors import SFTError

MODULES = {
    "config": ("SFTConfig",),
    "data.chat_templates": ("build_template",),
    "data.encode": ("Encoder", "build_input_ids_and_labels", "encode_dataset"),
    "data.packing": ("PackingCollator",),
    "data.padding": ("PaddingCollator",),
    "data.messages": ("Conversation",),
    "data.sources": ("load_conversations",),
    "data.template": ("Template",),
    "inference.answers": ("Answer", "answer_prompts"),
    "inference.engine": ("Completion", "generate"),
    "inference.sampling": ("SamplingParams",),
    "runs.trained_model": ("load_trained",),
    "training.evaluation_callback": ("EvaluationCallback",),
    "training.sft_trainer": ("SFTTrainer",),
    "utils.errors": ("SFTError",),
}
_MODULE_OF_NAME = {name: module for module, names in MODULES.items() for name in names}

__all__ = [
    "Answer",
    "Completion",
    "Conversation",
    "Encoder",
    "EvaluationCallback",
    "PackingCollator",
    "PaddingCollator",
    "SFTConfig",
    "SFTError",
    "SFTTrainer",
    "SamplingParams",
    "Template",
    "answer_prompts",
    "build_input_ids_and_labels",
    "build_template",
    "encode_dataset",
    "generate",
    "load_conversations",
    "load_trained",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF_NAME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
