"""The output folder of a run: its file names, and the checks that protect folders which hold something else.

    run.yaml            the config that repeats the run; also marks the folder as a run's
    evaluation/         answers and metrics of each evaluation (evaluation/step_results.py)
    results.json        metrics, answers before and after training, loss curve, versions
    preview.json        tokens of the first training row, histogram of row lengths (data/preview.py)
    report.html         all of this as one page (reports/html.py)
    trackers.json       the run's name in wandb and trackio (training/trackers.py)
    sft_template.json   template and system prompt, read by `chat`, `generate` and `evaluate` (runs/trained_model.py)
    quantization_config.json  beside adapters that were trained on quantized weights (model/quantization.py)
    README.md           model card of a run that was pushed to the hub (training/hub.py)

Beside these are the model's files as transformers saves them, and the checkpoints (runs/checkpoints.py).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from sft_pipeline.config import SFTConfig, get_output_dir
from sft_pipeline.runs.checkpoints import find_checkpoint_to_resume
from sft_pipeline.utils.distributed import main_process_first
from sft_pipeline.utils.errors import SFTError

RUN_FILE = "run.yaml"
EVALUATION_DIR = "evaluation"
RESULTS_FILE = "results.json"
PREVIEW_FILE = "preview.json"
REPORT_FILE = "report.html"
TEMPLATE_FILE = "sft_template.json"


def check_output_dir(args: SFTConfig) -> str | None:
    """Check that the run may write to its output folder; return the checkpoint to resume from, or None.

    Changes nothing on the disk. With `resume_from_checkpoint: auto` and no checkpoint the run starts from the
    beginning. Raises SFTError for a folder that is not writable, holds files of something else than a run, or holds a
    run that is to be neither replaced nor resumed.
    """
    folder = get_output_dir(args)
    if folder.exists() and not folder.is_dir():
        raise SFTError(f"output_dir {folder}: is a file; choose another folder")
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise SFTError(f"output_dir {folder}: no permission to write to {existing}; choose another folder")
    restarts = False  # whether an unfinished run without a checkpoint may be replaced
    if is_resuming(args):
        checkpoint = find_checkpoint_to_resume(args, folder)
        if checkpoint is not None:
            return checkpoint
        restarts = not (folder / RESULTS_FILE).exists()
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / RUN_FILE).is_file():
            raise SFTError(f"output_dir {folder}: holds files that are not a run's; choose another folder")
        if not (args.overwrite_output_dir or restarts):
            raise SFTError(
                f"output_dir {folder}: already holds a run; add --overwrite_output_dir to replace it, "
                "--resume_from_checkpoint true to continue it, or choose another folder"
            )
    return None


def create_output_dir(args: SFTConfig, checkpoint: str | None, record: dict[str, Any]) -> None:
    """Create the output folder with its run.yaml; without a checkpoint to resume from, delete the run that is there.

    record: the config of the run, from `build_config_record`. Call this after every process has called
    `check_output_dir`, and after data and model are loaded, so that errors in those delete no run.
    """
    folder = get_output_dir(args)
    with main_process_first(args):
        if args.process_index == 0:
            if (folder / RUN_FILE).is_file() and checkpoint is None:
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / RUN_FILE).exists():
                text = yaml.safe_dump(record, allow_unicode=True, sort_keys=False)
                (folder / RUN_FILE).write_text(text, encoding="utf-8")


def is_resuming(args: TrainingArguments) -> bool:
    """Return whether `resume_from_checkpoint` asks to resume."""
    return args.resume_from_checkpoint not in (None, "false", "False")


def copy_evaluations(checkpoint: str | None, args: TrainingArguments) -> None:
    """Copy the evaluations of the checkpoint's run, among them that of the base model, into a new output folder."""
    if checkpoint is None or args.process_index:
        return
    source, target = Path(checkpoint).parent / EVALUATION_DIR, get_output_dir(args) / EVALUATION_DIR
    if source.is_dir() and not target.exists():
        shutil.copytree(source, target)
