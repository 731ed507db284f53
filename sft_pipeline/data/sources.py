"""Load rows of a hub dataset, a file, a folder or a list as conversations.

    load_conversations("alpaca.json")    # a list of {"messages": [...], "tools": [...]}, see messages.py
    load_source("alpaca.json")           # a `datasets.Dataset` of them as JSON text, with their locations

The row format is detected from the columns (see formats.py) and logged, and so is what it does not read. Converted
rows are kept in `datasets`' cache, under a key of the content, the row format and ROWS_FORMAT. Nothing from the data is
executed or opened: no loading scripts, no pickles, no paths in the rows, and no symbolic links that leave a folder.
"""

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError

from sft_pipeline.arguments import SourceEntry
from sft_pipeline.data.formats import (
    FORMATS,
    RowFormat,
    convert_row,
    detect_format,
    drop_ambiguous_nulls,
    list_unread_names,
)
from sft_pipeline.data.messages import Conversation, format_conversation, parse_conversation
from sft_pipeline.data.readers import COLUMNAR, READERS, LocatedRow, convert_to_rows, read_rows
from sft_pipeline.data.tool_calls import describe_type
from sft_pipeline.utils.errors import SFTError, format_error
from sft_pipeline.utils.sanitize import format_line

logger = logging.getLogger(__name__)

# Part of the cache keys. Raise it when the same file would give other conversations, bad rows or unread names.
ROWS_FORMAT = 3
SHOWN_NAMES = 20  # most names of one source that are listed; in broken data every row may have others
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
Source: TypeAlias = str | os.PathLike[str] | SourceEntry | Dataset | Sequence[Mapping[str, Any]]
FEATURES = Features(
    {
        "conversation": Value("string"),  # JSON text, see messages.py
        "origin": Value("string"),  # "alpaca.json row 17"
        # load_source removes these two columns: why the row is bad, or null; what of the row nothing reads.
        "problem": Value("string"),
        "unread": [Value("string")],
    }
)


def load_conversations(
    source: Source, split: str = "train", skip_bad_rows: bool = False, name: str | None = None
) -> list[Conversation]:
    """Load a source as a list of conversations, see `load_source`."""
    dataset, _ = load_source(source, split, skip_bad_rows, name)
    return [parse_conversation(text) for text in dataset["conversation"]]


def load_source(
    source: Source, split: str = "train", skip_bad_rows: bool = False, name: str | None = None
) -> tuple[Dataset, dict[str, int]]:
    """Load a source as a dataset with the columns `conversation` (JSON text) and `origin`.

    A source is a file (.json, .jsonl, .csv, .parquet, .arrow), a folder of such files, a folder written by
    `save_to_disk`, or a dataset on the hub, as a name or a SourceEntry; or rows in memory: a list of dictionaries or a
    `Dataset`. All files of a folder are read, sorted by name, and must have the same row format. `split` selects a
    split of a hub dataset or of a saved `DatasetDict`. Bad rows raise; with `skip_bad_rows` they are dropped and their
    number is logged. `name` is what the log and the errors call the source.

    Also returns in how many rows each name is that nothing reads: the SHOWN_NAMES most frequent names, the largest
    number first. Raises SFTError: missing source, file that does not parse, unknown or mixed row formats, bad row, no
    rows.
    """
    if isinstance(source, (str, os.PathLike)):
        source = SourceEntry(str(source))
    if isinstance(source, SourceEntry):
        name, split = name or source.label, source.split or split
        source = resolve_source(source, split)
    else:
        name = name or ("dataset" if isinstance(source, Dataset) else "rows")
    unread: Counter[str] = Counter()
    if isinstance(source, Path):
        dataset, description = _load_path(source, split)
    elif isinstance(source, Dataset):
        dataset, description = _convert_dataset(source, name)
        unread += _count_unread_columns(source, detect_format(source.column_names, name))
    else:
        dataset, description = _convert_list(source, name)
    unread += _count_unread_names(dataset)
    dataset = _remove_bad_rows(dataset.remove_columns("unread"), name, skip_bad_rows)
    logger.info("%s: %s rows, %s", name, f"{len(dataset):,}", description)
    if unread:
        logger.info("%s: not read: %s", name, describe_unread_names(unread))
    return dataset, dict(unread.most_common(SHOWN_NAMES))


def resolve_source(entry: SourceEntry, split: str, streaming: bool = False) -> Path | Any:
    """Return the path of a folder or file, or the dataset of the hub, with `streaming` an IterableDataset.

    Raises SFTError for options that a path does not have.
    """
    path = Path(entry.path).expanduser()
    if not path.is_dir() and not path.is_file():
        return _load_from_hub(entry, split, streaming)
    for option in ("name", "revision", "data_files"):
        if getattr(entry, option) is not None:
            raise SFTError(f"{entry.path}: {option} is an option of a hub dataset, and this is a path; remove it")
    if entry.split is not None and not (path / "dataset_dict.json").is_file():
        raise SFTError(f"{entry.path}: has no splits, as a hub dataset or a saved DatasetDict; remove split")
    return path


def _load_path(path: Path, split: str) -> tuple[Dataset, str]:
    """Load a folder or a file; returns it with a description of how it is read."""
    if path.is_dir():
        return _load_folder(path, split)
    dataset, row_format, columns = _load_file(path, format_line(path.name))
    return dataset, describe_columns(row_format, columns)


def _convert_list(rows: Any, name: str) -> tuple[Dataset, str]:
    """Convert rows in memory; the columns of the first decide the row format."""
    if not isinstance(rows, Sequence):
        remedy = "give a file, a folder, a hub name, a list of rows or a Dataset (one split)"
        if isinstance(rows, datasets.IterableDataset):
            remedy = "streaming: true reads training rows from it; held-out rows have to be a list or a Dataset"
        raise SFTError(f"{name}: cannot be read, it is of type {type(rows).__name__}; {remedy}")
    if not rows:
        raise SFTError(f"{name}: no rows")
    if not isinstance(rows[0], Mapping):
        raise SFTError(f"{name} row 0: expected an object with columns, got {describe_type(rows[0])}")
    row_format = detect_format(rows[0], name)
    converted = [convert_source_row(row, f"{name} row {index}", row_format, False) for index, row in enumerate(rows)]
    return Dataset.from_list(converted, features=FEATURES), describe_columns(row_format, list(rows[0]))


def read_raw_rows(name_or_path: str, split: str = "train") -> Iterator[LocatedRow]:
    """Yield (location, row) for each row of a source, without converting, checking or caching it."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        for file in list_data_files(path, split):
            yield from read_rows(file, format_file_name(file))
    elif path.is_file():
        yield from read_rows(path, format_line(path.name))
    else:
        dataset = _load_from_hub(SourceEntry(str(name_or_path)), split)
        row_format = detect_format(dataset.column_names, str(name_or_path), require_answer=False)
        tables = _select_arrow_columns(dataset, row_format).iter(batch_size=1000)
        rows = (row for table in tables for row in convert_to_rows(table))
        yield from ((f"{name_or_path} row {index}", row) for index, row in enumerate(rows))


def describe_columns(row_format: RowFormat, columns: list[str]) -> str:
    """Describe how a source is read: "read as alpaca (instruction, input, output)"."""
    return format_line(f"read as {row_format.name} ({', '.join(row_format.select_columns(columns))})")


def describe_unread_names(counts: Counter[str]) -> str:
    """Describe the numbers of rows by name, the largest first: "id in 40 rows, messages[].weight in 12 rows"."""
    shown = [
        f"{name or 'a column without a name'} in {rows:,} row{'s' if rows > 1 else ''}"
        for name, rows in counts.most_common(SHOWN_NAMES)
    ]
    more = [f"{len(counts) - SHOWN_NAMES:,} other names"] if len(counts) > SHOWN_NAMES else []
    return ", ".join(shown + more)


def _count_unread_names(dataset: Dataset) -> Counter[str]:
    """Count the rows of a dataset of FEATURES in which a name is in the column `unread`."""
    names = pc.value_counts(pc.list_flatten(dataset.data.column("unread")))
    return Counter({entry["values"]: entry["counts"] for entry in names.to_pylist()})


def _load_file(path: Path, name: str) -> tuple[Dataset, RowFormat, list[str]]:
    """Load a file as a dataset of FEATURES; returns it with the row format and the columns of the first row."""
    row_format, columns = detect_file_format(path, name)
    # datasets hashes these arguments into the name of its cache.
    arguments = {
        "path": str(path.resolve()),
        "name": name,
        "format_name": row_format.name,
        "cache_key": _build_cache_key(path, row_format),
    }
    try:
        dataset = Dataset.from_generator(_generate_rows, features=FEATURES, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None  # datasets wraps the reader's SFTError
    return dataset, row_format, columns


def detect_file_format(path: Path, name: str) -> tuple[RowFormat, list[str]]:
    """Return the row format of a file and the columns of its first row."""
    first = next(read_rows(path, name), None)
    if first is None:
        raise SFTError(f"{name}: no rows")
    location, row = first
    if not isinstance(row, dict):
        raise SFTError(f"{location}: expected an object with columns, got {describe_type(row)}")
    return detect_format(row, name), list(row)


def check_same_format(folder: Path, paths: Sequence[Path], formats: Sequence[RowFormat]) -> None:
    """Raise SFTError unless the files of a folder have the same row format."""
    for path, row_format in zip(paths, formats):
        if row_format != formats[0]:
            mismatch = f"{paths[0].name} is {formats[0].name}, {path.name} is {row_format.name}"
            raise SFTError(f"{folder}: mixed row formats: {mismatch}; use one format per folder")


def _generate_rows(path: str, name: str, format_name: str, cache_key: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of FEATURES of a file; `cache_key` only names the cache."""
    for location, row in read_rows(Path(path), name):
        yield convert_source_row(row, location, FORMATS[format_name], Path(path).suffix.lower() in COLUMNAR)


def convert_source_row(row: Any, location: str, row_format: RowFormat, is_columnar: bool) -> dict[str, Any]:
    """Convert a row to the columns of FEATURES; a bad row gets its error as `problem`.

    is_columnar: whether Arrow has read the row, so that a null in an object may be an absent key.
    """
    row, ambiguous_nulls = drop_ambiguous_nulls(row) if is_columnar else (row, [])
    unread = list_unread_names(row, row_format) + ambiguous_nulls
    try:
        text, problem = format_conversation(convert_row(row, row_format)), None
    except SFTError as error:
        text, problem = "", str(error)
    return {"conversation": text, "origin": location, "problem": problem, "unread": unread}


def _build_cache_key(path: Path, row_format: RowFormat) -> str:
    return f"{_hash_file(path)}-{row_format.name}-{ROWS_FORMAT}"


def _hash_file(path: Path) -> str:
    """Return the BLAKE2b hash of a file's content."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def hash_source(name_or_path: str, split: str = "train") -> str | None:
    """Return a hash of the content of a file, or of a folder's data files in order; None if there is no such path."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        hashes = "".join(map(_hash_file, list_data_files(path, split)))
        return hashlib.blake2b(hashes.encode(), digest_size=16).hexdigest()
    return _hash_file(path) if path.is_file() else None


def _load_folder(folder: Path, split: str) -> tuple[Dataset, str]:
    paths = list_data_files(folder, split)
    parts = [_load_file(path, format_file_name(path)) for path in paths]
    _, row_format, columns = parts[0]
    check_same_format(folder, paths, [part[1] for part in parts])
    log_unread_files(folder, paths)
    description = describe_files(paths, row_format, columns)
    return datasets.concatenate_datasets([part[0] for part in parts]), description


def log_unread_files(folder: Path, paths: Sequence[Path]) -> None:
    """Log the files and folders in a folder of data files that are not read; hidden ones are left out."""
    others = sorted({path for path in folder.iterdir() if not path.name.startswith(".")} - set(paths))
    if others and paths[0].parent == folder and not (folder / "state.json").is_file():
        shown = [format_line(path.name) for path in others[:SHOWN_NAMES]]
        more = [f"{len(others) - SHOWN_NAMES:,} others"] if len(others) > SHOWN_NAMES else []
        logger.info("%s: not read: %s; data are files of %s", folder, ", ".join(shown + more), ", ".join(READERS))


def describe_files(paths: Sequence[Path], row_format: RowFormat, columns: list[str]) -> str:
    """Describe how the files of a folder are read: "2 files, read as alpaca (instruction, input, output)"."""
    return f"{len(paths)} file{'s' if len(paths) > 1 else ''}, {describe_columns(row_format, columns)}"


def format_file_name(file: Path) -> str:
    """Format the name of a folder's file for errors and the column `origin`."""
    return format_line(f"{file.parent.name}/{file.name}")


def list_data_files(folder: Path, split: str) -> list[Path]:
    """List the data files of a folder, sorted by name; of a saved dataset, the files in its state.json.

    The folder may come from someone else, so a symbolic link that leaves it raises SFTError.
    """
    paths = _find_data_files(folder, split)
    for path in paths:
        if not path.resolve().is_relative_to(folder.resolve()):
            remedy = "copy the file into the folder, or name it in train_data"
            raise SFTError(f"{folder}: {path.name} is a symbolic link that leaves the folder; {remedy}")
    return paths


def _find_data_files(folder: Path, split: str) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        if not (folder / split / "state.json").is_file():
            splits = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) or "none"
            raise SFTError(f"{folder}: no split {split!r} in this saved dataset; available splits: {splits}")
        folder = folder / split
    if (folder / "state.json").is_file():
        return list_saved_files(folder)
    paths = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in READERS and (path.is_file() or path.is_symlink()) and not path.name.startswith(".")
    )
    if not paths:
        raise SFTError(f"{folder}: no data file in this folder; supported file types: {', '.join(READERS)}")
    return paths


def list_saved_files(folder: Path) -> list[Path]:
    """List the Arrow files of a dataset written by `save_to_disk`, without the caches of `map` beside them.

    The files are read directly because `load_from_disk` follows names out of the folder, and `map` on the loaded
    dataset would write caches into it.
    """
    try:
        names = [str(entry["filename"]) for entry in json.loads((folder / "state.json").read_bytes())["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {format_error(error)}"
        raise SFTError(f"{folder}: state.json is not from save_to_disk ({reason}); save the dataset again") from error
    for name in names:
        if Path(name).name != name:
            raise SFTError(f"{folder}: state.json lists a file outside the folder ({name}); save the dataset again")
        if not (folder / name).is_file():
            raise SFTError(f"{folder}: {name}, which state.json lists, is missing; save the dataset again")
    if not names:
        raise SFTError(f"{folder}: no rows")
    return [folder / name for name in names]


def is_hub_name(name: str) -> bool:
    """Return whether `name`, which is no local path, can be the name of a hub dataset."""
    return Path(name).suffix.lower() not in READERS and bool(HUB_NAME.fullmatch(name)) and not name.startswith(".")


def _load_from_hub(entry: SourceEntry, split: str, streaming: bool = False) -> Any:
    name = entry.path
    if not is_hub_name(name):
        raise SFTError(f"{name}: no such file or folder; check the path (current folder: {Path.cwd()})")
    try:
        options: dict[str, Any] = {"streaming": True} if streaming else {}
        return datasets.load_dataset(
            name, entry.name, split=split, revision=entry.revision, data_files=entry.data_files, **options
        )
    except Exception as error:  # the hub client raises many classes: of the network, of HTTP and its own
        reason = f"{type(error).__name__}: {format_error(error)}"
        raise SFTError(
            f"{name}: no such file or folder, and not available on the hub ({reason}); check the name and the network"
        ) from error


def _convert_dataset(dataset: Dataset, name: str) -> tuple[Dataset, str]:
    columns = dataset.column_names
    row_format = detect_format(columns, name)
    selected = _select_arrow_columns(dataset, row_format)
    converted = selected.map(
        _convert_batch,
        batched=True,
        with_indices=True,
        # datasets hashes these arguments into the name of its cache.
        fn_kwargs={"name": name, "format_name": row_format.name, "rows_format": ROWS_FORMAT},
        remove_columns=selected.column_names,
        features=FEATURES,
        desc=f"reading {name}",
    )
    return converted.with_format(None), describe_columns(row_format, columns)


def _count_unread_columns(dataset: Dataset, row_format: RowFormat) -> Counter[str]:
    """Count the rows of a source that hold something in a column that `row_format` does not read."""
    read = row_format.select_columns(dataset.column_names)
    unread = dataset.select_columns([column for column in dataset.column_names if column not in read])
    counts: Counter[str] = Counter()
    if unread.column_names:
        # As Arrow tables, slices of the file: columns of images are neither decoded nor read.
        for table in unread.with_format("arrow").iter(batch_size=1000):
            for column in table.column_names:
                counts[format_line(column)] += len(table) - table.column(column).null_count
    return +counts


def _select_arrow_columns(dataset: Dataset, row_format: RowFormat) -> Dataset:
    """Select the columns of the row format as Arrow tables, because decoding images opens paths in the data."""
    return dataset.select_columns(row_format.select_columns(dataset.column_names)).with_format("arrow")


def _convert_batch(batch: pa.Table, indices: list[int], name: str, format_name: str, rows_format: int) -> pa.Table:
    """Convert a batch to the columns of FEATURES; `rows_format` only names the cache."""
    rows = [
        convert_source_row(row, f"{name} row {index}", FORMATS[format_name], True)
        for row, index in zip(convert_to_rows(batch), indices)
    ]
    return pa.Table.from_pylist(rows, schema=FEATURES.arrow_schema)


def _remove_bad_rows(dataset: Dataset, name: str, skip_bad_rows: bool) -> Dataset:
    """Raise SFTError for bad rows, or with `skip_bad_rows` drop and log them; removes the column `problem`."""
    if not len(dataset):
        raise SFTError(f"{name}: no rows")
    is_bad = pc.is_valid(dataset.data.column("problem")).to_numpy()
    bad_rows = is_bad.nonzero()[0]
    if len(bad_rows):
        first_error = "{origin}: {problem}".format(**dataset[int(bad_rows[0])])
        if not skip_bad_rows:
            count = f" ({len(bad_rows) - 1:,} more bad rows)" if len(bad_rows) > 1 else ""
            raise SFTError(f"{first_error}{count}; fix the data or set skip_bad_rows: true")
        if len(bad_rows) == len(dataset):
            raise SFTError(f"{name}: all rows are bad; first error: {first_error}")
        logger.warning(
            "%s: skipped %s of %s rows as bad; first error: %s", name, len(bad_rows), len(dataset), first_error
        )
        dataset = dataset.select((~is_bad).nonzero()[0])
    return dataset.remove_columns("problem")
