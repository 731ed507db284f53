"""Atomic file writes, checksums and the cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHECKSUMS_FILE = "SHA256SUMS"
CHUNK_BYTES = 2**22  # read at a time for a checksum
READING_THREADS = 4  # SHA-256 of one file reaches 0.5 to 2 GB/s, less than most disks
# The files of a checkpoint that every process writes: the shards of torch.distributed.checkpoint, the random states of
# transformers' Trainer, the parts of DeepSpeed's optimizer.
FILES_OF_PROCESSES = re.compile(r"(?:__|rng_state_|zero_pp_rank_|bf16_zero_pp_rank_)(\d+)")


def write_checksums(folder: Path, sums: dict[str, str] | None = None) -> None:
    """Write the SHA-256 sums of all files in `folder` to CHECKSUMS_FILE, and sync everything to the disk.

    sums: of all files, by name, where they were hashed and synced before.
    """
    if sums is None:
        sums = hash_files(folder, list_files(folder))
    lines = [f"{sums[name]}  {name}\n" for name in sorted(sums)]
    (folder / CHECKSUMS_FILE).write_text("".join(lines), encoding="utf-8")
    folders = sorted(path for path in folder.rglob("*") if path.is_dir())
    for path in [*folders, folder / CHECKSUMS_FILE, folder]:
        sync_to_disk(path)


def list_files(folder: Path) -> dict[str, int]:
    """Return the sizes in bytes of all files in `folder` and its folders, by their paths in it."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of files in `folder`, by name, each read in a thread of its own, and sync them to the disk."""
    files = {name: folder / name for name in names}
    with ThreadPoolExecutor(READING_THREADS) as pool:
        sums = dict(zip(files, pool.map(hash_file, files.values())))
    for file in files.values():
        sync_to_disk(file)
    return sums


def divide_files(sizes: dict[str, int], count: int, local: int | None = None) -> list[list[str]]:
    """Divide files among `count` processes.

    A file that has the number of a process in its name (FILES_OF_PROCESSES) goes to this one, which wrote it. The
    others go, largest first, to the one with the fewest bytes of the first `local` processes (default: of all).
    """
    shares: list[list[str]] = [[] for _ in range(count)]
    totals = [0] * count
    owners = {name: _read_owner(name, count) for name in sizes}
    for name in sorted(sizes, key=lambda name: (owners[name] is None, -sizes[name], name)):
        owner = owners[name]
        index = totals.index(min(totals[:local])) if owner is None else owner
        shares[index].append(name)
        totals[index] += sizes[name]
    return shares


def _read_owner(name: str, count: int) -> int | None:
    """Return the process that wrote the file, as its name says; None if it does not, or there is no such process."""
    match = FILES_OF_PROCESSES.match(name.rpartition("/")[2])
    return int(match[1]) if match and int(match[1]) < count else None


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


def find_damage(checkpoint: Path, process: int = 0, processes: int = 1) -> str | None:
    """Return what differs from the checksums of a checkpoint, or None if all files are as they were saved.

    Of several processes, each reads its share of the files.
    """
    file = checkpoint / CHECKSUMS_FILE
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    if not lines:
        return f"{CHECKSUMS_FILE} is missing or empty"
    sums = {name: expected for expected, _, name in (line.partition("  ") for line in lines)}
    sizes = {name: (checkpoint / name).stat().st_size for name in sums if (checkpoint / name).is_file()}
    if missing := [name for name in sums if name not in sizes]:
        return f"{missing[0]} is missing"
    names = sorted(divide_files(sizes, processes)[process])
    with ThreadPoolExecutor(READING_THREADS) as pool:
        for name, digest in zip(names, pool.map(hash_file, [checkpoint / name for name in names])):
            if digest != sums[name]:
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
