"""Files -> rows, one at a time, each with the place where it stands, for messages such as "chat.jsonl line 18".

Rows are counted from 0, lines from 1. Nothing here knows what the columns mean. JSON and CSV are read by Python's own
parsers: they keep text as text (Arrow's reader makes dates of strings that look like dates) and tell lines exactly.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sft_pipeline.errors import SFTError

PlacedRow = tuple[str, Any]  # where it stands, the row
# What pyarrow raises for a broken file, and Python for a value that it cannot hold, such as a date in the year 10000.
UNREADABLE = (pa.ArrowException, ArithmeticError, LookupError, TypeError)
SPACE = re.compile(r"[ \t\r\n]*")


def read_rows(path: Path, name: str) -> Iterator[PlacedRow]:
    """The rows of one file. `name` is what messages call it.

    Raises SFTError for an unknown suffix, a file that does not parse (with its line) or is not UTF-8.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise SFTError(f"{name}: not a known kind of file; known are {', '.join(READERS)}")
    try:
        yield from reader(path, name)
    except UnicodeDecodeError as error:
        raise SFTError(f"{name}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    except OSError as error:
        raise SFTError(f"{name}: cannot be read ({error.strerror or error})") from error


def _jsonl(path: Path, name: str) -> Iterator[PlacedRow]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{name} line {number}", _line(line, f"{name} line {number}")


def _line(line: bytes, place: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        raise SFTError(f"{place}: not UTF-8 at byte {error.start} of the line; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise SFTError(f"{place}: not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        raise SFTError(f"{place}: not JSON that can be read: {error}") from error


def _json(path: Path, name: str) -> Iterator[PlacedRow]:
    """A list of objects, decoded one by one: a large file costs its text, not all its objects at once."""
    text = path.read_text(encoding="utf-8-sig")
    start = _skip_space(text, 0)
    if text.startswith("{", start):  # many a JSONL file is called .json
        yield from _jsonl(path, name)
        return
    try:
        for index, row in enumerate(_elements(text, start)):
            yield f"{name} row {index}", row
    except json.JSONDecodeError as error:
        raise SFTError(f"{name}: not JSON: {error.msg} at line {error.lineno} column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise SFTError(f"{name}: not JSON that can be read: {error}") from error


def _elements(text: str, start: int) -> Iterator[Any]:
    decoder, position = json.JSONDecoder(), _skip_space(text, start + 1)
    if not text.startswith("[", start):
        raise json.JSONDecodeError("Expecting a list of objects", text, start)
    more = not text.startswith("]", position)
    while more:
        row, position = decoder.raw_decode(text, position)
        yield row
        position = _skip_space(text, position)
        if text[position : position + 1] not in (",", "]"):
            raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        more = text[position] == ","
        position = _skip_space(text, position + 1) if more else position
    if _skip_space(text, position + 1) < len(text):
        raise json.JSONDecodeError("Extra data after the list", text, position + 1)


def _skip_space(text: str, position: int) -> int:
    return SPACE.match(text, position).end()  # type: ignore[union-attr]  # it matches the empty string too


def _csv(path: Path, name: str) -> Iterator[PlacedRow]:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is less than a long answer
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            _refuse_twins(list(reader.fieldnames or []), name)
            for index, row in enumerate(reader):
                if None in row:
                    raise SFTError(f"{name} row {index}: more cells than the header; quote cells that hold commas")
                yield f"{name} row {index}", row
        except csv.Error as error:
            raise SFTError(f"{name}: not CSV: {error} at line {reader.line_num}") from error


def _parquet(path: Path, name: str) -> Iterator[PlacedRow]:
    try:
        with pq.ParquetFile(path) as file:
            _refuse_twins(file.schema_arrow.names, name)
            yield from _placed(file.iter_batches(batch_size=1000), name)
    except UNREADABLE as error:
        raise SFTError(f"{name}: not a readable Parquet file ({_first_line(error)})") from error


def _arrow(path: Path, name: str) -> Iterator[PlacedRow]:
    """Both of Arrow's containers: the file with a footer and the stream, which `datasets` writes."""
    try:
        with pa.memory_map(str(path)) as source:
            try:
                table = pa.ipc.open_file(source).read_all()
            except pa.ArrowInvalid:
                source.seek(0)
                table = pa.ipc.open_stream(source).read_all()
            _refuse_twins(table.column_names, name)
            # The file is used as it lies in memory: an offset that leads out of it would be followed.
            table.validate(full=True)
            yield from _placed(table.to_batches(max_chunksize=1000), name)
    except UNREADABLE as error:
        raise SFTError(f"{name}: not a readable Arrow file ({_first_line(error)})") from error


def _placed(batches: Any, name: str) -> Iterator[PlacedRow]:
    rows = (row for batch in batches for row in batch.to_pylist())
    return ((f"{name} row {index}", row) for index, row in enumerate(rows))


def _refuse_twins(columns: list[str], name: str) -> None:
    """Of columns that are called alike, a row could keep one alone."""
    for at, column in enumerate(columns):
        if column in columns[:at]:
            raise SFTError(f"{name}: has more than one column {column!r}; rename or remove all but one")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


READERS: dict[str, Callable[[Path, str], Iterator[PlacedRow]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
