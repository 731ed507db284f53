"""Messages to training rows: `input_ids` and `labels`, shifted and masked, in Arrow, with an account of every row.

    rows, account = encode_dataset(messages, Encoder(template, max_length=1024))
    print(account)

`labels[t]` is the id to predict at position t, which is the token at t + 1, if that token is supervised, else -100;
the last is -100. The shift happens here and nowhere else.
"""

from __future__ import annotations

import hashlib
import inspect
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

from sft_pipeline.data import chat_templates, text_encoder
from sft_pipeline.data.batch_sampler import count_row_tokens
from sft_pipeline.data.chat_templates import Template, TokenSpan
from sft_pipeline.data.messages import Message, add_system_prompt
from sft_pipeline.utils.constants import IGNORED
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.files import get_cache_dir, write_aside

KEPT, CUT, TOO_LONG, UNSUPERVISED = "kept", "truncated", "longer than max_length", "nothing supervised"
FEATURES = Features(
    # 32 bits hold every vocabulary and halve the files.
    {"input_ids": ListOf(Value("int32")), "labels": ListOf(Value("int32")), "outcome": Value("string")}
)


def build_input_ids_and_labels(runs: list[TokenSpan], limit: int | None = None) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of one row from its runs, cut after `limit` tokens."""
    targets = (run.ids if run.supervised else [IGNORED] * len(run.ids) for run in runs)
    ids = list(itertools.chain.from_iterable(run.ids for run in runs))[:limit]
    return ids, [*list(itertools.chain.from_iterable(targets))[1:limit], IGNORED]


@dataclass(frozen=True)
class Encoder:
    """The function for `datasets.map`: a batch of `messages` and `origin` to FEATURES.

    overlong: "drop" a row above max_length, "truncate_answer" (it then has no stop token), or "truncate_turns" (the
    oldest exchanges go, the system message stays). A row with no supervised token left is dropped in each case.
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
            rows = self._one_by_one(conversations, batch["origin"])
        columns = zip(*(self._row(*pair) for pair in zip(rows, conversations)))
        return dict(zip(FEATURES, map(list, columns)))

    def _one_by_one(self, conversations: list[list[Message]], origins: list[str]) -> list[list[TokenSpan]]:
        """The batch again, slowly, to name the row that failed."""
        rows = []
        for messages, origin in zip(conversations, origins):
            try:
                rows += self.template.render([messages], self.train_on)
            except SFTError as error:
                raise SFTError(f"{origin}: {error}") from error
        return rows

    def _row(self, runs: list[TokenSpan], messages: list[Message]) -> tuple[list[int], list[int], str]:
        """One row's ids, labels and outcome; a dropped row is empty."""
        length, outcome = _count_tokens(runs), KEPT
        if length > self.max_length and self.overlong == "truncate_turns":
            runs, outcome = self._without_oldest_turns(messages), CUT
        elif length > self.max_length and self.overlong == "truncate_answer":
            outcome = CUT
        if _count_tokens(runs) > self.max_length and self.overlong != "truncate_answer":
            return [], [], TOO_LONG
        ids, labels = build_input_ids_and_labels(runs, self.max_length)
        if labels.count(IGNORED) == len(labels):
            return [], [], TOO_LONG if outcome == CUT else UNSUPERVISED
        return ids, labels, outcome

    def _without_oldest_turns(self, messages: list[Message]) -> list[TokenSpan]:
        """The conversation less as many of its oldest exchanges as needed; the last exchange always stays."""
        system = messages[:1] if messages[0]["role"] == "system" else []
        turns = messages[len(system) :]
        while True:
            turns = turns[2:]
            [runs] = self.template.render([system + turns], self.train_on) if turns else [[]]
            if _count_tokens(runs) <= self.max_length or len(turns) <= 2:
                # Nothing left of a single exchange: its full length says that it does not fit.
                return runs or self.template.render([messages], self.train_on)[0]

    def key(self) -> str:
        """A hash of what decides the result besides the rows: settings, template, tokenizer and this code."""
        settings = (self.system_prompt, self.max_length, self.overlong, self.train_on, self.template.name)
        return hash_texts(repr(settings), self.template.chat_template, hash_tokenizer(self.template.tokenizer), _code())


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of all that decides a text's ids."""
    # In front of the added tokens stand truncation and padding alone, which encoding turns off.
    rules = tokenizer.backend_tokenizer.to_str().partition('"added_tokens"')[2]
    return hash_texts(rules, repr(sorted(tokenizer.added_tokens_decoder.items())))


def hash_texts(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _count_tokens(runs: list[TokenSpan]) -> int:
    return sum(len(run.ids) for run in runs)


def _code() -> str:
    """The text of the code that makes rows, so that another release never reads this one's cache."""
    return (
        Path(__file__).read_text(encoding="utf-8") + inspect.getsource(chat_templates) + inspect.getsource(text_encoder)
    )


@dataclass(frozen=True)
class EncodingStats:
    """What became of the rows: every one is kept, truncated (and kept) or dropped for a named reason."""

    rows: int
    kept: int
    truncated: int
    dropped: dict[str, int]
    tokens: int
    supervised_tokens: int
    length_quantiles: dict[str, int]  # tokens, of the kept rows
    cached: bool

    def __str__(self) -> str:
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items()) or "none"
        lengths = ", ".join(f"{name} {value:,}" for name, value in self.length_quantiles.items())
        share = self.supervised_tokens / max(1, self.tokens)
        return (
            f"{self.rows:,} rows, {self.kept:,} kept ({self.truncated:,} of them truncated), dropped: {dropped}"
            f"{' (encoded before)' if self.cached else ''}\n"
            f"{self.tokens:,} tokens, {share:.0%} supervised; tokens a row: {lengths}"
        )


def encode_dataset(dataset: Dataset, encoder: Encoder, num_proc: int = 1) -> tuple[Dataset, EncodingStats]:
    """Encode `messages` rows; returns the kept rows (`input_ids`, `labels`) and the account.

    Cached under a hash of the rows and of `encoder.key()`, in `SFT_PIPELINE_CACHE` or ~/.cache/sft_pipeline: a change
    of data, template, tokenizer or settings encodes anew, and nothing else does.

    Raises SFTError naming the row that cannot be encoded, or with the account if no row is left.
    """
    key = hashlib.sha256(f"{_hash_rows(dataset)} {encoder.key()}".encode()).hexdigest()[:32]
    folder = get_cache_dir() / "encoded" / key
    encoded = _read(folder)
    cached = encoded is not None
    if encoded is None:
        encoded = _encode(folder, dataset, encoder, num_proc)
    account = _count_outcomes(encoded, cached)
    if not account.kept:
        counts = str(account).splitlines()[0]
        raise SFTError(f"no row is left to train on: {counts}; raise max_length or mend the rows")
    kept = np.flatnonzero(_find_kept(encoded))
    return (encoded if len(kept) == len(encoded) else encoded.select(kept)).remove_columns("outcome"), account


def _encode(folder: Path, dataset: Dataset, encoder: Encoder, num_proc: int) -> Dataset:
    """Encode into `folder`, which appears whole or not at all."""
    # Below some thousand rows starting a process takes longer than encoding.
    workers = min(num_proc, 1 + len(dataset) // 4000)
    with write_aside(folder, keep_existing=True) as aside:
        aside.mkdir()
        dataset.map(
            encoder,
            batched=True,
            num_proc=workers if workers > 1 else None,
            remove_columns=dataset.column_names,
            features=FEATURES,
            cache_file_name=str(aside / "rows.arrow"),
            load_from_cache_file=False,
            new_fingerprint=folder.name,
            desc="encoding",
        )
    encoded = _read(folder)
    assert encoded is not None
    return encoded


def _read(folder: Path) -> Dataset | None:
    """The rows that `_encode` wrote there, in order; None if it did not."""
    files = sorted(folder.glob("rows*.arrow"))
    return datasets.concatenate_datasets([Dataset.from_file(str(file)) for file in files]) if files else None


def _hash_rows(dataset: Dataset) -> str:
    """Of the messages and their places, whatever file, folder or cache they came from."""
    digest = hashlib.sha256()
    for batch in dataset.with_format("arrow").iter(10_000):
        for row in batch.select(["messages", "origin"]).to_pylist():
            digest.update(repr(row).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _find_kept(encoded: Dataset) -> np.ndarray:
    """Of each row."""
    return pc.is_in(encoded.data.column("outcome"), pa.array([KEPT, CUT])).to_numpy()


def _count_outcomes(encoded: Dataset, cached: bool) -> EncodingStats:
    counts = {one["values"]: one["counts"] for one in pc.value_counts(encoded.data.column("outcome")).to_pylist()}
    kept = count_row_tokens(encoded)[_find_kept(encoded)]
    quantiles = np.quantile(kept, [0, 0.25, 0.5, 0.75, 0.95, 1]) if len(kept) else [0] * 6
    return EncodingStats(
        rows=len(encoded),
        kept=len(kept),
        truncated=counts.get(CUT, 0),
        dropped={reason: counts[reason] for reason in (TOO_LONG, UNSUPERVISED) if reason in counts},
        tokens=int(kept.sum()),
        supervised_tokens=_count_supervised_tokens(encoded),
        length_quantiles=dict(zip(["least", "25%", "median", "75%", "95%", "most"], map(int, quantiles))),
        cached=cached,
    )


def _count_supervised_tokens(encoded: Dataset) -> int:
    """Supervised tokens, counted a chunk (of some thousand rows) at a time: all together may not fit into memory."""
    chunks = encoded.data.column("labels").chunks
    return sum(int((chunk.flatten().to_numpy() != IGNORED).sum()) for chunk in chunks)
