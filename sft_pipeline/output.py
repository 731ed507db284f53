"""The output folder of a run: who may write there, what marks it, and what repeats the run.

    run.yaml            the config that repeats the run; marks the folder as a run's
    evaluation/         answers and figures of each evaluation (evaluation/history.py)
    results.json        figures, answers before and after, loss curve, versions
    preview.json        the first training row in tokens, and how long the rows are (preview.py)
    report.html         all this as one page (report/)
    trackers.json       what trackers call the run (trackers.py)
    sft_template.json   template and system prompt, which `chat` needs

Beside these stand the model as transformers saves it, and the checkpoints.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from sft_pipeline.checkpoints import CHECKSUMS_FILE, damage, newest_whole, output_folder
from sft_pipeline.config import DEFAULTS, SFTArguments
from sft_pipeline.errors import SFTError

RUN_FILE = "run.yaml"
EVALUATION_DIR = "evaluation"
RESULTS_FILE = "results.json"
PREVIEW_FILE = "preview.json"
REPORT_FILE = "report.html"
TEMPLATE_FILE = "sft_template.json"


def check_output_dir(sft: SFTArguments, training: TrainingArguments) -> str | None:
    """Refuse an output folder that is taken; returns the checkpoint to resume from, if that was asked for."""
    folder = output_folder(training)
    if folder.exists() and not folder.is_dir():
        raise SFTError(f"output_dir {folder}: is a file; choose another folder")
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise SFTError(f"output_dir {folder}: {existing} may not be written to; choose another folder")
    begins_again = False
    if _resumes(training):
        checkpoint = checkpoint_to_resume(training, folder)
        if checkpoint is not None:
            return checkpoint
        # auto, and nothing was saved: the run begins, or begins again.
        training.resume_from_checkpoint = None
        begins_again = not (folder / RESULTS_FILE).exists()
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / RUN_FILE).is_file():
            raise SFTError(f"output_dir {folder}: holds files that are not a run's; choose another folder")
        if not (sft.overwrite_output_dir or begins_again):
            raise SFTError(
                f"output_dir {folder}: already holds a run; add --overwrite_output_dir to replace it, "
                "--resume_from_checkpoint true to go on with it, or choose another folder"
            )
    return None


def claim_output_dir(sft: SFTArguments, training: TrainingArguments) -> None:
    """Make the checked folder ours. Called when data and model are loaded: what is wrong with them costs no old run."""
    folder = output_folder(training)
    with training.main_process_first(desc="output folder"):
        if training.process_index == 0:
            if (folder / RUN_FILE).is_file() and not _resumes(training):
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / RUN_FILE).exists():
                text = yaml.safe_dump(config_record(sft, training), allow_unicode=True, sort_keys=False)
                (folder / RUN_FILE).write_text(text, encoding="utf-8")


def _resumes(training: TrainingArguments) -> bool:
    return training.resume_from_checkpoint not in (None, "false", "False")


def checkpoint_to_resume(training: TrainingArguments, folder: Path) -> str | None:
    """The checkpoint's folder: the one that was named, or the run's newest whole one.

    None where `auto` finds no checkpoint, which is an error where `true` was given.
    """
    asked = str(training.resume_from_checkpoint)
    if asked.lower() not in ("true", "last", "auto"):
        return _named_checkpoint(training, Path(asked))
    found = looked_for_once(training, lambda: newest_whole(folder))
    if found is None and asked.lower() != "auto":
        raise SFTError(f"output_dir {folder}: no checkpoint to resume from; leave --resume_from_checkpoint out")
    return found


def _named_checkpoint(training: TrainingArguments, folder: Path) -> str:
    if not folder.is_dir():
        raise SFTError(f"resume_from_checkpoint {folder}: no such folder; give a checkpoint-N folder, or true")
    if not (folder / TRAINER_STATE_NAME).is_file():
        raise SFTError(f"resume_from_checkpoint {folder}: has no {TRAINER_STATE_NAME}; give a checkpoint-N folder")
    # One that another trainer has saved has no checksums.
    sealed = (folder / CHECKSUMS_FILE).is_file()
    reason = looked_for_once(training, lambda: damage(folder)) if sealed else None
    if reason:
        raise SFTError(f"resume_from_checkpoint {folder}: damaged ({reason}); give an older one, or true")
    return str(folder)


def looked_for_once(training: TrainingArguments, look: Callable[[], str | None]) -> str | None:
    """What the first process finds, for all: it reads every byte of a checkpoint."""
    [found] = broadcast_object_list([look() if training.process_index == 0 else None])
    return found


def bring_evaluations(checkpoint: str | None, training: TrainingArguments) -> None:
    """A run that goes on in another folder takes along what was found before, the base model's answers among it."""
    if checkpoint is None or training.process_index:
        return
    earlier, ours = Path(checkpoint).parent / EVALUATION_DIR, output_folder(training) / EVALUATION_DIR
    if earlier.is_dir() and not ours.exists():
        shutil.copytree(earlier, ours)


def config_record(sft: SFTArguments, training: TrainingArguments) -> dict[str, Any]:
    """Our keys, and those of TrainingArguments that were given, as one flat dictionary that `train` reads again."""
    # Making TrainingArguments sets up the process' device and group; told otherwise, they would end a distributed run.
    default = TrainingArguments(
        output_dir=training.output_dir, use_cpu=training.use_cpu, ddp_backend=training.ddp_backend
    ).to_dict()
    default |= {"use_cpu": False, "ddp_backend": None}
    given = {key: value for key, value in training.to_dict().items() if value != default.get(key)}
    # With DEFAULTS, for the library's default of such a key would be read back as ours.
    for key in ("output_dir", "learning_rate", "seed", "num_train_epochs", "per_device_train_batch_size", *DEFAULTS):
        given.setdefault(key, getattr(training, key))
    # Secrets (given by a program: a config can't hold one), and what would make a repeated run replace this one.
    left_out = {key for key in given if key.endswith("token")} | {"overwrite_output_dir"}
    # An empty list has no spelling on the command line, which every key goes through; it is the default anyway.
    return {key: value for key, value in {**asdict(sft), **given}.items() if key not in left_out and value != []}


def write_json(file: Path, content: Any) -> None:
    """Written aside and renamed, so that a file is whole or absent."""
    aside = file.with_suffix(".part")
    aside.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    aside.replace(file)
