"""Encode conversations as training rows, with statistics of the outcomes.

    rows, stats = encode_dataset(conversations, Encoder(template, max_length=1024))
    print(stats)

A row is a conversation. It has one or more sequences, whose `input_ids` and `labels` are concatenated;
`sequence_lengths` has their numbers of tokens, and `computed_tokens` is how many are computed if what they share is
computed once.

`labels[t]` is the id to predict at position t: the token at t + 1 if that token is supervised, else -100. The last
label of a sequence is -100. Labels are shifted here and nowhere else.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value
from datasets import List as ListOf
from transformers import PreTrainedTokenizerBase

from sft_pipeline.data.messages import (
    SYSTEM_ROLES,
    Conversation,
    add_system_prompt,
    format_conversation,
    parse_conversation,
    replace_messages,
)
from sft_pipeline.data.prefix_tree import count_tree_tokens
from sft_pipeline.data.template import Template, TokenSequence
from sft_pipeline.utils.constants import IGNORED
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.files import get_cache_dir, write_aside

# Part of the cache key: raise it when the same messages would give other ids or labels (or FEATURES change).
ENCODING_FORMAT = 2
SOURCE_COLUMN = "source_index"  # of training rows: the number of their source
KEPT, TRUNCATED, TOO_LONG, UNSUPERVISED = "kept", "truncated", "longer than max_length", "nothing supervised"
FEATURES = Features(
    # 32 bits are enough for every vocabulary and halve the files.
    {
        "input_ids": ListOf(Value("int32")),
        "labels": ListOf(Value("int32")),
        "sequence_lengths": ListOf(Value("int32")),
        "computed_tokens": Value("int32"),
        # encode_dataset removes these two columns: of the row, and of its sequences.
        "outcome": Value("string"),
        "dropped_sequences": Value("int32"),
    }
)


def build_input_ids_and_labels(sequence: TokenSequence, limit: int | None = None) -> tuple[list[int], list[int]]:
    """Return (input_ids, labels) of one sequence of spans, cut off after `limit` tokens."""
    targets = (span.ids if span.supervised else [IGNORED] * len(span.ids) for span in sequence.spans)
    ids = list(itertools.chain.from_iterable(span.ids for span in sequence.spans))[:limit]
    return ids, [*list(itertools.chain.from_iterable(targets))[1:limit], IGNORED]


@dataclass(frozen=True)
class Encoder:
    """The function for `Dataset.map`: encodes a batch of `conversation` and `origin` as the columns of FEATURES.

    overlong: what to do with a sequence of more than max_length tokens. "drop" it, "truncate_answer" (cut off its end,
    so it has no stop token) or "truncate_turns" (remove its oldest exchanges, but not the system message). A text is
    cut into sequences of max_length tokens. A row is dropped if no sequence with a supervised token is left.
    """

    template: Template
    system_prompt: str | None = None
    max_length: int = 1024
    overlong: str = "drop"
    train_on: str = "all"

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        conversations = [
            add_system_prompt(parse_conversation(text), self.system_prompt) for text in batch["conversation"]
        ]
        try:
            rows = self.template.render(conversations, self.train_on)
        except SFTError:
            rows = self._render_each(conversations, batch["origin"])
        encoded = []
        for sequences, conversation, origin in zip(rows, conversations, batch["origin"]):
            try:
                encoded.append(self._encode_row(sequences, conversation))
            except SFTError as error:  # a conversation without its oldest turns is rendered again
                raise SFTError(f"{origin}: {error}") from error
        return dict(zip(FEATURES, map(list, zip(*encoded))))

    def compute_cache_key(self) -> str:
        """Return a hash of what decides the result besides the rows: settings, template, tokenizer, ENCODING_FORMAT."""
        settings = (self.system_prompt, self.max_length, self.overlong, self.train_on, self.template.name)
        return hash_texts(
            repr(settings),
            self.template.chat_template,
            json.dumps(self.template.chat_template_kwargs, sort_keys=True),
            hash_tokenizer(self.template.tokenizer),
            str(ENCODING_FORMAT),
        )

    def _render_each(self, conversations: list[Conversation], origins: list[str]) -> list[list[TokenSequence]]:
        """Render a batch that failed one row at a time, so that the error names the row."""
        rows = []
        for conversation, origin in zip(conversations, origins):
            try:
                rows += self.template.render([conversation], self.train_on)
            except SFTError as error:
                raise SFTError(f"{origin}: {error}") from error
        return rows

    def _encode_row(self, sequences: list[TokenSequence], conversation: Conversation) -> tuple[Any, ...]:
        """Return the values of one row in the columns of FEATURES; a dropped row has no ids."""
        encoded: list[tuple[list[int], list[int]]] = []
        dropped, outcome = 0, KEPT
        for sequence in sequences:
            pieces = [build_input_ids_and_labels(sequence)]
            if len(pieces[0][0]) > self.max_length:
                pieces = self._shorten(sequence, pieces[0], conversation)
                if "text" not in conversation:
                    dropped += not pieces
                    outcome = TRUNCATED if pieces else outcome
            encoded += pieces
        if not encoded:
            return [], [], [], 0, TOO_LONG if sequences else UNSUPERVISED, 0
        ids, labels = (list(itertools.chain.from_iterable(column)) for column in zip(*encoded))
        computed_tokens = len(ids)
        if len(encoded) > 1:
            computed_tokens = count_tree_tokens([np.array(sequence_ids) for sequence_ids, _ in encoded])
        return ids, labels, [len(ids) for ids, _ in encoded], computed_tokens, outcome, dropped

    def _shorten(
        self, sequence: TokenSequence, encoded: tuple[list[int], list[int]], conversation: Conversation
    ) -> list[tuple[list[int], list[int]]]:
        """Return the sequences of at most max_length tokens, with targets, that a longer one is made into."""
        if "text" in conversation:
            return self._cut_text(*encoded)
        if self.overlong == "truncate_turns":
            shorter = self._drop_oldest_turns(sequence, conversation)
            return [encoded for encoded in map(build_input_ids_and_labels, shorter) if self._fits(encoded)]
        if self.overlong == "truncate_answer":
            cut = build_input_ids_and_labels(sequence, self.max_length)
            return [cut] if self._fits(cut) else []
        return []

    def _fits(self, encoded: tuple[list[int], list[int]]) -> bool:
        ids, labels = encoded
        return len(ids) <= self.max_length and labels.count(IGNORED) < len(labels)

    def _cut_text(self, ids: list[int], labels: list[int]) -> list[tuple[list[int], list[int]]]:
        """Cut a text; each sequence begins with the last token of the one before, so that every token is predicted."""
        step = self.max_length - 1
        starts = range(0, len(ids) - 1, step) if step else ()
        return [
            (ids[start : start + step + 1], [*labels[start : start + step][: len(ids) - start - 1], IGNORED])
            for start in starts
        ]

    def _drop_oldest_turns(self, sequence: TokenSequence, conversation: Conversation) -> list[TokenSequence]:
        """Render the turns of a sequence without as many of the oldest exchanges as needed to fit into max_length.

        An exchange begins with a user message. The last one always stays, even if it does not fit.
        """
        messages = conversation["messages"][: sequence.turns[-1] + 1]
        trained = [
            message if index in sequence.turns else {**message, "train": False}
            for index, message in enumerate(messages)
        ]
        start = next((index for index, message in enumerate(trained) if message["role"] not in SYSTEM_ROLES), 0)
        shorter = [sequence]
        while any(_count_tokens(part) > self.max_length for part in shorter):
            exchanges = [index for index in range(start + 1, len(trained)) if trained[index]["role"] == "user"]
            if not exchanges:
                break
            trained = trained[:start] + trained[exchanges[0] :]
            [shorter] = self.template.render([replace_messages(conversation, trained)])
        return shorter


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash everything in the tokenizer that decides the ids of a text."""
    # Only truncation and padding, which encoding turns off, are written before the added tokens.
    rules = tokenizer.backend_tokenizer.to_str().partition('"added_tokens"')[2]
    return hash_texts(rules, repr(sorted(tokenizer.added_tokens_decoder.items())))


def hash_texts(*texts: str) -> str:
    """Return the SHA-256 of the texts in hexadecimal digits."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _count_tokens(sequence: TokenSequence) -> int:
    return sum(len(span.ids) for span in sequence.spans)


@dataclass(frozen=True)
class EncodingStats:
    """Outcomes of all rows: each is kept (possibly truncated) or dropped for a reason, and counted once."""

    rows: int  # conversations and texts
    kept: int
    truncated: int  # of the kept rows
    dropped: dict[str, int]  # reason: rows
    sequences: int  # of the kept rows, like all that follow
    dropped_sequences: int  # longer than max_length
    tokens: int
    computed_tokens: int  # with what the sequences of a row share computed once
    supervised_tokens: int
    length_quantiles: dict[str, int]  # tokens per sequence
    cached: bool

    def __str__(self) -> str:
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items()) or "none"
        lengths = ", ".join(f"{name} {value:,}" for name, value in self.length_quantiles.items())
        supervised_share = self.supervised_tokens / max(1, self.tokens)
        lines = [
            f"{self.rows:,} rows, {self.kept:,} kept ({self.truncated:,} of them truncated), dropped: {dropped}"
            f"{' (read from the cache)' if self.cached else ''}"
        ]
        if self.sequences > self.kept or self.dropped_sequences:
            without = f", without {self.dropped_sequences:,} longer than max_length" if self.dropped_sequences else ""
            lines.append(
                f"{self.sequences:,} sequences{without}; {self.computed_tokens:,} tokens are computed, as sequences "
                "of a row share their beginnings"
            )
        lines.append(f"{self.tokens:,} tokens, {supervised_share:.0%} supervised; tokens per sequence: {lengths}")
        return "\n".join(lines)


def sum_stats(parts: Sequence[EncodingStats], rows: Dataset) -> EncodingStats:
    """Return the statistics of several encoded data sets together. rows: the kept rows of all of them."""
    counts = (
        *("rows", "kept", "truncated", "sequences", "dropped_sequences"),
        *("tokens", "computed_tokens", "supervised_tokens"),
    )
    return EncodingStats(
        **{name: sum(getattr(part, name) for part in parts) for name in counts},
        dropped=dict(sum((Counter(part.dropped) for part in parts), Counter())),
        length_quantiles=compute_length_quantiles(count_sequence_tokens(rows)),
        cached=all(part.cached for part in parts),
    )


def encode_dataset(
    rows: Dataset | Sequence[Conversation], encoder: Encoder, num_proc: int = 1
) -> tuple[Dataset, EncodingStats]:
    """Encode conversations, or a dataset of `load_source`; return the kept rows and the statistics.

    The kept rows have the SOURCE_COLUMN that `rows` has.

    The result is cached in `SFT_PIPELINE_CACHE` or ~/.cache/sft_pipeline under a hash of the rows and
    `encoder.compute_cache_key()`: only a change of data, template, tokenizer, settings or ENCODING_FORMAT encodes
    again.

    Raises SFTError naming the row that cannot be encoded, or with the counts if no row is left.
    """
    dataset = rows if isinstance(rows, Dataset) else _build_dataset(rows)
    key = hashlib.sha256(f"{_hash_rows(dataset)} {encoder.compute_cache_key()}".encode()).hexdigest()[:32]
    folder = get_cache_dir() / "encoded" / key
    encoded = _read_encoded(folder)
    cached = encoded is not None
    if encoded is None:
        encoded = _write_encoded(folder, dataset, encoder, num_proc)
    stats = _compute_stats(encoded, cached)
    if not stats.kept:
        counts = str(stats).splitlines()[0]
        raise SFTError(f"no row is left to train on: {counts}; raise max_length or fix the rows")
    if SOURCE_COLUMN in dataset.column_names:
        encoded = encoded.add_column(SOURCE_COLUMN, dataset.with_format("numpy")[SOURCE_COLUMN][:])
    if stats.kept < stats.rows:
        encoded = encoded.select(np.flatnonzero(_get_kept_mask(encoded)))
    return encoded.remove_columns(["outcome", "dropped_sequences"]), stats


def _build_dataset(conversations: Sequence[Conversation]) -> Dataset:
    rows = [
        {"conversation": format_conversation(conversation), "origin": f"row {index}"}
        for index, conversation in enumerate(conversations)
    ]
    return Dataset.from_list(rows)


def _write_encoded(folder: Path, dataset: Dataset, encoder: Encoder, num_proc: int) -> Dataset:
    """Encode into `folder`, which is created whole or not at all."""
    # Below a few thousand rows, starting a process takes longer than encoding.
    workers = min(num_proc, 1 + len(dataset) // 4000)
    with write_aside(folder, keep_existing=True) as temp_folder:
        temp_folder.mkdir()
        dataset.map(
            encoder,
            batched=True,
            num_proc=workers if workers > 1 else None,
            remove_columns=dataset.column_names,
            features=FEATURES,
            cache_file_name=str(temp_folder / "rows.arrow"),
            load_from_cache_file=False,
            new_fingerprint=folder.name,
            desc="encoding",
        )
    encoded = _read_encoded(folder)
    assert encoded is not None
    return encoded


def _read_encoded(folder: Path) -> Dataset | None:
    """Return the rows that `_write_encoded` wrote to `folder`, in order; None if there are none."""
    files = sorted(folder.glob("rows*.arrow"))
    return datasets.concatenate_datasets([Dataset.from_file(str(file)) for file in files]) if files else None


def _hash_rows(dataset: Dataset) -> str:
    """Hash the conversations and origins, whatever file, folder or cache they were read from."""
    digest = hashlib.sha256()
    for batch in dataset.with_format("arrow").iter(10_000):
        for row in batch.select(["conversation", "origin"]).to_pylist():
            digest.update(repr(row).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _get_kept_mask(encoded: Dataset) -> np.ndarray:
    """Return whether each row is kept, (rows,) bool."""
    return pc.is_in(encoded.data.column("outcome"), pa.array([KEPT, TRUNCATED])).to_numpy()


def _compute_stats(encoded: Dataset, cached: bool) -> EncodingStats:
    value_counts = pc.value_counts(encoded.data.column("outcome")).to_pylist()
    counts = {entry["values"]: entry["counts"] for entry in value_counts}
    lengths = count_sequence_tokens(encoded)  # dropped rows have none
    return EncodingStats(
        rows=len(encoded),
        kept=sum(counts.get(outcome, 0) for outcome in (KEPT, TRUNCATED)),
        truncated=counts.get(TRUNCATED, 0),
        dropped={reason: counts[reason] for reason in (TOO_LONG, UNSUPERVISED) if reason in counts},
        sequences=len(lengths),
        dropped_sequences=pc.sum(encoded.data.column("dropped_sequences")).as_py(),
        tokens=int(lengths.sum()),
        computed_tokens=pc.sum(encoded.data.column("computed_tokens")).as_py(),
        supervised_tokens=_count_supervised_tokens(encoded),
        length_quantiles=compute_length_quantiles(lengths),
        cached=cached,
    )


def count_sequence_tokens(rows: Dataset) -> np.ndarray:
    """Return the number of tokens of each sequence of the rows, in order."""
    column = "sequence_lengths" if "sequence_lengths" in rows.column_names else "input_ids"
    batches = (batch[column] for batch in rows.with_format("arrow").select_columns(column).iter(10_000))
    count = pc.list_flatten if column == "sequence_lengths" else pc.list_value_length
    return np.concatenate([count(batch).to_numpy() for batch in batches])


def compute_length_quantiles(lengths: np.ndarray) -> dict[str, int]:
    """Return the smallest, largest and some quantiles between them of the numbers of tokens, by name."""
    quantiles = np.quantile(lengths, [0, 0.25, 0.5, 0.75, 0.95, 1]) if len(lengths) else [0] * 6
    return dict(zip(["least", "25%", "median", "75%", "95%", "most"], map(int, quantiles)))


def _count_supervised_tokens(encoded: Dataset) -> int:
    """Count chunk by chunk (some thousand rows each), because all labels together may not fit into memory."""
    chunks = encoded.data.column("labels").chunks
    return sum(int((chunk.flatten().to_numpy() != IGNORED).sum()) for chunk in chunks)
