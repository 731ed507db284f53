"""Encode rows once, before training, into a folder of Arrow shards that all processes memory-map.

    sft-pipeline prepare CONFIG --prepared_data prepared/alpaca
    sft-pipeline train CONFIG --prepared_data prepared/alpaca

    train/ held_out/     the columns of encode.FEATURES in shards, as `save_to_disk` writes them; of several held-out
                         sets, each row has the name of its set
    held_out_conversations/    the held-out conversations, some of which are answered during training
    prepared.json        everything that the ids depend on, and the encoding statistics
    SHA256SUMS           checksums that detect a damaged folder

The folder is written atomically: it is complete or absent.
"""

from __future__ import annotations

import json
import logging
import reprlib
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from sft_pipeline.arguments import SFTArguments, SourceEntry, parse_eval_data
from sft_pipeline.config import SFTConfig
from sft_pipeline.data.encode import ENCODING_FORMAT, EncodingStats, hash_texts, hash_tokenizer
from sft_pipeline.data.pipeline import PreparedData, prepare_data
from sft_pipeline.data.sources import ROWS_FORMAT, describe_unread_names, hash_source, list_saved_files
from sft_pipeline.data.template import Template
from sft_pipeline.utils.distributed import run_on_main_process
from sft_pipeline.utils.errors import SFTError, format_error
from sft_pipeline.utils.files import find_damage, sync_to_disk, write_aside, write_checksums, write_json

logger = logging.getLogger(__name__)

# Raise it when the same settings give other splits or keys of prepared.json.
SHARDS_FORMAT = 5
RECORD_FILE = "prepared.json"
PARTS = ("train", "held_out", "held_out_conversations")
SOURCES = ("train_data", "eval_data")
SETTINGS = (
    *("train_data_weights", "held_out", "skip_bad_rows", "max_train_rows"),
    *("template", "system_prompt", "train_on", "max_length", "overlong"),
)
REMEDY = "run `prepare` again, or use the config it was prepared with"


def write_shards(args: SFTArguments, template: Template, folder: Path) -> None:
    """Prepare the rows of the config into `folder`.

    A folder that is up to date stays as it is; shards of another config are replaced.

    Raises SFTError for data that cannot be prepared, a folder with other files, or one that cannot be written.
    """
    if args.streaming:
        raise SFTError("streaming: rows are encoded as they come, and nothing is prepared; set streaming: false")
    _check_replaceable(folder)
    if find_shard_mismatch(args, template, folder) is None:
        logger.info("%s: up to date, nothing to prepare", folder)
        return
    inputs = list_shard_inputs(args, template)
    data = prepare_data(args, template)
    try:
        with write_aside(folder) as new_folder:
            _write_folder(data, inputs, new_folder)
        sync_to_disk(folder.parent)
    except OSError as error:
        reason = format_error(error)
        raise SFTError(
            f"prepared_data {folder}: cannot be written ({reason}); check permissions and disk space"
        ) from error


def map_shards(args: SFTConfig, template: Template) -> PreparedData:
    """Memory-map the rows of `args.prepared_data`: every process reads the pages it needs and encodes nothing.

    The main process checks the folder once for all. Raises SFTError for a folder that is missing, damaged or prepared
    from another config, with the first key that differs.
    """
    folder = Path(str(args.prepared_data)).expanduser()
    reason = run_on_main_process(args, lambda: find_shard_mismatch(args, template, folder))
    if reason is None and not (folder / RECORD_FILE).is_file():
        reason = "missing on this machine; copy it to all machines, or use a disk that they share"
    if reason:
        raise SFTError(f"prepared_data {folder}: {reason}")
    record = _read_record(folder)
    held_out_stats = record["held_out_stats"]
    data = PreparedData(
        train=_map_part(folder / "train"),
        train_stats=EncodingStats(**record["train_stats"]),
        held_out=_map_part(folder / "held_out") if held_out_stats else None,
        held_out_stats=EncodingStats(**held_out_stats) if held_out_stats else None,
        held_out_conversations=_map_part(folder / "held_out_conversations") if held_out_stats else None,
        unread=record["unread"],
        sources=record["sources"],
        held_out_sets={name: EncodingStats(**stats) for name, stats in record.get("held_out_sets", {}).items()},
    )
    for source, counts in data.unread.items():
        if counts:
            logger.info("%s: not read: %s", source, describe_unread_names(Counter(counts)))
    logger.info("training rows of %s: %s", folder, data.train_stats)
    for name, stats in data.held_out_sets.items():
        logger.info("held-out rows of %s, %s: %s", folder, name, stats)
    if data.held_out_stats and not data.held_out_sets:
        logger.info("held-out rows of %s: %s", folder, data.held_out_stats)
    return data


def list_shard_inputs(args: SFTArguments, template: Template) -> dict[str, Any]:
    """List everything that the rows and their ids depend on, in the order in which it is compared."""
    sets = parse_eval_data(args.eval_data)
    sources = {
        "train_data": [SourceEntry.parse(text) for text in args.train_data],
        "eval_data": [entry for entries in sets.values() for entry in entries],
    }
    return {
        "format": SHARDS_FORMAT,
        "rows_format": ROWS_FORMAT,
        "encoding_format": ENCODING_FORMAT,
        **{key: [_hash_entry(entry) for entry in sources[key]] for key in SOURCES},
        **({"held_out_sets": {name: len(entries) for name, entries in sets.items()}} if sets.keys() - {None} else {}),
        **{key: getattr(args, key) for key in SETTINGS},
        "tokenizer": hash_tokenizer(template.tokenizer),
        "chat_template": hash_texts(template.chat_template),
        "chat_template_kwargs": template.chat_template_kwargs,
    }


def _hash_entry(entry: SourceEntry) -> tuple[str, str | None]:
    """Return the text of an entry and the hash of its content and weight; None if it is on the hub: its text then tells
    them."""
    formatted = entry.format()
    text = formatted if isinstance(formatted, str) else json.dumps(formatted, ensure_ascii=False)
    content = hash_source(entry.path, entry.split or "train")
    return text, content if content is None or entry.weight is None else f"{content} {entry.weight}"


def find_shard_mismatch(args: SFTArguments, template: Template, folder: Path) -> str | None:
    """Return why this config cannot be trained from the folder, with the remedy; None if it can."""
    if not (folder / RECORD_FILE).is_file():
        return "has no prepared rows; run `prepare`" if folder.exists() else "no such folder; run `prepare`"
    try:
        damage = find_damage(folder)
        if damage:
            return f"damaged ({damage}); run `prepare` again"
        difference = _find_difference(_read_record(folder)["made_from"], list_shard_inputs(args, template))
    except (SFTError, OSError) as error:
        # Returned, not raised: the other processes wait for the main process's result.
        return format_error(error)
    return difference and f"{difference}; {REMEDY}"


def _find_difference(recorded: dict[str, Any], current: dict[str, Any]) -> str | None:
    """Describe the first key whose recorded value differs from the current one; None if all are equal."""
    for key in {**current, **recorded}:
        recorded_value, value = recorded.get(key), current.get(key)
        if key in SOURCES:
            difference = _compare_sources(recorded_value or [], value or [])
        elif recorded_value != value:
            difference = f"prepared with {reprlib.repr(recorded_value)}, now {reprlib.repr(value)}"
        else:
            difference = None
        if difference:
            return f"{key} differs ({difference})"
    return None


def _compare_sources(recorded: list[list[str | None]], current: list[list[str | None]]) -> str | None:
    """Describe how two lists of (name, content hash) differ; None if they do not.

    A source without a hash (on the hub, or not on this machine) is compared by its name, any other by its content.
    """
    for (recorded_name, recorded_hash), (name, content_hash) in zip(recorded, current):
        if content_hash is None and recorded_name != name:
            return f"prepared from {recorded_name}, now {name}"
        if content_hash is not None and recorded_hash != content_hash:
            return f"the content of {name} differs"
    if len(recorded) != len(current):
        return f"prepared from {len(recorded)} sources, now {len(current)}"
    return None


def _check_replaceable(folder: Path) -> None:
    """Raise SFTError unless the folder is absent, empty or written by `prepare`."""
    if not folder.exists() or (folder / RECORD_FILE).is_file():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise SFTError(f"prepared_data {folder}: has files that `prepare` did not write; choose another folder")


def _write_folder(data: PreparedData, inputs: dict[str, Any], folder: Path) -> None:
    for name in PARTS:
        rows = getattr(data, name)
        if rows is not None:
            rows.save_to_disk(folder / name)
    record: dict[str, Any] = {"made_from": inputs, "unread": data.unread, "sources": data.sources}
    for name in ("train_stats", "held_out_stats"):
        stats = getattr(data, name)
        record[name] = stats and asdict(replace(stats, cached=True))
    if data.held_out_sets:
        stats_of_sets = data.held_out_sets.items()
        record["held_out_sets"] = {name: asdict(replace(stats, cached=True)) for name, stats in stats_of_sets}
    write_json(folder / RECORD_FILE, record)
    write_checksums(folder)


def _read_record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))


def _map_part(folder: Path) -> Dataset:
    return datasets.concatenate_datasets([Dataset.from_file(str(file)) for file in list_saved_files(folder)])
