"""Sources: shapes to messages, files to data sets, mixing and holding out; every error with its message. No network."""

import csv
import hashlib
import json
import logging
import random
import subprocess
import sys
from pathlib import Path

import datasets
import huggingface_hub.constants
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from sft_pipeline.data.formats import FORMATS, convert_to_messages, detect_format
from sft_pipeline.data.sources import load_source
from sft_pipeline.data.splits import drop_overlap, hash_row, hash_rows, mix_datasets, split_held_out
from sft_pipeline.utils.errors import SFTError

QUICK = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
ROWS = [
    {"instruction": "Name a colour.", "input": "", "output": "Blue."},
    {"instruction": "Translate to German.", "input": "cat", "output": "Katze."},
    {"instruction": "2 + 2?", "input": "", "output": "4"},
]
EXPECTED = [
    [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}],
    [{"role": "user", "content": "Translate to German.\ncat"}, {"role": "assistant", "content": "Katze."}],
    [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}],
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def talk(user="Hi", answer="Hello", system=None):
    start = [{"role": "system", "content": system}] if system else []
    return [*start, {"role": "user", "content": user}, {"role": "assistant", "content": answer}]


def table(conversations):
    return Dataset.from_dict({"messages": conversations, "origin": [f"row {n}" for n in range(len(conversations))]})


def write(path: Path, rows, kind=None) -> Path:
    kind = kind or path.suffix
    if kind == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    elif kind == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif kind == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        arrow = pa.Table.from_pylist(rows)
        make = pa.ipc.new_stream if kind == ".arrow" else pa.ipc.new_file
        with make(str(path), arrow.schema) as writer:
            writer.write_table(arrow)
    return path


def fails(call, *parts):
    """The call raises SFTError, in one line that has all the parts."""
    with pytest.raises(SFTError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


# Shapes


@pytest.mark.parametrize(
    "columns, name",
    [
        (["instruction", "input", "output", "text"], "alpaca"),
        (["output", "instruction"], "alpaca"),
        (["id", "messages"], "messages"),
        (["prompt", "prompt_id", "messages"], "messages"),
        (["conversations", "system"], "sharegpt"),
        (["completion", "prompt"], "prompt-completion"),
    ],
)
def test_detect_format(columns, name):
    assert detect_format(columns).name == name


def test_unknown_columns_name_file_columns_and_shapes():
    known = ["alpaca (instruction, output)", "messages (messages)", "sharegpt (conversations)"]
    fails(lambda: detect_format(["text", "label"], "x.csv"), "x.csv", "text, label", "(prompt, completion)", *known)
    fails(lambda: detect_format([]), "(none)")


@QUICK
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), st.none() | TEXT)
def test_shapes_agree(pairs, system):
    messages = talk(*pairs[0], system) + [message for pair in pairs[1:] for message in talk(*pair)]
    start = [messages[0]] if system else []
    speakers = {"user": "human", "assistant": "gpt", "system": "system"}
    spoken = [{"from": speakers[message["role"]], "value": message["content"]} for message in messages]
    *earlier, (question, reply) = [list(pair) for pair in pairs]
    rows = [
        ("alpaca", {"instruction": question, "output": reply, "system": system, "history": earlier}),
        ("messages", {"messages": [{**message, "name": "x", "weight": 1} for message in messages]}),
        ("sharegpt", {"conversations": spoken}),
        ("sharegpt", {"conversations": spoken[len(start) :], "system": system}),
        ("prompt-completion", {"prompt": messages[:-1], "completion": messages[-1:]}),
    ]
    for name, row in rows:
        assert detect_format(row).name == name
        assert convert_to_messages(row, FORMATS[name]) == messages


def test_alpaca_joins_input_by_a_newline_and_takes_missing_cells_as_empty():
    alpaca = FORMATS["alpaca"]
    assert [convert_to_messages(row, alpaca) for row in ROWS] == EXPECTED
    bare = {"instruction": "Hi", "input": None, "output": "Hello", "system": " ", "history": None}
    assert convert_to_messages(bare, alpaca) == talk()
    assert convert_to_messages({"instruction": "", "input": "Hi", "output": "Hello"}, alpaca) == talk()


def test_prompt_completion_as_text_keeps_the_text():
    assert convert_to_messages({"prompt": "Hi", "completion": " Hello"}, FORMATS["prompt-completion"]) == talk(
        answer=" Hello"
    )


U, A, S = ({"role": role, "content": role[0]} for role in ("user", "assistant", "system"))


@pytest.mark.parametrize(
    "shape, row, parts",
    [
        ("alpaca", ["Hi"], ["a row must be an object", "list"]),
        ("alpaca", {"instruction": "Hi"}, ["no 'output'", "(the row has: instruction)", "alpaca"]),
        ("alpaca", {"instruction": "Hi", "output": None}, ["no 'output'"]),
        ("alpaca", {"instruction": "Hi", "output": " \n"}, ["no answer: the assistant's text is empty"]),
        ("alpaca", {"instruction": "Hi", "output": 42}, ["'output' is of type int, not text"]),
        ("alpaca", {"instruction": "", "output": "Hello"}, ["the user's text is empty"]),
        ("alpaca", {"instruction": "Hi", "output": "x", "history": [["a"]]}, ["'history'", "[user, assistant] pairs"]),
        ("alpaca", {"instruction": "Hi", "output": "x", "history": [["a", 3]]}, ["assistant is of type int, not text"]),
        ("alpaca", {"instruction": "Hi", "output": "\ud83d"}, ["half a character"]),
        ("messages", {"messages": "Hi"}, ["'messages' is of type str, not a list of messages"]),
        ("messages", {"messages": ["Hi"]}, ["messages[0] must have 'role' and 'content'"]),
        ("messages", {"messages": [U, {"role": "assistant"}]}, ["messages[1] must have"]),
        ("messages", {"messages": [U, {"role": "tool", "content": ""}]}, ["messages[1]", "unknown role 'tool'; known"]),
        ("messages", {"messages": [U, {"role": None, "content": "x"}]}, ["unknown role None"]),
        ("messages", {"messages": [U, {"role": "assistant", "content": None}]}, ["the assistant is null, not text"]),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "text"}]}, A]}, ["of type list, not text"]),
        ("messages", {"messages": []}, ["an empty conversation"]),
        ("messages", {"messages": [S]}, ["an empty conversation"]),
        ("messages", {"messages": [{"role": "system", "content": ""}, U, A]}, ["the system's text is empty"]),
        ("messages", {"messages": [U]}, ["no answer: the last message is the user's"]),
        ("messages", {"messages": [U, A, U]}, ["no answer: the last message is the user's"]),
        ("messages", {"messages": [U, U, A]}, ["a message of the user where the assistant should speak"]),
        ("messages", {"messages": [A]}, ["a message of the assistant where the user should speak"]),
        ("messages", {"messages": [U, A, S, U, A]}, ["of the system where the user", "optional system message"]),
        ("sharegpt", {"conversations": [{"from": "bot", "value": "x"}]}, ["unknown role 'bot'", "human, gpt"]),
        ("sharegpt", {"conversations": [U, A]}, ["conversations[0] must have 'from' and 'value'"]),
        ("sharegpt", {"conversations": [], "system": ["x"]}, ["'system' is of type list, not text"]),
        ("prompt-completion", {"prompt": "Hi", "completion": [A]}, ["both be text or both be lists"]),
    ],
)
def test_bad_rows_say_why(shape, row, parts):
    fails(lambda: convert_to_messages(row, FORMATS[shape]), *parts)


# Files


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet", "a.arrow", "A.JSON"])
def test_every_kind_of_file_gives_the_same_messages(tmp_path, name):
    path = write(tmp_path / name, ROWS, Path(name).suffix.lower())
    dataset = load_source(str(path))
    assert dataset.column_names == ["messages", "origin"]
    assert dataset["messages"][:] == EXPECTED
    places = [f"{name} line {n}" for n in (1, 2, 3)] if name == "a.jsonl" else [f"{name} row {n}" for n in range(3)]
    assert dataset["origin"][:] == places


def test_both_containers_of_arrow(tmp_path):
    path = write(tmp_path / "a.arrow", ROWS, kind="file with a footer")
    assert load_source(path)["messages"][:] == EXPECTED


@QUICK
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
def test_text_survives_every_kind_of_file(tmp_path, pairs):
    assume(not any("\0" in text for pair in pairs for text in pair))  # Python 3.10's csv refuses it
    rows = [{"instruction": user, "output": answer} for user, answer in pairs]
    for suffix in (".json", ".jsonl", ".csv", ".parquet"):
        assert load_source(write(tmp_path / f"a{suffix}", rows))["messages"][:] == [talk(*pair) for pair in pairs]


def test_text_that_looks_like_something_else_stays_text(tmp_path):
    rows = [{"instruction": "When?", "output": "2024-01-01"}, {"instruction": "1", "output": "NaN"}]
    for suffix in (".json", ".jsonl", ".csv"):
        dataset = load_source(write(tmp_path / f"a{suffix}", rows))
        assert [messages[-1]["content"] for messages in dataset["messages"]] == ["2024-01-01", "NaN"]


def test_conversations_from_parquet_ignore_other_keys(tmp_path):
    rows = [{"id": 1, "messages": [{**message, "tool_calls": None} for message in talk()]}]
    assert load_source(write(tmp_path / "a.parquet", rows))["messages"][:] == [talk()]


def test_the_choice_is_said_aloud(tmp_path, caplog):
    path = write(tmp_path / "alpaca.json", [{**row, "id": 7} for row in ROWS])
    with caplog.at_level(logging.INFO, "sft_pipeline"):
        load_source(path)
    assert caplog.messages == [f"{path}: 3 rows, read as alpaca (instruction, input, output), without id"]


def test_lines_of_json_under_the_name_json_and_blank_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("\ufeff" + "\r\n\r\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    dataset = load_source(path)
    assert dataset["messages"][:] == EXPECTED
    assert dataset["origin"][:] == ["a.json line 1", "a.json line 3", "a.json line 5"]


def test_an_unchanged_file_is_converted_once(tmp_path):
    path = write(tmp_path / "a.json", ROWS)
    first = load_source(path)
    path.touch()
    assert load_source(path).cache_files == first.cache_files
    assert load_source(path)._fingerprint == first._fingerprint
    write(path, ROWS[:2])
    assert load_source(path)["messages"][:] == EXPECTED[:2]


GOOD = '{"instruction": "Hi", "output": "Hello"}\n'


@pytest.mark.parametrize(
    "name, content, parts",
    [
        ("a.txt", GOOD, ["a.txt: not a known kind of file", ".jsonl"]),
        ("a.jsonl", GOOD + '{"instruction": "Hi", "output" "x"}', ["line 2: not JSON: Expecting ':'", "column 32"]),
        ("a.jsonl", GOOD + '{"instruction": ', ["a.jsonl line 2: not JSON: Expecting value at column 17"]),
        ("a.jsonl", GOOD + "[" * 200_000, ["a.jsonl line 2: not JSON that can be read"]),
        ("a.jsonl", GOOD + "[3]", ["a.jsonl line 2: a row must be an object", "list"]),
        ("a.jsonl", "3", ["a.jsonl line 1: a row must be an object", "int"]),
        ("a.jsonl", GOOD.encode() + b'"\xff"', ["a.jsonl line 2: not UTF-8 at byte 1 of the line"]),
        ("a.jsonl", "\n\n", ["a.jsonl: no rows"]),
        ("a.json", "[]", ["a.json: no rows"]),
        ("a.json", "[\n{},\n {,}]", ["a.json: its columns (none) fit no known shape"]),
        ("a.json", f"[\n{GOOD},\n {{,}}]", ["a.json: not JSON: Expecting property name", "line 4 column 3"]),
        ("a.json", f"[{GOOD}{GOOD}]", ["a.json: not JSON: Expecting ',' or ']' at line 2 column 1"]),
        ("a.json", f"[{GOOD}", ["a.json: not JSON: Expecting ',' or ']' at line 2 column 1"]),
        ("a.json", f"[{GOOD},]", ["a.json: not JSON: Expecting value at line 2 column 2"]),
        ("a.json", f"[{GOOD}] x", ["a.json: not JSON: Extra data after the list at line 2 column 3"]),
        ("a.json", '"Hi"', ["a.json: not JSON: Expecting a list of objects at line 1 column 1"]),
        ("a.json", "", ["a.json: not JSON: Expecting a list of objects"]),
        ("a.json", "[" * 200_000, ["a.json: not JSON that can be read"]),
        ("a.json", b"[\xff]", ["a.json: not UTF-8 at byte 1"]),
        ("a.csv", b"instruction,output\n\xff,x\n", ["a.csv: not UTF-8 at byte 19"]),
        ("a.csv", "instruction,output\nHi,Hello\nHi,a,b\n", ["a.csv row 1: more cells than the header"]),
        ("a.csv", "instruction,output\nHi,Hello\nHi\n", ["a.csv row 1: no 'output'"]),
        ("a.csv", 'instruction,output\nHi,"Hello', ["a.csv: not CSV: unexpected end of data at line"]),
        ("a.csv", "instruction,output\n", ["a.csv: no rows"]),
        ("a.parquet", "PAR1", ["a.parquet: not a readable Parquet file"]),
        ("a.arrow", "ARROW1", ["a.arrow: not a readable Arrow file"]),
        ("a.jsonl", '{"a": 1, "b": 2}', ["a.jsonl: its columns (a, b) fit no known shape"]),
        ("a.jsonl", GOOD + '{"messages": []}', ["a.jsonl line 2: no 'instruction' (the row has: messages)"]),
    ],
)
def test_files_that_cannot_be_read_say_where(tmp_path, name, content, parts):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    fails(lambda: load_source(str(path)), *parts)


def test_a_broken_line_is_found_behind_a_thousand_good_ones(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD * 2500 + "{")
    fails(lambda: load_source(path), "a.jsonl line 2501: not JSON")


def test_a_file_without_read_permission(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", ROWS)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    fails(lambda: load_source(path), "a.jsonl: cannot be read (Permission denied)")


def test_bad_rows_are_refused_with_their_number_or_skipped_and_counted(tmp_path, caplog):
    empty = {"instruction": "Hi", "input": "", "output": ""}
    path = write(tmp_path / "a.json", [ROWS[0], empty, ROWS[1], empty])
    fails(lambda: load_source(path), "a.json row 1: no answer", "(1 more bad rows)", "skip_bad_rows")
    with caplog.at_level(logging.INFO, "sft_pipeline"):
        dataset = load_source(path, skip_bad_rows=True)
    assert dataset["messages"][:] == EXPECTED[:2] and dataset["origin"][:] == ["a.json row 0", "a.json row 2"]
    assert "2 of 4 rows are bad and skipped; the first: a.json row 1: no answer" in caplog.messages[0]
    assert "2 rows" in caplog.messages[1]
    write(path, [empty])
    fails(lambda: load_source(path), "a.json row 0: no answer: the assistant's text is empty; mend")
    fails(lambda: load_source(path, skip_bad_rows=True), "no good rows; the first: a.json row 0")


# Folders and the hub


def test_a_folder_is_read_in_the_order_of_names(tmp_path, caplog):
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "b.json", ROWS[:1])
    write(folder / "a.jsonl", ROWS[1:])
    (folder / "README.md").write_text("not data")
    (folder / ".hidden.json").write_text("not read")
    with caplog.at_level(logging.INFO, "sft_pipeline"):
        dataset = load_source(folder)
    assert dataset["origin"][:] == ["rows/a.jsonl line 1", "rows/a.jsonl line 2", "rows/b.json row 0"]
    assert dataset["messages"][:] == EXPECTED[1:] + EXPECTED[:1]
    assert "3 rows, 2 files, read as alpaca" in caplog.text


def test_folders_that_do_not_fit(tmp_path):
    fails(lambda: load_source(tmp_path), "no data file in this folder")
    write(tmp_path / "a.json", ROWS)
    write(tmp_path / "b.json", [{"messages": talk()}])
    fails(lambda: load_source(tmp_path), "mixed columns: a.json is alpaca, b.json is messages")


def test_saved_data_sets(tmp_path):
    saved = Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one")
    (tmp_path / "one" / "cache-1.arrow").write_bytes(b"what a map left there")
    before = sorted((tmp_path / "one").iterdir())
    dataset = load_source(tmp_path / "one")
    assert dataset["messages"][:] == EXPECTED
    assert dataset["origin"][0] == "one/data-00000-of-00001.arrow row 0"
    assert sorted((tmp_path / "one").iterdir()) == before
    datasets.DatasetDict(train=saved, test=saved.select([2])).save_to_disk(tmp_path / "two")
    assert load_source(tmp_path / "two", split="test")["messages"][:] == EXPECTED[2:]
    fails(lambda: load_source(tmp_path / "two", split="dev"), "no split 'dev'", "test, train")


@pytest.mark.parametrize(
    "state, parts",
    [
        ("{", ["state.json is not what save_to_disk writes"]),
        ("{}", ["state.json is not what", "_data_files"]),
        ('{"_data_files": [{"filename": "../secret.arrow"}]}', ["names a file outside the folder (../secret.arrow)"]),
        ('{"_data_files": [{"filename": "/secret.arrow"}]}', ["names a file outside the folder (/secret.arrow)"]),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', ["the file gone.arrow", "is missing"]),
        ('{"_data_files": []}', ["no rows"]),
    ],
)
def test_a_saved_data_set_that_is_broken_or_leaves_its_folder(tmp_path, state, parts):
    write(tmp_path / "secret.arrow", ROWS)
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "state.json").write_text(state)
    fails(lambda: load_source(folder), *parts)


@pytest.mark.parametrize("name", ["gone.jsonl", "./gone", "/gone/a", "a/b/c", "~/no such folder", "data/gone.csv"])
def test_a_missing_path_is_not_sought_on_the_hub(name):
    fails(lambda: load_source(name), f"{name}: no such file or folder")


def test_a_hub_name_offline():
    fails(lambda: load_source("someone/rows"), "someone/rows: neither a file or folder here nor a data set")


def test_a_hub_name_with_a_hub(monkeypatch):
    asked = []

    def answer(name, split):
        asked.append((name, split))
        return Dataset.from_list([{**row, "text": "x"} for row in [*ROWS, {"instruction": "Hi", "output": ""}]])

    monkeypatch.setattr(datasets, "load_dataset", answer)
    dataset = load_source("someone/rows", split="train[:4]", skip_bad_rows=True)
    assert asked == [("someone/rows", "train[:4]")]
    assert dataset.column_names == ["messages", "origin"] and dataset.format["type"] is None
    assert dataset["messages"][:] == EXPECTED
    assert dataset["origin"][2] == "someone/rows row 2"
    fails(lambda: load_source("someone/rows"), "someone/rows row 3: no answer")


def test_paths_in_the_data_are_not_opened(monkeypatch, tmp_path):
    features = datasets.Features(instruction=datasets.Image(), output=datasets.Value("string"))
    rows = Dataset.from_dict({"instruction": [str(tmp_path / "secret.png")], "output": ["x"]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    fails(lambda: load_source("someone/images"), "someone/images row 0: 'instruction' is of type dict, not text")


# Hashes, mixing, holding out


def test_row_hash_is_pinned_and_counts_role_order_and_text():
    reference = hashlib.blake2b(b'[["user", "Hi"], ["assistant", "\\u00e9"]]', digest_size=8).digest()
    assert hash_row(talk(answer="é")) == int.from_bytes(reference, "big") == 794376867648640232
    different = [talk(), talk("Hi "), talk("Hello", "Hi"), talk(system="Hi"), talk()[:1], talk() * 2, talk()[::-1]]
    assert len({hash_row(messages) for messages in different}) == len(different)
    assert hash_row(talk(), "mix") != hash_row(talk())
    assert hash_row([{**message, "extra": 1} for message in talk()]) == hash_row(talk())


def test_row_hash_is_the_same_in_another_process():
    code = "from sft_pipeline.data.splits import hash_row; print(hash_row([{'role': 'user', 'content': '冬瓜'}]))"
    here = Path(__file__).parents[1]
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=here)
    assert int(other.stdout) == hash_row([{"role": "user", "content": "冬瓜"}])


def numbered(rows):
    return [talk(str(number)) for number in rows]


def users(dataset):
    return [messages[0]["content"] for messages in dataset["messages"]]


def test_row_hashes_are_the_hash_of_each_row():
    assert hash_rows(table(numbered(range(50)))).tolist() == [hash_row(talk(str(number))) for number in range(50)]


@QUICK
@given(st.lists(st.integers(0, 30), min_size=2, max_size=40), st.sampled_from([1, 3, 0.2, 0.5]), st.randoms())
def test_a_split_survives_reordering_and_shares_no_row(numbers, held_out, shuffler):
    def split(values):
        try:
            return [sorted(users(side)) for side in split_held_out(table(numbered(values)), held_out)]
        except SFTError:  # all rows on one side
            return None

    shuffled = list(numbers)
    shuffler.shuffle(shuffled)
    sides = split(numbers)
    assert split(shuffled) == sides
    if sides:
        train, held = sides
        assert not set(train) & set(held)
        assert sorted(train + held) == sorted(map(str, numbers))


def test_a_count_and_a_share_hold_out_what_they_say():
    dataset = table(numbered(range(2000)))
    train, held = split_held_out(dataset, 20)
    assert (len(train), len(held)) == (1980, 20)
    by_hash = sorted(range(2000), key=lambda number: hash_row(talk(str(number))))
    assert sorted(users(held)) == sorted(str(number) for number in by_hash[:20])
    train, held = split_held_out(dataset, 0.1)
    assert 150 < len(held) < 250 and len(train) + len(held) == 2000
    assert set(users(split_held_out(table(numbered(range(1000))), 0.1)[1])) <= set(
        users(held)
    )  # more rows move none across
    assert len(split_held_out(dataset, 5.0)[1]) == 5


def test_a_count_takes_all_copies():
    first = min(range(10), key=lambda number: hash_row(talk(str(number))))
    train, held = split_held_out(table(numbered(list(range(10)) + [first] * 3)), 1)
    assert users(held) == [str(first)] * 4 and len(train) == 9


@pytest.mark.parametrize(
    "held_out, parts",
    [
        (0, ["held out 0:", "a share between 0 and 1"]),
        (-3, ["held out -3:"]),
        (1.5, ["held out 1.5:"]),
        (float("nan"), ["held out nan:"]),
        (float("inf"), ["held out inf:"]),
        (10, ["held out 10 of 10 rows: nothing is left to train on"]),
        (99, ["held out 99 of 10 rows: nothing is left to train on"]),
        (1e-9, ["held out 1e-09 of 10 rows: no row falls below the share; give a count"]),
    ],
)
def test_hold_out_refuses(held_out, parts):
    fails(lambda: split_held_out(table(numbered(range(10))), held_out), *parts)


def test_mix_takes_each_part_by_its_weight():
    a, b = table(numbered(range(100))), table(numbered(range(100, 110)))
    assert users(mix_datasets([a, b])) == users(a) + users(b)
    assert users(mix_datasets([a, b], [0, 2])) == users(b) * 2
    half = users(mix_datasets([a], [0.5]))
    assert len(half) == 50 and half == sorted(set(half), key=int)
    assert sorted(users(mix_datasets([a, b], [1.5, 1]))) == sorted(users(a) + half + users(b))
    assert len(mix_datasets([b], [0.01])) == 1
    shuffled = table(numbered(random.Random(0).sample(range(100), 100)))
    assert sorted(users(mix_datasets([shuffled], [0.5])), key=int) == half


def test_what_mix_takes_says_nothing_about_what_is_held_out():
    half = mix_datasets([table(numbered(range(2000)))], [0.5])
    assert 60 < len(split_held_out(half, 0.1)[1]) < 140  # with one hash for both it would be 200


@pytest.mark.parametrize(
    "weights, parts",
    [
        ([1], ["1 weights for 2 data sets"]),
        ([1, -1], ["weight -1: must be 0 or more"]),
        ([1, float("nan")], ["weight nan"]),
        ([float("inf"), 1], ["weight inf"]),
        ([0, 0.0], ["the weights leave no data set"]),
    ],
)
def test_mix_refuses(weights, parts):
    fails(lambda: mix_datasets([table([talk()]), table([talk()])], weights), *parts)


def test_drop_overlap(caplog):
    train, held = table(numbered([1, 2, 3, 2])), table(numbered([2, 9]))
    with caplog.at_level(logging.INFO, "sft_pipeline"):
        assert users(drop_overlap(train, held)) == ["1", "3"]
        assert drop_overlap(train, table(numbered([9]))) is train
    assert caplog.messages == ["2 training rows stand in the evaluation data and are left out"]
    fails(lambda: drop_overlap(held, held), "nothing is left to train on")
