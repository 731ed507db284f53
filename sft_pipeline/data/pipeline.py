"""Prepare the rows that a config names: load, mix, hold out, encode. Needs the tokenizer but no model."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import datasets
from datasets import Dataset

from sft_pipeline.arguments import SFTArguments, SourceEntry
from sft_pipeline.data.encode import UNSUPERVISED, Encoder, EncodingStats, encode_dataset
from sft_pipeline.data.encoded_rows import is_encoded, load_encoded_rows
from sft_pipeline.data.messages import parse_conversation
from sft_pipeline.data.row_stream import RowStream
from sft_pipeline.data.sources import Source, load_source
from sft_pipeline.data.splits import drop_overlap, hash_rows, mix_datasets, select_rows, split_held_out
from sft_pipeline.data.streamed_sources import SourceMix, open_stream
from sft_pipeline.data.template import Template
from sft_pipeline.data.tokenizer_export import count_id_differences
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.time_account import TimeAccount

logger = logging.getLogger(__name__)

COMPARED_ROWS = 100  # rows on which the saved chat template is compared with the training ids


@dataclass(frozen=True)
class PreparedData:
    """Encoded training and held-out rows with their statistics, and the held-out conversations as JSON text.

    unread: for each source, in how many rows each column or key is that nothing reads. stream: of a run with
    `streaming`; `train` and `train_stats` are then those of its first rows, and after training what was read.
    """

    train: Dataset
    train_stats: EncodingStats
    held_out: Dataset | None
    held_out_stats: EncodingStats | None
    held_out_conversations: Dataset | None
    unread: dict[str, dict[str, int]] = field(default_factory=dict)
    stream: RowStream | None = None


def build_encoder(args: SFTArguments, template: Template) -> Encoder:
    return Encoder(template, args.system_prompt, args.max_length, args.overlong, args.train_on)


def prepare_data(
    args: SFTArguments,
    template: Template,
    train_rows: Source | None = None,
    eval_rows: Source | None = None,
    times: TimeAccount | None = None,
) -> PreparedData:
    """Load and encode the training and held-out rows, and log how many were read, truncated and dropped.

    train_rows and eval_rows are used in place of the keys train_data and eval_data. Rows that have `input_ids` and
    `labels` are used as they are: template, system_prompt, max_length, overlong and train_on do not apply to them.
    times: gets the seconds of reading and encoding.
    """
    times = times or TimeAccount()
    with times.measure("reading rows"):
        if is_encoded(train_rows) or is_encoded(eval_rows):
            return _use_encoded_rows(args, train_rows, eval_rows)
        conversations = load_splits_and_unread(args, train_rows, eval_rows)
    with times.measure("encoding rows"):
        return _encode_splits(args, template, *conversations)


def _encode_splits(
    args: SFTArguments,
    template: Template,
    train_conversations: Dataset,
    held_out_conversations: Dataset | None,
    unread: dict[str, dict[str, int]],
) -> PreparedData:
    encoder = build_encoder(args, template)
    train, train_stats = encode_dataset(train_conversations, encoder, args.num_proc)
    logger.info("training rows: %s", train_stats)
    _log_template_differences(train_conversations[:COMPARED_ROWS]["conversation"], template, args)
    if held_out_conversations is None:
        return PreparedData(train, train_stats, None, None, None, unread)
    held_out, held_out_stats = encode_dataset(held_out_conversations, encoder, args.num_proc)
    logger.info("held-out rows: %s", held_out_stats)
    return PreparedData(train, train_stats, held_out, held_out_stats, held_out_conversations, unread)


def prepare_held_out(
    args: SFTArguments, template: Template, eval_rows: Source | None, times: TimeAccount
) -> tuple[Dataset, Dataset, EncodingStats] | None:
    """Load and encode the held-out rows of a run with `streaming`.

    Returns conversations, encoded rows and statistics, or None if there are none.
    """
    with times.measure("reading rows"):
        conversations = load_eval_data(args, eval_rows)
    if conversations is None:
        return None
    with times.measure("encoding rows"):
        held_out, stats = encode_dataset(conversations, build_encoder(args, template), args.num_proc)
    logger.info("held-out rows: %s", stats)
    return conversations, held_out, stats


def prepare_stream(
    args: SFTArguments,
    template: Template,
    train_rows: Any,
    held_out: tuple[Dataset, Dataset, EncodingStats] | None,
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
    conversations, rows, held_out_stats = held_out or (None, None, None)
    return PreparedData(sample.rows, stats, rows, held_out_stats, conversations, stream=stream)


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


def load_eval_data(args: SFTArguments, eval_rows: Source | None = None) -> Dataset | None:
    """Load the conversations of eval_rows or of the key eval_data; None if there are none."""
    if is_encoded(eval_rows):
        raise SFTError("eval_dataset: encoded already, and streamed rows are not; give rows, or set streaming: false")
    parts = _load_parts(args, args.eval_data, eval_rows, "eval_dataset", {})
    return datasets.concatenate_datasets(parts) if parts else None


def _use_encoded_rows(args: SFTArguments, train_rows: Any, eval_rows: Any) -> PreparedData:
    """Check and measure rows that are encoded already. There are no held-out conversations to answer."""
    if args.eval_data or not is_encoded(train_rows) or not (eval_rows is None or is_encoded(eval_rows)):
        raise SFTError("train_dataset and eval_dataset: one of them is encoded; encode both or none of them")
    for key in ("held_out", "max_train_rows"):
        if getattr(args, key):
            raise SFTError(
                f"{key}: rows that are encoded already are not selected; give train_dataset and eval_dataset"
            )
    train, train_stats = load_encoded_rows(train_rows, "train_dataset")
    logger.info("training rows, encoded already: %s", train_stats)
    if eval_rows is None:
        return PreparedData(train, train_stats, None, None, None)
    held_out, held_out_stats = load_encoded_rows(eval_rows, "eval_dataset")
    logger.info("held-out rows, encoded already: %s", held_out_stats)
    return PreparedData(train, train_stats, held_out, held_out_stats, None)


def load_splits(
    args: SFTArguments, train_rows: Source | None = None, eval_rows: Source | None = None
) -> tuple[Dataset, Dataset | None]:
    """Load (training, held-out or None) conversations, from the arguments or from the keys; no row is in both.

    `max_train_rows` limits the training rows and does not change the held-out rows.
    """
    return load_splits_and_unread(args, train_rows, eval_rows)[:2]


def load_held_out(args: SFTArguments) -> Dataset | None:
    """Load the held-out conversations of the keys; of a run with `streaming` no training rows are read for them."""
    return load_eval_data(args) if args.streaming else load_splits(args)[1]


def load_splits_and_unread(
    args: SFTArguments, train_rows: Source | None = None, eval_rows: Source | None = None
) -> tuple[Dataset, Dataset | None, dict[str, dict[str, int]]]:
    """Load the splits as `load_splits` does; also return `PreparedData.unread`."""
    if args.held_out and eval_rows is not None:
        raise SFTError("held_out and eval_dataset are both set; remove one of them")
    unread: dict[str, dict[str, int]] = {}
    parts = _load_parts(args, args.train_data, train_rows, "train_dataset", unread)
    held_out_parts = _load_parts(args, args.eval_data, eval_rows, "eval_dataset", unread)
    train, held_out = _split_parts(args, parts, held_out_parts)
    return (select_rows(train, args.max_train_rows) if args.max_train_rows else train), held_out, unread


def _load_parts(
    args: SFTArguments, names: list[str], rows: Source | None, rows_name: str, unread: dict[str, dict[str, int]]
) -> list[Dataset]:
    """Load `rows`, or the sources that a key names; adds to `unread`."""
    sources: list[tuple[str, Source]] = [(entry.label, entry) for entry in map(SourceEntry.parse, names)]
    if rows is not None:
        sources = [(str(rows) if isinstance(rows, (str, os.PathLike)) else rows_name, rows)]
    parts = []
    for name, source in sources:
        part, unread[name] = load_source(source, skip_bad_rows=args.skip_bad_rows, name=name)
        parts.append(part)
    return parts


def _split_parts(
    args: SFTArguments, parts: list[Dataset], held_out_parts: list[Dataset]
) -> tuple[Dataset, Dataset | None]:
    weights = args.train_data_weights or _list_entry_weights(args)
    if held_out_parts:
        train = mix_datasets(parts, weights)
        held_out = datasets.concatenate_datasets(held_out_parts)
        return drop_overlap(train, held_out), held_out
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
    rows = datasets.concatenate_datasets(_load_parts(args, args.train_data, None, "", {}))
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
