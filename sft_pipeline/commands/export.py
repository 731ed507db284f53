"""A trained model as one folder that other tools load: adapters merged, in another precision, with a model card.

sft-pipeline export outputs/quickstart quickstart-bf16 --dtype bfloat16
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sft_pipeline.data.tokenizer_export import build_saved_tokenizer
from sft_pipeline.model.loading import load_model, set_special_tokens
from sft_pipeline.reports.model_card import build_model_card
from sft_pipeline.reports.run_results import read_run
from sft_pipeline.runs.output_dir import TEMPLATE_FILE
from sft_pipeline.runs.trained_model import load_template
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.files import copy_folder_permissions, write_aside, write_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_model(folder: str, destination: Path, dtype: str = "float32", licence: str | None = None) -> None:
    """Write the model of a run's output folder to `destination`, which appears whole or not at all.

    Raises SFTError for a folder that is not of a finished run, and for a destination that is there.
    """
    run = read_run(Path(folder))
    if destination.exists():
        raise SFTError(f"{destination}: is there already; choose another folder, or take it away")
    template, system_prompt = load_template(folder)
    model: Any = load_model(folder)
    model.to(dtype=DTYPES[dtype])
    set_special_tokens(model, template.tokenizer, template.stop_token_id)
    model.config.use_cache = True  # training turns it off
    with write_aside(destination) as aside:
        model.save_pretrained(aside)
        copy_folder_permissions(aside)
        build_saved_tokenizer(template, system_prompt).save_pretrained(aside)
        write_json(aside / TEMPLATE_FILE, {"template": template.name, "system_prompt": system_prompt})
        build_model_card(run, destination.name, dtype, licence).save(aside / "README.md")
