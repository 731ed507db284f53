"""Mixing data sets by weight and holding rows out, both decided by the hash of a row.

A row's hash depends on its messages alone, so a choice made by it survives reordering, renaming and another machine,
and all copies of a row fall on one side. Every function takes and returns data sets with a column `messages`.
"""

import hashlib
import json
import logging
import math
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, Value

from sft_pipeline.data.messages import Message
from sft_pipeline.utils.errors import SFTError

logger = logging.getLogger(__name__)


def hash_row(messages: list[Message], purpose: str = "") -> int:
    """64 bits of BLAKE2b over the roles and texts in order, the same on every platform and in every version.

    Another `purpose` (at most 16 bytes) gives an independent hash: the rows that `mix` takes must not be the ones that
    `split_held_out` likes.
    """
    content = json.dumps([[message["role"], message["content"]] for message in messages])
    digest = hashlib.blake2b(content.encode(), digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "big")


def hash_rows(dataset: Dataset, purpose: str = "") -> np.ndarray:
    """The hashes of all rows (uint64, one a row), kept in datasets' cache."""
    hashed = dataset.map(
        _hash_batch,
        batched=True,
        fn_kwargs={"purpose": purpose},
        remove_columns=dataset.column_names,
        features=Features({"hash": Value("uint64")}),
        desc="hashing rows",
    )
    return hashed.data.column("hash").to_numpy()


def _hash_batch(batch: dict[str, list[Any]], purpose: str) -> dict[str, np.ndarray]:
    # An array, because datasets takes a list of integers for int64 and half of the hashes are larger.
    return {"hash": np.array([hash_row(messages, purpose) for messages in batch["messages"]], dtype=np.uint64)}


def mix_datasets(parts: list[Dataset], weights: list[float] | None = None) -> Dataset:
    """One data set, part after part (training shuffles), in which a part's rows stand `weight` times: 1 is once, 2
    twice, 0.5 takes the half with the smaller hashes, 0 leaves the part out. None is once each.

    A positive weight takes a row at least. Raises SFTError: a weight too few or many, negative, not finite, all zero.
    """
    weights = [1.0] * len(parts) if weights is None else weights
    if len(weights) != len(parts):
        raise SFTError(f"{len(weights)} weights for {len(parts)} data sets: give one each")
    for weight in weights:
        if not (math.isfinite(weight) and weight >= 0):
            raise SFTError(f"weight {weight}: must be 0 or more (1 takes each row once, 0.5 half of the rows)")
    taken = [_times(part, weight) for part, weight in zip(parts, weights) if weight > 0]
    if not taken:
        raise SFTError("the weights leave no data set: one at least must be above 0")
    return datasets.concatenate_datasets(taken)


def _times(dataset: Dataset, weight: float) -> Dataset:
    if weight == 1:
        return dataset
    rows = len(dataset)
    repeats, rest = divmod(max(1, round(weight * rows)), rows)
    smallest = np.argsort(hash_rows(dataset, "mix"), kind="stable")[:rest] if rest else np.array([], dtype=np.int64)
    return dataset.select(np.concatenate([np.tile(np.arange(rows), repeats), np.sort(smallest)]))


def split_held_out(dataset: Dataset, held_out: float) -> tuple[Dataset, Dataset]:
    """(train, eval): a whole number of 1 or more holds out that many rows (those with the smallest hashes), a number
    below 1 that share (those with a hash below it; about so many, but adding rows moves none across).

    Every copy of a held-out row goes with it, so no row is in both and a count may be exceeded by the copies.
    Raises SFTError: a number that is neither, nothing held out, nothing left to train on.
    """
    hashes = hash_rows(dataset)
    chosen = _chosen(hashes, held_out)
    if not chosen.any():
        raise SFTError(f"held out {held_out:g} of {len(dataset)} rows: no row falls below the share; give a count")
    if chosen.all():
        raise SFTError(f"held out {held_out:g} of {len(dataset)} rows: nothing is left to train on; hold out less")
    return dataset.select(np.flatnonzero(~chosen)), dataset.select(np.flatnonzero(chosen))


def _chosen(hashes: np.ndarray, held_out: float) -> np.ndarray:
    if 0 < held_out < 1:
        return hashes < np.uint64(int(held_out * 2**64))
    if held_out >= 1 and held_out % 1 == 0:
        return hashes <= np.sort(hashes)[min(int(held_out), len(hashes)) - 1]
    raise SFTError(f"held out {held_out:g}: give a share between 0 and 1 (0.05) or a whole number of rows (20)")


def select_rows(dataset: Dataset, rows: int) -> Dataset:
    """The `rows` rows with the smallest hashes, or all where there are no more, in their order: fewer are always among
    more."""
    smallest = np.argsort(hash_rows(dataset, "take"), kind="stable")[:rows]
    return dataset.select(np.sort(smallest))


def drop_overlap(train: Dataset, held: Dataset) -> Dataset:
    """`train` without the rows that stand in `held` too; their number is logged.

    Raises SFTError if nothing is left.
    """
    shared = np.isin(hash_rows(train), hash_rows(held))
    if shared.all():
        raise SFTError("every training row stands in the evaluation data too: nothing is left to train on")
    if not shared.any():
        return train
    logger.info("%s training rows stand in the evaluation data and are left out", f"{int(shared.sum()):,}")
    return train.select(np.flatnonzero(~shared))
