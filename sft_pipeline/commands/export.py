"""Export a run's model as one folder for other tools: adapters merged, in a chosen dtype, with a model card.

sft-pipeline export outputs/quickstart quickstart-bf16 --dtype bfloat16 --ollama
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sft_pipeline.data.ollama_export import MODELFILE, build_modelfile
from sft_pipeline.data.tokenizer_export import build_saved_tokenizer
from sft_pipeline.model.loading import check_revision, load_model, set_special_tokens
from sft_pipeline.reports.model_card import build_model_card
from sft_pipeline.reports.run_results import read_run
from sft_pipeline.runs.trained_model import load_template, save_template_settings
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.files import copy_folder_permissions, write_aside

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_model(
    folder: str,
    destination: Path,
    dtype: str = "float32",
    license_id: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    ollama: bool = False,
) -> None:
    """Write the model of a run's output folder to `destination`, which appears complete or not at all.

    dtype: a key of DTYPES. license_id: the model's license as the hub names it ("apache-2.0"), for the model card.
    trust_remote_code: run the code that the folder contains. revision: of the base model of adapters, on the hub; by
    default the one that they were trained with. ollama: also write a Modelfile.
    Raises SFTError if `folder` is not the output folder of a finished run, or `destination` exists.
    """
    run = read_run(Path(folder))
    if destination.exists():
        raise SFTError(f"{destination}: already exists; choose another folder, or delete it")
    check_revision(folder, revision)
    template, system_prompt = load_template(folder, trust_remote_code=trust_remote_code)
    tokenizer = build_saved_tokenizer(template, system_prompt, trust_remote_code)
    stop_tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(template.stop_token_ids)]
    modelfile = build_modelfile(tokenizer, stop_tokens) if ollama else None
    model: Any = load_model(folder, trust_remote_code, revision)
    model.to(dtype=DTYPES[dtype])
    set_special_tokens(model, template.tokenizer, template.stop_token_ids)
    model.config.use_cache = True  # training sets it to False
    with write_aside(destination) as staging:
        model.save_pretrained(staging)
        copy_folder_permissions(staging)
        tokenizer.save_pretrained(staging)
        if modelfile:
            (staging / MODELFILE).write_text(modelfile, encoding="utf-8")
        save_template_settings(staging, template, system_prompt)
        build_model_card(run.results, destination.name, dtype, license_id).save(staging / "README.md")
