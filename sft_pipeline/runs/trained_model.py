"""A model folder as a run left it: the model, and how it was asked and told to answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sft_pipeline.data.chat_templates import TEMPLATES, Template, build_template
from sft_pipeline.model.loading import load_model, load_tokenizer, resolve_model
from sft_pipeline.runs.output_dir import TEMPLATE_FILE
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.files import get_cache_dir


def load_trained(
    name_or_path: str, template_name: str = "chat", system_prompt: str | None = None
) -> tuple[PreTrainedModel, Template, str | None]:
    """Model, template and system prompt of a run's output folder (merged, if it holds adapters), a model folder or a
    hub name; the model on the accelerator, if there is one. For template and system prompt see `load_template`."""
    path = resolve_model(name_or_path, get_cache_dir())
    template, system_prompt = load_template(path, template_name, system_prompt)
    model = load_model(path)
    device: Any = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    model.to(device)
    return model, template, system_prompt


def load_template(
    path: str, template_name: str = "chat", system_prompt: str | None = None
) -> tuple[Template, str | None]:
    """The template and system prompt that the model was trained with; for a model that is no run's, those given."""
    tokenizer = load_tokenizer(path)
    record = Path(path) / TEMPLATE_FILE
    if not record.is_file():
        return build_template(template_name, tokenizer), system_prompt
    try:
        settings = json.loads(record.read_text(encoding="utf-8"))
        build, system_prompt = TEMPLATES[settings["template"]], settings["system_prompt"]
    except (ValueError, LookupError, TypeError) as error:
        raise SFTError(
            f"{record}: not as a run writes it ({error!r}); save the model again, or take the file away"
        ) from error
    return build_template(build.name, tokenizer), system_prompt
