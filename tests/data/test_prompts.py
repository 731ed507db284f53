"""Prompts out of text files and rows: what the model is shown, what is kept back, and what is wrong with a row."""

import json
from pathlib import Path

import datasets
import pytest

from sft_pipeline.data.prompts import Prompt, load_prompts
from sft_pipeline.utils.errors import SFTError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


HISTORY = [user("Hi"), assistant("Yes?"), user("Why?")]
UNTRAINED = [user("Hi"), assistant("Yes?") | {"train": False}, user("Why?")]
SYSTEM = {"role": "system", "content": "Be brief."}


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("row", "messages", "reference"),
    [
        ({"messages": HISTORY}, HISTORY, None),
        ({"messages": [SYSTEM, *HISTORY, assistant("So.")]}, [SYSTEM, *HISTORY], "So."),
        ({"messages": [user("Hi"), assistant(" ")]}, [user("Hi")], None),
        ({"messages": [user("Hi"), {"role": "assistant", "content": None}]}, [user("Hi")], None),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, [user("Hi")], None),
        (
            {
                "system": "Be brief.",
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}],
            },
            [SYSTEM, user("Hi")],
            "Yes?",
        ),
        ({"instruction": "Add.", "input": "1 + 1"}, [user("Add.\n1 + 1")], None),
        ({"instruction": "Why?", "history": [["Hi", "Yes?"]], "output": "So."}, HISTORY, "So."),
        ({"instruction": "Hi", "output": ""}, [user("Hi")], None),
        ({"prompt": "Hi"}, [user("Hi")], None),
        ({"prompt": "Hi", "completion": "Yes?"}, [user("Hi")], "Yes?"),
        ({"prompt": HISTORY}, UNTRAINED, None),
        ({"prompt": HISTORY, "completion": [assistant("So.")]}, UNTRAINED, "So."),
    ],
)
def test_the_last_answer_is_the_reference(row, messages, reference, tmp_path):
    name = write(tmp_path / "rows.jsonl", row)
    answer = reference and assistant(reference)
    assert load_prompts(name) == [Prompt("rows.jsonl line 1", {"messages": messages}, answer)]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": []}, "the conversation has no message before its answer"),
        ({"messages": [assistant("Hi")]}, "the conversation has no message before its answer"),
        ({"messages": [user(" ")]}, "the content of messages[0] (user) is empty"),
        (
            {"messages": [user("Hi"), assistant("") | {"tool_calls": [{}]}]},
            "messages[1].tool_calls[0] must be an object",
        ),
        ({"messages": [user("Hi")], "tools": "{"}, "tools is not JSON"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages[0]: unknown role 'robot'; use one of: "),
        (
            {"messages": [user("Hi"), {"role": "assistant", "content": 3}]},
            "the content of messages[1] (assistant) must be a string, got int",
        ),
        (
            {"messages": [user("\ud800")]},
            "the content of messages[0] (user) contains a lone surrogate, which is not valid Unicode text",
        ),
        ({"messages": "Hi"}, "'messages' must be a list of messages, got str"),
        ({"prompt": "Hi"}, "missing 'messages', which messages rows require; the row has prompt"),
        ([1], "expected an object with columns, got list"),
    ],
)
def test_a_bad_row_stays_where_it_is(row, problem, tmp_path):
    good = {"messages": [user("Hi")]}
    first, bad, last = load_prompts(write(tmp_path / "rows.jsonl", good, row, good))
    assert first.conversation == last.conversation == {"messages": [user("Hi")]}
    assert (bad.origin, bad.conversation, bad.reference) == ("rows.jsonl line 2", {"messages": []}, None)
    assert bad.problem.startswith(problem)


def test_tools_reasoning_and_template_arguments_are_kept(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {"n": "42"}}}
    asked = [user("Hi"), assistant("") | {"tool_calls": [call]}, {"role": "tool", "content": "4"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    kwargs = {"enable_thinking": False}
    answer = assistant("Four.") | {"reasoning_content": "It says 4."}
    conversation = {"messages": asked, "tools": tools, "chat_template_kwargs": kwargs}
    rows = [conversation, conversation | {"messages": [*asked, answer]}, conversation | {"messages": asked[:2]}]
    assert load_prompts(write(tmp_path / "rows.jsonl", *rows)) == [
        Prompt("rows.jsonl line 1", conversation),
        Prompt("rows.jsonl line 2", conversation, answer),
        Prompt("rows.jsonl line 3", conversation | {"messages": asked[:1]}, asked[1]),
    ]


def test_texts_without_turns_are_no_prompts(tmp_path):
    [prompt] = load_prompts(write(tmp_path / "rows.jsonl", {"text": "Once upon a time"}))
    assert prompt.problem == "a text has no turns and no prompt to answer; give rows of messages"


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffHi\r\n\n  你好\u2028! \nlast".encode())
    assert load_prompts(str(file)) == [
        Prompt("prompts.txt line 1", {"messages": [user("Hi")]}),
        Prompt("prompts.txt line 3", {"messages": [user("你好\u2028!")]}),
        Prompt("prompts.txt line 4", {"messages": [user("last")]}),
    ]


def test_csv_parquet_folders_and_saved_data_sets(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt\nHi\nWhy?\n")
    expected = [{"messages": [user("Hi")]}, {"messages": [user("Why?")]}]
    assert [prompt.conversation for prompt in load_prompts(str(tmp_path / "rows.csv"))] == expected
    rows = datasets.Dataset.from_dict({"prompt": ["Hi", "Why?"]})
    rows.to_parquet(tmp_path / "rows.parquet")
    assert [prompt.conversation for prompt in load_prompts(str(tmp_path / "rows.parquet"))] == expected
    assert [prompt.origin for prompt in load_prompts(str(tmp_path))][1:3] == [
        f"{tmp_path.name}/rows.csv row 1",
        f"{tmp_path.name}/rows.parquet row 0",
    ]
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "saved")
    assert [prompt.conversation for prompt in load_prompts(str(tmp_path / "saved"))] == expected


def test_the_hub(monkeypatch):
    rows = datasets.Dataset.from_dict({"instruction": ["Hi"], "output": ["Yes?"], "other": [1]})
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, split, **options: rows)
    assert load_prompts("some/rows") == [Prompt("some/rows row 0", {"messages": [user("Hi")]}, assistant("Yes?"))]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.txt", b"\n \n", "a.txt: no prompts"),
        ("a.txt", b"\xff", "a.txt: not UTF-8 at byte 0; save the file as UTF-8"),
        ("a.txt", None, "a.txt: cannot be read (No such file or directory); check the path"),
        ("a.jsonl", b"", "a.jsonl: no prompts"),
        ("a.jsonl", b"[1]\n", "a.jsonl: no prompts"),
        (
            "a.jsonl",
            b'{"question": "Hi"}',
            "a.jsonl: its columns (question) match no row format; rename them to one of: ",
        ),
        ("a.jsonl", b'{"prompt": "Hi"}\n{"prompt', "a.jsonl line 2: invalid JSON"),
        ("a.jsonl", None, "a.jsonl: no such file or folder"),
        ("a.docx", b"Hi", "a.docx: unsupported file type; use one of"),
    ],
)
def test_a_file_that_cannot_be_read(file, content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(file).write_bytes(content)
    with pytest.raises(SFTError) as error:
        load_prompts(file)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
