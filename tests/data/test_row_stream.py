"""Streamed rows: each once an epoch, resumed anywhere with the same rows, dealt to any number of processes."""

import csv
import json
import pickle
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft_pipeline.arguments import SourceEntry
from sft_pipeline.data import readers, row_stream, sources
from sft_pipeline.data.batch_sampler import StepBatchSampler
from sft_pipeline.data.chat_templates import build_template
from sft_pipeline.data.encode import Encoder, encode_dataset
from sft_pipeline.data.readers import FilePosition, read_rows
from sft_pipeline.data.row_stream import STEP_ROWS, STREAM_STATE, RowStream, StepStream
from sft_pipeline.data.sources import load_source
from sft_pipeline.data.splits import hash_rows
from sft_pipeline.data.streamed_sources import SourceMix, open_stream
from sft_pipeline.utils.errors import SFTError

TYPES = ["jsonl", "json", "csv", "parquet", "arrow"]
QUICK = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def make_rows(source: str, count: int) -> list[dict]:
    return [{"instruction": f"{source} {n}", "output": "word " * (n % 4 + 1)} for n in range(count)]


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Write rows as the type of the path says, Parquet and Arrow in groups of three."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    else:
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    return path


@pytest.fixture(scope="module")
def encoder(tokenizer) -> Encoder:
    return Encoder(build_template("role", tokenizer))


@pytest.fixture
def stream_of(encoder, monkeypatch):
    """stream_of(paths, weights=None, ...) is a stream in blocks of seven rows."""
    monkeypatch.setattr(row_stream, "BLOCK_ROWS", 7)
    monkeypatch.setattr(row_stream, "ENCODED_TOGETHER", 3)

    def build(paths, weights=None, encoder=encoder, **options) -> RowStream:
        mix = SourceMix([open_stream(SourceEntry(str(path))) for path in paths], weights)
        return RowStream(mix, encoder, **({"seed": 5} | options))

    return build


def take(stream: RowStream, count: int) -> list[str]:
    """Where the next rows are from."""
    return [row["origin"] for row in islice(iter(stream), count)]


@pytest.mark.parametrize("suffix", [*TYPES, "json of lines"])
def test_a_file_is_read_on_from_any_row(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BATCH_ROWS", 2)
    path = write_rows(tmp_path / f"a.{suffix.split()[0]}", make_rows("a", 8))
    if suffix == "json of lines":
        path.write_text("\n" + "\n\n".join(map(json.dumps, make_rows("ä", 8))))
    elif suffix == "jsonl":
        path.write_bytes(b"\xef\xbb\xbf" + b"\r\n \r\n".join(path.read_bytes().splitlines()))
    position, rows, positions = FilePosition(), [], [FilePosition()]
    for row in read_rows(path, "a", position):
        rows.append(row)
        positions.append(FilePosition(**vars(position)))
    assert rows == list(read_rows(path, "a")) and len(rows) == 8
    for index, start in enumerate(positions):
        assert list(read_rows(path, "a", start)) == rows[index:], "with its location"


@QUICK
@given(
    sizes=st.lists(st.integers(1, 18), min_size=1, max_size=3),
    types=st.lists(st.sampled_from(TYPES), min_size=3, max_size=3),
    weights=st.none() | st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=3, max_size=3),
    shuffle=st.booleans(),
    killed=st.integers(0, 60),
)
def test_a_stream_goes_on_from_any_row(sizes, types, weights, shuffle, killed, stream_of, tmp_path):
    """No row is lost, none comes twice, and the account goes on."""
    for file in tmp_path.iterdir():
        file.unlink()
    paths = [
        write_rows(
            tmp_path / f"{source}.{suffix}",
            [row | {"id": "7"} for row in [*make_rows(source, size), {"instruction": "bad", "output": ""}]],
        )
        for source, size, suffix in zip("abc", sizes, types)
    ]
    weights = weights and weights[: len(paths)]
    options = {"shuffle": shuffle, "skip_bad_rows": True}
    whole = stream_of(paths, weights, **options)
    expected = take(whole, 80)
    stream = stream_of(paths, weights, **options)
    assert take(stream, killed) == expected[:killed]
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = stream_of(paths, weights, **options)
    resumed.load_state_dict(state)
    assert take(resumed, 80 - killed) == expected[killed:]
    assert resumed.account == whole.account and resumed.account.kept == 80
    assert resumed.state_dict() == whole.state_dict()
    if weights is None:
        rows = sum(sizes)
        epochs = [expected[start : start + rows] for start in range(0, 80 - rows + 1, rows)]
        assert all(Counter(epoch) == Counter(epochs[0]) and max(Counter(epoch).values()) == 1 for epoch in epochs)


def test_a_folder_goes_on_in_the_file_that_was_being_read(stream_of, tmp_path):
    (tmp_path / "f").mkdir()
    for name in "ab":
        write_rows(tmp_path / "f" / f"{name}.jsonl", make_rows(name, 5))
    stream, whole = stream_of([tmp_path / "f"], shuffle=False), stream_of([tmp_path / "f"], shuffle=False)
    expected = take(whole, 14)
    assert expected[4:6] == ["f/a.jsonl line 5", "f/b.jsonl line 1"]
    for killed in range(14):
        stream.load_state_dict(None)
        take(stream, killed)
        state = stream.state_dict()
        stream.load_state_dict(state)
        assert take(stream, 14 - killed) == expected[killed:]
    take(stream, 6)
    stream.load_state_dict(None)
    take(stream, 9)  # the second block begins in b.jsonl
    state = stream.state_dict()
    assert state["mix"]["sources"][0]["file"] == "b.jsonl"
    (tmp_path / "f" / "a.jsonl").write_text("not read again, but for its columns")
    write_rows(tmp_path / "f" / "a.jsonl", make_rows("other", 1))
    assert take_from(stream_of([tmp_path / "f"], shuffle=False), state, 1) == expected[9:10]


def take_from(stream: RowStream, state: dict, count: int) -> list[str]:
    stream.load_state_dict(state)
    return take(stream, count)


def test_rows_are_shuffled_within_their_block_and_each_epoch_otherwise(stream_of, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", make_rows("a", 14))
    lines = [int(origin.split()[-1]) for origin in take(stream_of([path]), 28)]
    assert [sorted(lines[start : start + 7]) for start in (0, 7)] == [list(range(1, 8)), list(range(8, 15))]
    assert lines[:7] != sorted(lines[:7]) and lines[:14] != lines[14:]
    assert take(stream_of([path], seed=6), 7) != take(stream_of([path]), 7)


def test_a_block_of_long_rows_is_shorter(stream_of, tmp_path, monkeypatch):
    path = write_rows(tmp_path / "a.jsonl", make_rows("a", 14))
    monkeypatch.setattr(row_stream, "BLOCK_CHARACTERS", 100)
    lines = [int(origin.split()[-1]) for origin in take(stream_of([path]), 14)]
    assert sorted(lines) == list(range(1, 15)) and max(lines[:2]) < 4


def test_sources_take_turns_and_weights_are_proportions(stream_of, tmp_path, caplog):
    caplog.set_level("INFO")
    paths = [write_rows(tmp_path / f"{name}.jsonl", make_rows(name, size)) for name, size in (("a", 3), ("b", 20))]
    turns = [origin[0] for origin in take(stream_of(paths, shuffle=False), 24)]
    assert "".join(turns) == "ababab" + "b" * 17 + "a"
    caplog.clear()
    stream = stream_of(paths, [3.0, 1.0], shuffle=False)
    assert "".join(origin[0] for origin in take(stream, 8)) == "aaabaaab"
    assert Counter(origin[0] for origin in take(stream, 40)) == {"a": 30, "b": 10}
    again = f"{paths[0]}: all 3 rows were read; it begins again, in the same order"
    assert caplog.messages.count(again) == 1
    assert not take(stream_of(paths, [0.0, 1.0]), 1)[0].startswith("a")


def test_an_epoch_that_ends_is_logged_once(stream_of, tmp_path, caplog):
    caplog.set_level("INFO")
    path = write_rows(tmp_path / "a.jsonl", make_rows("a", 9))
    stream, again = (
        stream_of([path]),
        f"{tmp_path / 'a.jsonl'}: all 9 rows were read; it begins again, in another order",
    )
    take(stream, 9)
    assert again not in caplog.messages
    state = stream.state_dict()
    take_from(stream, state, 30)
    assert caplog.messages.count(again) == 1


def test_the_account_is_that_of_rows_in_memory(stream_of, make_tokenizer, tmp_path, cache):
    rows = [
        *make_rows("a", 9),
        {"instruction": "long", "output": "word " * 200},
        {"instruction": "q", "output": "a", "id": 3},
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    encoder = Encoder(build_template("role", make_tokenizer()), max_length=100)
    stream = stream_of([path], encoder=encoder)
    take(stream, 10)
    dataset, unread = load_source(str(path))
    _, stats = encode_dataset(dataset, encoder)
    assert stream.account.compute_stats() == stats
    assert {name: dict(counts) for name, counts in stream.account.unread.items()} == {str(path): unread}


def test_bad_rows_are_an_error_or_counted_and_held_out_rows_are_left_out(stream_of, tmp_path):
    rows = make_rows("a", 5)
    path = write_rows(tmp_path / "a.jsonl", [*rows, {"instruction": "q", "output": 7}])
    with pytest.raises(SFTError, match=r"^a.jsonl line 6: .*; fix the data or set skip_bad_rows: true$"):
        take(stream_of([path]), 1)
    held_out, _ = load_source(rows[1:3])
    stream = stream_of([path], skip_bad_rows=True, shuffle=False, held_out=set(hash_rows(held_out).tolist()))
    assert take(stream, 4) == [f"a.jsonl line {line}" for line in (1, 4, 5, 1)]
    assert stream.account.dropped == {row_stream.BAD_ROW: 1, row_stream.HELD_OUT: 2}
    assert (stream.account.rows, stream.account.kept) == (7, 4)


def test_a_stream_without_rows_to_train_ends_in_an_error(stream_of, make_tokenizer, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", make_rows("a", 9))
    stream = stream_of([path], encoder=Encoder(build_template("role", make_tokenizer()), max_length=2))
    message = (
        r"^no row is left to train on: 9 rows, 0 kept \(0 of them truncated\), dropped: 9 longer than max_length; raise"
    )
    with pytest.raises(SFTError, match=message):
        stream.read_sample()
    stream.load_state_dict(None)
    with pytest.raises(SFTError, match=message):
        take(stream, 1)


def test_the_sample_is_the_first_rows_and_the_stream_begins_after_it(stream_of, tmp_path, monkeypatch):
    path = write_rows(tmp_path / "a.jsonl", make_rows("a", 9))
    expected = take(stream_of([path]), 12)
    monkeypatch.setattr(row_stream, "SAMPLE_ROWS", 5)
    stream = stream_of([path])
    sample = stream.read_sample()
    assert len(sample.rows) == len(sample.conversations) == sample.stats.kept == sample.stats.rows == 6, "two chunks"
    assert [json.loads(text)["messages"][0]["content"] for text in sample.conversations[:2]] == ["a 0", "a 1"]
    assert take(stream, 12) == expected
    monkeypatch.setattr(row_stream, "SAMPLE_ROWS", 500)
    assert len(stream_of([path]).read_sample().rows) == 9


@pytest.mark.parametrize(("tokens", "packed"), [(0, True), (60, True), (0, False)])
def test_the_rows_of_a_step_are_the_same_for_any_number_of_processes(tokens, packed, stream_of, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", make_rows("a", 9))

    def take_steps(processes: int, accumulation: int) -> tuple[list[list[str]], str]:
        """The rows of three steps of all processes, and the state after them."""
        steps: list[list[str]] = [[], [], []]
        for process in range(processes):
            sizes = {"rows": 8 // (processes * accumulation), "accumulation": accumulation, "processes": processes}
            batches = StepBatchSampler(np.zeros(0), seed=0, process=process, tokens=tokens, packed=packed, **sizes)
            share = islice(
                StepStream(stream_of([path]), batches, share_prefixes=packed), 3 if tokens else 3 * accumulation
            )
            for index, (item, values) in enumerate(share):
                micro_batches = item if tokens else [item]
                step = index if tokens else index // accumulation
                steps[step] += [row["origin"] for rows in micro_batches for row in rows]
                ends_step = tokens or index % accumulation == accumulation - 1
                assert set(values) == ({STREAM_STATE, STEP_ROWS} if ends_step else set())
        assert [sorted(step) for step in steps][-1] == sorted(values[STEP_ROWS])
        return [sorted(step) for step in steps], values[STREAM_STATE]

    assert take_steps(1, 1) == take_steps(2, 2) == take_steps(4, 1) == take_steps(8, 1)
    assert [row for step in take_steps(2, 1)[0] for row in step] != []


def test_a_dataset_of_the_hub_is_streamed_and_goes_on(stream_of, monkeypatch, tmp_path):
    """`load_dataset` reads local Parquet files in place of the hub's."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name in "ab":
        rows = [row | {"id": n or None} for n, row in enumerate(make_rows(name, 6))]
        write_rows(folder / f"{name}.parquet", rows)
    calls, load_dataset = [], datasets.load_dataset

    def load(name, *args, **options):
        calls.append((name, args, options))
        options.pop("data_files"), options.pop("revision")
        return load_dataset("parquet", data_files=[str(file) for file in sorted(folder.iterdir())], **options)

    monkeypatch.setattr(sources.datasets, "load_dataset", load)
    whole = stream_of(["org/rows"])
    assert calls == [("org/rows", (None,), {"split": "train", "streaming": True})]
    expected = take(whole, 30)
    assert Counter(expected[:12]) == {f"org/rows row {n}": 1 for n in range(12)}
    for killed in (0, 1, 6, 7, 11, 12, 25):
        stream = stream_of(["org/rows"])
        take(stream, killed)
        state = json.loads(json.dumps(stream.state_dict()))
        assert take_from(stream_of(["org/rows"]), state, 30 - killed) == expected[killed:]
    assert whole.account.unread["org/rows"]["id"] in range(24, 27)


def test_a_shuffled_dataset_is_refused_as_its_buffer_would_be_lost():
    dataset = Dataset.from_list(make_rows("a", 9)).to_iterable_dataset()
    with pytest.raises(
        SFTError, match="^rows: is shuffled, and a resumed run would lose the rows of its buffer; leave"
    ):
        open_stream(dataset.shuffle(seed=1).map(lambda row: row), "rows")


def test_a_stream_is_sent_to_a_process_that_is_spawned(stream_of, tmp_path):
    paths = [write_rows(tmp_path / f"{name}.jsonl", make_rows(name, 5)) for name in "ab"]
    stream, expected = stream_of(paths), take(stream_of(paths), 20)
    take(stream, 4)
    state = stream.state_dict()
    assert take_from(pickle.loads(pickle.dumps(stream)), state, 16) == expected[4:]


def test_rows_of_a_dataset_are_those_that_are_read_in_memory(stream_of, encoder, cache):
    rows = [row | {"system": None if n % 2 else "Be brief."} for n, row in enumerate(make_rows("a", 5))]
    dataset = Dataset.from_list(rows)
    expected, _ = encode_dataset(load_source(dataset)[0], encoder)
    stream = RowStream(SourceMix([open_stream(dataset.to_iterable_dataset())]), encoder, seed=1, shuffle=False)
    assert [row["input_ids"] for row in islice(iter(stream), 5)] == expected["input_ids"]


def test_a_state_of_another_run_is_refused(stream_of, tmp_path):
    path, other = (write_rows(tmp_path / f"{name}.jsonl", make_rows(name, 9)) for name in "ab")
    state = stream_of([path]).state_dict()
    remedy = "differs from the run that is resumed, so the order of its rows would; set it back"
    for stream, message in [
        (stream_of([path], seed=6), f"data_seed: {remedy}"),
        (stream_of([path], shuffle=False), f"train_sampling_strategy: {remedy}"),
        (stream_of([path], [2.0]), f"train_data_weights: {remedy}"),
        (
            stream_of([path, other]),
            "train_data: the run that is resumed read 1 sources, now there are 2; resume with the config of the run",
        ),
        (
            stream_of([other]),
            f"{other}: a.jsonl, which was being read, is missing; resume with the files of the run",
        ),
    ]:
        with pytest.raises(SFTError) as error:
            stream.load_state_dict(state)
        assert str(error.value) == message
    size = path.stat().st_size
    write_rows(path, make_rows("a", 8))
    with pytest.raises(SFTError, match=f"^{path}: a.jsonl has {path.stat().st_size} bytes, and had {size} when it was"):
        stream_of([path]).load_state_dict(state)


def test_files_of_other_formats_are_refused_before_training(stream_of, tmp_path):
    write_rows(tmp_path / "a.jsonl", make_rows("a", 2))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "plain"}) + "\n")
    with pytest.raises(
        SFTError, match="mixed row formats: a.jsonl is alpaca, b.jsonl is text; use one format per folder"
    ):
        stream_of([tmp_path])
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(SFTError, match="b.jsonl: no rows$"):
        stream_of([tmp_path])
    with pytest.raises(SFTError, match="^rows: no rows$"):
        open_stream(datasets.IterableDataset.from_generator(lambda: iter(())), "rows")
