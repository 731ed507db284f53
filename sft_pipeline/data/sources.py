"""A hub name, file or folder -> a `datasets.Dataset` of messages, with the place of every row.

    load_source("alpaca.json")  # columns: messages (list of {"role", "content"}), origin ("alpaca.json row 17")

The shape of the rows is found from the columns (see formats.py) and said in the log. Rows are converted once and kept
in `datasets`' cache, under a key of the content, the shape and the code that converts. Nothing is executed: no loading
scripts, no pickles, no path that stands in the data is opened, and no link is followed out of a folder.
"""

import hashlib
import inspect
import json
import logging
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError

from sft_pipeline.data import formats, readers
from sft_pipeline.data.formats import FORMATS, RowFormat, convert_to_messages, detect_format
from sft_pipeline.data.readers import READERS, LocatedRow, read_rows
from sft_pipeline.utils.errors import SFTError, format_error
from sft_pipeline.utils.sanitize import format_line

logger = logging.getLogger(__name__)

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
FEATURES = Features(
    {
        "messages": [{"role": Value("string"), "content": Value("string")}],
        "origin": Value("string"),
        "problem": Value("string"),  # why the row is bad, or null; gone when load_source returns
    }
)


def load_source(name_or_path: str, split: str = "train", skip_bad_rows: bool = False) -> Dataset:
    """The rows of a file (.json, .jsonl, .csv, .parquet, .arrow), of a folder of such files, of a folder written by
    `save_to_disk`, or of a data set on the hub, as `messages` and `origin`.

    A folder's files are all read, sorted by name, and must have one shape. `split` chooses among the splits of the hub
    and of a saved `DatasetDict`. Bad rows raise, unless `skip_bad_rows`, which leaves them out and logs their number.

    Raises SFTError: missing source, file that does not parse, unknown or mixed columns, bad row, no rows.
    """
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if path.is_dir():
        dataset, said = _load_folder(path, split)
    elif path.is_file():
        dataset, shape, columns = _load_file(path, format_line(path.name))
        said = _reading(shape, columns)
    else:
        dataset, said = _convert(_from_hub(name, split), name)
    dataset = _without_problems(dataset, name, skip_bad_rows)
    logger.info("%s: %s rows, %s", name, f"{len(dataset):,}", said)
    return dataset


def read_raw_rows(name_or_path: str, split: str = "train") -> Iterator[LocatedRow]:
    """The rows of the same sources as they are, each with its place: nothing is converted, checked or cached."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        for file in _files(path, split):
            yield from read_rows(file, _name(file))
    elif path.is_file():
        yield from read_rows(path, format_line(path.name))
    else:
        dataset = _from_hub(str(name_or_path), split)
        shape = detect_format(dataset.column_names, str(name_or_path), answered=False)
        tables = _undecoded(dataset, shape).iter(batch_size=1000)
        rows = (row for table in tables for row in table.to_pylist())
        yield from ((f"{name_or_path} row {index}", row) for index, row in enumerate(rows))


def _reading(shape: RowFormat, columns: list[str]) -> str:
    """The choice said aloud: "read as alpaca (instruction, input, output)"."""
    used = shape.used(columns)
    unused = [column for column in columns if column not in used]
    return format_line(
        f"read as {shape.name} ({', '.join(used)})" + (f", without {', '.join(unused)}" if unused else "")
    )


def _load_file(path: Path, name: str) -> tuple[Dataset, RowFormat, list[str]]:
    place, row = next(read_rows(path, name), (name, None))
    if row is None:
        raise SFTError(f"{name}: no rows")
    if not isinstance(row, dict):
        raise SFTError(f"{place}: a row must be an object with columns, this is of type {type(row).__name__}")
    shape = detect_format(row, name)
    arguments = {"path": str(path.resolve()), "name": name, "shape": shape.name, "key": _digest(path) + _code()}
    try:
        dataset = Dataset.from_generator(_file_rows, features=FEATURES, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None  # datasets wraps the reader's SFTError
    return dataset, shape, list(row)


def _file_rows(path: str, name: str, shape: str, key: str) -> Iterator[dict[str, Any]]:
    """`key` is not read: datasets hashes the arguments into the name of its cache."""
    for place, row in read_rows(Path(path), name):
        yield _examined(row, place, FORMATS[shape])


def _examined(row: Any, place: str, shape: RowFormat) -> dict[str, Any]:
    try:
        return {"messages": convert_to_messages(row, shape), "origin": place, "problem": None}
    except SFTError as error:
        return {"messages": [], "origin": place, "problem": str(error)}


def _digest(path: Path) -> str:
    """Of the content, so that a file that was only copied or touched is found in the cache."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@cache
def _code() -> str:
    """A hash of the converting code: datasets hashes an imported function by its name alone."""
    return hashlib.blake2b((inspect.getsource(formats) + inspect.getsource(readers)).encode()).hexdigest()


def hash_source(name_or_path: str, split: str = "train") -> str | None:
    """Of a file, or of a folder's files in their order; None for a name on the hub, or where there is nothing."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return hashlib.blake2b("".join(map(_digest, _files(path, split))).encode(), digest_size=16).hexdigest()
    return _digest(path) if path.is_file() else None


def _load_folder(folder: Path, split: str) -> tuple[Dataset, str]:
    paths = _files(folder, split)
    parts = [_load_file(path, _name(path)) for path in paths]
    _, shape, columns = parts[0]
    for path, (_, other, _) in zip(paths, parts):
        if other != shape:
            two = f"{paths[0].name} is {shape.name}, {path.name} is {other.name}"
            raise SFTError(f"{folder}: mixed columns: {two}; keep one shape in a folder")
    files = f"{len(paths)} file{'s' if len(paths) > 1 else ''}"
    return datasets.concatenate_datasets([part[0] for part in parts]), f"{files}, {_reading(shape, columns)}"


def _name(file: Path) -> str:
    """A folder's file as messages and the rows' `origin` call it."""
    return format_line(f"{file.parent.name}/{file.name}")


def _files(folder: Path, split: str) -> list[Path]:
    """The data files of a folder, sorted by name; of what `save_to_disk` wrote, those that its state.json lists.

    A folder may be somebody else's: a link in it that leads out of it is refused, not followed and not left out.
    """
    paths = _listed(folder, split)
    for path in paths:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise SFTError(
                f"{folder}: {path.name} is a link out of the folder; copy the file here, or name it in train_data"
            )
    return paths


def _listed(folder: Path, split: str) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        if not (folder / split / "state.json").is_file():
            found = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) or "none"
            raise SFTError(f"{folder}: no split {split!r} in this saved data set; it has: {found}")
        folder = folder / split
    if (folder / "state.json").is_file():
        return list_saved_files(folder)
    paths = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in READERS and (path.is_file() or path.is_symlink())
    )
    paths = [path for path in paths if not path.name.startswith(".")]
    if not paths:
        raise SFTError(f"{folder}: no data file in this folder; known are {', '.join(READERS)}")
    return paths


def list_saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a saved data set, but not the caches that lie beside them. They are read as files, because
    `load_from_disk` follows a name out of the folder and maps would leave new caches in it."""
    try:
        names = [str(entry["filename"]) for entry in json.loads((folder / "state.json").read_bytes())["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise SFTError(
            f"{folder}: its state.json is not what save_to_disk writes ({type(error).__name__}: {format_error(error)})"
        ) from error
    for name in names:
        if Path(name).name != name:
            raise SFTError(f"{folder}: its state.json names a file outside the folder ({name})")
        if not (folder / name).is_file():
            raise SFTError(f"{folder}: the file {name}, which its state.json names, is missing")
    if not names:
        raise SFTError(f"{folder}: no rows")
    return [folder / name for name in names]


def is_hub_name(name: str) -> bool:
    """Whether it can be a name there, where no file or folder has it."""
    return Path(name).suffix.lower() not in READERS and bool(HUB_NAME.fullmatch(name)) and not name.startswith(".")


def _from_hub(name: str, split: str) -> Dataset:
    if not is_hub_name(name):
        raise SFTError(f"{name}: no such file or folder; check the path (it starts at {Path.cwd()})")
    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub's client raises a dozen classes, of the network, of HTTP and of its own
        missing = "neither a file or folder here nor a data set that the hub gives"
        raise SFTError(
            f"{name}: {missing} ({type(error).__name__}: {format_error(error)}); check the name and the connection"
        ) from error


def _convert(dataset: Dataset, name: str) -> tuple[Dataset, str]:
    columns = dataset.column_names
    shape = detect_format(columns, name)
    used = _undecoded(dataset, shape)
    converted = used.map(
        _convert_batch,
        batched=True,
        with_indices=True,
        fn_kwargs={"name": name, "shape": shape.name, "key": _code()},
        remove_columns=used.column_names,
        features=FEATURES,
        desc=f"reading {name}",
    )
    return converted.with_format(None), _reading(shape, columns)


def _undecoded(dataset: Dataset, shape: RowFormat) -> Dataset:
    """The columns of the shape as Arrow: the decoding of images and sounds would open the paths that stand in the
    data."""
    return dataset.select_columns(shape.used(dataset.column_names)).with_format("arrow")


def _convert_batch(batch: pa.Table, indices: list[int], name: str, shape: str, key: str) -> pa.Table:
    """`key` is not read: see _file_rows."""
    rows = zip(batch.to_pylist(), indices)
    examined = [_examined(row, f"{name} row {index}", FORMATS[shape]) for row, index in rows]
    return pa.Table.from_pylist(examined, schema=FEATURES.arrow_schema)


def _without_problems(dataset: Dataset, name: str, skip_bad_rows: bool) -> Dataset:
    """Raise for bad rows, or leave them out; what is returned has `messages` and `origin` alone."""
    if not len(dataset):
        raise SFTError(f"{name}: no rows")
    bad = pc.is_valid(dataset.data.column("problem")).to_numpy().nonzero()[0]
    if len(bad):
        first = "{origin}: {problem}".format(**dataset[int(bad[0])])
        if not skip_bad_rows:
            others = f" ({len(bad) - 1:,} more bad rows)" if len(bad) > 1 else ""
            raise SFTError(f"{first}{others}; mend the data or set skip_bad_rows")
        if len(bad) == len(dataset):
            raise SFTError(f"{name}: no good rows; the first: {first}")
        logger.warning("%s: %s of %s rows are bad and skipped; the first: %s", name, len(bad), len(dataset), first)
        good = pc.is_null(dataset.data.column("problem")).to_numpy().nonzero()[0]
        dataset = dataset.select(good)
    return dataset.remove_columns("problem")
