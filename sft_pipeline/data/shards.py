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
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from transformers import TrainingArguments

from sft_pipeline.config import SFTArguments
from sft_pipeline.data.chat_templates import Template
from sft_pipeline.data.encode import Account, text_hash, tokenizer_hash
from sft_pipeline.data.pipeline import Prepared, prepare
from sft_pipeline.data.sources import content_hash, saved_files
from sft_pipeline.utils.distributed import looked_for_once
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.files import damage, seal, sync, write_json

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
    if problem(sft, template, folder) is None:
        logger.info("%s: prepared already, nothing has changed since", folder)
        return
    made_from = ingredients(sft, template)
    data = prepare(sft, template)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as work:
            _write(data, made_from, Path(work) / "new")
            if folder.exists():
                folder.rename(Path(work) / "old")
            (Path(work) / "new").rename(folder)
        sync(folder.parent)
    except OSError as error:
        raise SFTError(f"prepared_data {folder}: cannot be written ({' '.join(str(error).split())})") from error


def map_shards(sft: SFTArguments, template: Template, training: TrainingArguments) -> Prepared:
    """The rows of `sft.prepared_data`, mapped into memory: every process reads the pages it needs, none encodes.

    The first process looks at everything once, for all. Raises SFTError for a folder that is missing, damaged or of
    another config, naming the first key that differs.
    """
    folder = Path(str(sft.prepared_data)).expanduser()
    reason = looked_for_once(training, lambda: problem(sft, template, folder))
    if reason is None and not (folder / RECORD_FILE).is_file():
        reason = "is not on every machine; copy it to all, or to a disk that they share"
    if reason:
        raise SFTError(f"prepared_data {folder}: {reason}")
    record = _record(folder)
    parts: dict[str, Any] = {name: _map(folder / name) if (folder / name).is_dir() else None for name in PARTS}
    accounts = {f"{name}_account": record[f"{name}_account"] for name in ("train", "held_out")}
    data = Prepared(**parts | {name: one and Account(**one) for name, one in accounts.items()})
    logger.info("training rows of %s: %s", folder, data.train_account)
    if data.held_out_account:
        logger.info("held-out rows of %s: %s", folder, data.held_out_account)
    return data


def ingredients(sft: SFTArguments, template: Template) -> dict[str, Any]:
    """All that the rows and their ids depend on, in the order in which it is compared."""
    return {
        "format": FORMAT,
        **{key: [[name, content_hash(name)] for name in getattr(sft, key)] for key in SOURCES},
        **{key: getattr(sft, key) for key in SETTINGS},
        "tokenizer": tokenizer_hash(template.tokenizer),
        "chat_template": text_hash(template.chat_template),
    }


def problem(sft: SFTArguments, template: Template, folder: Path) -> str | None:
    """Why this config cannot be trained from the folder, and what to do; None if it can."""
    if not (folder / RECORD_FILE).is_file():
        return "has no prepared rows; run `prepare`" if folder.exists() else "no such folder; run `prepare`"
    try:
        damaged = damage(folder)
        reason = damaged or _difference(_record(folder)["made_from"], ingredients(sft, template))
    except (SFTError, OSError) as error:
        # Said by the first process for all: the others wait for it.
        return " ".join(str(error).split())
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


def _write(data: Prepared, made_from: dict[str, Any], aside: Path) -> None:
    for name in PARTS:
        rows = getattr(data, name)
        if rows is not None:
            rows.save_to_disk(aside / name)
    accounts = {"train_account": data.train_account, "held_out_account": data.held_out_account}
    found = {name: one and asdict(dataclasses.replace(one, cached=True)) for name, one in accounts.items()}
    write_json(aside / RECORD_FILE, {"made_from": made_from, **found})
    seal(aside)


def _record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))


def _map(folder: Path) -> Dataset:
    return datasets.concatenate_datasets([Dataset.from_file(str(file)) for file in saved_files(folder)])
