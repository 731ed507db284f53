"""Encode messages as training rows: `input_ids` and shifted, masked `labels`, with statistics of the outcomes.

    rows, stats = encode_dataset(messages, Encoder(template, max_length=1024))
    print(stats)

`labels[t]` is the id to predict at position t: the token at t + 1 if that token is supervised, else -100. The last
label is -100. Labels are shifted here and nowhere else.
"""

from __future__ import annotations

import hashlib
import itertools
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

from sft_pipeline.data.batch_sampler import count_row_tokens
from sft_pipeline.data.chat_templates import Template, TokenSpan
from sft_pipeline.data.messages import Message, add_system_prompt
from sft_pipeline.utils.constants import IGNORED
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.files import get_cache_dir, write_aside

# Part of the cache key: raise it when the same messages would give other ids or labels (or FEATURES change).
ENCODING_FORMAT = 1
KEPT, TRUNCATED, TOO_LONG, UNSUPERVISED = "kept", "truncated", "longer than max_length", "nothing supervised"
FEATURES = Features(
    # 32 bits are enough for every vocabulary and halve the files.
    {"input_ids": ListOf(Value("int32")), "labels": ListOf(Value("int32")), "outcome": Value("string")}
)


def build_input_ids_and_labels(spans: list[TokenSpan], limit: int | None = None) -> tuple[list[int], list[int]]:
    """Return (input_ids, labels) of one row from its spans, cut off after `limit` tokens."""
    targets = (span.ids if span.supervised else [IGNORED] * len(span.ids) for span in spans)
    ids = list(itertools.chain.from_iterable(span.ids for span in spans))[:limit]
    return ids, [*list(itertools.chain.from_iterable(targets))[1:limit], IGNORED]


@dataclass(frozen=True)
class Encoder:
    """The function for `Dataset.map`: encodes a batch of `messages` and `origin` as the columns of FEATURES.

    overlong: what to do with a row of more than max_length tokens. "drop" it, "truncate_answer" (cut off its end, so it
    has no stop token) or "truncate_turns" (remove its oldest exchanges, but not the system message). A row without a
    supervised token is dropped in each case.
    """

    template: Template
    system_prompt: str | None = None
    max_length: int = 1024
    overlong: str = "drop"
    train_on: str = "all"

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        conversations = [add_system_prompt(messages, self.system_prompt) for messages in batch["messages"]]
        try:
            rows = self.template.render(conversations, self.train_on)
        except SFTError:
            rows = self._render_each(conversations, batch["origin"])
        columns = zip(*(self._encode_row(spans, messages) for spans, messages in zip(rows, conversations)))
        return dict(zip(FEATURES, map(list, columns)))

    def compute_cache_key(self) -> str:
        """Return a hash of what decides the result besides the rows: settings, template, tokenizer, ENCODING_FORMAT."""
        settings = (self.system_prompt, self.max_length, self.overlong, self.train_on, self.template.name)
        return hash_texts(
            repr(settings),
            self.template.chat_template,
            hash_tokenizer(self.template.tokenizer),
            str(ENCODING_FORMAT),
        )

    def _render_each(self, conversations: list[list[Message]], origins: list[str]) -> list[list[TokenSpan]]:
        """Render a batch that failed one row at a time, so that the error names the row."""
        rows = []
        for messages, origin in zip(conversations, origins):
            try:
                rows += self.template.render([messages], self.train_on)
            except SFTError as error:
                raise SFTError(f"{origin}: {error}") from error
        return rows

    def _encode_row(self, spans: list[TokenSpan], messages: list[Message]) -> tuple[list[int], list[int], str]:
        """Return one row's (input_ids, labels, outcome); ids and labels of a dropped row are empty."""
        outcome = KEPT
        if _count_tokens(spans) > self.max_length:
            outcome = TRUNCATED
            if self.overlong == "truncate_turns":
                spans = self._drop_oldest_turns(messages)
            if _count_tokens(spans) > self.max_length and self.overlong != "truncate_answer":
                return [], [], TOO_LONG
        ids, labels = build_input_ids_and_labels(spans, self.max_length)
        if labels.count(IGNORED) == len(labels):
            return [], [], TOO_LONG if outcome == TRUNCATED else UNSUPERVISED
        return ids, labels, outcome

    def _drop_oldest_turns(self, messages: list[Message]) -> list[TokenSpan]:
        """Render the conversation without as many of its oldest exchanges as needed to fit into max_length.

        The last exchange always stays, even if it does not fit.
        """
        system = messages[:1] if messages[0]["role"] == "system" else []
        turns = messages[len(system) :]
        while True:
            # A single exchange stays: the caller sees from its length that it does not fit.
            turns = turns[2:] or turns
            [spans] = self.template.render([system + turns], self.train_on)
            if _count_tokens(spans) <= self.max_length or len(turns) <= 2:
                return spans


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash everything in the tokenizer that decides the ids of a text."""
    # Only truncation and padding, which encoding turns off, are written before the added tokens.
    rules = tokenizer.backend_tokenizer.to_str().partition('"added_tokens"')[2]
    return hash_texts(rules, repr(sorted(tokenizer.added_tokens_decoder.items())))


def hash_texts(*texts: str) -> str:
    """Return the SHA-256 of the texts in hexadecimal digits."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _count_tokens(spans: list[TokenSpan]) -> int:
    return sum(len(span.ids) for span in spans)


@dataclass(frozen=True)
class EncodingStats:
    """Outcomes of all rows: each is kept (possibly truncated) or dropped for a reason, and counted once."""

    rows: int
    kept: int
    truncated: int  # of the kept rows
    dropped: dict[str, int]  # reason: rows
    tokens: int  # of the kept rows, like all that follow
    supervised_tokens: int
    length_quantiles: dict[str, int]  # tokens
    cached: bool

    def __str__(self) -> str:
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items()) or "none"
        lengths = ", ".join(f"{name} {value:,}" for name, value in self.length_quantiles.items())
        supervised_share = self.supervised_tokens / max(1, self.tokens)
        return (
            f"{self.rows:,} rows, {self.kept:,} kept ({self.truncated:,} of them truncated), dropped: {dropped}"
            f"{' (read from the cache)' if self.cached else ''}\n"
            f"{self.tokens:,} tokens, {supervised_share:.0%} supervised; tokens per row: {lengths}"
        )


def encode_dataset(dataset: Dataset, encoder: Encoder, num_proc: int = 1) -> tuple[Dataset, EncodingStats]:
    """Encode rows of `messages` and `origin`; return the kept rows (`input_ids`, `labels`) and the statistics.

    The result is cached in `SFT_PIPELINE_CACHE` or ~/.cache/sft_pipeline under a hash of the rows and
    `encoder.compute_cache_key()`: only a change of data, template, tokenizer, settings or ENCODING_FORMAT encodes
    again.

    Raises SFTError naming the row that cannot be encoded, or with the counts if no row is left.
    """
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
    if stats.kept < stats.rows:
        encoded = encoded.select(np.flatnonzero(_get_kept_mask(encoded)))
    return encoded.remove_columns("outcome"), stats


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
    """Hash the messages and origins, whatever file, folder or cache they were read from."""
    digest = hashlib.sha256()
    for batch in dataset.with_format("arrow").iter(10_000):
        for row in batch.select(["messages", "origin"]).to_pylist():
            digest.update(repr(row).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _get_kept_mask(encoded: Dataset) -> np.ndarray:
    """Return whether each row is kept, (rows,) bool."""
    return pc.is_in(encoded.data.column("outcome"), pa.array([KEPT, TRUNCATED])).to_numpy()


def _compute_stats(encoded: Dataset, cached: bool) -> EncodingStats:
    value_counts = pc.value_counts(encoded.data.column("outcome")).to_pylist()
    counts = {entry["values"]: entry["counts"] for entry in value_counts}
    lengths = count_row_tokens(encoded)[_get_kept_mask(encoded)]
    return EncodingStats(
        rows=len(encoded),
        kept=len(lengths),
        truncated=counts.get(TRUNCATED, 0),
        dropped={reason: counts[reason] for reason in (TOO_LONG, UNSUPERVISED) if reason in counts},
        tokens=int(lengths.sum()),
        supervised_tokens=_count_supervised_tokens(encoded),
        length_quantiles=compute_length_quantiles(lengths),
        cached=cached,
    )


def compute_length_quantiles(lengths: np.ndarray) -> dict[str, int]:
    """Return the smallest, largest and some quantiles between them of the numbers of tokens, by name."""
    quantiles = np.quantile(lengths, [0, 0.25, 0.5, 0.75, 0.95, 1]) if len(lengths) else [0] * 6
    return dict(zip(["least", "25%", "median", "75%", "95%", "most"], map(int, quantiles)))


def _count_supervised_tokens(encoded: Dataset) -> int:
    """Count chunk by chunk (some thousand rows each), because all labels together may not fit into memory."""
    chunks = encoded.data.column("labels").chunks
    return sum(int((chunk.flatten().to_numpy() != IGNORED).sum()) for chunk in chunks)
