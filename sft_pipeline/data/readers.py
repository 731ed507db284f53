"""Files -> rows, one at a time, each with the place where it stands, for messages such as "chat.jsonl line 18".

Rows are counted from 0, lines from 1. Nothing here knows what the columns mean. JSON and CSV are read by Python's own
parsers: they keep text as text (Arrow's reader makes dates of strings that look like dates) and tell lines exactly.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from sft_pipeline.utils.errors import SFTError, format_first_line

LocatedRow = tuple[str, Any]  # where it stands, the row
# What pyarrow raises for a broken file, and Python for a value that it cannot hold, such as a date in the year 10000.
UNREADABLE = (pa.ArrowException, ArithmeticError, LookupError, TypeError)
SPACE = re.compile(r"[ \t\r\n]*")
CHUNK = 1 << 20  # characters of JSON read at a time: more than a word, a number's end or an escape has


def read_rows(path: Path, name: str) -> Iterator[LocatedRow]:
    """The rows of one file. `name` is what messages call it.

    Raises SFTError for an unknown suffix, a file that does not parse (with its line) or is not UTF-8.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise SFTError(f"{name}: not a known kind of file; known are {', '.join(READERS)}")
    try:
        yield from reader(path, name)
    except UnicodeDecodeError as error:
        raise SFTError(f"{name}: not UTF-8 at byte {_not_utf8(path)}; save the file as UTF-8") from error
    except OSError as error:
        raise SFTError(f"{name}: cannot be read ({error.strerror or error}); check its permissions") from error


def _jsonl(path: Path, name: str) -> Iterator[LocatedRow]:
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


def _json(path: Path, name: str) -> Iterator[LocatedRow]:
    """A list of objects, decoded one by one: a large file costs its longest row, not its text."""
    with path.open(encoding="utf-8-sig") as file:
        window = _Window(file)
        try:
            if window.next() == "{":  # many a JSONL file is called .json
                yield from _jsonl(path, name)
                return
            for index, row in enumerate(_elements(window)):
                yield f"{name} row {index}", row
        except json.JSONDecodeError as error:
            raise SFTError(f"{name}: not JSON: {error.msg} at {window.place(error.pos)}") from error
        except UnicodeDecodeError:  # read_rows says where
            raise
        except (ValueError, RecursionError) as error:
            raise SFTError(f"{name}: not JSON that can be read: {error}") from error


def _elements(window: "_Window") -> Iterator[Any]:
    window.take("[", "Expecting a list of objects")
    if window.next() == "]":
        window.at += 1
    else:
        yield window.decode()
        while window.take(",]", "Expecting ',' or ']'") == ",":
            window.next()
            yield window.decode()
    if window.next():
        raise json.JSONDecodeError("Extra data after the list", window.text, window.at)


class _Window:
    """The part of a text that is being decoded: what stands before it is forgotten, what follows is not yet read."""

    def __init__(self, file: TextIO) -> None:
        self.text, self.at = "", 0  # what stands before `at` is decoded
        self._file, self._decoder = file, json.JSONDecoder()
        self._lines = self._column = 0  # forgotten: line ends, and characters since the last one

    def next(self) -> str:
        """The next character that is no space, to which `at` goes; empty at the end of the file."""
        self.at = _skip_space(self.text, self.at)
        while self.at == len(self.text) and self._read_on():
            self.at = _skip_space(self.text, self.at)
        return self.text[self.at : self.at + 1]

    def take(self, expected: str, error: str) -> str:
        """The next character, which has to be one of `expected`."""
        found = self.next()
        if not found or found not in expected:
            raise json.JSONDecodeError(error, self.text, self.at)
        self.at += 1
        return found

    def decode(self) -> Any:
        """The value at `at`, after reading on as long as it may be cut off.

        An error is one if it stays where and what it was with more text, which that of a cut text does not; a value is
        whole if three characters stand behind it, for a number may go on with them: e-9.
        """
        before = None
        while True:
            try:
                value, end = self._decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                found = error.msg, error.pos - self.at
                is_one = found == before and not error.msg.startswith("Unterminated")
                if is_one or not self._read_on():
                    raise
                before = found
                continue
            if end + 3 <= len(self.text) or not self._read_on():
                self.at = end
                return value

    def place(self, position: int) -> str:
        """Where a position of the text stands in the file."""
        before = self.text[:position]
        line, column = before.count("\n"), len(before) - before.rfind("\n") - 1
        return f"line {self._lines + line + 1} column {column + 1 + (0 if line else self._column)}"

    def _read_on(self) -> bool:
        """Read CHUNK or as much as is there already, and forget what is decoded; False at the end of the file."""
        piece = self._file.read(max(CHUNK, len(self.text) - self.at))
        if not piece:
            return False
        gone, self.text, self.at = self.text[: self.at], self.text[self.at :] + piece, 0
        lines = gone.count("\n")
        self._column = len(gone) - gone.rfind("\n") - 1 + (0 if lines else self._column)
        self._lines += lines
        return True


def _skip_space(text: str, position: int) -> int:
    return SPACE.match(text, position).end()  # type: ignore[union-attr]  # it matches the empty string too


def _not_utf8(path: Path) -> int:
    """Where the first byte stands that is not UTF-8, of which a line's end is never in the middle of a character."""
    start = 0
    with path.open("rb") as lines:
        for line in lines:
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return start + error.start
            start += len(line)
    return start


def _csv(path: Path, name: str) -> Iterator[LocatedRow]:
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


def _parquet(path: Path, name: str) -> Iterator[LocatedRow]:
    try:
        with pq.ParquetFile(path) as file:
            _refuse_twins(file.schema_arrow.names, name)
            yield from _placed(file.iter_batches(batch_size=1000), name)
    except UNREADABLE as error:
        raise SFTError(f"{name}: not a readable Parquet file ({format_first_line(error)})") from error


def _arrow(path: Path, name: str) -> Iterator[LocatedRow]:
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
        raise SFTError(f"{name}: not a readable Arrow file ({format_first_line(error)})") from error


def _placed(batches: Any, name: str) -> Iterator[LocatedRow]:
    rows = (row for batch in batches for row in batch.to_pylist())
    return ((f"{name} row {index}", row) for index, row in enumerate(rows))


def _refuse_twins(columns: list[str], name: str) -> None:
    """Of columns that are called alike, a row could keep one alone."""
    for at, column in enumerate(columns):
        if column in columns[:at]:
            raise SFTError(f"{name}: has more than one column {column!r}; rename or remove all but one")


READERS: dict[str, Callable[[Path, str], Iterator[LocatedRow]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
