"""Rows encoded once, before any process trains: a folder of Arrow shards that ranks map and do not encode again.

    sft-pipeline prepare CONFIG --prepared_data prepared/alpaca
    sft-pipeline train CONFIG --prepared_data prepared/alpaca

    train/ held_out/     input_ids and labels in shards, as `save_to_disk` writes them
    held_out_messages/   the held-out conversations, of which some are answered while training
    prepared.json        all that the ids depend on; what was kept and dropped
    SHA256SUMS           tells a damaged folder

The folder appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import reprlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from transformers import TrainingArguments

from sft_pipeline.config import SFTArguments
from sft_pipeline.data.chat_templates import Template
from sft_pipeline.data.encode import EncodingStats, hash_texts, hash_tokenizer
from sft_pipeline.data.pipeline import PreparedData, prepare_data
from sft_pipeline.data.sources import hash_source, list_saved_files
from sft_pipeline.utils.distributed import run_on_main_process
from sft_pipeline.utils.errors import SFTError, format_error
from sft_pipeline.utils.files import find_damage, sync_to_disk, write_aside, write_checksums, write_json

logger = logging.getLogger(__name__)

FORMAT = 1  # raised when the same settings give other rows or ids; a test holds some of this format's
RECORD_FILE = "prepared.json"
PARTS = ("train", "held_out", "held_out_messages")
SOURCES = ("train_data", "eval_data")
SETTINGS = (
    *("train_data_weights", "held_out", "skip_bad_rows", "max_train_rows"),
    *("template", "system_prompt", "train_on", "max_length", "overlong"),
)
AGAIN = "run `prepare` again, or give the config it was prepared with"


def write_shards(sft: SFTArguments, template: Template, folder: Path) -> None:
    """Prepare what the config names into `folder`; earlier shards are replaced, and those of this config are kept.

    Raises SFTError for data that cannot be prepared, a folder of other files, or one that cannot be written.
    """
    _refuse_foreign(folder)
    if find_shard_mismatch(sft, template, folder) is None:
        logger.info("%s: prepared already, nothing has changed since", folder)
        return
    made_from = list_shard_inputs(sft, template)
    data = prepare_data(sft, template)
    try:
        with write_aside(folder) as aside:
            _write(data, made_from, aside)
        sync_to_disk(folder.parent)
    except OSError as error:
        raise SFTError(f"prepared_data {folder}: cannot be written ({format_error(error)})") from error


def map_shards(sft: SFTArguments, template: Template, training: TrainingArguments) -> PreparedData:
    """The rows of `sft.prepared_data`, mapped into memory: every process reads the pages it needs, none encodes.

    The first process looks at everything once, for all. Raises SFTError for a folder that is missing, damaged or of
    another config, naming the first key that differs.
    """
    folder = Path(str(sft.prepared_data)).expanduser()
    reason = run_on_main_process(training, lambda: find_shard_mismatch(sft, template, folder))
    if reason is None and not (folder / RECORD_FILE).is_file():
        reason = "is not on every machine; copy it to all, or to a disk that they share"
    if reason:
        raise SFTError(f"prepared_data {folder}: {reason}")
    record = _record(folder)
    parts: dict[str, Any] = {name: _map(folder / name) if (folder / name).is_dir() else None for name in PARTS}
    accounts = {f"{name}_stats": record[f"{name}_stats"] for name in ("train", "held_out")}
    data = PreparedData(**parts | {name: one and EncodingStats(**one) for name, one in accounts.items()})
    logger.info("training rows of %s: %s", folder, data.train_stats)
    if data.held_out_stats:
        logger.info("held-out rows of %s: %s", folder, data.held_out_stats)
    return data


def list_shard_inputs(sft: SFTArguments, template: Template) -> dict[str, Any]:
    """All that the rows and their ids depend on, in the order in which it is compared."""
    return {
        "format": FORMAT,
        **{key: [[name, hash_source(name)] for name in getattr(sft, key)] for key in SOURCES},
        **{key: getattr(sft, key) for key in SETTINGS},
        "tokenizer": hash_tokenizer(template.tokenizer),
        "chat_template": hash_texts(template.chat_template),
    }


def find_shard_mismatch(sft: SFTArguments, template: Template, folder: Path) -> str | None:
    """Why this config cannot be trained from the folder, and what to do; None if it can."""
    if not (folder / RECORD_FILE).is_file():
        return "has no prepared rows; run `prepare`" if folder.exists() else "no such folder; run `prepare`"
    try:
        damaged = find_damage(folder)
        reason = damaged or _difference(_record(folder)["made_from"], list_shard_inputs(sft, template))
    except (SFTError, OSError) as error:
        # Said by the first process for all: the others wait for it.
        return format_error(error)
    if damaged:
        return f"damaged ({damaged}); run `prepare` again"
    return reason and f"{reason}; {AGAIN}"


def _difference(then: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first key that differs, and how."""
    for key, value in now.items():
        before = then.get(key)
        said = _other_sources(before or [], value) if key in SOURCES else None
        if key not in SOURCES and before != value:
            said = f"prepared with {reprlib.repr(before)}, now {reprlib.repr(value)}"
        if said:
            return f"{key} differs ({said})"
    return None


def _other_sources(then: list[list[str | None]], now: list[list[str | None]]) -> str | None:
    """How the sources, pairs of name and content, differ. One that is not here, or on the hub, is known by its name."""
    for (name, content), (other_name, other) in zip(then, now):
        if other is None and name != other_name:
            return f"prepared from {name}, now {other_name}"
        if other is not None and content != other:
            return f"{other_name} has other content"
    return None if len(then) == len(now) else f"prepared from {len(then)} sources, now {len(now)}"


def _refuse_foreign(folder: Path) -> None:
    ours = (folder / RECORD_FILE).is_file()
    if folder.exists() and not ours and not (folder.is_dir() and not any(folder.iterdir())):
        raise SFTError(f"prepared_data {folder}: holds files that `prepare` did not write; choose another folder")


def _write(data: PreparedData, made_from: dict[str, Any], aside: Path) -> None:
    for name in PARTS:
        rows = getattr(data, name)
        if rows is not None:
            rows.save_to_disk(aside / name)
    accounts = {"train_stats": data.train_stats, "held_out_stats": data.held_out_stats}
    found = {name: one and asdict(dataclasses.replace(one, cached=True)) for name, one in accounts.items()}
    write_json(aside / RECORD_FILE, {"made_from": made_from, **found})
    write_checksums(aside)


def _record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))


def _map(folder: Path) -> Dataset:
    return datasets.concatenate_datasets([Dataset.from_file(str(file)) for file in list_saved_files(folder)])
