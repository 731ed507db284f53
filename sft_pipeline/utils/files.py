"""Atomic writes, checksums, the cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHECKSUMS_FILE = "SHA256SUMS"
CHUNK = 2**22  # bytes


def write_checksums(folder: Path) -> None:
    """Write the checksums of all files in `folder`, and see that everything is on the disk."""
    paths = sorted(folder.rglob("*"))
    files = [path for path in paths if path.is_file()]
    sums = [f"{hash_file(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    (folder / CHECKSUMS_FILE).write_text("".join(sums), encoding="utf-8")
    for path in [*paths, folder / CHECKSUMS_FILE, folder]:
        sync_to_disk(path)


def hash_file(file: Path) -> str:
    """The file's SHA-256 in hexadecimal digits."""
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()


def sync_to_disk(path: Path) -> None:
    """Wait until the file, or the names in the folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None if all is as it was saved."""
    sums = checkpoint / CHECKSUMS_FILE
    lines = sums.read_text(encoding="utf-8", errors="replace").splitlines() if sums.is_file() else []
    if not lines:
        return f"{CHECKSUMS_FILE} is missing or empty"
    for line in lines:
        expected, _, name = line.partition("  ")
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if hash_file(checkpoint / name) != expected:
            return f"{name} differs from {CHECKSUMS_FILE}"
    return None


def copy_folder_permissions(folder: Path) -> None:
    """Who may read the folder may read its weights: safetensors writes files for their owner alone."""
    for file in folder.glob("*.safetensors"):
        file.chmod(folder.stat().st_mode & 0o666)


@contextmanager
def write_aside(target: Path, keep_existing: bool = False) -> Iterator[Path]:
    """Yield a path beside `target` to write a file or a folder to, and rename it to `target` when the block ends.

    A process that is killed leaves the old `target` or the new one, each complete. A block that raises leaves the old
    one and nothing beside it. With `keep_existing`, a `target` that another process has written meanwhile stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    new, old = (target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ("new", "old"))
    try:
        yield new
        if not (keep_existing and target.exists()):
            if target.is_dir():
                target.rename(old)
            new.replace(target)
    finally:
        for path in (new, old):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def write_json(file: Path, content: Any) -> None:
    """Write `content` as JSON, whole or not at all."""
    with write_aside(file) as aside:
        aside.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def get_cache_dir() -> Path:
    """`SFT_PIPELINE_CACHE`, or ~/.cache/sft_pipeline."""
    return Path(os.environ.get("SFT_PIPELINE_CACHE", "~/.cache/sft_pipeline")).expanduser()
