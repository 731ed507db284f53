"""Rows that somebody has encoded already: check their `input_ids` and `labels`, and measure them.

`labels[t]` must be the id at t + 1, or -100: shifted, as data/encode.py writes them. Labels that are not shifted, as
`transformers` takes them, would train the model to repeat each token, so they are refused. A row with
`sequence_lengths` has several sequences, see data/encode.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from sft_pipeline.data.encode import EncodingStats, compute_length_quantiles, count_sequence_tokens
from sft_pipeline.data.sources import Source
from sft_pipeline.utils.constants import IGNORED
from sft_pipeline.utils.errors import SFTError

COLUMNS = ["input_ids", "labels"]
OPTIONAL_COLUMNS = ["sequence_lengths", "computed_tokens"]


def is_encoded(rows: Source | None) -> bool:
    """Return whether rows in memory have the columns `input_ids` and `labels`."""
    if isinstance(rows, Dataset):
        return set(COLUMNS) <= set(rows.column_names)
    first = rows[0] if isinstance(rows, Sequence) and not isinstance(rows, str) and rows else None
    return isinstance(first, Mapping) and set(COLUMNS) <= set(first)


def load_encoded_rows(rows: Dataset | Sequence[Mapping[str, Any]], name: str) -> tuple[Dataset, EncodingStats]:
    """Return the rows as a dataset of the columns of data/encode.py, with their statistics.

    Raises SFTError with the row's index for labels that are not shifted or have another length than the ids, for an
    empty row, and for rows without any supervised token. name: of the rows, for errors.
    """
    if isinstance(rows, Dataset):
        optional = [column for column in OPTIONAL_COLUMNS if column in rows.column_names]
        dataset = rows.select_columns([*COLUMNS, *optional]).with_format(None)
    else:
        dataset = Dataset.from_list([_select_lists(row, f"{name} row {index}") for index, row in enumerate(rows)])
    supervised_tokens = sum(_check_batches(dataset, name))
    if not supervised_tokens:
        raise SFTError(f"{name}: no row has a supervised token (a label other than {IGNORED})")
    lengths = count_sequence_tokens(dataset)
    has_tree = "computed_tokens" in dataset.column_names
    return dataset, EncodingStats(
        rows=len(dataset),
        kept=len(dataset),
        truncated=0,
        dropped={},
        sequences=len(lengths),
        dropped_sequences=0,
        tokens=int(lengths.sum()),
        computed_tokens=int(pc.sum(dataset.data.column("computed_tokens")).as_py() if has_tree else lengths.sum()),
        supervised_tokens=supervised_tokens,
        length_quantiles=compute_length_quantiles(lengths),
        cached=True,
    )


def _select_lists(row: Mapping[str, Any], location: str) -> dict[str, list[int]]:
    """Return the columns of a row in memory, with the lengths of its sequences."""
    for column in COLUMNS:
        if row.get(column) is None:
            raise SFTError(f"{location}: missing {column!r}, which the first row has")
    ids, labels = list(row["input_ids"]), list(row["labels"])
    lengths = row.get("sequence_lengths")
    lengths = [len(ids)] if lengths is None else list(lengths)
    return {"input_ids": ids, "labels": labels, "sequence_lengths": lengths}


def _check_batches(dataset: Dataset, name: str) -> Iterator[int]:
    """Check the rows some thousand at a time; yield the number of supervised tokens of each batch."""
    start = 0
    for batch in dataset.with_format("arrow").iter(10_000):
        lengths, label_lengths = (pc.list_value_length(batch[column]).to_numpy() for column in COLUMNS)
        for index in np.flatnonzero((lengths != label_lengths) | (lengths == 0))[:1]:
            counts = f"{lengths[index]} input_ids and {label_lengths[index]} labels"
            raise SFTError(f"{name} row {start + index}: has {counts}; give as many labels as ids, at least one")
        ids, labels = (_flatten(batch[column]) for column in COLUMNS)
        ends = lengths.cumsum()
        expected = np.roll(ids, -1)
        expected[_find_sequence_ends(batch, ends, name, start) - 1] = IGNORED
        supervised = labels != IGNORED
        for position in np.flatnonzero(supervised & (labels != expected))[:1]:
            index = int(np.searchsorted(ends, position, side="right"))
            offset = position - (ends[index] - lengths[index])
            raise SFTError(
                f"{name} row {start + index}: labels[{offset}] is {labels[position]}, not the id at {offset + 1}; "
                f"labels must be shifted: give labels[1:] + [{IGNORED}]"
            )
        yield int(supervised.sum())
        start += len(lengths)


def _find_sequence_ends(batch: pa.Table, row_ends: np.ndarray, name: str, start: int) -> np.ndarray:
    """Return where each sequence ends in the ids of all rows; raises SFTError for lengths that do not add up.

    row_ends: where each row ends. start: the index of the first row.
    """
    if "sequence_lengths" not in batch.column_names:
        return row_ends
    column = batch["sequence_lengths"]
    ends = _flatten(column).cumsum()
    last_of_row = pc.list_value_length(column).to_numpy().cumsum() - 1
    for index in np.flatnonzero(ends[last_of_row] != row_ends)[:1]:
        raise SFTError(f"{name} row {start + index}: its sequence_lengths do not add up to its number of input_ids")
    for position in np.flatnonzero(np.diff(ends, prepend=0) < 1)[:1]:
        index = int(np.searchsorted(last_of_row, position))
        raise SFTError(f"{name} row {start + index}: its sequence_lengths must be 1 or more")
    return ends


def _flatten(column: pa.ChunkedArray) -> np.ndarray:
    """Return the ids of all rows in one array."""
    return pc.list_flatten(column).to_numpy().astype(np.int64)
