"""Encode the rows of a stream as they come, in an order that a run can resume exactly.

    stream = RowStream(SourceMix(...), encoder, seed=42)
    for row in stream:  # endless
        state = stream.state_dict()  # after this row, for `stream.load_state_dict`

Rows are read in blocks and shuffled within each. The order depends on the sources, the seed and the number of the
block alone: every process reads all rows and takes its share of each step (StepStream), so nothing is communicated, no
process waits for another, and a state is that of the whole run, for any number of processes.

The state is where the sources were at the beginning of the block and how many of its rows were handed out: resuming
reads at most one block again, and encodes none of the rows before.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset
from torch.utils.data import DataLoader, IterableDataset

from sft_pipeline.data.batch_sampler import MicroBatchCollator, StepBatchSampler
from sft_pipeline.data.encode import FEATURES, KEPT, TRUNCATED, Encoder, EncodingStats, compute_length_quantiles
from sft_pipeline.data.messages import parse_conversation
from sft_pipeline.data.sources import SHOWN_NAMES
from sft_pipeline.data.splits import hash_row
from sft_pipeline.data.streamed_sources import SourceMix, State
from sft_pipeline.utils.constants import IGNORED
from sft_pipeline.utils.errors import SFTError

logger = logging.getLogger(__name__)

# A block is as many rows, or fewer of as many characters together. It is held in memory, and its rows are the only
# ones that are shuffled with each other.
BLOCK_ROWS, BLOCK_CHARACTERS = 10_000, 1 << 26
ENCODED_TOGETHER = 64  # rows; any number gives the same ids
SAMPLE_ROWS = 1000  # rows that stand for all in estimates and in the preview
BAD_ROW, HELD_OUT = "bad rows", "in the evaluation data too"
STREAM_STATE, STEP_ROWS = "stream_state", "step_rows"  # keys of the last micro-batch of a step

EncodedRow = dict[str, Any]
Row = tuple[str, dict[str, Any]]  # the name of its source, and the columns of sources.FEATURES


@dataclass
class StreamAccount:
    """What became of the rows so far; `compute_stats` gives it the form that rows in memory have."""

    rows: int = 0
    kept: int = 0
    truncated: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_sequences: int = 0
    computed_tokens: int = 0
    supervised_tokens: int = 0
    lengths: Counter[int] = field(default_factory=Counter)  # tokens of a sequence: sequences
    unread: dict[str, Counter[str]] = field(default_factory=dict)  # of each source the names that came first
    sources: dict[str, dict[str, int]] = field(default_factory=dict)  # of each source the rows, and those of them kept

    def add(self, source: str, row: dict[str, Any], encoded: EncodedRow) -> None:
        """Count a row. encoded: its columns of encode.FEATURES, or only the `outcome` of one that was not encoded."""
        self.rows += 1
        of_source = self.sources.setdefault(source, {"rows": 0, "kept": 0})
        of_source["rows"] += 1
        counts = self.unread.setdefault(source, Counter())
        for name in row["unread"]:
            if name in counts or len(counts) < SHOWN_NAMES:
                counts[name] += 1
        outcome = encoded["outcome"]
        self.dropped_sequences += encoded.get("dropped_sequences", 0)
        if outcome not in (KEPT, TRUNCATED):
            self.dropped[outcome] += 1
            return
        self.kept += 1
        of_source["kept"] += 1
        self.truncated += outcome == TRUNCATED
        self.computed_tokens += encoded["computed_tokens"]
        self.supervised_tokens += len(encoded["labels"]) - encoded["labels"].count(IGNORED)
        self.lengths.update(encoded["sequence_lengths"])

    def compute_stats(self) -> EncodingStats:
        lengths = np.repeat(*map(np.array, zip(*sorted(self.lengths.items())))) if self.lengths else np.array([], int)
        return EncodingStats(
            rows=self.rows,
            kept=self.kept,
            truncated=self.truncated,
            dropped=dict(self.dropped),
            sequences=len(lengths),
            dropped_sequences=self.dropped_sequences,
            tokens=int(lengths.sum()),
            computed_tokens=self.computed_tokens,
            supervised_tokens=self.supervised_tokens,
            length_quantiles=compute_length_quantiles(lengths),
            cached=False,
        )

    def state_dict(self) -> State:
        lengths = {str(length): count for length, count in sorted(self.lengths.items())}
        unread = {source: dict(counts) for source, counts in self.unread.items()}
        sources = {source: dict(counts) for source, counts in self.sources.items()}
        return vars(self) | {"dropped": dict(self.dropped), "lengths": lengths, "unread": unread, "sources": sources}

    @classmethod
    def from_state(cls, state: State) -> StreamAccount:
        unread = {source: Counter(counts) for source, counts in state["unread"].items()}
        lengths = Counter({int(length): count for length, count in state["lengths"].items()})
        sources = {source: dict(counts) for source, counts in state["sources"].items()}
        counters = {"dropped": Counter(state["dropped"]), "lengths": lengths, "unread": unread, "sources": sources}
        return cls(**(state | counters))


@dataclass(frozen=True)
class StreamSample:
    """The first rows of a stream that are trained, encoded and as conversations, and what became of all read so far."""

    rows: Dataset
    conversations: list[str]
    stats: EncodingStats


class RowStream:
    """The encoded rows of a mix of sources, without end: `iter` goes on from the current state.

    shuffle: whether rows are shuffled in their block. held_out: hashes (splits.hash_row) of rows that are left out.
    Raises SFTError for a bad row, unless `skip_bad_rows`, and if no row of all sources can be trained.
    """

    def __init__(
        self,
        mix: SourceMix,
        encoder: Encoder,
        seed: int,
        shuffle: bool = True,
        held_out: Set[int] = frozenset(),
        skip_bad_rows: bool = False,
    ) -> None:
        self._mix, self._encoder, self._held_out, self._skip_bad_rows = mix, encoder, held_out, skip_bad_rows
        self._order: State = {"seed": seed, "shuffle": shuffle, "weights": mix.weights}
        self.load_state_dict(None)

    def state_dict(self) -> State:
        return {
            **self._order,
            "block": self._block,
            "position": self._position,
            "mix": self._block_start,
            "account": self.account.state_dict(),
        }

    def load_state_dict(self, state: State | None) -> None:
        """Go on from a state; from the beginning for None. Raises SFTError for a state of another order or sources."""
        for key, value in self._order.items():
            if state and state[key] != value:
                name = {"seed": "data_seed", "shuffle": "train_sampling_strategy"}.get(key, "train_data_weights")
                raise SFTError(
                    f"{name}: differs from the run that is resumed, so the order of its rows would; set it back"
                )
        self._mix.load_state_dict(state and state["mix"])
        self._block: int = state["block"] if state else 0
        self._position: int = state["position"] if state else 0
        self._block_start, self._ended = self._mix.state_dict(), self._mix.count_rows_of_ended()
        self.account = StreamAccount.from_state(state["account"]) if state else StreamAccount()

    def __iter__(self) -> Iterator[EncodedRow]:
        """Yield rows of encode.FEATURES and `origin`."""
        while True:
            ended = self._mix.count_rows_of_ended()
            for name in ended.keys() - self._ended.keys():
                again = "in another order" if self._order["shuffle"] else "in the same order"
                logger.info("%s: all %s rows were read; it begins again, %s", name, f"{ended[name]:,}", again)
            self._ended = ended
            rows = self._read_rows(BLOCK_ROWS)
            order = np.arange(len(rows))
            if self._order["shuffle"]:
                order = np.random.default_rng([self._order["seed"], self._block]).permutation(len(rows))
            for start in range(self._position, len(rows), ENCODED_TOGETHER):
                chunk = [rows[index] for index in order[start : start + ENCODED_TOGETHER]]
                for (source, row), encoded in zip(chunk, self._encode(chunk)):
                    self._position += 1
                    self.account.add(source, row, encoded)
                    if encoded["outcome"] in (KEPT, TRUNCATED):
                        yield encoded | {"origin": row["origin"]}
            self._check_kept(self.account)
            self._block, self._position, self._block_start = self._block + 1, 0, self._mix.state_dict()

    def read_sample(self) -> StreamSample:
        """Encode about the first SAMPLE_ROWS rows, in the order of the sources; the stream is then at its beginning.

        Raises SFTError if no row of all sources can be trained.
        """
        self.load_state_dict(None)
        account, conversations, encoded_rows = StreamAccount(), [], []
        while (account.rows < SAMPLE_ROWS or not account.kept) and not self._mix.passes:
            chunk = self._read_rows(ENCODED_TOGETHER)
            for (source, row), encoded in zip(chunk, self._encode(chunk)):
                account.add(source, row, encoded)
                if encoded["outcome"] in (KEPT, TRUNCATED):
                    encoded_rows.append(encoded)
                    conversations.append(row["conversation"])
        self._check_kept(account)
        self.load_state_dict(None)
        columns = {name: [row[name] for row in encoded_rows] for name in FEATURES}
        rows = Dataset.from_dict(columns, features=FEATURES).remove_columns(["outcome", "dropped_sequences"])
        return StreamSample(rows, conversations, account.compute_stats())

    def _check_kept(self, account: StreamAccount) -> None:
        if self._mix.passes and not account.kept:
            counts = str(account.compute_stats()).splitlines()[0]
            raise SFTError(f"no row is left to train on: {counts}; raise max_length, fix the rows or add others")

    def _read_rows(self, count: int) -> list[Row]:
        """Read rows of a block: `count`, fewer if they are long, or those to the end of an epoch, which may be none.

        Raises SFTError for a bad row, unless they are skipped.
        """
        rows: list[Row] = []
        characters = 0
        while len(rows) < count and characters < BLOCK_CHARACTERS:
            source_and_row = self._mix.read_row()
            if source_and_row is None:
                break
            row = source_and_row[1]
            if row["problem"] is not None and not self._skip_bad_rows:
                raise SFTError(f"{row['origin']}: {row['problem']}; fix the data or set skip_bad_rows: true")
            rows.append(source_and_row)
            characters += len(row["conversation"])
        return rows

    def _encode(self, rows: list[Row]) -> list[EncodedRow]:
        """Encode rows; those that are not trained whatever their tokens have only an `outcome`."""
        outcomes = [self._find_obstacle(row) for _, row in rows]
        usable = [row for (_, row), outcome in zip(rows, outcomes) if outcome is None]
        batch = {name: [row[name] for row in usable] for name in ("conversation", "origin")}
        columns = self._encoder(batch) if usable else {}
        encoded = iter([dict(zip(columns, values)) for values in zip(*columns.values())])
        return [next(encoded) if outcome is None else {"outcome": outcome} for outcome in outcomes]

    def _find_obstacle(self, row: dict[str, Any]) -> str | None:
        if row["problem"] is not None:
            return BAD_ROW
        if self._held_out and hash_row(parse_conversation(row["conversation"])) in self._held_out:
            return HELD_OUT
        return None


@dataclass
class StepStream(IterableDataset):
    """The share of a process in the steps of a RowStream: an item of `build_stream_loader` for each of its batches.

    batches: as for rows in memory, without their lengths. state: of the RowStream, where to begin. skipped: batches of
    None that come first, for a Trainer that skips those of the steps that a resumed run has done.
    """

    rows: RowStream
    batches: StepBatchSampler
    share_prefixes: bool
    state: State | None = None
    skipped: int = 0

    def __iter__(self) -> Iterator[Any]:
        yield from [None] * self.skipped
        try:
            self.rows.load_state_dict(self.state)
            rows = iter(self.rows)
            while True:
                yield from self._divide_step(list(islice(rows, self._count_rows())))
        except SFTError as error:
            yield error  # raised in the process of the trainer, not in that of a loader

    def _count_rows(self) -> int:
        return self.batches.rows * self.batches.accumulation * self.batches.processes

    def _divide_step(self, rows: list[EncodedRow]) -> list[Any]:
        """Return (rows, values for the batch) for each micro-batch of this process, with `tokens` for all together."""
        lengths = [row["computed_tokens"] if self.share_prefixes else len(row["input_ids"]) for row in rows]
        batches = replace(self.batches, lengths=np.array(lengths))
        shares = batches.split_step(np.arange(len(rows)))[batches.process :: batches.processes]
        micro_batches: list[Any] = [[rows[index] for index in share] for share in shares]
        items = [micro_batches] if batches.tokens else micro_batches
        state = {STREAM_STATE: json.dumps(self.rows.state_dict()), STEP_ROWS: [row["origin"] for row in rows]}
        return [*((item, {}) for item in items[:-1]), (items[-1], state)]


def build_stream_loader(stream: StepStream, collate_fn: Callable[..., Any], **options: Any) -> DataLoader:
    """Return a loader of the batches of a process; the last of a step also has STREAM_STATE and STEP_ROWS."""
    collate = MicroBatchCollator(collate_fn) if stream.batches.tokens else collate_fn
    return DataLoader(stream, batch_size=None, collate_fn=StreamCollator(collate), **options)


@dataclass(frozen=True)
class StreamCollator:
    """Collate the rows of an item of StepStream; an error stays one, for the trainer to raise."""

    collate: Callable[..., dict[str, Any]]

    def __call__(self, item: Any) -> Any:
        if item is None or isinstance(item, SFTError):
            return item
        rows, values = item
        return self.collate(rows) | values
