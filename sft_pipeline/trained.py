"""A model folder as a run left it: the model, and how it was asked and told to answer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sft_pipeline.cache import cache_dir
from sft_pipeline.data.templates import Template, build_template
from sft_pipeline.model.loading import load_model, load_tokenizer, resolve
from sft_pipeline.output import TEMPLATE_FILE


def load_trained(name_or_path: str) -> tuple[PreTrainedModel, Template, str | None]:
    """Model, template and system prompt of a run's output folder (merged, if it holds adapters), a model folder or a
    hub name; the model on the accelerator, if there is one."""
    path = resolve(name_or_path, cache_dir())
    template, system_prompt = load_template(path)
    model = load_model(path).to(torch.accelerator.current_accelerator() or "cpu")
    return model, template, system_prompt


def load_template(path: str) -> tuple[Template, str | None]:
    """The template and system prompt that the model was trained with, or the tokenizer's own chat template."""
    tokenizer = load_tokenizer(path)
    record = Path(path) / TEMPLATE_FILE
    if not record.is_file():
        return build_template("chat", tokenizer), None
    settings = json.loads(record.read_text(encoding="utf-8"))
    return build_template(settings["template"], tokenizer), settings["system_prompt"]
