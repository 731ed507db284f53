"""Mix datasets by weight and hold rows out; both select rows by their hash.

A row's hash depends on its content alone, so a selection is the same for reordered or renamed files and on another
machine, and all copies of a row are on the same side. All functions take and return datasets with a column
`conversation`.
"""

import hashlib
import itertools
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Features, Value

from sft_pipeline.data.messages import Conversation, Message, parse_conversation
from sft_pipeline.utils.errors import SFTError

logger = logging.getLogger(__name__)

T = TypeVar("T")
SET_COLUMN = "held_out_set"  # of held-out rows, their set


def hash_row(conversation: Conversation, purpose: str = "") -> int:
    """Return 64 bits of BLAKE2b over the content in order, the same on every platform and in every version.

    The content is what the model may read: not which messages are trained, nor the template's arguments. Another
    `purpose` (at most 16 bytes) gives an independent hash: the rows that `mix_datasets` takes must not be correlated
    with those that `split_held_out` holds out.
    """
    content: list[Any] = [_list_message_content(message) for message in conversation.get("messages", ())]
    content += [{key: conversation[key]} for key in ("tools", "text") if key in conversation]
    digest = hashlib.blake2b(json.dumps(content).encode(), digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "big")


def _list_message_content(message: Message) -> list[Any]:
    content = [message["role"], message["content"]]
    fields = {key: value for key, value in message.items() if key not in ("role", "content", "train")}
    return [*content, fields] if fields else content


def hash_rows(dataset: Dataset, purpose: str = "") -> np.ndarray:
    """Return the hashes of all rows (uint64, [rows]); they are kept in datasets' cache."""
    hashed = dataset.map(
        _hash_batch,
        batched=True,
        input_columns="conversation",
        fn_kwargs={"purpose": purpose},
        remove_columns=dataset.column_names,
        features=Features({"hash": Value("uint64")}),
        desc="hashing rows",
    )
    return hashed.data.column("hash").to_numpy()


def _hash_batch(conversations: list[str], purpose: str) -> dict[str, np.ndarray]:
    # An array, because datasets reads a list of integers as int64, which half of the hashes exceed.
    return {"hash": np.array([hash_row(parse_conversation(text), purpose) for text in conversations], dtype=np.uint64)}


def mix_datasets(parts: list[Dataset], weights: list[float] | None = None) -> Dataset:
    """Concatenate the parts in order, each repeated by its weight; training shuffles the rows.

    Weight 1 takes each row once, 2 twice, 0.5 the half with the smaller hashes, 0 none; a positive weight takes at
    least one row. None is weight 1 for every part.

    Raises SFTError: wrong number of weights, a negative or non-finite weight, all weights 0.
    """
    weights = [1.0] * len(parts) if weights is None else weights
    check_weights(weights, len(parts))
    repeated = [_repeat_rows(part, weight) for part, weight in zip(parts, weights) if weight > 0]
    return datasets.concatenate_datasets(repeated)


def check_weights(weights: Sequence[float], sources: int) -> None:
    """Raise SFTError for a wrong number of weights, a negative or non-finite weight, or if all are 0."""
    if len(weights) != sources:
        raise SFTError(f"train_data_weights: {len(weights)} weights for {sources} datasets; give one per dataset")
    for weight in weights:
        if not (math.isfinite(weight) and weight >= 0):
            raise SFTError(f"train_data_weights: {weight} must be 0 or more (1 is each row once, 0.5 half of the rows)")
    if not any(weights):
        raise SFTError("train_data_weights: all weights are 0; set at least one above 0")


def _repeat_rows(dataset: Dataset, weight: float) -> Dataset:
    """Repeat all rows by the whole part of `weight`, and take the rows with the smallest hashes for its fraction."""
    if weight == 1:
        return dataset
    rows = len(dataset)
    repeats, remainder = divmod(max(1, round(weight * rows)), rows)
    indices = np.tile(np.arange(rows), repeats)
    if remainder:
        smallest = np.argsort(hash_rows(dataset, "mix"), kind="stable")[:remainder]
        indices = np.concatenate([indices, np.sort(smallest)])
    return dataset.select(indices)


def split_held_out(dataset: Dataset, held_out: float) -> tuple[Dataset, Dataset]:
    """Split into (train, held-out) rows.

    held_out: a whole number of 1 or more holds out that many rows, those with the smallest hashes. A number below 1
    is a share: it holds out the rows whose hash is below that share of the range, which is about that many; adding
    rows to the data then moves no row from one side to the other.

    Copies of a held-out row are held out too, so no row is on both sides; a number of rows may be exceeded by copies.
    Raises SFTError: a number that is neither, no row held out, no row left to train on.
    """
    hashes = hash_rows(dataset)
    is_held_out = _select_held_out(hashes, held_out)
    if not is_held_out.any():
        raise SFTError(f"held_out: {held_out:g} selects none of {len(dataset)} rows; give a number of rows, such as 20")
    if is_held_out.all():
        raise SFTError(f"held_out: {held_out:g} leaves none of {len(dataset)} rows to train on; lower it")
    return dataset.select(np.flatnonzero(~is_held_out)), dataset.select(np.flatnonzero(is_held_out))


def _select_held_out(hashes: np.ndarray, held_out: float) -> np.ndarray:
    """Return the mask ([rows], bool) of the rows to hold out."""
    if 0 < held_out < 1:
        return hashes < np.uint64(int(held_out * 2**64))
    if held_out >= 1 and held_out % 1 == 0:
        return hashes <= np.sort(hashes)[min(int(held_out), len(hashes)) - 1]
    raise SFTError(f"held_out: {held_out:g} must be a share between 0 and 1 (0.05) or a whole number of rows (20)")


def select_rows(dataset: Dataset, rows: int) -> Dataset:
    """Select the `rows` rows with the smallest hashes, in their order; all rows if there are no more than that.

    A smaller number of rows is always a subset of a larger one.
    """
    smallest = np.argsort(hash_rows(dataset, "take"), kind="stable")[:rows]
    return dataset.select(np.sort(smallest))


def join_sets(sets: Mapping[str | None, Dataset]) -> Dataset:
    """Concatenate held-out sets. Each row has its set in SET_COLUMN, unless they are one set without a name."""
    if None in sets:
        return sets[None]
    label = ClassLabel(names=list(sets))
    return datasets.concatenate_datasets(
        [rows.add_column(SET_COLUMN, [index] * len(rows), feature=label) for index, rows in enumerate(sets.values())]
    )


def index_sets(held_out: Any) -> dict[str, np.ndarray]:
    """Return the indices of the rows of each held-out set by its name, in the order in which the sets were joined; none
    for rows without names."""
    if SET_COLUMN not in (getattr(held_out, "column_names", None) or ()):
        return {}
    labels = np.array(held_out[SET_COLUMN][:])
    return {name: np.flatnonzero(labels == index) for index, name in enumerate(held_out.features[SET_COLUMN].names)}


def split_sets(held_out: Dataset) -> dict[str | None, Dataset]:
    """Return the rows of each held-out set by its name, which is None if they are one set without a name."""
    sets: dict[str | None, Dataset] = {name: held_out.select(rows) for name, rows in index_sets(held_out).items()}
    return {name: rows.remove_columns(SET_COLUMN) for name, rows in sets.items()} or {None: held_out}


def parse_sets(held_out: Dataset) -> dict[str | None, list[Conversation]]:
    """Parse the held-out conversations of `load_splits`; return those of each set by its name."""
    return {
        name: [parse_conversation(text) for text in rows["conversation"]] for name, rows in split_sets(held_out).items()
    }


def alternate(parts: Iterable[Iterable[T]]) -> Iterator[T]:
    """Yield the first item of each part, then the second of each, and so on: the first n have as many of each part."""
    for items in itertools.zip_longest(*parts, fillvalue=None):
        yield from (item for item in items if item is not None)


def drop_overlap(train: Dataset, held_out: Dataset, name: str | None = None) -> Dataset:
    """Drop the rows of `train` that are in `held_out` too, and log their number. name: of the held-out set, if any.

    Raises SFTError if no row is left.
    """
    is_shared = np.isin(hash_rows(train), hash_rows(held_out))
    if is_shared.all():
        raise SFTError(
            "train_data: every row is in the evaluation data too; no row is left to train on, add other rows"
        )
    if not is_shared.any():
        return train
    of_set = "" if name is None else f" {name}"
    logger.info("dropped %s training rows that are in the evaluation data%s too", f"{int(is_shared.sum()):,}", of_set)
    return train.select(np.flatnonzero(~is_shared))
