"""Checkpoints that are whole or absent, at whatever moment a run is killed.

    checkpoint-90/             renamed to this name when all of it was on the disk
        SHA256SUMS             tells a damaged one: `damage`, or `sha256sum -c SHA256SUMS`
    .saving/checkpoint-100/    being written, or left by a run that was killed meanwhile

Older checkpoints go when the new one is whole, and as they came: renamed first.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints

from sft_pipeline.utils.distributed import run_on_main_process
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.files import CHECKSUMS_FILE, find_damage, sync_to_disk, write_checksums

logger = logging.getLogger(__name__)

SAVING_DIR = ".saving"


def publish_checkpoint(aside: Path, place: Path) -> None:
    """Make the written folder `aside` the checkpoint `place`; one that is there is left in SAVING_DIR.

    Raises OSError where the disk fails, and then nothing is there that is not whole.
    """
    write_checksums(aside)
    if place.exists():
        move_aside(place)
    aside.rename(place)
    sync_to_disk(place.parent)


def publish_files(aside: Path, folder: Path) -> None:
    """Move all files of `aside` into `folder`, where each is the one before or the whole new one."""
    files = sorted(path for path in aside.rglob("*") if path.is_file())
    for file in files:
        sync_to_disk(file)
    for file in files:
        place = folder / file.relative_to(aside)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.replace(place)
    sync_to_disk(folder)


def move_aside(checkpoint: Path) -> None:
    """Into SAVING_DIR, to be deleted: nothing half deleted is ever found under its name."""
    leaving = checkpoint.parent / SAVING_DIR / f"{checkpoint.name}-leaving"
    leaving.parent.mkdir(exist_ok=True)
    checkpoint.rename(leaving)


def clear_leftovers(folder: Path) -> None:
    """Delete what was set aside in an output folder, or left there by a run that was killed while it saved."""
    shutil.rmtree(folder / SAVING_DIR, ignore_errors=True)


def find_newest_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is whole; damaged ones are named and passed over.

    Returns None where there is no checkpoint; raises SFTError where all are damaged.
    """
    checkpoints = sort_checkpoints(str(folder))
    for checkpoint in reversed(checkpoints):
        reason = find_damage(Path(checkpoint))
        if reason is None:
            return checkpoint
        logger.warning("%s: damaged (%s); passed over", checkpoint, reason)
    if checkpoints:
        raise SFTError(f"output_dir {folder}: all its checkpoints are damaged; delete them to begin again")
    return None


def rotate_checkpoints(saved: Path, limit: int | None, best: str | None) -> None:
    """Set checkpoints aside until `limit` are left, but not `saved`, which is whole, nor the best one.

    Those of later steps go first: they are of a run before this one, or damaged; then the oldest.
    """
    checkpoints = [Path(path) for path in sort_checkpoints(str(saved.parent))]
    at = checkpoints.index(saved)
    spare = [path for path in checkpoints[at + 1 :] + checkpoints[:at] if best is None or path != Path(best)]
    surplus = max(0, len(checkpoints) - limit) if limit and limit > 0 else 0
    for path in spare[:surplus]:
        move_aside(path)


def find_checkpoint_to_resume(training: TrainingArguments, folder: Path) -> str | None:
    """The checkpoint's folder: the one that was named, or the run's newest whole one.

    None where `auto` finds no checkpoint, which is an error where `true` was given.
    """
    asked = str(training.resume_from_checkpoint)
    if asked.lower() not in ("true", "last", "auto"):
        return _named_checkpoint(training, Path(asked))
    found = run_on_main_process(training, lambda: find_newest_checkpoint(folder))
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
    reason = run_on_main_process(training, lambda: find_damage(folder)) if sealed else None
    if reason:
        raise SFTError(f"resume_from_checkpoint {folder}: damaged ({reason}); give an older one, or true")
    return str(folder)
