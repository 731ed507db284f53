"""Sources: files, folders and hub datasets to conversations; every error with its message. No network."""

import csv
import json
import logging
import os
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from support.source_rows import EXPECTED, QUICK, ROWS, TEXT, fails, talk

from sft_pipeline.arguments import SourceEntry
from sft_pipeline.data import sources
from sft_pipeline.data.formats import FORMATS, detect_format
from sft_pipeline.data.messages import parse_conversation
from sft_pipeline.data.sources import load_conversations, load_source


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


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


def parse(dataset: Dataset) -> list[Any]:
    """The conversations of a dataset of `load_source`."""
    return [parse_conversation(text) for text in dataset["conversation"]]


def conversation(*args: str) -> dict[str, Any]:
    return {"messages": talk(*args)}


# Files


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet", "a.arrow", "A.JSON"])
def test_every_kind_of_file_gives_the_same_messages(tmp_path, name):
    path = write(tmp_path / name, ROWS, Path(name).suffix.lower())
    dataset, unread = load_source(str(path))
    assert dataset.column_names == ["conversation", "origin"] and not unread
    assert parse(dataset) == load_conversations(str(path)) == EXPECTED
    places = [f"{name} line {n}" for n in (1, 2, 3)] if name == "a.jsonl" else [f"{name} row {n}" for n in range(3)]
    assert dataset["origin"][:] == places


def test_both_containers_of_arrow(tmp_path):
    path = write(tmp_path / "a.arrow", ROWS, kind="file with a footer")
    assert load_conversations(path) == EXPECTED


@QUICK
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
def test_text_survives_every_kind_of_file(tmp_path, pairs):
    rows = [{"instruction": user, "output": answer} for user, answer in pairs]
    for suffix in (".json", ".jsonl", ".csv", ".parquet"):
        assert load_conversations(write(tmp_path / f"a{suffix}", rows)) == [conversation(*pair) for pair in pairs]


def test_text_that_looks_like_something_else_stays_text(tmp_path):
    rows = [{"instruction": "When?", "output": "2024-01-01"}, {"instruction": "1", "output": "NaN"}]
    for suffix in (".json", ".jsonl", ".csv"):
        loaded = load_conversations(write(tmp_path / f"a{suffix}", rows))
        assert [conversation["messages"][-1]["content"] for conversation in loaded] == ["2024-01-01", "NaN"]


def test_conversations_from_parquet_ignore_other_keys(tmp_path):
    rows = [{"id": 1, "messages": [{**message, "tool_calls": None} for message in talk()]}]
    assert load_conversations(write(tmp_path / "a.parquet", rows)) == [conversation()]


def test_the_row_format_is_logged(tmp_path, caplog):
    path = write(tmp_path / "alpaca.json", [{**row, "id": 7} for row in ROWS])
    with caplog.at_level(logging.INFO, "sft_pipeline"):
        load_conversations(path)
    assert caplog.messages == [
        f"{path}: 3 rows, read as alpaca (instruction, input, output)",
        f"{path}: not read: id in 3 rows",
    ]


UNREAD_ROWS = [
    {"prompt": "Hi", "completion": "Yes?"},
    {"prompt": [{"role": "user", "content": "Hi", "name": "A"}], "completion": [{"role": "assistant", "content": "B"}]},
]


def chat_row(id_: int | None = None, **keys: object) -> dict[str, object]:
    """A row of messages whose answer has more keys."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?", **keys}]
    return {"messages": messages, **({} if id_ is None else {"id": id_})}


@pytest.mark.parametrize("kind", ["a.json", "a.jsonl", "a.parquet", "a.arrow", "list", "dataset", "shuffled"])
def test_what_nothing_reads_is_counted_by_name(kind, tmp_path, caplog):
    """A key is counted once a row, a null not at all; the first row does not decide. A second call reads the cache."""
    rows = [
        chat_row(),
        *(chat_row(number, index=0) for number in range(12)),
        chat_row(refusal="Hm.", index=None),
        {"messages": [{**message, "score": "1"} for message in chat_row()["messages"]]},
    ]
    source: Any = rows
    if kind in ("dataset", "shuffled"):
        source = Dataset.from_list([{"id": None, **row} for row in rows])
        source = source.shuffle(seed=1) if kind == "shuffled" else source
    elif kind != "list":
        filled = [{"id": None, **row} for row in rows] if kind in ("a.parquet", "a.arrow") else rows
        source = write(tmp_path / kind, filled)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO, "sft_pipeline"):
            dataset, numbers = load_source(source, name="rows")
        assert dataset.column_names == ["conversation", "origin"] and len(dataset) == 15
        [account, unread] = caplog.messages
        assert account == "rows: 15 rows, read as messages (messages)"
        counts = unread.removeprefix("rows: not read: ").split(", ")
        assert sorted(counts[:2]) == ["id in 12 rows", "messages[].index in 12 rows"]
        assert sorted(counts[2:]) == ["messages[].refusal in 1 row", "messages[].score in 1 row"]
        assert numbers == {"id": 12, "messages[].index": 12, "messages[].refusal": 1, "messages[].score": 1}


def test_unread_keys_of_the_other_formats(tmp_path, caplog):
    turns = [{"from": "human", "value": "Hi", "score": 1}, {"from": "gpt", "value": "Yes?"}]
    with caplog.at_level(logging.INFO, "sft_pipeline"):
        load_conversations([{"conversations": turns, "system": "", "functions": "[]"}], name="a")
        load_conversations([{**row, 7: "x"} for row in UNREAD_ROWS], name="b")
        bad = [{"prompt": "Hi", "completion": " ", "score": 2}, 3]
        load_conversations([*UNREAD_ROWS[:1], *bad], name="c", skip_bad_rows=True)
        load_conversations(UNREAD_ROWS[:1], name="d")
    assert [line for line in caplog.messages if "not read" in line or line.startswith("d")] == [
        "a: not read: functions in 1 row, conversations[].score in 1 row",
        "b: not read: 7 in 2 rows, prompt[].name in 1 row",
        "c: not read: score in 1 row",
        "d: 1 rows, read as prompt-completion (prompt, completion)",
    ]


def test_a_column_without_a_name_is_named_as_such(tmp_path, caplog):
    """As pandas writes its index."""
    (tmp_path / "a.csv").write_text(",instruction,output\n0,Hi,Hello\n1,Bye,See you\n")
    with caplog.at_level(logging.INFO, "sft_pipeline"):
        load_conversations(tmp_path / "a.csv", name="a")
    assert caplog.messages[-1] == "a: not read: a column without a name in 2 rows"


def test_names_that_nothing_reads_are_one_short_line(tmp_path, caplog):
    rows = [{**UNREAD_ROWS[0], f"id{number}\n\ud800": 1} for number in range(30)]
    with caplog.at_level(logging.INFO, "sft_pipeline"):
        load_conversations(write(tmp_path / "a.jsonl", rows), name="a")
    assert caplog.messages[-1].startswith("a: not read: id0\u240a\\ud800 in 1 row, id1")
    assert caplog.messages[-1].endswith("in 1 row, 10 other names")


def test_lines_of_json_under_the_name_json_and_blank_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("\ufeff" + "\r\n\r\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    dataset, _ = load_source(path)
    assert parse(dataset) == EXPECTED
    assert dataset["origin"][:] == ["a.json line 1", "a.json line 3", "a.json line 5"]


def test_an_unchanged_file_is_converted_once(tmp_path):
    path = write(tmp_path / "a.json", ROWS)
    first, _ = load_source(path)
    path.touch()
    assert load_source(path)[0].cache_files == first.cache_files
    assert load_source(path)[0]._fingerprint == first._fingerprint
    write(path, ROWS[:2])
    assert load_conversations(path) == EXPECTED[:2]


GOOD = '{"instruction": "Hi", "output": "Hello"}\n'
KEY = "4adc440e83f727f388dd2e490c22ed57-alpaca-3"


# The number of the row format in the cache keys


CALL = '{"name": "f", "arguments": {"a": "42", "b": null}}'
PLAIN = '{"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Hello"}]}'
WITH_SYSTEM = PLAIN.replace("[", '[{"role":"system","content":"S"},')
CALLED = (
    '{"role":"assistant","content":"","tool_calls":[{"type":"function","function":{"name":"f",'
    '"arguments":{"a":"42","b":null}}}]}'
)
# The rows of each format, and the JSON text that they become.
FIXED_ROWS = {
    "alpaca": (
        [
            {"instruction": "Hi", "input": "", "output": "Hello"},
            {"instruction": "Add.", "input": "1 + 1", "output": " 2\n", "system": "S", "history": [["Hi", "Hello"]]},
            {"instruction": "Hi", "output": " "},
        ],
        [
            PLAIN,
            WITH_SYSTEM.replace(
                "]", ',{"role":"user","content":"Add.\\n1 + 1"},{"role":"assistant","content":" 2\\n"}]'
            ),
            None,
        ],
    ),
    "messages": (
        [
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "é", "name": "x"}]},
            {"messages": talk(system="S"), "id": 7},
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                    {"role": "assistant", "content": None, "thinking": "Hm.", "tool_calls": [CALL]},
                    {"role": "tool", "content": "", "name": "f", "tool_call_id": "c"},
                    {"role": "assistant", "content": "Hello", "weight": 0},
                ],
                "tools": '[{"name": "f"}]',
                "chat_template_kwargs": {"x": None},
            },
            {"messages": [{"role": "user", "content": "Hi"}]},
        ],
        [
            PLAIN.replace("Hello", "é"),
            WITH_SYSTEM,
            '{"messages":[{"role":"user","content":"Hi"},'
            + CALLED.replace('"",', '"","reasoning_content":"Hm.",')
            + ',{"role":"tool","content":"","tool_call_id":"c","name":"f"},'
            '{"role":"assistant","content":"Hello","train":false}],'
            '"tools":[{"type":"function","function":{"name":"f"}}],"chat_template_kwargs":{"x":null}}',
            None,
        ],
    ),
    "sharegpt": (
        [
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "S"},
            {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}], "system": ""},
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": CALL}]},
            {"conversations": [{"from": "bot", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": ""},
        ],
        [WITH_SYSTEM, PLAIN, '{"messages":[{"role":"user","content":"Hi"},' + CALLED + "]}", None],
    ),
    "prompt-completion": (
        [
            {"prompt": "Hi", "completion": " Hello"},
            {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]},
            {"prompt": talk(), "completion": talk()},
            {"prompt": "Hi", "completion": [{"role": "assistant", "content": "Hello"}]},
        ],
        [
            PLAIN.replace("Hello", " Hello"),
            PLAIN,
            PLAIN.replace("}]}", ',"train":false}' + PLAIN.removeprefix('{"messages":[').join([",", ""])),
            None,
        ],
    ),
    "text": ([{"text": " Once\n"}, {"text": " "}], ['{"text":" Once\\n"}', None]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_converted_rows_of_this_rows_format(tmp_path, name):
    rows, expected = FIXED_ROWS[name]
    dataset, _ = load_source(write(tmp_path / "a.jsonl", rows), skip_bad_rows=True)
    texts = dict(zip(dataset["origin"], dataset["conversation"]))
    converted = [texts.get(f"a.jsonl line {number}") for number in range(1, len(rows) + 1)]
    assert detect_format(rows[0]).name == name
    assert (sources.ROWS_FORMAT, converted) == (3, expected), (
        "the same file gives other conversations or other bad rows: if that is intended, raise ROWS_FORMAT in "
        "sft_pipeline/data/sources.py, or rows cached by earlier versions are used, and update this test"
    )


def test_the_cache_key_depends_on_content_row_format_and_number_alone(tmp_path, monkeypatch):
    """Not on the file's name or time, nor on the source code: the key is a constant."""
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD)
    copy = tmp_path / "b.jsonl"
    copy.write_text(GOOD)
    os.utime(copy, (0, 0))
    alpaca = FORMATS["alpaca"]
    assert sources._build_cache_key(path, alpaca) == KEY
    assert sources._build_cache_key(copy, alpaca) == KEY
    assert sources._build_cache_key(path, FORMATS["messages"]) == KEY.replace("alpaca", "messages")
    copy.write_text(GOOD * 2)
    assert sources._build_cache_key(copy, alpaca) not in (KEY, KEY.replace("alpaca", "messages"))
    first, _ = load_source(path)
    assert load_source(path)[0].cache_files == first.cache_files
    monkeypatch.setattr(sources, "ROWS_FORMAT", 4)
    assert sources._build_cache_key(path, alpaca) == KEY.removesuffix("3") + "4"
    assert load_source(path)[0].cache_files != first.cache_files


# Values stay what they are


def tool_rows() -> list[dict[str, Any]]:
    """Rows of different tools and calls: texts that look like numbers, nulls, and keys that only one row has."""
    rows = []
    for name, arguments in (
        ("find", {"code": "42", "unit": None, "depth": 3}),
        ("add", {"values": [1, 2.5], "exact": True}),
        ("now", {}),
        ("write", {"text": "null", "at": {"line": "07", "column": None}}),
    ):
        properties = {key: {"type": "string"} for key in arguments}
        tool = {"name": name, "strict": None, "parameters": {"type": "object", "properties": properties}}
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        messages = [{"role": "user", "content": "Hi"}, answer, {"role": "tool", "content": "42"}]
        messages.append({"role": "assistant", "content": "Yes?"})
        rows.append({"messages": messages, "tools": [{"type": "function", "function": tool}]})
    return rows


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def with_json_text(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose arguments and tools are JSON text, as files with one type a column have them."""
    row = json.loads(json.dumps(row))
    function = row["messages"][1]["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(function["arguments"])
    return {**row, "tools": json.dumps(row["tools"])}


@pytest.mark.parametrize("kind", ["a.json", "a.jsonl", "list"])
@pytest.mark.parametrize("as_text", [False, True])
def test_values_of_tools_from_json_stay(tmp_path, caplog, kind, as_text):
    rows = [with_json_text(row) for row in tool_rows()] if as_text else tool_rows()
    with caplog.at_level(logging.INFO, "sft_pipeline"):
        loaded = load_conversations(rows if kind == "list" else write(tmp_path / kind, rows))
    assert json.dumps(loaded) == json.dumps(tool_rows())  # 1 and 1.0 and True differ too
    assert "not read" not in caplog.text


@pytest.mark.parametrize("kind", ["a.parquet", "a.arrow", "dataset"])
def test_values_of_tools_as_json_text_in_columns_stay(tmp_path, kind):
    rows = [with_json_text(row) for row in tool_rows()]
    source: Any = Dataset.from_list(rows) if kind == "dataset" else write(tmp_path / kind, rows)
    assert json.dumps(load_conversations(source)) == json.dumps(tool_rows())


@pytest.mark.parametrize("kind", ["a.parquet", "a.arrow", "dataset"])
def test_values_of_tools_in_structs_stay_but_for_nulls(tmp_path, caplog, kind):
    """Arrow gives the arguments of one tool to all, as nulls; these are dropped, and the log names them."""
    rows = tool_rows()
    table = pa.Table.from_pylist(rows)
    assert table.to_pylist()[2]["messages"][1]["tool_calls"][0]["function"]["arguments"]["code"] is None
    if kind == "dataset":
        source: Any = Dataset(table)
    else:
        source = tmp_path / kind
        if kind == "a.parquet":
            pa.parquet.write_table(table, source)
        else:
            with pa.ipc.new_stream(str(source), table.schema) as writer:
                writer.write_table(table)
    with caplog.at_level(logging.INFO, "sft_pipeline"):
        loaded = load_conversations(source, name="rows")
    # The order of the keys is that of the columns.
    expected = without_nulls(rows)
    assert loaded == expected and loaded[1]["messages"][1]["tool_calls"][0]["function"]["arguments"]["exact"] is True
    counts = "nulls in messages[].tool_calls[].arguments in 4 rows, nulls in tools in 4 rows"
    assert caplog.messages == [
        "rows: 4 rows, read as messages (messages, tools)",
        f"rows: not read: {counts}",
    ]


@pytest.mark.parametrize("kind", ["dataset", "a.parquet", "saved"])
def test_values_in_the_librarys_json_cells_stay(tmp_path, kind):
    """`datasets` has its own type for objects whose keys differ in type from row to row."""
    rows = []
    for value in ("42", 42, [1, "1"], {"b": "null"}):
        call = {"type": "function", "function": {"name": "f", "arguments": {"a": value}}}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        rows.append({"messages": [{"role": "user", "content": "Hi"}, answer]})
    dataset = Dataset.from_list(rows, on_mixed_types="use_json")
    assert "Json" in str(dataset.features)
    source: Any = dataset
    if kind == "a.parquet":
        dataset.to_parquet(source := tmp_path / kind)
    elif kind == "saved":
        dataset.save_to_disk(source := tmp_path / kind)
    assert json.dumps(load_conversations(source)) == json.dumps(rows)


def test_a_text_alone_in_a_json_cell_is_no_longer_a_text():
    """`datasets` writes the text "42" as the number, which is refused, never trained as another text."""
    parts = [{"type": "text", "text": "Hello"}]
    rows = [{"messages": talk(answer=answer)} for answer in ("Hello", parts)]
    assert load_conversations(Dataset.from_list(rows, on_mixed_types="use_json")) == [conversation()] * 2
    numbers = Dataset.from_list([{"messages": talk(answer="42")}, *rows], on_mixed_types="use_json")
    fails(lambda: load_conversations(numbers), "dataset row 0: the content of messages[1] (assistant) must be a string")


def test_a_json_cell_that_is_no_json_is_its_text(tmp_path):
    cell = pa.ExtensionArray.from_storage(pa.json_(), pa.array(["{", '"x"', None]))
    table = pa.table({"prompt": ["a", "b", "c"], "completion": cell})
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    answers = [row["messages"][1]["content"] for row in load_conversations(tmp_path / "a.arrow", skip_bad_rows=True)]
    assert answers == ["{", "x"]


def test_a_csv_file_with_tools_as_json_text(tmp_path):
    tools, kwargs = tool_rows()[0]["tools"], {"x": None, "y": "42"}
    row = {
        "prompt": "Hi",
        "completion": "Hello",
        "tools": json.dumps(tools),
        "chat_template_kwargs": json.dumps(kwargs),
    }
    rows = [row, {**row, "tools": "", "chat_template_kwargs": ""}]
    assert load_conversations(write(tmp_path / "a.csv", rows)) == [
        {"messages": talk(), "tools": tools, "chat_template_kwargs": kwargs},
        {"messages": talk()},
    ]


# Files that cannot be read


@pytest.mark.parametrize(
    "name, content, parts",
    [
        ("a.txt", GOOD, ["a.txt: unsupported file type", ".jsonl"]),
        ("a.jsonl", GOOD + '{"instruction": "Hi", "output" "x"}', ["line 2: invalid JSON: Expecting ':'", "column 32"]),
        ("a.jsonl", GOOD + '{"instruction": ', ["a.jsonl line 2: invalid JSON: Expecting value at column 17"]),
        ("a.jsonl", GOOD + "[" * 200_000, ["a.jsonl line 2: cannot parse JSON"]),
        ("a.jsonl", GOOD + "[3]", ["a.jsonl line 2: expected an object with columns, got list"]),
        ("a.jsonl", "3", ["a.jsonl line 1: expected an object with columns, got int"]),
        ("a.jsonl", "null\n" + GOOD, ["a.jsonl line 1: expected an object with columns, got null"]),
        ("a.jsonl", GOOD.encode() + b'"\xff"', ["a.jsonl line 2: not UTF-8 at byte 1 of the line"]),
        ("a.jsonl", "\n\n", ["a.jsonl: no rows"]),
        ("a.json", "[]", ["a.json: no rows"]),
        ("a.json", "[\n{},\n {,}]", ["a.json: its columns (none) match no row format"]),
        ("a.json", f"[\n{GOOD},\n {{,}}]", ["a.json: invalid JSON: Expecting property name", "line 4 column 3"]),
        ("a.json", f"[{GOOD}{GOOD}]", ["a.json: invalid JSON: Expecting ',' or ']' at line 2 column 1"]),
        ("a.json", f"[{GOOD}", ["a.json: invalid JSON: Expecting ',' or ']' at line 2 column 1"]),
        ("a.json", f"[{GOOD},]", ["a.json: invalid JSON: Remove the comma before ']' at line 2 column 2"]),
        (
            "a.jsonl",
            GOOD.strip() + ",",
            ["line 1: invalid JSON: Extra data", "one object a line, without commas between"],
        ),
        ("a.csv", "问题,回答\n甲,乙\n".encode("gb18030"), ["a.csv: not UTF-8 at byte 0", "iconv -f GB18030 -t UTF-8"]),
        ("a.csv", "instruction;output\nHi;Hello\n", ["a.csv: its cells are separated by ';'; save it with commas"]),
        ("a.csv", "instruction\toutput\nHi\tHello\n", ["a.csv: its cells are separated by '\\t'"]),
        ("a.json", f"[{GOOD}] x", ["a.json: invalid JSON: Extra data after the list at line 2 column 3"]),
        ("a.json", '"Hi"', ["a.json: invalid JSON: Expecting a list of objects at line 1 column 1"]),
        ("a.json", "", ["a.json: invalid JSON: Expecting a list of objects"]),
        ("a.json", "[" * 200_000, ["a.json: cannot parse JSON"]),
        ("a.json", b"[\xff]", ["a.json: not UTF-8 at byte 1"]),
        ("a.csv", b"instruction,output\n\xff,x\n", ["a.csv: not UTF-8 at byte 19"]),
        ("a.csv", "instruction,output\nHi,Hello\nHi,a,b\n", ["a.csv row 1: more cells than the header"]),
        ("a.csv", "instruction,output\nHi,Hello\nHi\n", ["a.csv row 1: missing 'output'"]),
        ("a.csv", 'instruction,output\nHi,"Hello', ["a.csv: invalid CSV: unexpected end of data at line"]),
        ("a.csv", "instruction,output\n", ["a.csv: no rows"]),
        ("a.parquet", "PAR1", ["a.parquet: not a readable Parquet file"]),
        ("a.arrow", "ARROW1", ["a.arrow: not a readable Arrow file"]),
        ("a.jsonl", '{"a": 1, "b": 2}', ["a.jsonl: its columns (a, b) match no row format"]),
        ("a.jsonl", GOOD + '{"messages": []}', ["a.jsonl line 2: missing 'instruction'", "the row has messages"]),
    ],
)
def test_files_that_cannot_be_read_say_where(tmp_path, name, content, parts):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    fails(lambda: load_conversations(str(path)), *parts)


def test_a_broken_line_is_found_behind_a_thousand_good_ones(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD * 2500 + "{")
    fails(lambda: load_conversations(path), "a.jsonl line 2501: invalid JSON")


def test_a_file_without_read_permission(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", ROWS)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    fails(lambda: load_conversations(path), "a.jsonl: cannot be read (Permission denied)")


def test_bad_rows_are_refused_with_their_number_or_skipped_and_counted(tmp_path, caplog):
    empty = {"instruction": "Hi", "input": "", "output": ""}
    path = write(tmp_path / "a.json", [ROWS[0], empty, ROWS[1], empty])
    fails(lambda: load_conversations(path), "a.json row 1: no answer", "(1 more bad rows)", "skip_bad_rows")
    with caplog.at_level(logging.INFO, "sft_pipeline"):
        dataset, _ = load_source(path, skip_bad_rows=True)
    assert parse(dataset) == EXPECTED[:2] and dataset["origin"][:] == ["a.json row 0", "a.json row 2"]
    assert "skipped 2 of 4 rows as bad; first error: a.json row 1: no answer" in caplog.messages[0]
    assert "2 rows" in caplog.messages[1]
    write(path, [empty])
    fails(
        lambda: load_conversations(path),
        "a.json row 0: no answer: the content of messages[1] (assistant) is empty; fix the data",
    )
    fails(lambda: load_conversations(path, skip_bad_rows=True), "all rows are bad; first error: a.json row 0")


# Folders and the hub


def test_a_folder_is_read_in_the_order_of_names(tmp_path, caplog):
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "b.json", ROWS[:1])
    write(folder / "a.jsonl", ROWS[1:])
    (folder / "README.md").write_text("not data")
    (folder / ".hidden.json").write_text("not read")
    (folder / "c.jsonl.gz").write_text("not read")
    with caplog.at_level(logging.INFO, "sft_pipeline"):
        dataset, _ = load_source(folder)
    assert dataset["origin"][:] == ["rows/a.jsonl line 1", "rows/a.jsonl line 2", "rows/b.json row 0"]
    assert parse(dataset) == EXPECTED[1:] + EXPECTED[:1]
    assert "3 rows, 2 files, read as alpaca" in caplog.text
    assert f"{folder}: not read: README.md, c.jsonl.gz; data are files of .json, .jsonl, .csv" in caplog.text


def test_folders_that_do_not_fit(tmp_path):
    fails(lambda: load_conversations(tmp_path), "no data file in this folder")
    write(tmp_path / "a.json", ROWS)
    write(tmp_path / "b.json", [{"messages": talk()}])
    fails(lambda: load_conversations(tmp_path), "mixed row formats: a.json is alpaca, b.json is messages")


def test_saved_data_sets(tmp_path):
    saved = Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one")
    (tmp_path / "one" / "cache-1.arrow").write_bytes(b"what a map left there")
    files = sorted((tmp_path / "one").iterdir())
    dataset, _ = load_source(tmp_path / "one")
    assert parse(dataset) == EXPECTED
    assert dataset["origin"][0] == "one/data-00000-of-00001.arrow row 0"
    assert sorted((tmp_path / "one").iterdir()) == files
    datasets.DatasetDict(train=saved, test=saved.select([2])).save_to_disk(tmp_path / "two")
    assert load_conversations(tmp_path / "two", split="test") == EXPECTED[2:]
    fails(lambda: load_conversations(tmp_path / "two", split="dev"), "no split 'dev'", "test, train")


@pytest.mark.parametrize(
    "state, parts",
    [
        ("{", ["state.json is not from save_to_disk"]),
        ("{}", ["state.json is not from save_to_disk", "_data_files"]),
        (
            '{"_data_files": [{"filename": "../secret.arrow"}]}',
            ["state.json lists a file outside the folder (../secret.arrow)"],
        ),
        (
            '{"_data_files": [{"filename": "/secret.arrow"}]}',
            ["state.json lists a file outside the folder (/secret.arrow)"],
        ),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', ["gone.arrow, which state.json lists, is missing"]),
        ('{"_data_files": []}', ["no rows"]),
    ],
)
def test_a_saved_data_set_that_is_broken_or_leaves_its_folder(tmp_path, state, parts):
    write(tmp_path / "secret.arrow", ROWS)
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "state.json").write_text(state)
    fails(lambda: load_conversations(folder), *parts)


@pytest.mark.parametrize("name", ["gone.jsonl", "./gone", "/gone/a", "a/b/c", "~/no such folder", "data/gone.csv"])
def test_a_missing_path_is_not_sought_on_the_hub(name):
    fails(lambda: load_conversations(name), f"{name}: no such file or folder")


def test_a_hub_name_offline():
    fails(
        lambda: load_conversations("someone/rows"),
        "someone/rows: no such file or folder, and not available on the hub (",
    )


def test_a_hub_name_with_a_hub(monkeypatch):
    asked = []

    def answer(path, name, split, **options):
        asked.append((path, name, split, options))
        return Dataset.from_list([{**row, "text": "x"} for row in [*ROWS, {"instruction": "Hi", "output": ""}]])

    monkeypatch.setattr(datasets, "load_dataset", answer)
    dataset, _ = load_source("someone/rows", split="train[:4]", skip_bad_rows=True)
    assert asked == [("someone/rows", None, "train[:4]", {"revision": None, "data_files": None})]
    assert dataset.column_names == ["conversation", "origin"] and dataset.format["type"] is None
    assert parse(dataset) == EXPECTED
    assert dataset["origin"][2] == "someone/rows row 2"
    fails(lambda: load_conversations("someone/rows"), "someone/rows row 3: no answer")


def test_an_entry_has_the_options_of_load_dataset(tmp_path):
    """`json` is the name of datasets' own builder, which needs no hub."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    entry = SourceEntry("json", split="train[1:]", data_files=str(file))
    dataset, _ = load_source(entry)
    assert parse(dataset) == EXPECTED[1:]
    assert dataset["origin"][0] == f"json (split: train[1:], data_files: {file}) row 0"


def test_an_entry_may_name_a_split_of_a_saved_dataset(tmp_path):
    rows = Dataset.from_list(ROWS)
    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(tmp_path / "saved")
    assert parse(load_source(SourceEntry(str(tmp_path / "saved"), split="test"))[0]) == [EXPECTED[1]]
    assert len(load_source(SourceEntry(str(tmp_path / "saved")))[0]) == len(ROWS)


def test_an_entry_of_a_path_has_no_options_of_the_hub(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n")
    remedy = "is an option of a hub dataset, and this is a path; remove it"
    fails(lambda: load_source(SourceEntry(str(file), name="x")), f"{file}: name {remedy}")
    fails(lambda: load_source(SourceEntry(str(file), revision="x")), f"{file}: revision {remedy}")
    fails(lambda: load_source(SourceEntry(str(file), data_files="x")), f"{file}: data_files {remedy}")
    remedy = "has no splits, as a hub dataset or a saved DatasetDict; remove split"
    fails(lambda: load_source(SourceEntry(str(file), split="test")), f"{file}: {remedy}")


def test_paths_in_the_data_are_not_opened(monkeypatch, tmp_path):
    features = datasets.Features(instruction=datasets.Image(), output=datasets.Value("string"))
    rows = Dataset.from_dict({"instruction": [str(tmp_path / "secret.png")], "output": ["x"]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, split, **options: rows)
    fails(
        lambda: load_conversations("someone/images"), "someone/images row 0: 'instruction' must be a string, got dict"
    )
