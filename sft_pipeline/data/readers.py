"""Read the rows of a file one at a time, each with its location for error messages, such as "chat.jsonl line 18".

Rows are counted from 0, lines from 1. Nothing here knows what the columns mean. JSON and CSV are read by Python's own
parsers, which keep strings as they are (Arrow's reader converts strings that look like dates) and report exact lines.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from sft_pipeline.utils.errors import SFTError, format_first_line

LocatedRow = tuple[str, Any]  # (location, row)
# What pyarrow raises for a broken file, and Python for a value that it cannot hold, such as a date in the year 10000.
UNREADABLE = (pa.ArrowException, ArithmeticError, LookupError, TypeError)
SPACE = re.compile(r"[ \t\r\n]*")
# Characters of JSON read at a time; must be more than the length of a literal, a number's exponent or an escape.
CHUNK = 1 << 20
# What a spreadsheet writes instead, and how to convert it.
SAVE_AS_UTF8 = "save the file as UTF-8 (in Excel: CSV UTF-8), or convert it, as with `iconv -f GB18030 -t UTF-8`"
BATCH_ROWS = 1000  # of a columnar file that are converted at a time


@dataclass
class FilePosition:
    """How far a file is read: rows, and of JSONL also lines and bytes, from which reading can go on."""

    rows: int = 0
    lines: int = 0
    offset: int = 0


def read_rows(path: Path, name: str, position: FilePosition | None = None) -> Iterator[LocatedRow]:
    """Yield (location, row) for each row of a file; `name` is the file's name in locations and errors.

    position: where to begin; it is the end of a row when that row is yielded. JSONL, Parquet and Arrow files are not
    read again up to there, JSON lists and CSV files are.

    Raises SFTError for an unknown file type, a file that does not parse (with the line) or one that is not UTF-8.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise SFTError(f"{name}: unsupported file type; use one of: {', '.join(READERS)}")
    position = position or FilePosition()
    try:
        for row in reader(path, name, position):
            position.rows += 1
            yield row
    except UnicodeDecodeError as error:
        raise SFTError(f"{name}: not UTF-8 at byte {_find_invalid_utf8(path)}; {SAVE_AS_UTF8}") from error
    except OSError as error:
        raise SFTError(f"{name}: cannot be read ({error.strerror or error}); check its permissions") from error


def _read_jsonl(path: Path, name: str, position: FilePosition) -> Iterator[LocatedRow]:
    with path.open("rb") as file:
        file.seek(position.offset)
        for line in file:
            position.lines += 1
            position.offset += len(line)
            if line.strip():
                location = f"{name} line {position.lines}"
                yield location, _decode_line(line, location)


def _decode_line(line: bytes, location: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        raise SFTError(f"{location}: not UTF-8 at byte {error.start} of the line; {SAVE_AS_UTF8}") from error
    except json.JSONDecodeError as error:
        problem = f"{location}: invalid JSON: {error.msg} at column {error.colno}"
        raise SFTError(f"{problem}; a .jsonl file has one object a line, without commas between them") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        raise SFTError(f"{location}: cannot parse JSON: {error}") from error


def _read_json(path: Path, name: str, position: FilePosition) -> Iterator[LocatedRow]:
    """Yield the objects of a JSON list, decoded one by one: memory holds the longest row, not the whole file."""
    with path.open(encoding="utf-8-sig") as file:
        stream = _JSONStream(file)
        try:
            if stream.find_next_char() == "{":  # a JSONL file with the suffix .json
                yield from _read_jsonl(path, name, position)
                return
            for index, row in islice(enumerate(_decode_list(stream)), position.rows, None):
                yield f"{name} row {index}", row
        except json.JSONDecodeError as error:
            raise SFTError(f"{name}: invalid JSON: {error.msg} at {stream.format_position(error.pos)}") from error
        except UnicodeDecodeError:  # read_rows reports the byte
            raise
        except (ValueError, RecursionError) as error:
            raise SFTError(f"{name}: cannot parse JSON: {error}") from error


def _decode_list(stream: "_JSONStream") -> Iterator[Any]:
    stream.read_char("[", "Expecting a list of objects")
    if stream.find_next_char() == "]":
        stream.position += 1
    else:
        yield stream.decode_value()
        while stream.read_char(",]", "Expecting ',' or ']'") == ",":
            if stream.find_next_char() == "]":
                raise json.JSONDecodeError("Remove the comma before ']'", stream.text, stream.position)
            yield stream.decode_value()
    if stream.find_next_char():
        raise json.JSONDecodeError("Extra data after the list", stream.text, stream.position)


class _JSONStream:
    """Decode JSON values from a file that is read in chunks; decoded text is dropped from memory.

    text: the part of the file in memory.
    position: index in `text` of the first character that is not decoded yet.
    """

    def __init__(self, file: TextIO) -> None:
        self.text, self.position = "", 0
        self._file, self._decoder = file, json.JSONDecoder()
        # Of the dropped text: the number of line ends, and of characters since the last one.
        self._dropped_lines = self._dropped_columns = 0

    def find_next_char(self) -> str:
        """Move to the next character that is not white space and return it; "" at the end of the file."""
        self.position = _skip_space(self.text, self.position)
        while self.position == len(self.text) and self._read_chunk():
            self.position = _skip_space(self.text, self.position)
        return self.text[self.position : self.position + 1]

    def read_char(self, expected: str, error: str) -> str:
        """Read the next character that is not white space. Raises JSONDecodeError if it is none of `expected`."""
        char = self.find_next_char()
        if not char or char not in expected:
            raise json.JSONDecodeError(error, self.text, self.position)
        self.position += 1
        return char

    def decode_value(self) -> Any:
        """Decode the value at `position`, reading more text as long as the value may be cut off at the end of `text`.

        A syntax error is final if decoding more text gives the same error at the same place, because the error of a
        value that is cut off changes with more text. A value is complete if at least three characters follow it,
        because a number may continue with up to three characters (e-9).
        """
        previous_error = None
        while True:
            try:
                value, end = self._decoder.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                current_error = error.msg, error.pos - self.position
                is_final = current_error == previous_error and not error.msg.startswith("Unterminated")
                if is_final or not self._read_chunk():
                    raise
                previous_error = current_error
                continue
            if end + 3 <= len(self.text) or not self._read_chunk():
                self.position = end
                return value

    def format_position(self, position: int) -> str:
        """Format a position in `text` as line and column of the file."""
        text = self.text[:position]
        line, column = text.count("\n"), len(text) - text.rfind("\n") - 1
        return f"line {self._dropped_lines + line + 1} column {column + 1 + (0 if line else self._dropped_columns)}"

    def _read_chunk(self) -> bool:
        """Read CHUNK characters, or as many as are in memory if that is more, and drop the decoded text.

        Returns False at the end of the file.
        """
        chunk = self._file.read(max(CHUNK, len(self.text) - self.position))
        if not chunk:
            return False
        dropped, self.text, self.position = self.text[: self.position], self.text[self.position :] + chunk, 0
        lines = dropped.count("\n")
        self._dropped_columns = len(dropped) - dropped.rfind("\n") - 1 + (0 if lines else self._dropped_columns)
        self._dropped_lines += lines
        return True


def _skip_space(text: str, position: int) -> int:
    """Return the position of the first character from `position` on that is not white space."""
    return SPACE.match(text, position).end()  # type: ignore[union-attr]  # it matches the empty string too


def _find_invalid_utf8(path: Path) -> int:
    """Return the offset of the first byte that is not UTF-8."""
    start = 0
    with path.open("rb") as file:
        for line in file:  # a line's end is never inside a character
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return start + error.start
            start += len(line)
    return start


def _read_csv(path: Path, name: str, position: FilePosition) -> Iterator[LocatedRow]:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is less than a long answer
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            columns = list(reader.fieldnames or [])
            _check_column_names(columns, name)
            if len(columns) == 1 and (separator := re.search(r"[;\t|]", columns[0])):
                raise SFTError(f"{name}: its cells are separated by {separator[0]!r}; save it with commas")
            for index, row in islice(enumerate(reader), position.rows, None):
                if None in row:
                    raise SFTError(f"{name} row {index}: more cells than the header; quote cells that contain commas")
                yield f"{name} row {index}", row
        except csv.Error as error:
            raise SFTError(f"{name}: invalid CSV: {error} at line {reader.line_num}") from error


def _read_parquet(path: Path, name: str, position: FilePosition) -> Iterator[LocatedRow]:
    try:
        with pq.ParquetFile(path) as file:
            _check_column_names(file.schema_arrow.names, name)
            groups, first = range(file.num_row_groups), 0
            while groups and first + (size := file.metadata.row_group(groups[0]).num_rows) <= position.rows:
                groups, first = groups[1:], first + size
            batches = file.iter_batches(batch_size=BATCH_ROWS, row_groups=list(groups))
            yield from _iterate_batches(batches, name, first, position.rows)
    except UNREADABLE as error:
        raise SFTError(f"{name}: not a readable Parquet file ({format_first_line(error)})") from error


def _read_arrow(path: Path, name: str, position: FilePosition) -> Iterator[LocatedRow]:
    """Read both of Arrow's IPC formats: the file format, and the stream format that `datasets` writes."""
    try:
        with pa.memory_map(str(path)) as source:
            try:
                file = pa.ipc.open_file(source)
                schema, batches = file.schema, map(file.get_batch, range(file.num_record_batches))
            except pa.ArrowInvalid:
                source.seek(0)
                stream = pa.ipc.open_stream(source)
                schema, batches = stream.schema, iter(stream)
            _check_column_names(schema.names, name)
            yield from _iterate_batches(batches, name, 0, position.rows)
    except UNREADABLE as error:
        raise SFTError(f"{name}: not a readable Arrow file ({format_first_line(error)})") from error


def _iterate_batches(batches: Iterable[pa.RecordBatch], name: str, first: int, start: int) -> Iterator[LocatedRow]:
    """Yield the rows from `start` on, some at a time; `first` is the number of the first row of the batches."""
    for batch in batches:
        end = first + batch.num_rows
        if start < end:
            # Buffers are used as mapped: without validation an offset beyond the file would be followed.
            batch.validate(full=True)
        for row in range(max(first, start), end, BATCH_ROWS):
            rows = convert_to_rows(batch.slice(row - first, BATCH_ROWS))
            yield from ((f"{name} row {index}", values) for index, values in enumerate(rows, row))
        first = end


def convert_to_rows(batch: pa.RecordBatch | pa.Table) -> list[dict[str, Any]]:
    """Return the rows of a batch, with the values of its JSON cells, as `datasets` has them where objects differ."""
    rows = batch.to_pylist()
    for field in batch.schema:
        if "arrow.json" in str(field.type):
            for row in rows:
                row[field.name] = _parse_json_cells(row[field.name], field.type)
    return rows


def _parse_json_cells(value: Any, cell_type: pa.DataType) -> Any:
    if isinstance(value, str) and getattr(cell_type, "extension_name", None) == "arrow.json":
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    if isinstance(value, list) and hasattr(cell_type, "value_type"):
        return [_parse_json_cells(item, cell_type.value_type) for item in value]
    if isinstance(value, dict):
        return {name: _parse_json_cells(item, cell_type.field(name).type) for name, item in value.items()}
    return value


def _check_column_names(columns: list[str], name: str) -> None:
    """Raise SFTError for columns of the same name, of which a row could keep only one."""
    for index, column in enumerate(columns):
        if column in columns[:index]:
            raise SFTError(f"{name}: duplicate column {column!r}; rename or remove all but one")


READERS: dict[str, Callable[[Path, str, FilePosition], Iterator[LocatedRow]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
COLUMNAR = (".parquet", ".arrow")  # types in whose objects an absent key is a null
