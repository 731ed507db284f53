"""Checkpoints from somebody else: their pickles are data, or refused before anything in them is run.

torch reads most of a checkpoint with `weights_only`. Of a sharded one (torch.distributed.checkpoint) it reads two parts
as any pickle: the file `.metadata`, and each entry that is no tensor, such as a learning rate
(torch/distributed/checkpoint/default_planner.py, `load_bytes`). These are read here first, under the same rule.
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

# What the metadata of a sharded checkpoint is made of.
METADATA_NAMES = {
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
    """What is read of the checkpoint meanwhile is read by torch's `weights_only` with transformers' list of NumPy's
    types: tensors, numbers, texts. Raises SFTError for a pickle that names anything else, of which nothing was run.
    """
    for file in Path(checkpoint).rglob(".metadata") if isinstance(checkpoint, str) else ():
        _check_sharded(file)
    try:
        yield
    except (pickle.UnpicklingError, EOFError) as error:
        raise _refused(checkpoint, error) from error


class _Metadata(pickle.Unpickler):
    """Reads `.metadata` as far as it names what torch itself puts there."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name in METADATA_NAMES.get(module, "").split():
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def _member(kind: Any, name: str) -> Any:
    """What early releases of Python 3.11 write for a member of an Enum, and nothing else: getattr(kind, name)."""
    if not (isinstance(kind, EnumMeta) and name in kind.__members__):
        raise pickle.UnpicklingError("GLOBAL builtins.getattr")
    return kind[name]


def _check_sharded(file: Path) -> None:
    """Raise SFTError if the metadata in `file`, or an entry beside it that is no tensor, is more than data."""
    try:
        with file.open("rb") as stream:
            metadata = _Metadata(stream).load()
        for index, stored in metadata.storage_data.items():
            if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
                _check_entry(file.parent, stored)
    except Exception as error:  # a damaged pickle raises whatever its instructions come to
        raise _refused(file, error) from error


def _check_entry(folder: Path, stored: Any) -> None:
    """`stored` is torch's _StorageInfo: a file in the folder, and which bytes of it."""
    if getattr(stored, "transform_descriptors", None):
        raise pickle.UnpicklingError("it is stored in a form that is not torch's own")
    with (folder / stored.relative_path).open("rb") as stream:
        stream.seek(stored.offset)
        torch.load(io.BytesIO(stream.read(stored.length)), weights_only=True)


def _refused(place: object, error: Exception) -> SFTError:
    named = re.search(r"GLOBAL (\S+)", str(error))
    reason = f"it names {named[1]}" if named else format_error(error, limit=100)
    return SFTError(
        f"{place}: holds a pickle that is more than data ({reason}); it was not run; go on with a checkpoint of yours"
    )
