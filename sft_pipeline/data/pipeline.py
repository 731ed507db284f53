"""Prepare the rows that a config names: load, mix, hold out, encode. Needs the tokenizer but no model."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import datasets
from datasets import Dataset

from sft_pipeline.config import SFTArguments
from sft_pipeline.data.chat_templates import Template
from sft_pipeline.data.encode import Encoder, EncodingStats, encode_dataset
from sft_pipeline.data.messages import Message
from sft_pipeline.data.sources import load_source
from sft_pipeline.data.splits import drop_overlap, mix_datasets, select_rows, split_held_out
from sft_pipeline.data.tokenizer_export import count_id_differences
from sft_pipeline.utils.errors import SFTError

logger = logging.getLogger(__name__)

COMPARED_ROWS = 100  # rows on which the saved chat template is compared with the training ids


@dataclass(frozen=True)
class PreparedData:
    """Encoded training and held-out rows with their statistics, and the held-out conversations as messages."""

    train: Dataset
    train_stats: EncodingStats
    held_out: Dataset | None
    held_out_stats: EncodingStats | None
    held_out_messages: Dataset | None


def build_encoder(sft: SFTArguments, template: Template) -> Encoder:
    return Encoder(template, sft.system_prompt, sft.max_length, sft.overlong, sft.train_on)


def prepare_data(sft: SFTArguments, template: Template) -> PreparedData:
    """Load and encode the rows of the config, and log how many were read, truncated and dropped."""
    train_messages, held_out_messages = load_conversations(sft)
    encoder = build_encoder(sft, template)
    train, train_stats = encode_dataset(train_messages, encoder, sft.num_proc)
    logger.info("training rows: %s", train_stats)
    _log_template_differences(train_messages[:COMPARED_ROWS]["messages"], template, sft)
    if held_out_messages is None:
        return PreparedData(train, train_stats, None, None, None)
    held_out, held_out_stats = encode_dataset(held_out_messages, encoder, sft.num_proc)
    logger.info("held-out rows: %s", held_out_stats)
    return PreparedData(train, train_stats, held_out, held_out_stats, held_out_messages)


def load_conversations(sft: SFTArguments) -> tuple[Dataset, Dataset | None]:
    """Load (training, held-out or None) conversations; no row is in both.

    `max_train_rows` limits the training rows and does not change the held-out rows.
    """
    train, held_out = _load_splits(sft)
    return (select_rows(train, sft.max_train_rows) if sft.max_train_rows else train), held_out


def _load_splits(sft: SFTArguments) -> tuple[Dataset, Dataset | None]:
    parts = [_load_source(name, sft) for name in sft.train_data]
    if sft.eval_data:
        train = mix_datasets(parts, sft.train_data_weights or None)
        held_out = datasets.concatenate_datasets([_load_source(name, sft) for name in sft.eval_data])
        return drop_overlap(train, held_out), held_out
    if not sft.held_out:
        return mix_datasets(parts, sft.train_data_weights or None), None
    train, held_out = split_held_out(datasets.concatenate_datasets(parts), sft.held_out)
    if sft.train_data_weights:
        # The held-out rows are taken from the sources before weighting; the weights apply to the remaining rows.
        train = drop_overlap(mix_datasets(parts, sft.train_data_weights), held_out)
    return train, held_out


def load_one_row(sft: SFTArguments, template: Template, row: int) -> tuple[dict[str, list[int]], str]:
    """Load row `row` of train_data (from 0, in file order) as it is trained; returns it with its location.

    Raises SFTError for a row that does not exist or that the length policy drops.
    """
    rows = datasets.concatenate_datasets([_load_source(name, sft) for name in sft.train_data])
    if not 0 <= row < len(rows):
        raise SFTError(f"row {row}: out of range; train_data has rows 0 to {len(rows) - 1}")
    batch = rows[row : row + 1]
    ids, labels, outcome = (column[0] for column in build_encoder(sft, template)(batch).values())
    if not ids:
        raise SFTError(f"{batch['origin'][0]}: dropped ({outcome}); raise max_length or change overlong")
    return {"input_ids": ids, "labels": labels}, batch["origin"][0]


def _log_template_differences(conversations: list[list[Message]], template: Template, sft: SFTArguments) -> None:
    """Log for how many conversations the chat template that is saved gives other ids than training, if for any."""
    try:
        count = count_id_differences(template, conversations, sft.system_prompt)
    except SFTError:
        return  # the template rewrites earlier turns, which `train_on: last` allows
    if count:
        logger.info(
            "the saved chat template gives other ids than training for %s of %s rows: tools that use it tokenize the "
            "text as a whole, training, `chat` and `evaluate` tokenize each piece separately",
            count,
            len(conversations),
        )


def _load_source(name: str, sft: SFTArguments) -> Dataset:
    return load_source(name, skip_bad_rows=sft.skip_bad_rows)
