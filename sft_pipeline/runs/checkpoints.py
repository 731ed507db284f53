"""Atomic checkpoints: a run that is killed at any moment leaves every checkpoint complete or absent.

    checkpoint-90/             gets this name once all of its files are on the disk
        SHA256SUMS             detects damaged files: `find_damage`, or `sha256sum -c SHA256SUMS`
    .saving/checkpoint-100/    being written, or left behind by a run that was killed while it saved

An older checkpoint is removed only after the new one is complete. It is first renamed into .saving/ and then deleted,
so a half-deleted checkpoint never has the name of a complete one.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy, sort_checkpoints

from sft_pipeline.utils.distributed import run_on_all_processes, run_on_main_process
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.files import (
    CHECKSUMS_FILE,
    divide_files,
    find_damage,
    hash_files,
    list_files,
    sync_to_disk,
    write_checksums,
)

logger = logging.getLogger(__name__)

SAVING_DIR = ".saving"


def hash_together(training: TrainingArguments, staging: Path, local_processes: int) -> dict[str, str]:
    """Hash the files that the processes have written to `staging`; return their sums by name, on every process.

    Each process hashes and syncs the files that it wrote itself, all at the same time. What the first process wrote
    for all is divided among those of its machine (`local_processes`), as others may not see its disk. With
    `save_on_each_node` the first process of each node hashes what is on its node.
    """
    if training.save_on_each_node:
        return hash_files(staging, list_files(staging)) if training.should_save else {}
    shares = run_on_main_process(
        training, lambda: divide_files(list_files(staging), training.world_size, local_processes)
    )
    parts = run_on_all_processes(training, lambda: hash_files(staging, shares[training.process_index]))
    return dict(item for part in parts for item in part.items())


def publish_checkpoint(staging: Path, checkpoint: Path, sums: dict[str, str] | None = None) -> None:
    """Write checksums into the folder `staging` and rename it to `checkpoint`.

    sums: from `hash_together`. An existing folder of that name is moved into SAVING_DIR. Raises OSError if the disk
    fails; no incomplete folder then has the name `checkpoint`.
    """
    write_checksums(staging, sums)
    if checkpoint.exists():
        move_aside(checkpoint)
    staging.rename(checkpoint)
    sync_to_disk(checkpoint.parent)


def publish_files(staging: Path, folder: Path) -> None:
    """Move all files of `staging` into `folder`, where each file is always the complete old or new one."""
    files = sorted(path for path in staging.rglob("*") if path.is_file())
    for file in files:
        sync_to_disk(file)
    for file in files:
        target = folder / file.relative_to(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)
    sync_to_disk(folder)


def move_aside(checkpoint: Path) -> None:
    """Rename a checkpoint into SAVING_DIR, where `clear_leftovers` deletes it."""
    leaving = checkpoint.parent / SAVING_DIR / f"{checkpoint.name}-leaving"
    leaving.parent.mkdir(exist_ok=True)
    checkpoint.rename(leaving)


def clear_leftovers(folder: Path) -> None:
    """Delete the SAVING_DIR of an output folder: checkpoints moved aside, and what a killed run left there."""
    shutil.rmtree(folder / SAVING_DIR, ignore_errors=True)


def rotate_checkpoints(saved: Path, limit: int | None, best: str | None) -> None:
    """Move checkpoints aside until `limit` remain, but never `saved` (the newest complete one) or `best`.

    Checkpoints of later steps than `saved` go first: they are an earlier run's, or damaged. Then the oldest go.
    """
    checkpoints = [Path(path) for path in sort_checkpoints(str(saved.parent))]
    index = checkpoints.index(saved)
    removable = [path for path in checkpoints[index + 1 :] + checkpoints[:index] if best is None or path != Path(best)]
    surplus = max(0, len(checkpoints) - limit) if limit and limit > 0 else 0
    for path in removable[:surplus]:
        move_aside(path)


def find_newest_checkpoint(folder: Path, training: TrainingArguments | None = None) -> str | None:
    """Return the newest undamaged checkpoint of an output folder, or None if it has no checkpoint.

    Logs every damaged one that is skipped. Raises SFTError if all are damaged. training: of a run whose processes all
    call this, to read the checkpoints together.
    """
    if training is None:
        checkpoints = sort_checkpoints(str(folder))
    else:
        checkpoints = run_on_main_process(training, lambda: sort_checkpoints(str(folder)))
    for checkpoint in reversed(checkpoints):
        damage = find_damage(Path(checkpoint)) if training is None else find_damage_together(training, Path(checkpoint))
        if damage is None:
            return checkpoint
        if training is None or training.process_index == 0:
            logger.warning("%s: damaged (%s); skipped", checkpoint, damage)
    if checkpoints:
        raise SFTError(f"output_dir {folder}: all its checkpoints are damaged; delete them to start again")
    return None


def find_damage_together(training: TrainingArguments, checkpoint: Path) -> str | None:
    """Return what differs from the checksums of a checkpoint, or None. Each process of the run reads a share of it."""
    process, processes = training.process_index, training.world_size
    damages = run_on_all_processes(training, lambda: find_damage(checkpoint, process, processes))
    return next(filter(None, damages), None)


def find_checkpoint_to_resume(training: TrainingArguments, folder: Path) -> str | None:
    """Return the checkpoint that `resume_from_checkpoint` names, or the newest undamaged one in `folder`.

    Returns None if the key is `auto` and there is no checkpoint; raises SFTError in that case if it is `true`.
    """
    requested = str(training.resume_from_checkpoint)
    if requested.lower() not in ("true", "last", "auto"):
        return _check_named_checkpoint(training, Path(requested))
    checkpoint = find_newest_checkpoint(folder, training)
    if checkpoint is None and requested.lower() != "auto":
        raise SFTError(f"output_dir {folder}: no checkpoint to resume from; leave --resume_from_checkpoint out")
    return checkpoint


def _check_named_checkpoint(training: TrainingArguments, folder: Path) -> str:
    if not folder.is_dir():
        raise SFTError(f"resume_from_checkpoint {folder}: no such folder; give a checkpoint-N folder, or true")
    if not (folder / TRAINER_STATE_NAME).is_file():
        raise SFTError(f"resume_from_checkpoint {folder}: has no {TRAINER_STATE_NAME}; give a checkpoint-N folder")
    # A checkpoint that another trainer saved has no checksums.
    has_checksums = (folder / CHECKSUMS_FILE).is_file()
    damage = find_damage_together(training, folder) if has_checksums else None
    if damage:
        raise SFTError(f"resume_from_checkpoint {folder}: damaged ({damage}); give an older one, or true")
    return str(folder)


def needs_evaluation(checkpoint: str, training: TrainingArguments) -> bool:
    """Return whether an evaluation was due at the checkpoint's step, but the run stopped before it was made."""
    state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    if any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history):
        return False
    if training.eval_strategy == IntervalStrategy.EPOCH:
        return state.epoch == int(state.epoch) and training.eval_delay <= state.epoch
    is_due = training.eval_strategy == IntervalStrategy.STEPS and state.global_step % state.eval_steps == 0
    return is_due and training.eval_delay <= state.global_step
