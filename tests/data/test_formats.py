"""Row formats: columns to conversations, what nothing reads, and what is wrong with a row."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.source_rows import EXPECTED, QUICK, ROWS, TEXT, fails, talk

from sft_pipeline.data.formats import (
    FORMATS,
    convert_row,
    convert_to_prompt,
    detect_format,
    drop_ambiguous_nulls,
    list_unread_names,
)


def convert(row, name="messages"):
    return convert_row(row, FORMATS[name])


def convert_turns(*turns):
    """Convert a row of messages; returns them."""
    return convert({"messages": list(turns)})["messages"]


@pytest.mark.parametrize(
    "columns, name",
    [
        (["instruction", "input", "output", "text"], "alpaca"),
        (["output", "instruction"], "alpaca"),
        (["id", "messages"], "messages"),
        (["prompt", "prompt_id", "messages"], "messages"),
        (["conversations", "system"], "sharegpt"),
        (["completion", "prompt"], "prompt-completion"),
        (["text", "label"], "text"),
    ],
)
def test_detect_format(columns, name):
    assert detect_format(columns).name == name


def test_unknown_columns_name_file_columns_and_shapes():
    known = ["alpaca (instruction, output)", "messages (messages)", "sharegpt (conversations)", "text (text)"]
    fails(lambda: detect_format(["words", "label"], "x.csv"), "x.csv", "words, label", "(prompt, completion)", *known)
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
        ("messages", {"messages": [{**message, "name": "x"} for message in messages]}),
        ("sharegpt", {"conversations": spoken}),
        ("sharegpt", {"conversations": spoken[len(start) :], "system": system}),
    ]
    for name, row in rows:
        assert detect_format(row).name == name
        assert convert(row, name) == {"messages": messages}
    untrained = [{**message, **({"train": False} if message["role"] == "assistant" else {})} for message in messages]
    row = {"prompt": messages[:-1], "completion": messages[-1:]}
    assert convert(row, "prompt-completion") == {"messages": [*untrained[:-1], messages[-1]]}
    flagged = [{**message, **({"weight": 1} if message["role"] == "assistant" else {})} for message in messages]
    assert convert({**row, "prompt": flagged[:-1]}, "prompt-completion") == {"messages": messages}


def test_alpaca_joins_input_by_a_newline_and_takes_missing_cells_as_empty():
    assert [convert(row, "alpaca") for row in ROWS] == EXPECTED
    bare = {"instruction": "Hi", "input": None, "output": "Hello", "system": " ", "history": None}
    assert convert(bare, "alpaca") == {"messages": talk()}
    assert convert({"instruction": "", "input": "Hi", "output": "Hello"}, "alpaca") == {"messages": talk()}


def test_prompt_completion_as_text_keeps_the_text():
    row = {"prompt": "Hi", "completion": " Hello"}
    assert convert(row, "prompt-completion") == {"messages": talk(answer=" Hello")}


def test_a_text_is_kept_as_it_is():
    assert convert({"text": " Once\n"}, "text") == {"text": " Once\n"}


# ---- tools, calls and reasoning

U, A, S = ({"role": role, "content": role[0]} for role in ("user", "assistant", "system"))
D, T = ({"role": role, "content": role[0]} for role in ("developer", "tool"))
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": {"code": "42"}}}


def test_a_conversation_with_tools_reasoning_and_a_call():
    called = {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [CALL]}
    result = {"role": "tool", "content": "", "tool_call_id": "c1", "name": "find", "tool_calls": None}
    row = {"messages": [U, called, result, A], "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": True}}
    plain_result = {key: value for key, value in result.items() if key != "tool_calls"}
    assert convert(row) == {
        "messages": [U, {**called, "content": ""}, plain_result, A],
        "tools": [TOOL],
        "chat_template_kwargs": {"enable_thinking": True},
    }


def test_tools_and_template_arguments_as_json_text():
    row = {"messages": [U, A], "tools": '[{"name": "find"}]', "chat_template_kwargs": '{"x": null}'}
    tool = {"type": "function", "function": {"name": "find"}}
    assert convert(row) == {"messages": [U, A], "tools": [tool], "chat_template_kwargs": {"x": None}}
    empty = {"messages": [U, A], "tools": [], "chat_template_kwargs": None}
    assert convert(empty) == convert({**empty, "tools": "", "chat_template_kwargs": {}}) == {"messages": [U, A]}


@pytest.mark.parametrize("missing", [{}, {"content": None}, {"content": ""}])
def test_the_content_beside_calls_may_be_missing(missing):
    expected = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert convert_turns(U, {"role": "assistant", "tool_calls": [CALL], **missing}) == [U, expected]


def test_thinking_is_reasoning():
    expected = [U, {**A, "reasoning_content": "Hm."}]
    assert convert_turns(U, {**A, "thinking": "Hm."}) == expected
    assert convert_turns(U, {**A, "thinking": "Hm.", "reasoning_content": "Hm."}) == expected
    assert convert_turns(U, {**A, "thinking": " \n", "reasoning_content": None}) == [U, A]
    assert convert_turns({**U, "thinking": "Hm."}, A) == [U, A]  # counted as not read


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": " b", "image_url": None}]
    assert convert_turns({"role": "user", "content": parts}, A) == [{"role": "user", "content": "a b"}, A]


def test_sharegpt_calls_observations_and_tools():
    turns = [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": '{"name": "find", "arguments": {"code": "42"}}'},
        {"from": "observation", "value": "[1]"},
        {"from": "function_call", "value": '[{"name": "a", "arguments": {}}, {"name": "b", "arguments": "{}"}]'},
        {"from": "tool", "value": ""},
        {"from": "gpt", "value": "Hello", "weight": 1},
    ]
    row = {"conversations": turns, "system": "S", "tools": '[{"name": "find"}]'}
    calls = [
        {"type": "function", "function": {"name": name, "arguments": arguments}}
        for name, arguments in (("find", {"code": "42"}), ("a", {}), ("b", {}))
    ]
    assert convert(row, "sharegpt") == {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "", "tool_calls": calls[:1]},
            {"role": "tool", "content": "[1]"},
            {"role": "assistant", "content": "", "tool_calls": calls[1:]},
            {"role": "tool", "content": ""},
            {"role": "assistant", "content": "Hello"},
        ],
        "tools": [{"type": "function", "function": {"name": "find"}}],
    }


def test_any_order_that_ends_with_an_answer():
    """Which orders there may be is up to the chat template."""
    for turns in ([U, U, A], [S, D, U, A, A], [U, A, S, U, A], [U, T, T, A], [S, A], [T, A]):
        assert convert_turns(*turns) == turns


# ---- flags


@pytest.mark.parametrize("flags", [{"train": False}, {"weight": 0}, {"weight": 0.0}, {"train": False, "weight": 0}])
def test_an_answer_that_is_not_trained(flags):
    assert convert_turns(U, {**A, **flags}, U, A) == [U, {**A, "train": False}, U, A]
    turns = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a", **flags}]
    assert convert({"conversations": turns}, "sharegpt") == {"messages": [U, {**A, "train": False}]}


@pytest.mark.parametrize("flags", [{"train": True}, {"weight": 1}, {"weight": 1.0, "train": None}, {"weight": None}])
def test_an_answer_that_is_trained_has_no_flag(flags):
    assert convert_turns(U, {**A, **flags}) == [U, A]


def test_a_flag_that_excludes_what_is_never_trained():
    """Datasets flag every message; a user's is excluded anyway."""
    assert convert_turns({**S, "weight": 0}, {**U, "train": False}, {**T, "weight": 0}, A) == [S, U, T, A]


# ---- prompts


def test_prompts_and_their_references():
    prompt = {"messages": [U]}
    assert convert_to_prompt({"messages": [U, A]}, FORMATS["messages"]) == (prompt, A)
    assert convert_to_prompt({"messages": [U]}, FORMATS["messages"]) == (prompt, None)
    assert convert_to_prompt({"messages": [U, {**A, "content": " "}]}, FORMATS["messages"]) == (prompt, None)
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    row = {"messages": [U, called], "tools": [TOOL]}
    assert convert_to_prompt(row, FORMATS["messages"]) == (
        {"messages": [U], "tools": [TOOL]},
        {**called, "content": ""},
    )
    assert convert_to_prompt({"prompt": "u"}, FORMATS["prompt-completion"]) == (prompt, None)
    assert convert_to_prompt({"prompt": [U, A, U]}, FORMATS["prompt-completion"])[0]["messages"][0] == U


@pytest.mark.parametrize(
    "name, row, part",
    [
        ("text", {"text": "Once"}, "a text has no turns and no prompt to answer; give rows of messages"),
        ("messages", {"messages": [A]}, "the conversation has no message before its answer"),
        ("messages", {"messages": []}, "the conversation has no message before its answer"),
        ("messages", {"messages": [{**U, "content": ""}]}, "the content of messages[0] (user) is empty"),
        ("alpaca", {"output": "x"}, "missing 'instruction'"),
    ],
)
def test_prompts_that_cannot_be_answered(name, row, part):
    fails(lambda: convert_to_prompt(row, FORMATS[name]), part)


# ---- what nothing reads, and what Arrow cannot tell


@pytest.mark.parametrize(
    "turn, names",
    [
        ({**U, "name": "x", "tool_call_id": "c", "thinking": "Hm."}, ["name", "tool_call_id", "thinking"]),
        ({**A, "name": "x", "reasoning_content": "Hm.", "weight": 0, "refusal": None}, ["name"]),
        ({**T, "name": "x", "tool_call_id": "c", "is_error": True}, ["is_error"]),
        ({"role": "assistant", "tool_calls": [{**CALL, "index": 0}]}, ["tool_calls[].index"]),
        ({**A, "tool_calls": [{"name": "f", "arguments": {}, "extra": 1}, 3]}, ["tool_calls[].extra"]),
        (
            {**A, "tool_calls": [{"function": {"name": "f", "arguments": {}, "strict": True, "x": None}, "name": "y"}]},
            ["tool_calls[].name", "tool_calls[].function.strict"],
        ),
        ({**A, "tool_calls": []}, []),
    ],
)
def test_keys_that_nothing_reads(turn, names):
    row = {"messages": [turn], "id": 1, "empty": None}
    assert list_unread_names(row, FORMATS["messages"]) == ["id", *(f"messages[].{name}" for name in names)]


def test_keys_of_the_other_formats_that_nothing_reads():
    turns = [{"from": "gpt", "value": "x", "weight": 0, "train": True, "name": "n"}]
    row = {"conversations": turns, "tools": [{"x": 1}], "chat_template_kwargs": {"y": 1}}
    assert list_unread_names(row, FORMATS["sharegpt"]) == ["conversations[].name"]
    assert list_unread_names({"text": "x", "meta": 1}, FORMATS["text"]) == ["meta"]
    assert list_unread_names({"instruction": "x", "output": "x", "tools": []}, FORMATS["alpaca"]) == ["tools"]
    assert list_unread_names([1], FORMATS["text"]) == []


def test_nulls_in_structs_are_dropped_and_named():
    call = {"id": None, "function": {"name": "f", "arguments": {"a": "42", "b": None, "c": [None, {"d": None}]}}}
    turn = {**A, "tool_calls": [call], "reasoning_content": None}
    tools = [{"function": {"name": "f", "strict": None}}]
    row, names = drop_ambiguous_nulls({"messages": [U, turn], "tools": tools, "id": None})
    assert names == ["nulls in messages[].tool_calls[].arguments", "nulls in tools"]
    assert row["messages"][1]["tool_calls"] == [{"function": {"name": "f", "arguments": {"a": "42", "c": [None, {}]}}}]
    assert row["tools"] == [{"function": {"name": "f"}}]
    assert row["messages"][1]["reasoning_content"] is None  # a key of the message itself, where null is absent


@pytest.mark.parametrize("calls", ["[1]", [{"function": "f"}], ["x"], [{"name": "f", "arguments": None}], None, []])
def test_no_null_in_the_arguments_is_named(calls):
    row = {"messages": [U, {**A, "tool_calls": calls}, "x"], "tools": "[]", "history": [["a", "b"]]}
    assert drop_ambiguous_nulls(row)[1] == []
    assert drop_ambiguous_nulls([1]) == ([1], [])


# ---- bad rows


def turns_with(**keys):
    """A row of messages whose answer has other keys."""
    return {"messages": [U, {**A, **keys}]}


IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}


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
        ("messages", {"messages": [U, {"role": "assistant", "tool_calls": []}]}, ["messages[1] must have"]),
        (
            "messages",
            {"messages": [U, {"role": "function", "content": ""}]},
            ["messages[1]: unknown role 'function'; use one of: system, developer, user, assistant, tool"],
        ),
        ("messages", {"messages": [U, {"role": None, "content": "x"}]}, ["unknown role None"]),
        (
            "messages",
            {"messages": [U, {"role": "assistant", "content": None}]},
            ["messages[1] (assistant) must be a string, got null"],
        ),
        ("messages", {"messages": [{"role": "tool", "content": {}}, A]}, ["(tool) must be a string, got dict"]),
        ("messages", {"messages": []}, ["no answer: the conversation has no assistant message"]),
        ("messages", {"messages": [S]}, ["no answer: the conversation has no assistant message"]),
        (
            "messages",
            {"messages": [{"role": "system", "content": ""}, U, A]},
            ["the content of messages[0] (system) is empty"],
        ),
        ("messages", {"messages": [U, {**A, "content": " "}, U, A]}, ["no answer: the content of messages[1]"]),
        ("messages", {"messages": [U]}, ["no answer: the conversation has no assistant message"]),
        (
            "messages",
            {"messages": [U, A, T]},
            ["no answer: the last message has role tool; add an assistant message, or remove this one"],
        ),
        ("messages", {"messages": [A]}, ["the conversation has no message before its answer"]),
        # Parts
        (
            "messages",
            {"messages": [{"role": "user", "content": [IMAGE]}, A]},
            ["messages[0] has a part of type 'image_url'; only parts of type 'text' can be trained"],
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}, A]},
            ["messages[0] has a part of type 'input_audio'"],
        ),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "text"}]}, A]}, ["has a part without text"]),
        ("messages", {"messages": [{"role": "user", "content": ["x"]}, A]}, ["has a part without text"]),
        ("messages", turns_with(content=[]), ["no answer: the content of messages[1] (assistant) is empty"]),
        # Reasoning, calls, tools
        ("messages", turns_with(thinking=["x"]), ["'thinking' must be a string, got list"]),
        (
            "messages",
            turns_with(thinking="a", reasoning_content="b"),
            ["messages[1] has different texts as reasoning_content and thinking; keep one of them"],
        ),
        (
            "messages",
            turns_with(thinking="\ud83d"),
            ["the reasoning of messages[1] contains a lone surrogate"],
        ),
        (
            "messages",
            {"messages": [{**U, "tool_calls": [CALL]}, A]},
            ["messages[0]: a user message has tool_calls; only an assistant calls tools"],
        ),
        ("messages", turns_with(tool_calls=[{"function": {}}]), ["messages[1].tool_calls[0] has no name"]),
        ("messages", {"messages": [U, {**T, "name": 3}, A]}, ["'name' must be a string, got int"]),
        ("messages", {"messages": [U, {**T, "tool_call_id": []}, A]}, ["'tool_call_id' must be a string, got list"]),
        ("messages", {"messages": [U, {**T, "name": "\ud83d"}, A]}, ["'name' of messages[1]", "lone surrogate"]),
        ("messages", {"messages": [U, A], "tools": "find"}, ["tools is not JSON"]),
        ("messages", {"messages": [U, A], "tools": [{"function": {}}]}, ["tools[0] has no name; add function.name"]),
        (
            "messages",
            {"messages": [U, A], "chat_template_kwargs": "{"},
            ["'chat_template_kwargs' is not JSON (Expecting property name"],
        ),
        (
            "messages",
            {"messages": [U, A], "chat_template_kwargs": {"x": float("nan")}},
            ["'chat_template_kwargs' is not JSON (Out of range float values"],
        ),
        (
            "messages",
            {"messages": [U, A], "chat_template_kwargs": [1]},
            ["'chat_template_kwargs' must be an object, got list"],
        ),
        (
            "messages",
            {"messages": [U, A], "chat_template_kwargs": {"x": "\ud83d"}},
            ["'chat_template_kwargs' contains a lone surrogate"],
        ),
        # Flags
        ("messages", turns_with(train=0), ["messages[1]: train is 0; it must be true or false"]),
        ("messages", turns_with(train="false"), ["messages[1]: train is 'false'; it must be true or false"]),
        (
            "messages",
            turns_with(weight=0.5),
            ["messages[1]: weight is 0.5; it must be 0 or 1: shares of a message's loss are not supported"],
        ),
        ("messages", turns_with(weight=True), ["messages[1]: weight is True; it must be 0 or 1"]),
        ("messages", turns_with(weight=2), ["messages[1]: weight is 2; it must be 0 or 1"]),
        ("messages", turns_with(weight="0"), ["messages[1]: weight is '0'; it must be 0 or 1"]),
        ("messages", turns_with(weight=float("nan")), ["messages[1]: weight is nan; it must be 0 or 1"]),
        (
            "messages",
            turns_with(weight=0, train=True),
            ["messages[1]: train and weight contradict each other; keep one of them"],
        ),
        (
            "messages",
            {"messages": [{**U, "weight": 1}, A]},
            ["messages[0]: a user message cannot be trained; remove weight"],
        ),
        ("messages", {"messages": [U, {**T, "train": True}, A]}, ["messages[1]: a tool message cannot be trained"]),
        # Other formats
        ("sharegpt", {"conversations": [{"from": "bot", "value": "x"}]}, ["unknown role 'bot'", "human, gpt"]),
        ("sharegpt", {"conversations": [U, A]}, ["conversations[0] must have 'from' and 'value'"]),
        ("sharegpt", {"conversations": [], "system": ["x"]}, ["'system' must be a string, got list"]),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "find()"}]},
            ["conversations[1] is not JSON (Expecting value"],
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "[]"}]},
            ["conversations[1] has no tool call"],
        ),
        ("prompt-completion", {"prompt": "Hi", "completion": [A]}, ["both be strings or both be lists"]),
        ("prompt-completion", {"prompt": [U], "completion": [{"role": "x"}]}, ["completion[0] must have 'role'"]),
        ("text", {"text": " \n"}, ["'text' is empty"]),
        ("text", {"text": 3}, ["'text' must be a string, got int"]),
        ("text", {"text": "\ud83d"}, ["'text' contains a lone surrogate"]),
        ("text", {"words": "x"}, ["missing 'text', which text rows require; the row has words"]),
    ],
)
def test_bad_rows_say_why(shape, row, parts):
    fails(lambda: convert_row(row, FORMATS[shape]), *parts)
