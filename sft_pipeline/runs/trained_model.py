"""Models as runs save them: the weights, with the chat template and system prompt they were trained with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sft_pipeline.data.chat_templates import TEMPLATES, build_template
from sft_pipeline.data.template import Template
from sft_pipeline.model.loading import check_revision, load_model, load_tokenizer, resolve_model
from sft_pipeline.runs.output_dir import TEMPLATE_FILE
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.files import get_cache_dir, write_json


def load_trained(
    name_or_path: str,
    template_name: str = "chat",
    system_prompt: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> tuple[PreTrainedModel, Template, str | None]:
    """Load model, template and system prompt of a run's output folder, a model folder or a hub name.

    Adapters are merged. The model is on the accelerator if there is one. `template_name` and `system_prompt` are for
    models that no run of this package saved: see `load_template`. `revision` is a branch, tag or commit of the model on
    the hub, or of the base model of adapters.
    """
    path = resolve_model(name_or_path, get_cache_dir())
    check_revision(path, revision)
    template, system_prompt = load_template(path, template_name, system_prompt, trust_remote_code, revision)
    model = load_model(path, trust_remote_code, revision)
    device: Any = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    model.to(device)
    return model, template, system_prompt


def load_template(
    path: str,
    template_name: str = "chat",
    system_prompt: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> tuple[Template, str | None]:
    """Load the template and system prompt that the model was trained with.

    For a folder that no run saved, return those of the arguments. Raises SFTError if TEMPLATE_FILE is not readable.
    """
    tokenizer = load_tokenizer(path, trust_remote_code, revision)
    file, chat_template_kwargs = Path(path) / TEMPLATE_FILE, {}
    if file.is_file():
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
            template_name, system_prompt = TEMPLATES[settings["template"]].name, settings["system_prompt"]
            chat_template_kwargs = {**settings["chat_template_kwargs"]}
        except (ValueError, LookupError, TypeError) as error:
            raise SFTError(
                f"{file}: not as a run writes it ({error!r}); save the model again or delete this file"
            ) from error
    return build_template(template_name, tokenizer, chat_template_kwargs=chat_template_kwargs), system_prompt


def save_template_settings(folder: Path, template: Template, system_prompt: str | None) -> None:
    """Write TEMPLATE_FILE, which `load_template` reads; the jinja text itself is saved with the tokenizer."""
    settings = {"template": template.name, "chat_template_kwargs": template.chat_template_kwargs}
    write_json(folder / TEMPLATE_FILE, settings | {"system_prompt": system_prompt})
