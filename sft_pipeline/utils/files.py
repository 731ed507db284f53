"""Atomic writes, checksums, the cache folder."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

CHECKSUMS_FILE = "SHA256SUMS"
CHUNK = 2**22  # bytes


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


def share_weights(folder: Path) -> None:
    """Who may read the folder may read its weights: safetensors writes files for their owner alone."""
    for file in folder.glob("*.safetensors"):
        file.chmod(folder.stat().st_mode & 0o666)


def write_json(file: Path, content: Any) -> None:
    """Written aside and renamed, so that a file is whole or absent."""
    aside = file.with_suffix(".part")
    aside.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    aside.replace(file)


def cache_dir() -> Path:
    """`SFT_PIPELINE_CACHE`, or ~/.cache/sft_pipeline."""
    return Path(os.environ.get("SFT_PIPELINE_CACHE", "~/.cache/sft_pipeline")).expanduser()
