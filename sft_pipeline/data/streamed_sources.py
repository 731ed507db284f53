"""Read the rows of sources one at a time and mix them, with a state from which reading goes on.

    mix = SourceMix([open_stream(SourceEntry("a.jsonl")), open_stream(SourceEntry("b"))])
    row = mix.read_row()
    mix.load_state_dict(state)  # of `mix.state_dict()`, after which the rows come that came then

A row has the columns of sources.FEATURES. States are plain values for JSON.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets
from datasets.iterable_dataset import BufferShuffledExamplesIterable

from sft_pipeline.arguments import SourceEntry
from sft_pipeline.data.formats import RowFormat, detect_format
from sft_pipeline.data.readers import COLUMNAR, FilePosition, convert_to_rows, read_rows
from sft_pipeline.data.sources import (
    check_same_format,
    convert_source_row,
    describe_columns,
    describe_files,
    detect_file_format,
    format_file_name,
    list_data_files,
    log_unread_files,
    resolve_source,
)
from sft_pipeline.data.splits import check_weights
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.sanitize import format_line

logger = logging.getLogger(__name__)

State = dict[str, Any]


class SourceStream(Protocol):
    """The rows of a source: `iter` reads from the current state to the end, where the state is the beginning again."""

    name: str

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...


def open_stream(source: SourceEntry | datasets.IterableDataset, name: str = "train_dataset") -> SourceStream:
    """Open a file, a folder, a hub dataset or an IterableDataset that is not shuffled.

    name: of an IterableDataset in the log and in errors. Raises SFTError as `load_source` does.
    """
    stream: SourceStream
    if isinstance(source, SourceEntry):
        name, split = source.label, source.split or "train"
        source = resolve_source(source, split, streaming=True)
        if isinstance(source, Path):
            stream, description = _open_files(name, source, split)
            logger.info("%s: streamed, %s", name, description)
            return stream
    stream = DatasetStream(name, source)
    logger.info("%s: streamed, %s", name, describe_columns(stream.row_format, stream.columns))
    return stream


def _open_files(name: str, path: Path, split: str) -> tuple[FileStream, str]:
    paths = list_data_files(path, split) if path.is_dir() else [path]
    names = [format_file_name(file) for file in paths] if path.is_dir() else [format_line(path.name)]
    formats = [detect_file_format(*file) for file in zip(paths, names)]
    check_same_format(path, paths, [row_format for row_format, _ in formats])
    row_format, columns = formats[0]
    if path.is_dir():
        log_unread_files(path, paths)
    stream = FileStream(name, paths, names, row_format)
    return stream, describe_files(paths, row_format, columns) if path.is_dir() else describe_columns(
        row_format, columns
    )


class FileStream:
    """The rows of files, one file after the other. names: of the files, for errors and the column `origin`."""

    def __init__(self, name: str, paths: Sequence[Path], names: Sequence[str], row_format: RowFormat) -> None:
        self.name, self._paths, self._names, self._row_format = name, paths, names, row_format
        self._file, self._position = 0, FilePosition()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self._file < len(self._paths):
            path = self._paths[self._file]
            is_columnar = path.suffix.lower() in COLUMNAR
            for location, row in read_rows(path, self._names[self._file], self._position):
                yield convert_source_row(row, location, self._row_format, is_columnar)
            self._file, self._position = self._file + 1, FilePosition()
        self._file = 0

    def state_dict(self) -> State:
        path = self._paths[self._file]
        return {"file": path.name, "bytes": path.stat().st_size, **asdict(self._position)}

    def load_state_dict(self, state: State) -> None:
        """Raises SFTError if the file that was read is gone or has another size."""
        values = dict(state)
        file, size = values.pop("file"), values.pop("bytes")
        names = [path.name for path in self._paths]
        if file not in names:
            raise SFTError(f"{self.name}: {file}, which was being read, is missing; resume with the files of the run")
        self._file, self._position = names.index(file), FilePosition(**values)
        if (now := self._paths[self._file].stat().st_size) != size:
            raise SFTError(
                f"{self.name}: {file} has {now:,} bytes, and had {size:,} when it was being read; resume with the "
                "files of the run"
            )


class DatasetStream:
    """The rows of an `IterableDataset`, whose own state tells where it is."""

    def __init__(self, name: str, dataset: datasets.IterableDataset) -> None:
        self.name = name
        # As Arrow tables, because decoding images opens paths in the data.
        self._dataset = dataset.with_format("arrow")
        first = next(iter(self._dataset), None)
        if first is None:
            raise SFTError(f"{name}: no rows")
        self.row_format, self.columns = detect_format(first.column_names, name), first.column_names
        self._start = {"rows": 0, "dataset": dataset.with_format("arrow").state_dict()}
        if _has_shuffle_buffer(dataset._ex_iterable):
            raise SFTError(
                f"{name}: is shuffled, and a resumed run would lose the rows of its buffer; leave out `shuffle`, as "
                "rows are shuffled in blocks here"
            )
        self._loaded: State | None = None  # the state that was loaded, until a row is read
        self.load_state_dict(self._start)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for table in self._dataset:
            location = f"{self.name} row {self._rows}"
            self._rows += 1
            self._loaded = None
            read = self.row_format.select_columns(table.column_names)
            row = convert_source_row(convert_to_rows(table.select(read))[0], location, self.row_format, True)
            unread = [column for column in table.column_names if column not in read]
            row["unread"] += [format_line(column) for column in unread if not table.column(column).null_count]
            yield row
        self.load_state_dict(self._start)

    def state_dict(self) -> State:
        # The dataset returns its state of before until its next row is read.
        return self._loaded or {"rows": self._rows, "dataset": self._dataset.state_dict()}

    def load_state_dict(self, state: State) -> None:
        self._rows: int = state["rows"]
        self._loaded = state
        self._dataset.load_state_dict(state["dataset"])


def _has_shuffle_buffer(iterable: Any) -> bool:
    """Whether an IterableDataset, or one that it is made of, is shuffled. Its state does not tell."""
    parts = [getattr(iterable, "ex_iterable", None), *getattr(iterable, "ex_iterables", ())]
    inner = any(_has_shuffle_buffer(part) for part in parts if part is not None)
    return inner or isinstance(iterable, BufferShuffledExamplesIterable)


@dataclass
class Progress:
    """How far a source is read. taken: rows in this epoch, or with weights since the beginning; rows: of the source,
    known when it has ended; passes: how often it has; is_ended: whether it has in this epoch."""

    taken: int = 0
    rows: int = 0
    passes: int = 0
    is_ended: bool = False


class SourceMix:
    """Take rows from several sources in turn.

    Without weights each source gives one row in turn until it ends, and an epoch ends when all have: each row comes
    once. With weights the rows come in that proportion, each source begins again when it ends, and there are no epochs.
    """

    def __init__(self, streams: Sequence[SourceStream], weights: Sequence[float] | None = None) -> None:
        self.streams, self.weights = _select_weighted(streams, weights)
        self.progress = [Progress() for _ in self.streams]
        self._start = self.state_dict()
        self._iterators = [iter(stream) for stream in self.streams]

    def __getstate__(self) -> State:
        """Leave out what a loader cannot send to a process that it spawns; `load_state_dict` begins again there."""
        return vars(self) | {"_iterators": []}

    @property
    def passes(self) -> int:
        """How often all sources have ended."""
        return min(progress.passes for progress in self.progress)

    def read_row(self) -> tuple[str, dict[str, Any]] | None:
        """Return the name of a source and its next row; None at the end of an epoch, once. Raises SFTError."""
        while (index := self._choose_source()) is not None:
            row = next(self._iterators[index], None)
            if row is not None:
                self.progress[index].taken += 1
                return self.streams[index].name, row
            self._end_pass(index)
        for progress in self.progress:
            progress.taken, progress.is_ended = 0, False
        return None

    def _choose_source(self) -> int | None:
        """Return the source that has given the fewest rows for its weight, the first of several; None if all ended."""
        weights = self.weights or [1.0] * len(self.streams)
        shares = [
            ((progress.taken + 1) / weight, index)
            for index, (progress, weight) in enumerate(zip(self.progress, weights))
            if not progress.is_ended
        ]
        return min(shares)[1] if shares else None

    def _end_pass(self, index: int) -> None:
        progress = self.progress[index]
        if not progress.taken:
            raise SFTError(f"{self.streams[index].name}: no rows")
        progress.rows = progress.rows or progress.taken
        progress.passes += 1
        progress.is_ended = self.weights is None
        self._iterators[index] = iter(self.streams[index])

    def count_rows_of_ended(self) -> dict[str, int]:
        """Return the numbers of rows of the sources that have ended, by name."""
        return {stream.name: progress.rows for stream, progress in zip(self.streams, self.progress) if progress.passes}

    def state_dict(self) -> State:
        return {
            "progress": [asdict(progress) for progress in self.progress],
            "sources": [stream.state_dict() for stream in self.streams],
        }

    def load_state_dict(self, state: State | None) -> None:
        """Go on from a state; from the beginning for None. Raises SFTError for a state of other sources."""
        state = state or self._start
        if len(state["sources"]) != len(self.streams):
            counts = f"{len(state['sources'])} sources, now there are {len(self.streams)}"
            raise SFTError(f"train_data: the run that is resumed read {counts}; resume with the config of the run")
        self.progress = [Progress(**progress) for progress in state["progress"]]
        for stream, source_state in zip(self.streams, state["sources"]):
            stream.load_state_dict(source_state)
        self._iterators = [iter(stream) for stream in self.streams]


def _select_weighted(
    streams: Sequence[SourceStream], weights: Sequence[float] | None
) -> tuple[list[SourceStream], list[float] | None]:
    """Return the sources of positive weight and their weights. Raises SFTError as `mix_datasets` does."""
    if weights is None:
        return list(streams), None
    check_weights(weights, len(streams))
    selected = [(stream, weight) for stream, weight in zip(streams, weights) if weight > 0]
    return [stream for stream, _ in selected], [weight for _, weight in selected]
