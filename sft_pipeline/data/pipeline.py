"""Prepare the rows that a config names: load, mix, hold out, encode. Needs the tokenizer but no model."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, TypeAlias

import datasets
import numpy as np
from datasets import Dataset

from sft_pipeline.arguments import SFTArguments, SourceEntry, check_set_name, parse_eval_data
from sft_pipeline.data.encode import SOURCE_COLUMN, UNSUPERVISED, Encoder, EncodingStats, encode_dataset, sum_stats
from sft_pipeline.data.encoded_rows import is_encoded, load_encoded_rows
from sft_pipeline.data.messages import parse_conversation
from sft_pipeline.data.row_stream import RowStream
from sft_pipeline.data.sources import Source, load_source
from sft_pipeline.data.splits import (
    drop_overlap,
    hash_rows,
    join_sets,
    mix_datasets,
    select_rows,
    split_held_out,
    split_sets,
)
from sft_pipeline.data.streamed_sources import SourceMix, open_stream
from sft_pipeline.data.template import Template
from sft_pipeline.data.tokenizer_export import count_id_differences
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.time_account import TimeAccount

logger = logging.getLogger(__name__)

# Held-out rows from a program: one set, or several by their names.
EvalSource: TypeAlias = Source | Mapping[str, Source]
COMPARED_ROWS = 100  # rows on which the saved chat template is compared with the training ids


@dataclass(frozen=True)
class PreparedData:
    """Encoded training and held-out rows with their statistics, and the held-out conversations as JSON text.

    Of several held-out sets, the rows of all are in `held_out` and `held_out_conversations`, with the name of their set
    (`split_sets`). held_out_sets: the statistics of each of them, in the order of the config; of one set without a
    name none.
    unread: for each source, in how many rows each column or key is that nothing reads. sources: for each source of
    training rows, how many were read and how many of these are trained, a repeated row each time. stream: of a run with
    `streaming`; `train` and `train_stats` are then those of its first rows, and after training what was read.
    """

    train: Dataset
    train_stats: EncodingStats
    held_out: Dataset | None
    held_out_stats: EncodingStats | None
    held_out_conversations: Dataset | None
    unread: dict[str, dict[str, int]] = field(default_factory=dict)
    held_out_sets: dict[str, EncodingStats] = field(default_factory=dict)
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    stream: RowStream | None = None


def build_encoder(args: SFTArguments, template: Template) -> Encoder:
    return Encoder(template, args.system_prompt, args.max_length, args.overlong, args.train_on)


def prepare_data(
    args: SFTArguments,
    template: Template,
    train_rows: Source | None = None,
    eval_rows: EvalSource | None = None,
    times: TimeAccount | None = None,
) -> PreparedData:
    """Load and encode the training and held-out rows, and log how many were read, truncated and dropped.

    train_rows and eval_rows are used in place of the keys train_data and eval_data. Rows that have `input_ids` and
    `labels` are used as they are: template, system_prompt, max_length, overlong and train_on do not apply to them.
    times: gets the seconds of reading and encoding.
    """
    times = times or TimeAccount()
    with times.measure("reading rows"):
        if is_encoded(train_rows) or any(map(is_encoded, _list_eval_rows(eval_rows).values())):
            return _use_encoded_rows(args, train_rows, eval_rows)
        conversations = _load_splits_and_counts(args, train_rows, eval_rows)
    with times.measure("encoding rows"):
        return _encode_splits(args, template, *conversations)


def _encode_splits(
    args: SFTArguments,
    template: Template,
    train_conversations: Dataset,
    held_out_conversations: Dataset | None,
    unread: dict[str, dict[str, int]],
    rows_read: list[tuple[str, int]],
) -> PreparedData:
    encoder = build_encoder(args, template)
    train, train_stats = encode_dataset(train_conversations, encoder, args.num_proc)
    sources = _count_sources(train, rows_read)
    train = train.remove_columns(SOURCE_COLUMN)
    logger.info("training rows: %s", train_stats)
    _log_template_differences(train_conversations[:COMPARED_ROWS]["conversation"], template, args)
    if held_out_conversations is None:
        return PreparedData(train, train_stats, None, None, None, unread, sources=sources)
    encoded = _encode_sets(held_out_conversations, encoder, args.num_proc)
    data = _build_prepared_data(train, train_stats, encoded, "held-out rows", held_out_conversations, unread)
    return replace(data, sources=sources)


def _count_sources(train: Dataset, rows_read: list[tuple[str, int]]) -> dict[str, dict[str, int]]:
    """Return `PreparedData.sources`. rows_read: the name and the rows of each number in SOURCE_COLUMN of `train`."""
    kept_rows = np.bincount(train.with_format("numpy")[SOURCE_COLUMN][:], minlength=len(rows_read))
    sources: dict[str, dict[str, int]] = {}
    for (name, rows), count in zip(rows_read, kept_rows.tolist()):
        counts = sources.setdefault(name, {"rows": 0, "kept": 0})
        counts["rows"] += rows
        counts["kept"] += count
    return sources


EncodedSets: TypeAlias = dict[str | None, tuple[Dataset, EncodingStats]]  # held-out sets by name; None is one without


def _encode_sets(conversations: Dataset, encoder: Encoder, num_proc: int) -> EncodedSets:
    return {name: _encode_set(name, rows, encoder, num_proc) for name, rows in split_sets(conversations).items()}


def _encode_set(name: str | None, rows: Dataset, encoder: Encoder, num_proc: int) -> tuple[Dataset, EncodingStats]:
    try:
        return encode_dataset(rows, encoder, num_proc)
    except SFTError as error:
        raise error if name is None else SFTError(f"eval_data {name}: {error}") from error


def _build_prepared_data(
    train: Dataset,
    train_stats: EncodingStats,
    encoded: EncodedSets,
    title: str,
    conversations: Dataset | None = None,
    unread: dict[str, dict[str, int]] | None = None,
) -> PreparedData:
    """Join the encoded held-out sets, and log the statistics of each. title: what the log calls their rows."""
    held_out = join_sets({name: rows for name, (rows, _) in encoded.items()})
    sets = {name: stats for name, (_, stats) in encoded.items() if name is not None}
    for name, (_, stats) in encoded.items():
        logger.info("%s: %s", title if name is None else f"{title} of {name}", stats)
    stats = sum_stats(list(sets.values()), held_out) if sets else encoded[None][1]
    return PreparedData(train, train_stats, held_out, stats, conversations, unread or {}, sets)


def prepare_held_out(
    args: SFTArguments, template: Template, eval_rows: EvalSource | None, times: TimeAccount
) -> tuple[Dataset, EncodedSets] | None:
    """Load and encode the held-out rows of a run with `streaming`; returns None if there are none."""
    with times.measure("reading rows"):
        conversations = load_eval_data(args, eval_rows)
    if conversations is None:
        return None
    with times.measure("encoding rows"):
        return conversations, _encode_sets(conversations, build_encoder(args, template), args.num_proc)


def prepare_stream(
    args: SFTArguments,
    template: Template,
    train_rows: Any,
    held_out: tuple[Dataset, EncodedSets] | None,
    seed: int,
    shuffle: bool,
) -> PreparedData:
    """Open the sources of training rows and encode the first rows.

    train_rows: a name or an IterableDataset, in place of train_data. seed, shuffle: of the order of the rows.
    """
    hashes = frozenset() if held_out is None else frozenset(hash_rows(held_out[0]).tolist())
    stream = RowStream(
        open_mix(args, train_rows), build_encoder(args, template), seed, shuffle, hashes, args.skip_bad_rows
    )
    sample = stream.read_sample()
    rows_read = f"{sample.stats.rows:,}"
    logger.info("the first %s training rows, of which all estimates are made: %s", rows_read, sample.stats)
    _log_template_differences(sample.conversations[:COMPARED_ROWS], template, args)
    # A later row may be as long as any.
    stats = replace(sample.stats, length_quantiles=sample.stats.length_quantiles | {"most": args.max_length})
    if held_out is None:
        return PreparedData(sample.rows, stats, None, None, None, stream=stream)
    conversations, encoded = held_out
    return replace(_build_prepared_data(sample.rows, stats, encoded, "held-out rows", conversations), stream=stream)


def open_mix(args: SFTArguments, train_rows: Any = None) -> SourceMix:
    """Open the sources of train_data as streams, or `train_rows`."""
    if train_rows is None:
        entries = [SourceEntry.parse(entry) for entry in args.train_data]
        return SourceMix(
            [open_stream(entry) for entry in entries], args.train_data_weights or _list_entry_weights(args)
        )
    if isinstance(train_rows, (str, os.PathLike)):
        train_rows = SourceEntry(str(train_rows))
    if not isinstance(train_rows, (SourceEntry, datasets.IterableDataset)):
        raise SFTError(
            "train_dataset: rows in memory are not streamed; set streaming: false, or give an IterableDataset"
        )
    return SourceMix([open_stream(train_rows)])


def load_eval_data(args: SFTArguments, eval_rows: EvalSource | None = None) -> Dataset | None:
    """Load the conversations of eval_rows or of the key eval_data, of all sets (`split_sets`), or return None."""
    if any(map(is_encoded, _list_eval_rows(eval_rows).values())):
        raise SFTError("eval_dataset: encoded already, and streamed rows are not; give rows, or set streaming: false")
    sets = _load_held_out_sets(args, eval_rows, {})
    return join_sets(sets) if sets else None


def _load_held_out_sets(
    args: SFTArguments, eval_rows: EvalSource | None, unread: dict[str, dict[str, int]]
) -> dict[str | None, Dataset]:
    return {
        name: datasets.concatenate_datasets(_load_parts(args, sources, unread))
        for name, sources in _list_held_out_sources(args, eval_rows).items()
    }


def _use_encoded_rows(args: SFTArguments, train_rows: Any, eval_rows: Any) -> PreparedData:
    """Check and measure rows that are encoded already. There are no held-out conversations to answer."""
    sets = _list_eval_rows(eval_rows)
    if args.eval_data or not is_encoded(train_rows) or not all(map(is_encoded, sets.values())):
        raise SFTError("train_dataset and eval_dataset: one of them is encoded; encode both or none of them")
    for key in ("held_out", "max_train_rows"):
        if getattr(args, key):
            raise SFTError(
                f"{key}: rows that are encoded already are not selected; give train_dataset and eval_dataset"
            )
    train, train_stats = load_encoded_rows(train_rows, "train_dataset")
    logger.info("training rows, encoded already: %s", train_stats)
    if not sets:
        return PreparedData(train, train_stats, None, None, None)
    encoded = {name: load_encoded_rows(rows, _get_eval_name(name)) for name, rows in sets.items()}
    if len({frozenset(rows.column_names) for rows, _ in encoded.values()}) > 1:
        raise SFTError("eval_dataset: only some of its sets have sequence_lengths or computed_tokens; give all of them")
    return _build_prepared_data(train, train_stats, encoded, "held-out rows, encoded already")


def _list_eval_rows(eval_rows: EvalSource | None) -> dict[str | None, Any]:
    """Return the held-out sets of a program by their names; None names a single set, which has no name."""
    if not isinstance(eval_rows, Mapping):
        return {} if eval_rows is None else {None: eval_rows}
    if not eval_rows:
        raise SFTError("eval_dataset: a mapping without a held-out set; give it names and rows, or leave it out")
    for name in eval_rows:
        check_set_name(name, "eval_dataset")
    return {**eval_rows}


def _get_eval_name(name: str | None) -> str:
    """Return what the log and the errors call a held-out set of a program."""
    return "eval_dataset" if name is None else f"eval_dataset {name}"


def load_splits(
    args: SFTArguments, train_rows: Source | None = None, eval_rows: EvalSource | None = None
) -> tuple[Dataset, Dataset | None]:
    """Load (training, held-out or None) conversations, from the arguments or from the keys; no row is in both.

    Held-out sets with names are joined (`split_sets`).

    `max_train_rows` limits the training rows and does not change the held-out rows.
    """
    return _load_splits_and_counts(args, train_rows, eval_rows)[:2]


def load_held_out(args: SFTArguments) -> Dataset | None:
    """Load the held-out conversations of the keys; of a run with `streaming` no training rows are read for them."""
    return load_eval_data(args) if args.streaming else load_splits(args)[1]


def _load_splits_and_counts(
    args: SFTArguments, train_rows: Source | None = None, eval_rows: EvalSource | None = None
) -> tuple[Dataset, Dataset | None, dict[str, dict[str, int]], list[tuple[str, int]]]:
    """Load the splits as `load_splits` does; also return `PreparedData.unread`, and the rows read of each source.

    The number of its source is in SOURCE_COLUMN of each training row.
    """
    if args.held_out and eval_rows is not None:
        raise SFTError("held_out and eval_dataset are both set; remove one of them")
    unread: dict[str, dict[str, int]] = {}
    train_sources = [_name_source(train_rows, "train_dataset")] if train_rows is not None else _list_train_sources(args)
    parts = _load_parts(args, train_sources, unread)
    rows_read = [(name, len(part)) for (name, _), part in zip(train_sources, parts)]
    parts = [part.add_column(SOURCE_COLUMN, np.full(len(part), index)) for index, part in enumerate(parts)]
    held_out_sets = _load_held_out_sets(args, eval_rows, unread)
    train, held_out = _split_parts(args, parts, held_out_sets)
    if held_out is not None and SOURCE_COLUMN in held_out.column_names:
        held_out = held_out.remove_columns(SOURCE_COLUMN)
    return (select_rows(train, args.max_train_rows) if args.max_train_rows else train), held_out, unread, rows_read


NamedSource: TypeAlias = tuple[str, Source]  # what the log and the errors call it


def _list_train_sources(args: SFTArguments) -> list[NamedSource]:
    return [(entry.label, entry) for entry in map(SourceEntry.parse, args.train_data)]


def _list_held_out_sources(args: SFTArguments, eval_rows: EvalSource | None) -> dict[str | None, list[NamedSource]]:
    """Return the sources of each held-out set: of a program, or of the key."""
    if eval_rows is not None:
        sets = _list_eval_rows(eval_rows).items()
        return {name: [_name_source(rows, _get_eval_name(name))] for name, rows in sets}
    return {
        name: [(entry.label, entry) for entry in sources] for name, sources in parse_eval_data(args.eval_data).items()
    }


def _name_source(rows: Source, name: str) -> NamedSource:
    return (str(rows) if isinstance(rows, (str, os.PathLike)) else name), rows


def _load_parts(args: SFTArguments, sources: Iterable[NamedSource], unread: dict[str, dict[str, int]]) -> list[Dataset]:
    """Load the sources; adds to `unread`."""
    parts = []
    for name, source in sources:
        part, unread[name] = load_source(source, skip_bad_rows=args.skip_bad_rows, name=name)
        parts.append(part)
    return parts


def _split_parts(
    args: SFTArguments, parts: list[Dataset], held_out_sets: dict[str | None, Dataset]
) -> tuple[Dataset, Dataset | None]:
    weights = args.train_data_weights or _list_entry_weights(args)
    if held_out_sets:
        train = mix_datasets(parts, weights)
        for name, rows in held_out_sets.items():
            train = drop_overlap(train, rows, name)
        return train, join_sets(held_out_sets)
    if not args.held_out:
        return mix_datasets(parts, weights), None
    train, held_out = split_held_out(datasets.concatenate_datasets(parts), args.held_out)
    if weights:
        # The held-out rows are taken from the sources before weighting; the weights apply to the remaining rows.
        train = drop_overlap(mix_datasets(parts, weights), held_out)
    return train, held_out


def _list_entry_weights(args: SFTArguments) -> list[float] | None:
    """Return the weights of the entries of train_data, 1 for those without; None if none has one."""
    weights = [SourceEntry.parse(entry).weight for entry in args.train_data]
    return None if set(weights) <= {None} else [1.0 if weight is None else weight for weight in weights]


def load_one_row(args: SFTArguments, template: Template, row: int) -> tuple[dict[str, Any], str]:
    """Load row `row` of train_data (from 0, in file order) as it is trained; returns its columns and its location.

    With `streaming` in the order in which they are read. Raises SFTError for a row that does not exist or that the
    length policy drops.
    """
    if args.streaming:
        return _encode_one_row(args, template, _read_streamed_row(args, row))
    rows = datasets.concatenate_datasets(_load_parts(args, _list_train_sources(args), {}))
    if not 0 <= row < len(rows):
        raise SFTError(f"row {row}: out of range; train_data has rows 0 to {len(rows) - 1}")
    return _encode_one_row(args, template, rows[row : row + 1])


def _read_streamed_row(args: SFTArguments, row: int) -> dict[str, Any]:
    """Read row `row` of a stream as a batch of one."""
    mix = open_mix(args)
    read = next(islice(iter(mix.read_row, None), row, None), None) if row >= 0 else None
    if read is None:
        raise SFTError(f"row {row}: out of range; the rows of train_data have numbers from 0, and end before it")
    _, values = read
    if values["problem"] is not None:
        raise SFTError(f"{values['origin']}: {values['problem']}; fix the data")
    return {name: [values[name]] for name in ("conversation", "origin")}


def _encode_one_row(args: SFTArguments, template: Template, batch: dict[str, Any]) -> tuple[dict[str, Any], str]:
    columns = {name: column[0] for name, column in build_encoder(args, template)(batch).items()}
    if not columns["input_ids"]:
        reason, remedy = columns["outcome"], "raise max_length or change overlong"
        if reason == UNSUPERVISED:
            remedy = "mark an answer with train: true, or change train_on"
        raise SFTError(f"{batch['origin'][0]}: dropped ({reason}); {remedy}")
    return columns, batch["origin"][0]


def _log_template_differences(conversations: list[str], template: Template, args: SFTArguments) -> None:
    """Log for how many conversations the chat template that is saved gives other ids than training, if for any."""
    try:
        parsed = [parse_conversation(text) for text in conversations]
        count = count_id_differences(template, parsed, args.system_prompt)
    except SFTError:
        return  # of an answer that is not trained
    if count:
        logger.info(
            "the saved chat template gives other ids than training for %s of %s rows: tools that use it tokenize the "
            "text as a whole, training, `chat` and `evaluate` tokenize each piece separately",
            count,
            len(conversations),
        )
