"""Row formats: columns to messages, and what is wrong with a row."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.source_rows import EXPECTED, QUICK, ROWS, TEXT, fails, talk

from sft_pipeline.data.formats import FORMATS, convert_to_messages, detect_format


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
        ("alpaca", ["Hi"], ["expected an object with columns, got list"]),
        ("alpaca", {"instruction": "Hi"}, ["missing 'output'", "alpaca rows require", "the row has instruction"]),
        ("alpaca", {"instruction": "Hi", "output": None}, ["missing 'output'"]),
        (
            "alpaca",
            {"instruction": "Hi", "output": " \n"},
            ["no answer: the content of messages[1] (assistant) is empty"],
        ),
        ("alpaca", {"instruction": "Hi", "output": 42}, ["'output' must be a string, got int"]),
        ("alpaca", {"instruction": "", "output": "Hello"}, ["the content of messages[0] (user) is empty"]),
        ("alpaca", {"instruction": "Hi", "output": "x", "history": [["a"]]}, ["'history'", "[user, assistant] pairs"]),
        (
            "alpaca",
            {"instruction": "Hi", "output": "x", "history": [["a", 3]]},
            ["messages[1] (assistant) must be a string, got int"],
        ),
        ("alpaca", {"instruction": "Hi", "output": "\ud83d"}, ["messages[1] (assistant) contains a lone surrogate"]),
        ("messages", {"messages": "Hi"}, ["'messages' must be a list of messages, got str"]),
        ("messages", {"messages": ["Hi"]}, ["messages[0] must have 'role' and 'content'"]),
        ("messages", {"messages": [U, {"role": "assistant"}]}, ["messages[1] must have"]),
        (
            "messages",
            {"messages": [U, {"role": "tool", "content": ""}]},
            ["messages[1]: unknown role 'tool'; use one of"],
        ),
        ("messages", {"messages": [U, {"role": None, "content": "x"}]}, ["unknown role None"]),
        (
            "messages",
            {"messages": [U, {"role": "assistant", "content": None}]},
            ["messages[1] (assistant) must be a string, got null"],
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "text"}]}, A]},
            ["messages[0] (user) must be a string, got list"],
        ),
        ("messages", {"messages": []}, ["the conversation has no user message"]),
        ("messages", {"messages": [S]}, ["the conversation has no user message"]),
        (
            "messages",
            {"messages": [{"role": "system", "content": ""}, U, A]},
            ["the content of messages[0] (system) is empty"],
        ),
        ("messages", {"messages": [U]}, ["no answer: the last message has role user"]),
        ("messages", {"messages": [U, A, U]}, ["no answer: the last message has role user"]),
        ("messages", {"messages": [U, U, A]}, ["messages[1]: expected role assistant, got user"]),
        ("messages", {"messages": [A]}, ["messages[0]: expected role user, got assistant"]),
        (
            "messages",
            {"messages": [U, A, S, U, A]},
            ["messages[2]: expected role user, got system", "optional system message"],
        ),
        ("sharegpt", {"conversations": [{"from": "bot", "value": "x"}]}, ["unknown role 'bot'", "human, gpt"]),
        ("sharegpt", {"conversations": [U, A]}, ["conversations[0] must have 'from' and 'value'"]),
        ("sharegpt", {"conversations": [], "system": ["x"]}, ["'system' must be a string, got list"]),
        ("prompt-completion", {"prompt": "Hi", "completion": [A]}, ["both be strings or both be lists"]),
    ],
)
def test_bad_rows_say_why(shape, row, parts):
    fails(lambda: convert_to_messages(row, FORMATS[shape]), *parts)
