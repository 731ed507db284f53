"""Checkpoints that are whole or absent, at whatever moment a run is killed.

    checkpoint-90/             renamed to this name when all of it was on the disk
        SHA256SUMS             tells a damaged one: `damage`, or `sha256sum -c SHA256SUMS`
    .saving/checkpoint-100/    being written, or left by a run that was killed meanwhile

Older checkpoints go when the new one is whole, and as they came: renamed first.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import sort_checkpoints

from sft_pipeline.errors import SFTError

logger = logging.getLogger(__name__)

CHECKSUMS_FILE = "SHA256SUMS"
SAVING_DIR = ".saving"
CHUNK = 2**22  # bytes


def output_folder(training: TrainingArguments) -> Path:
    """The run's output folder, which config.py always names."""
    assert training.output_dir is not None
    return Path(training.output_dir)


def publish(aside: Path, place: Path) -> None:
    """Make the written folder `aside` the checkpoint `place`; one that is there is left in SAVING_DIR.

    Raises OSError where the disk fails, and then nothing is there that is not whole.
    """
    seal(aside)
    if place.exists():
        set_aside(place)
    aside.rename(place)
    sync(place.parent)


def publish_files(aside: Path, folder: Path) -> None:
    """Move all files of `aside` into `folder`, where each is the one before or the whole new one."""
    files = sorted(path for path in aside.rglob("*") if path.is_file())
    for file in files:
        sync(file)
    for file in files:
        place = folder / file.relative_to(aside)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.replace(place)
    sync(folder)


def seal(folder: Path) -> None:
    """Write the checksums of all files in `folder`, and see that everything is on the disk."""
    paths = sorted(folder.rglob("*"))
    files = [path for path in paths if path.is_file()]
    sums = [f"{digest(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    (folder / CHECKSUMS_FILE).write_text("".join(sums), encoding="utf-8")
    for path in [*paths, folder / CHECKSUMS_FILE, folder]:
        sync(path)


def digest(file: Path) -> str:
    """The file's SHA-256 in hexadecimal digits."""
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()


def sync(path: Path) -> None:
    """Wait until the file, or the names in the folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def set_aside(checkpoint: Path) -> None:
    """Into SAVING_DIR, to be deleted: nothing half deleted is ever found under its name."""
    leaving = checkpoint.parent / SAVING_DIR / f"{checkpoint.name}-leaving"
    leaving.parent.mkdir(exist_ok=True)
    checkpoint.rename(leaving)


def clear(folder: Path) -> None:
    """Delete what was set aside in an output folder, or left there by a run that was killed while it saved."""
    shutil.rmtree(folder / SAVING_DIR, ignore_errors=True)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None if all is as it was saved."""
    sums = checkpoint / CHECKSUMS_FILE
    lines = sums.read_text(encoding="utf-8", errors="replace").splitlines() if sums.is_file() else []
    if not lines:
        return f"{CHECKSUMS_FILE} is missing or empty"
    for line in lines:
        expected, _, name = line.partition("  ")
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if digest(checkpoint / name) != expected:
            return f"{name} differs from {CHECKSUMS_FILE}"
    return None


def newest_whole(folder: Path) -> str | None:
    """The newest checkpoint that is whole; damaged ones are named and passed over.

    Returns None where there is no checkpoint; raises SFTError where all are damaged.
    """
    checkpoints = sort_checkpoints(str(folder))
    for checkpoint in reversed(checkpoints):
        reason = damage(Path(checkpoint))
        if reason is None:
            return checkpoint
        logger.warning("%s: damaged (%s); passed over", checkpoint, reason)
    if checkpoints:
        raise SFTError(f"output_dir {folder}: all its checkpoints are damaged; delete them to begin again")
    return None


def rotate(saved: Path, limit: int | None, best: str | None) -> None:
    """Set checkpoints aside until `limit` are left, but not `saved`, which is whole, nor the best one.

    Those of later steps go first: they are of a run before this one, or damaged; then the oldest.
    """
    checkpoints = [Path(path) for path in sort_checkpoints(str(saved.parent))]
    at = checkpoints.index(saved)
    spare = [path for path in checkpoints[at + 1 :] + checkpoints[:at] if best is None or path != Path(best)]
    surplus = max(0, len(checkpoints) - limit) if limit and limit > 0 else 0
    for path in spare[:surplus]:
        set_aside(path)


class Termination:
    """While it is entered, SIGTERM is `received` instead of obeyed, so that the step can be ended and saved.

    Signals reach the main thread alone: in another one nothing changes.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: Any = None

    def __enter__(self) -> None:
        self.received = False
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._receive)

    def __exit__(self, *raised: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def _receive(self, *signal_and_frame: object) -> None:
        self.received = True


def share_weights(folder: Path) -> None:
    """Who may read the folder may read its weights: safetensors writes files for their owner alone."""
    for file in folder.glob("*.safetensors"):
        file.chmod(folder.stat().st_mode & 0o666)
