"""Convert tools and tool calls of rows to OpenAI's objects, which transformers' chat templates read.

    {"type": "function", "function": {"name": "get_weather", "description": "...", "parameters": {...}}}     a tool
    {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}} a call

Rows may leave out the outer object, and may hold any of these as JSON text. In error messages `location` is where the
value is in the row, such as `messages[2].tool_calls[0]`.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from sft_pipeline.utils.errors import SFTError

TOOL_KEYS, CALL_KEYS = ("type", "function"), ("id", "type", "function")
FUNCTION_KEYS = ("name", "arguments")


def describe_type(value: Any) -> str:
    """Return the type name of a value for an error message: "null" for None."""
    return "null" if value is None else type(value).__name__


def convert_tools(value: Any, location: str = "tools") -> list[dict[str, Any]]:
    """Convert tools: a list of objects or JSON texts, one of them alone, or JSON text of the whole list."""
    value = _parse_json_text(value, location)
    tools = []
    for index, tool in enumerate(value if isinstance(value, list) else [value]):
        tool_location = f"{location}[{index}]"
        tool = _parse_json_text(tool, tool_location)
        tool = {"type": "function", "function": tool} if isinstance(tool, Mapping) and "name" in tool else tool
        function = _get_function(tool, tool_location)
        tools.append({"type": "function", **tool, "function": dict(function)})
        _check_json(tools[-1], tool_location)
    return tools


def convert_tool_calls(value: Any, location: str) -> list[dict[str, Any]]:
    """Convert the calls of an assistant message; their arguments become objects."""
    calls = _parse_json_text(value, location)
    if not isinstance(calls, list):
        raise SFTError(f"{location} must be a list of tool calls, got {describe_type(calls)}")
    return [_convert_call(call, f"{location}[{index}]") for index, call in enumerate(calls)]


def convert_function_call(value: Any, location: str) -> list[dict[str, Any]]:
    """Convert the value of ShareGPT's `function_call`: JSON text of a call or of a list of calls."""
    calls = _parse_json_text(value, location)
    if calls == []:
        raise SFTError(f"{location} has no tool call; add one or remove the message")
    return convert_tool_calls(calls if isinstance(calls, list) else [calls], location)


def _convert_call(call: Any, location: str) -> dict[str, Any]:
    call = _parse_json_text(call, location)
    call = {"function": call} if isinstance(call, Mapping) and "name" in call else call
    function = _get_function(call, location)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            reason = _describe_error(error)
            raise SFTError(
                f"{location}: its arguments are not JSON ({reason}); write an object, such as {{}}"
            ) from error
    if arguments is None:  # a call without arguments
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise SFTError(f"{location}: its arguments must be an object, got {describe_type(arguments)}")
    identity = {} if call.get("id") is None else {"id": _check_text(call["id"], f"{location}.id")}
    call = {**identity, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}
    _check_json(call, location)
    return call


def _get_function(value: Any, location: str) -> Mapping[str, Any]:
    """Return the object `function` of a tool or a call, which has a name."""
    function = value.get("function") if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping):
        raise SFTError(f"{location} must be an object with a function, got {describe_type(value)}")
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise SFTError(f"{location} has no name; add function.name")
    return function


def _parse_json_text(value: Any, location: str) -> Any:
    """Return the value that a JSON text stands for; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise SFTError(f"{location} is not JSON ({_describe_error(error)})") from error


def _describe_error(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _check_json(value: Any, location: str) -> None:
    """Raise SFTError unless the value can be kept as JSON: dates of a Parquet file cannot, nor can NaN."""
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise SFTError(f"{location} contains a lone surrogate, which is not valid Unicode text; remove it") from None
    except (TypeError, ValueError, RecursionError) as error:
        reason = _describe_error(error)
        raise SFTError(f"{location} holds a value that JSON does not have ({reason}); write it as text") from error


def _check_text(value: Any, location: str) -> str:
    if not isinstance(value, str):
        raise SFTError(f"{location} must be a string, got {describe_type(value)}")
    return value


def list_unread_call_keys(calls: Any) -> list[str]:
    """List the keys of calls that `convert_tool_calls` does not read."""
    names = []
    for call in calls if isinstance(calls, list) else []:
        if isinstance(call, Mapping):
            function = call.get("function")
            keys = CALL_KEYS if isinstance(function, Mapping) else (*CALL_KEYS, *FUNCTION_KEYS)
            names += [str(key) for key, value in call.items() if key not in keys and value is not None]
            if isinstance(function, Mapping):
                names += [
                    f"function.{key}" for key in function if key not in FUNCTION_KEYS and function[key] is not None
                ]
    return names


def remove_nulls(value: Any) -> tuple[Any, bool]:
    """Remove the keys of objects whose value is null, at any depth; also return whether there were any.

    In the structs of Parquet and Arrow an absent key is a null.
    """
    if isinstance(value, Mapping):
        items = {key: remove_nulls(item) for key, item in value.items() if item is not None}
        removed = len(items) < len(value) or any(changed for _, changed in items.values())
        return {key: item for key, (item, _) in items.items()}, removed
    if isinstance(value, list):
        pairs = [remove_nulls(item) for item in value]
        return [item for item, _ in pairs], any(changed for _, changed in pairs)
    return value, False


# What models write around a call: tags such as <tool_call>, the name of a token in brackets, and code fences.
OPENING_MARK = re.compile(r"(<[^<>\s]+>|\[[A-Z_]+\]|```\w*)\s*$")
CLOSING_MARK = re.compile(r"\s*(</[^<>\s]+>|<[|｜][^<>\s]*end[|｜]>|\[/[A-Z_]+\]|```)")


def extract_tool_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """Extract the tool calls that a model wrote as JSON: objects with a name and arguments (or parameters).

    Returns the text without them, and the calls. Calls in other notations, such as XML, stay in the text.
    """
    decoder, calls, content, position = json.JSONDecoder(), [], "", 0
    for match in re.finditer(r"[{\[]", text):
        if match.start() < position:
            continue
        try:
            value, end = decoder.raw_decode(text, match.start())
            objects = [_read_call(item) for item in (value if isinstance(value, list) else [value])]
        except (ValueError, RecursionError, SFTError):
            continue
        if not objects:
            continue
        calls += objects
        content += OPENING_MARK.sub("", text[position : match.start()])
        closing = CLOSING_MARK.match(text, end)
        position = closing.end() if closing else end
    return content + text[position:], calls


def _read_call(value: Any) -> dict[str, Any]:
    """Convert an object that a model wrote to a call; raises SFTError if it is none."""
    if not isinstance(value, Mapping) or not ("arguments" in value or "parameters" in value):
        raise SFTError("not a call")
    return _convert_call({"name": value.get("name"), "arguments": value.get("arguments", value.get("parameters"))}, "")
