"""Tools and tool calls: every way of writing them, the errors, and calls that a model wrote."""

import datetime
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.source_rows import QUICK, fails

from sft_pipeline.data.tool_calls import (
    convert_function_call,
    convert_tool_calls,
    convert_tools,
    extract_tool_calls,
    remove_nulls,
)

FUNCTION = {"name": "find", "description": "冬瓜", "parameters": {"type": "object", "properties": {"a": {}}}}
TOOL = {"type": "function", "function": FUNCTION}
ARGUMENTS = {"code": "42", "count": 42, "none": None, "list": [1, "1"], "nested": {"a": {}}}
CALL = {"type": "function", "function": {"name": "find", "arguments": ARGUMENTS}}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=4), values, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    "value",
    [
        [TOOL],
        TOOL,
        [FUNCTION],
        FUNCTION,
        {"function": FUNCTION},
        json.dumps([TOOL]),
        json.dumps(FUNCTION),
        [json.dumps(TOOL)],
        json.dumps([json.dumps(FUNCTION)]),
    ],
)
def test_every_way_to_write_a_tool(value):
    assert convert_tools(value) == [TOOL]


def test_what_else_a_tool_has_is_kept():
    """Templates write the whole object."""
    tool = {**TOOL, "strict": True, "function": {**FUNCTION, "strict": None}}
    assert convert_tools([tool, FUNCTION]) == [tool, TOOL]


@pytest.mark.parametrize(
    "value",
    [
        [CALL],
        [{"function": CALL["function"]}],
        [CALL["function"]],
        [{"name": "find", "arguments": json.dumps(ARGUMENTS)}],
        json.dumps([CALL]),
        [json.dumps(CALL)],
        [{**CALL, "id": None, "index": 0}],
    ],
)
def test_every_way_to_write_a_call(value):
    assert convert_tool_calls(value, "x") == [CALL]


def test_ids_are_kept_and_missing_arguments_are_none():
    named = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": {}}}
    for function in ({"name": "find"}, {"name": "find", "arguments": None}, {"name": "find", "arguments": "{}"}):
        assert convert_tool_calls([{"id": "c1", "function": function}], "x") == [named]


def test_a_function_call_of_sharegpt_is_one_or_a_list():
    text = json.dumps(CALL["function"])
    assert convert_function_call(text, "x") == [CALL]
    assert convert_function_call(f"[{text}, {text}]", "x") == [CALL, CALL]


@QUICK
@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4))
def test_arguments_keep_every_value(arguments):
    for value in (arguments, json.dumps(arguments)):
        [call] = convert_tool_calls([{"name": "f", "arguments": value}], "x")
        assert json.dumps(call["function"]["arguments"]) == json.dumps(arguments)


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "convert, value, parts",
    [
        (convert_tools, "find", ["tools is not JSON (Expecting value"]),
        (convert_tools, DEEP, ["tools is not JSON (", "nested"]),
        (convert_tools, ["{"], ["tools[0] is not JSON (Expecting property name"]),
        (convert_tools, "NaN", ["tools is not JSON (NaN is not a JSON value)"]),
        (convert_tools, 3, ["tools[0] must be an object with a function, got int"]),
        (convert_tools, [TOOL, None], ["tools[1] must be an object with a function, got null"]),
        (convert_tools, [{"function": "find"}], ["tools[0] must be an object with a function, got dict"]),
        (convert_tools, [{"function": {"description": "x"}}], ["tools[0] has no name; add function.name"]),
        (convert_tools, [{"name": " "}], ["tools[0] has no name; add function.name"]),
        (convert_tools, [{"name": 3}], ["tools[0] has no name; add function.name"]),
        (convert_tools, [{**FUNCTION, "x": float("inf")}], ["tools[0] holds a value that JSON does not have (Out of"]),
        (convert_tools, [{"name": "\ud83d"}], ["tools[0] contains a lone surrogate"]),
        (convert_tools, [{**TOOL, "x": "\ud83d"}], ["tools[0] contains a lone surrogate"]),
        (convert_tool_calls, "f()", ["calls is not JSON (Expecting value"]),
        (convert_tool_calls, CALL, ["calls must be a list of tool calls, got dict"]),
        (convert_tool_calls, 3, ["calls must be a list of tool calls, got int"]),
        (convert_tool_calls, [None], ["calls[0] must be an object with a function, got null"]),
        (convert_tool_calls, [["x"]], ["calls[0] must be an object with a function, got list"]),
        (convert_tool_calls, ["x"], ["calls[0] is not JSON (Expecting value"]),
        (convert_tool_calls, [CALL, {"function": {"arguments": {}}}], ["calls[1] has no name; add function.name"]),
        (
            convert_tool_calls,
            [{"name": "f", "arguments": "{a: 1}"}],
            ["calls[0]: its arguments are not JSON (Expecting property name", "write an object, such as {}"],
        ),
        (
            convert_tool_calls,
            [{"name": "f", "arguments": '{"a": NaN}'}],
            ["calls[0]: its arguments are not JSON (NaN is not a JSON value); write an object"],
        ),
        (convert_tool_calls, [{"name": "f", "arguments": DEEP}], ["calls[0]: its arguments are not JSON", "nested"]),
        (
            convert_tool_calls,
            [{"name": "f", "arguments": [1]}],
            ["calls[0]: its arguments must be an object, got list"],
        ),
        (convert_tool_calls, [{"name": "f", "arguments": "3"}], ["calls[0]: its arguments must be an object, got int"]),
        (
            convert_tool_calls,
            [{"name": "f", "arguments": {"day": datetime.date(2020, 1, 1)}}],
            [
                "calls[0] holds a value that JSON does not have (Object of type date is not JSON serializable)",
                "as text",
            ],
        ),
        (convert_tool_calls, [{"name": "f", "arguments": {"\ud83d": 1}}], ["calls[0] contains a lone surrogate"]),
        (convert_tool_calls, [{"name": "\ud83d"}], ["calls[0] contains a lone surrogate"]),
        (convert_tool_calls, [{**CALL, "id": 3}], ["calls[0].id must be a string, got int"]),
        (convert_tool_calls, [{**CALL, "id": "\ud83d"}], ["calls[0] contains a lone surrogate"]),
        (convert_function_call, "[]", ["calls has no tool call"]),
        (convert_function_call, "[3]", ["calls[0] must be an object with a function, got int"]),
        (convert_function_call, None, ["calls[0] must be an object with a function, got null"]),
    ],
)
def test_errors_say_where(convert, value, parts):
    fails(lambda: convert(value) if convert is convert_tools else convert(value, "calls"), *parts)


def test_nulls_are_removed_at_any_depth():
    assert remove_nulls({"a": None, "b": [{"c": None, "d": 0}, None], "e": ""}) == (
        {"b": [{"d": 0}, None], "e": ""},
        True,
    )
    assert remove_nulls([{"a": [1]}]) == ([{"a": [1]}], False)
    assert remove_nulls(None) == (None, False)


# ---- calls that a model wrote


def call(name="find", **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    "text, content, calls",
    [
        # Qwen3, Hermes
        ('<tool_call>\n{"name": "find", "arguments": {"a": "1"}}\n</tool_call>', "", [call(a="1")]),
        (
            'Hm.\n<tool_call>\n{"name": "find", "arguments": {}}\n</tool_call>\n'
            '<tool_call>\n{"name": "b", "arguments": {}}\n</tool_call>',
            "Hm.",
            [call(), call("b")],
        ),
        # Llama 3.1
        ('{"name": "find", "parameters": {"a": [1]}}', "", [call(a=[1])]),
        # Mistral
        ('[TOOL_CALLS][{"name": "find", "arguments": {"a": 1}}]', "", [call(a=1)]),
        ('```json\n{"name": "find", "arguments": {}}\n```', "", [call()]),
        # SmolLM
        ('<|tool_call_start|>[{"name": "find", "arguments": {}}]<|tool_call_end|>', "", [call()]),
        ('{"name": "find", "arguments": "{\\"a\\": 1}"}', "", [call(a=1)]),
        ('{"name": "a", "arguments": {}} and {"name": "b", "arguments": {}}', "and", [call("a"), call("b")]),
        # No calls
        ("No call.", "No call.", []),
        ('{"name": "find"}', '{"name": "find"}', []),
        ('{"arguments": {}}', '{"arguments": {}}', []),
        ('[{"name": "find", "arguments": {}}, 3]', "[, 3]", [call()]),
        ("f(x) {not json} [1, 2] []", "f(x) {not json} [1, 2] []", []),
        ('{"name": "find", "arguments": [1]}', '{"name": "find", "arguments": [1]}', []),
        ('{"name": "find", "arguments": {"a": 1}', '{"name": "find", "arguments": {"a": 1}', []),
        ("[" * 20_000, "[" * 20_000, []),
        ("", "", []),
    ],
)
def test_calls_of_a_model(text, content, calls):
    rest, found = extract_tool_calls(text)
    assert (rest.strip(), found) == (content, calls)


def test_an_argument_that_is_a_call_is_no_call_of_its_own():
    inner = {"name": "inner", "arguments": {}}
    text = json.dumps({"name": "outer", "arguments": {"call": inner, "list": [inner]}})
    assert extract_tool_calls(text) == ("", [call("outer", call=inner, list=[inner])])


@QUICK
@given(st.text(max_size=8), st.dictionaries(st.text(max_size=4), JSON, max_size=3))
def test_what_is_written_is_extracted(content, arguments):
    """Whatever a call has as arguments, and whatever text without JSON is before it."""
    content = content.translate(dict.fromkeys(map(ord, "{[<`>]}"), "x")).strip()
    written = json.dumps({"name": "find", "arguments": arguments}, ensure_ascii=False)
    rest, calls = extract_tool_calls(f"{content}\n<tool_call>\n{written}\n</tool_call>")
    assert rest.strip() == content
    assert json.dumps(calls) == json.dumps([{"type": "function", "function": {"name": "find", "arguments": arguments}}])
