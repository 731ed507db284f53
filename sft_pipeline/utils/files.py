"""Atomic file writes, checksums and the cache folder."""

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
CHUNK_BYTES = 2**22  # read at a time for a checksum


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 sums of all files in `folder` to CHECKSUMS_FILE, and sync everything to the disk."""
    paths = sorted(folder.rglob("*"))
    files = [path for path in paths if path.is_file()]
    sums = [f"{hash_file(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    (folder / CHECKSUMS_FILE).write_text("".join(sums), encoding="utf-8")
    for path in [*paths, folder / CHECKSUMS_FILE, folder]:
        sync_to_disk(path)


def hash_file(file: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sync_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of entries, is on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_damage(checkpoint: Path) -> str | None:
    """Return what differs from the checksums of a checkpoint, or None if all files are as they were saved."""
    file = checkpoint / CHECKSUMS_FILE
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
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
    """Give the safetensors files in `folder` the folder's read and write permissions.

    The safetensors library creates files that only their owner may read.
    """
    for file in folder.glob("*.safetensors"):
        file.chmod(folder.stat().st_mode & 0o666)


@contextmanager
def write_aside(target: Path, keep_existing: bool = False) -> Iterator[Path]:
    """Write a file or folder atomically: yield a temporary path beside `target`, rename it to `target` at the end.

    If the process is killed, `target` is the previous or the new version, complete either way. If the block raises, the
    previous version stays and the temporary files are removed. With `keep_existing`, a `target` that another process
    has written in the meantime is not replaced.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    new, old = (target.with_name(f".{target.name}.{os.getpid()}.{suffix}") for suffix in ("new", "old"))
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
    """Write `content` as JSON, atomically."""
    with write_aside(file) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def get_cache_dir() -> Path:
    """Return the cache folder: `SFT_PIPELINE_CACHE`, or ~/.cache/sft_pipeline if it is not set."""
    return Path(os.environ.get("SFT_PIPELINE_CACHE", "~/.cache/sft_pipeline")).expanduser()
