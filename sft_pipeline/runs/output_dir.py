"""The output folder of a run: who may write there, what marks it, and what repeats the run.

    run.yaml            the config that repeats the run; marks the folder as a run's
    evaluation/         answers and metrics of each evaluation (evaluation/step_results.py)
    results.json        metrics, answers before and after, loss curve, versions
    preview.json        the first training row in tokens, and how long the rows are (preview.py)
    report.html         all this as one page (report/)
    trackers.json       what trackers call the run (trackers.py)
    sft_template.json   template and system prompt, which `chat` needs

Beside these stand the model as transformers saves it, and the checkpoints.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import yaml
from transformers import TrainingArguments

from sft_pipeline.config import SFTArguments, build_config_record, get_output_dir
from sft_pipeline.runs.checkpoints import find_checkpoint_to_resume
from sft_pipeline.utils.errors import SFTError

RUN_FILE = "run.yaml"
EVALUATION_DIR = "evaluation"
RESULTS_FILE = "results.json"
PREVIEW_FILE = "preview.json"
REPORT_FILE = "report.html"
TEMPLATE_FILE = "sft_template.json"


def check_output_dir(sft: SFTArguments, training: TrainingArguments) -> str | None:
    """Refuse an output folder that is taken; returns the checkpoint to resume from, if that was asked for."""
    folder = get_output_dir(training)
    if folder.exists() and not folder.is_dir():
        raise SFTError(f"output_dir {folder}: is a file; choose another folder")
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise SFTError(f"output_dir {folder}: {existing} may not be written to; choose another folder")
    begins_again = False
    if _resumes(training):
        checkpoint = find_checkpoint_to_resume(training, folder)
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


def create_output_dir(sft: SFTArguments, training: TrainingArguments) -> None:
    """Make the checked folder ours. Called when data and model are loaded: what is wrong with them costs no old run."""
    folder = get_output_dir(training)
    with training.main_process_first(desc="output folder"):
        if training.process_index == 0:
            if (folder / RUN_FILE).is_file() and not _resumes(training):
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / RUN_FILE).exists():
                text = yaml.safe_dump(build_config_record(sft, training), allow_unicode=True, sort_keys=False)
                (folder / RUN_FILE).write_text(text, encoding="utf-8")


def _resumes(training: TrainingArguments) -> bool:
    return training.resume_from_checkpoint not in (None, "false", "False")


def copy_evaluations(checkpoint: str | None, training: TrainingArguments) -> None:
    """A run that goes on in another folder takes along what was found before, the base model's answers among it."""
    if checkpoint is None or training.process_index:
        return
    earlier, ours = Path(checkpoint).parent / EVALUATION_DIR, get_output_dir(training) / EVALUATION_DIR
    if earlier.is_dir() and not ours.exists():
        shutil.copytree(earlier, ours)
