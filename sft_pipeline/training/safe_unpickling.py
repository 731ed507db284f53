"""Refuse pickles in a checkpoint that would run code when they are loaded.

torch reads most of a checkpoint with `weights_only`. It reads two parts of a sharded one (torch.distributed.checkpoint)
with plain pickle: the file `.metadata`, and each entry that is not a tensor, such as a learning rate
(torch/distributed/checkpoint/default_planner.py, `load_bytes`). These are read here first, with the same restriction.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import EnumMeta
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from sft_pipeline.utils.errors import SFTError, format_error

# Classes and functions that the metadata of a sharded checkpoint may refer to, by module.
METADATA_GLOBALS = {
    "torch.distributed.checkpoint.metadata": "Metadata MetadataIndex StorageMeta TensorProperties _MEM_FORMAT_ENCODING "
    "TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.serialization": "_get_layout",
    "torch": " ".join(["Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))]),
    "pathlib": "PosixPath WindowsPath",
    "pathlib._local": "PosixPath WindowsPath",
    "collections": "OrderedDict",
}


@contextmanager
def raise_on_unsafe_pickles(checkpoint: str | bool | None) -> Iterator[None]:
    """Raise SFTError if `checkpoint`, loaded inside the context, has a pickle of more than tensors, numbers and text.

    Allowed is what torch's `weights_only` reads, and the NumPy types that transformers adds to it. Nothing of a refused
    pickle is run.
    """
    for file in Path(checkpoint).rglob(".metadata") if isinstance(checkpoint, str) else ():
        _check_shard_metadata(file)
    try:
        yield
    except (pickle.UnpicklingError, EOFError) as error:
        raise _build_error(checkpoint, error) from error


class _MetadataUnpickler(pickle.Unpickler):
    """Load a `.metadata` file; raise UnpicklingError for any global but METADATA_GLOBALS."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _get_enum_member
        if name in METADATA_GLOBALS.get(module, "").split():
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def _get_enum_member(enum: Any, name: str) -> Any:
    """Replace `getattr`, with which early releases of Python 3.11 pickle a member of an Enum; refuse any other use."""
    if not (isinstance(enum, EnumMeta) and name in enum.__members__):
        raise pickle.UnpicklingError("GLOBAL builtins.getattr")
    return enum[name]


def _check_shard_metadata(file: Path) -> None:
    """Raise SFTError if the metadata in `file`, or a non-tensor entry it describes, is an unsafe pickle."""
    try:
        with file.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        for index, storage_info in metadata.storage_data.items():
            if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
                _check_entry(file.parent, storage_info)
    except Exception as error:  # unpickling damaged data can raise anything
        raise _build_error(file, error) from error


def _check_entry(folder: Path, storage_info: Any) -> None:
    """Load one entry with `weights_only`. storage_info: torch's _StorageInfo, a file in `folder` and a byte range."""
    if getattr(storage_info, "transform_descriptors", None):
        raise pickle.UnpicklingError("an entry is stored with a transform, such as compression, which is not supported")
    with (folder / storage_info.relative_path).open("rb") as stream:
        stream.seek(storage_info.offset)
        torch.load(io.BytesIO(stream.read(storage_info.length)), weights_only=True)


def _build_error(path: object, error: Exception) -> SFTError:
    match = re.search(r"GLOBAL (\S+)", str(error))
    reason = f"it names {match[1]}" if match else format_error(error, limit=100)
    return SFTError(
        f"{path}: contains an unsafe or damaged pickle ({reason}); it was not run; resume from a checkpoint you trust"
    )
