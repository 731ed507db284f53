"""From the config's sources to training rows: load, mix, hold out, encode. Needs the tokenizer, no model."""

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

COMPARED = 100  # rows on which the saved chat template is compared with the trained ids


@dataclass(frozen=True)
class PreparedData:
    """Training and held-out rows with their accounts, and the held-out conversations to answer."""

    train: Dataset
    train_stats: EncodingStats
    held_out: Dataset | None
    held_out_stats: EncodingStats | None
    held_out_messages: Dataset | None


def build_encoder(sft: SFTArguments, template: Template) -> Encoder:
    return Encoder(template, sft.system_prompt, sft.max_length, sft.overlong, sft.train_on)


def prepare_data(sft: SFTArguments, template: Template) -> PreparedData:
    """Load and encode what the config names; says what was read and what was dropped."""
    train, held = load_conversations(sft)
    encoder = build_encoder(sft, template)
    rows, account = encode_dataset(train, encoder, sft.num_proc)
    logger.info("training rows: %s", account)
    _say_what_other_tools_see(train[:COMPARED]["messages"], template, sft)
    held_rows, held_account = (None, None) if held is None else encode_dataset(held, encoder, sft.num_proc)
    if held_account:
        logger.info("held-out rows: %s", held_account)
    return PreparedData(rows, account, held_rows, held_account, held)


def load_conversations(sft: SFTArguments) -> tuple[Dataset, Dataset | None]:
    """(training, held-out or None) conversations; no row is in both. `max_train_rows` changes no held-out row."""
    train, held = _divided(sft)
    return (select_rows(train, sft.max_train_rows) if sft.max_train_rows else train), held


def _divided(sft: SFTArguments) -> tuple[Dataset, Dataset | None]:
    parts = [_load(name, sft) for name in sft.train_data]
    if sft.eval_data:
        train = mix_datasets(parts, sft.train_data_weights or None)
        held = datasets.concatenate_datasets([_load(name, sft) for name in sft.eval_data])
        return drop_overlap(train, held), held
    if not sft.held_out:
        return mix_datasets(parts, sft.train_data_weights or None), None
    train, held = split_held_out(datasets.concatenate_datasets(parts), sft.held_out)
    if sft.train_data_weights:
        # The held-out rows are drawn from the sources as they are; weights multiply what remains.
        train = drop_overlap(mix_datasets(parts, sft.train_data_weights), held)
    return train, held


def load_one_row(sft: SFTArguments, template: Template, row: int) -> tuple[dict[str, list[int]], str]:
    """Row `row` of train_data (from 0, in file order) as it is trained, and its place in the file.

    Raises SFTError for a row that is not there or that the length policy drops.
    """
    rows = datasets.concatenate_datasets([_load(name, sft) for name in sft.train_data])
    if not 0 <= row < len(rows):
        raise SFTError(f"row {row}: train_data has the rows 0 to {len(rows) - 1}")
    batch = rows[row : row + 1]
    ids, labels, outcome = (column[0] for column in build_encoder(sft, template)(batch).values())
    if not ids:
        raise SFTError(f"{batch['origin'][0]}: dropped, {outcome}; raise max_length or choose another `overlong`")
    return {"input_ids": ids, "labels": labels}, batch["origin"][0]


def _say_what_other_tools_see(conversations: list[list[Message]], template: Template, sft: SFTArguments) -> None:
    """The difference between the trained ids and those of the chat template that is saved, if there is one."""
    try:
        others = count_id_differences(template, conversations, sft.system_prompt)
    except SFTError:
        return  # a history that the template rewrites, which `train_on: last` trains all the same
    if others:
        logger.info(
            "the saved chat template gives other ids than training for %s of %s rows: tools that use it tokenize the "
            "text in one go, `chat` and the evaluation here tokenize each piece alone",
            others,
            len(conversations),
        )


def _load(name: str, sft: SFTArguments) -> Dataset:
    return load_source(name, skip_bad_rows=sft.skip_bad_rows)
