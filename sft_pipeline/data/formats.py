"""Convert rows of five known formats to conversations: pure functions on dictionaries, no files.

| format | columns | one row |
| --- | --- | --- |
| messages | `messages` | list of {role, content}, see below |
| sharegpt | `conversations`, optional `system` | list of {from, value}, see below |
| alpaca | `instruction`, `output`, optional `input`, `system`, `history` | history is a list of [user, assistant] |
| prompt-completion | `prompt`, `completion` | both strings, or both lists of {role, content} |
| text | `text` | a text without turns |

All but alpaca and text may have `tools` and `chat_template_kwargs`, as objects or JSON text.

A message has the role system, developer, user, assistant or tool, and a `content` of text or text parts. An
assistant's may have `reasoning_content` (or `thinking`) and `tool_calls`, with a content that is null or missing; a
tool's `tool_call_id` and `name`. `train: false` or `weight: 0` excludes an assistant's message from training. In
sharegpt, human is the user, gpt the assistant, function_call an assistant's tool calls as JSON text, observation a
tool.

Every conversation ends with an assistant's message; which other orders there may be is up to the chat template. A bad
row raises SFTError with the reason. Alpaca's input is appended to the instruction after a newline, as in LLaMA-Factory
(Zheng et al. 2024); with an empty input the instruction is used alone. The answers within `prompt` are not trained,
unless they have `train: true` or `weight: 1`.

Other columns, and other keys of a message, are not read: `list_unread_names`.

In error messages `messages[i]` is message i of the converted conversation, counted from 0, system message included.
"""

import json
import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sft_pipeline.data.messages import Conversation, Message, split_answer
from sft_pipeline.data.tool_calls import (
    convert_function_call,
    convert_tool_calls,
    convert_tools,
    describe_type,
    list_unread_call_keys,
    remove_nulls,
)
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.sanitize import format_line

SourceRow = Mapping[str, Any]

ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool", **ROLES}
REASONING_KEYS = ("reasoning_content", "thinking")
FLAGS = ("train", "weight")
MESSAGE_KEYS = ("role", "content", "tool_calls", "tool_call_id", "name", *REASONING_KEYS, *FLAGS)
SHAREGPT_KEYS = ("from", "value", *FLAGS)
OBJECT_COLUMNS = ("tools", "chat_template_kwargs")


@dataclass(frozen=True)
class RowFormat:
    """A row format: its name, its columns, and the function that converts a row to a conversation."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[SourceRow], Conversation]
    answer_column: str | None = None  # holds the answer alone; a row that is only a prompt may lack it
    message_keys: tuple[str, ...] = MESSAGE_KEYS  # of a message in a column that holds a list of them

    def select_columns(self, columns: Collection[str]) -> list[str]:
        """Return those of `columns` that this format reads, in the order of `columns`."""
        return [column for column in columns if column in self.required + self.optional]

    def get_required_columns(self, require_answer: bool) -> list[str]:
        """Return the columns that a row must have, with or without the answer's column."""
        return [column for column in self.required if require_answer or column != self.answer_column]


def detect_format(columns: Collection[str], name: str = "the data", require_answer: bool = True) -> RowFormat:
    """Return the format that matches `columns`; if several match, the first one in FORMATS.

    With `require_answer=False` the rows are prompts, whose answer column may be missing.

    Raises SFTError, naming the file (`name`), its columns and the known formats, if none matches.
    """
    for candidate in FORMATS.values():
        if set(candidate.get_required_columns(require_answer)) <= set(columns):
            return candidate
    known_formats = "; ".join(
        f"{row_format.name} ({', '.join(row_format.get_required_columns(require_answer))})"
        for row_format in FORMATS.values()
    )
    column_names = ", ".join(map(str, columns)) or "none"
    raise SFTError(f"{name}: its columns ({column_names}) match no row format; rename them to one of: {known_formats}")


def convert_row(row: Any, row_format: RowFormat) -> Conversation:
    """Convert a row to a conversation. Raises SFTError with the reason only: the caller knows the file and line."""
    conversation = _convert_row(row, row_format, require_answer=True)
    if "messages" in conversation:
        _check_messages(conversation["messages"])
    return conversation


def convert_to_prompt(row: Any, row_format: RowFormat) -> tuple[Conversation, Message | None]:
    """Convert a row to (prompt, reference): a conversation without its last answer, and that answer.

    The reference is None if the row has no answer or a blank one. Raises SFTError with the reason only.
    """
    prompt, reference = _convert_row(row, row_format, require_answer=False), None
    if "text" in prompt:
        raise SFTError("a text has no turns and no prompt to answer; give rows of messages")
    if prompt["messages"] and prompt["messages"][-1]["role"] == "assistant":
        prompt, answer = split_answer(prompt)
        reference = None if _is_blank(answer) else answer
    # A placeholder for a missing answer, so that the same checks apply.
    _check_messages([*prompt["messages"], reference or {"role": "assistant", "content": "to come"}])
    return prompt, reference


def drop_ambiguous_nulls(row: Any) -> tuple[Any, list[str]]:
    """Remove the nulls within the objects of a row that Arrow has read, where null and absent are the same.

    Also returns what they were removed from, as names for the log: "nulls in tools".
    """
    if not isinstance(row, Mapping):
        return row, []
    row, names = dict(row), []
    for column, value in row.items():
        if column in OBJECT_COLUMNS:
            row[column], removed = remove_nulls(value)
            names += [f"nulls in {column}"] * removed
        elif isinstance(value, list):
            row[column], removed = _drop_call_nulls(value)
            names += [f"nulls in {column}[].tool_calls[].arguments"] * removed
    return row, names


def _drop_call_nulls(turns: list[Any]) -> tuple[list[Any], bool]:
    """Remove the nulls within tool calls; also return whether any was within their arguments."""
    cleaned, any_removed = [], False
    for turn in turns:
        calls = turn.get("tool_calls") if isinstance(turn, Mapping) else None
        if calls:
            turn = {**turn, "tool_calls": remove_nulls(calls)[0]}
            functions = [call.get("function") or call for call in calls if isinstance(call, Mapping)]
            arguments = [function.get("arguments") for function in functions if isinstance(function, Mapping)]
            any_removed |= remove_nulls(arguments)[1]
        cleaned.append(turn)
    return cleaned, any_removed


def list_unread_names(row: Any, row_format: RowFormat) -> list[str]:
    """List what a row holds and `row_format` does not read, each name once: "id", "messages[].index".

    Null values are left out: Arrow fills the keys that a row lacks with them.
    """
    if not isinstance(row, Mapping):
        return []
    read = row_format.required + row_format.optional
    names = [str(column) for column, value in row.items() if column not in read and value is not None]
    for column in read:
        turns = row.get(column)
        if isinstance(turns, list) and column not in OBJECT_COLUMNS:
            for turn in turns:
                # Most have two keys, which are read.
                if isinstance(turn, Mapping) and (len(turn) > 2 or "tool_calls" in turn):
                    names += [f"{column}[].{key}" for key in _list_unread_keys(turn, row_format)]
    return list(dict.fromkeys(map(format_line, names))) if names else names


def _list_unread_keys(turn: SourceRow, row_format: RowFormat) -> list[str]:
    unread = [str(key) for key in turn if key not in row_format.message_keys and turn[key] is not None]
    if turn.get("tool_calls"):
        unread += [f"tool_calls[].{key}" for key in list_unread_call_keys(turn["tool_calls"])]
    for key, role in (("name", "tool"), ("tool_call_id", "tool"), *((key, "assistant") for key in REASONING_KEYS)):
        if turn.get(key) and key in row_format.message_keys and turn.get("role") != role:
            unread.append(key)
    return unread


def _convert_row(row: Any, row_format: RowFormat, require_answer: bool) -> Conversation:
    if not isinstance(row, Mapping):
        raise SFTError(f"expected an object with columns, got {describe_type(row)}")
    for column in row_format.get_required_columns(require_answer):
        if row.get(column) is None:
            present = ", ".join(str(key) for key, value in row.items() if value is not None) or "no column"
            raise SFTError(f"missing {column!r}, which {row_format.name} rows require; the row has {present}")
    return row_format.convert(row)


def _convert_alpaca(row: SourceRow) -> Conversation:
    question = "\n".join(text for text in (_get_text(row, "instruction"), _get_text(row, "input")) if text)
    turns = [turn for pair in _get_history(row) for turn in pair] + [question, _get_text(row, "output")]
    roles = ("user", "assistant") * (len(turns) // 2)
    messages: list[Message] = [{"role": role, "content": text} for role, text in zip(roles, turns)]
    return {"messages": _get_system_message(row) + messages}


def _get_history(row: SourceRow) -> list[list[str]]:
    history = row.get("history") or []
    if not (isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)):
        raise SFTError("'history' must be a list of [user, assistant] pairs")
    return history


def _convert_messages(row: SourceRow) -> Conversation:
    return _build_conversation(row, _convert_turns(row, "messages"))


def _convert_sharegpt(row: SourceRow) -> Conversation:
    turns = _get_turns(row, "conversations")
    messages = [_convert_sharegpt_turn(turn, f"conversations[{index}]") for index, turn in enumerate(turns)]
    return _build_conversation(row, _get_system_message(row) + messages)


def _convert_prompt_completion(row: SourceRow) -> Conversation:
    prompt, completion = row["prompt"], row.get("completion")
    if completion is None:  # a prompt alone
        completion = "" if isinstance(prompt, str) else []
    if isinstance(prompt, str) and isinstance(completion, str):
        messages: list[Message] = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    elif isinstance(prompt, list) and isinstance(completion, list):
        messages = _convert_turns(row, "prompt")
        for message, turn in zip(messages, prompt):
            if message["role"] == "assistant" and not any(turn.get(flag) for flag in FLAGS):
                message["train"] = False
        messages += _convert_turns({"completion": completion}, "completion")
    else:
        raise SFTError("'prompt' and 'completion' must both be strings or both be lists of messages")
    return _build_conversation(row, messages)


def _convert_text(row: SourceRow) -> Conversation:
    text = _get_text(row, "text")
    if not text.strip():
        raise SFTError("'text' is empty")
    _check_unicode(text, "'text'")
    return {"text": text}


def _build_conversation(row: SourceRow, messages: list[Message]) -> Conversation:
    """Add the tools and the template arguments of the row to its messages."""
    conversation: Conversation = {"messages": messages}
    if row.get("tools"):
        conversation["tools"] = convert_tools(row["tools"])
    if kwargs := row.get("chat_template_kwargs"):
        conversation["chat_template_kwargs"] = _convert_template_kwargs(kwargs)
    return conversation


def _convert_template_kwargs(kwargs: Any) -> dict[str, Any]:
    try:
        kwargs = json.loads(kwargs) if isinstance(kwargs, str) else kwargs
        text = json.dumps(kwargs, allow_nan=False, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise SFTError(f"'chat_template_kwargs' is not JSON ({reason})") from error
    if not isinstance(kwargs, Mapping):
        raise SFTError(f"'chat_template_kwargs' must be an object, got {describe_type(kwargs)}")
    _check_unicode(text, "'chat_template_kwargs'")
    return dict(kwargs)


def _get_turns(row: SourceRow, column: str) -> list[Any]:
    turns = row[column]
    if not isinstance(turns, list):
        raise SFTError(f"{column!r} must be a list of messages, got {describe_type(turns)}")
    return turns


def _convert_turns(row: SourceRow, column: str) -> list[Message]:
    """Convert a column that holds a list of messages."""
    return [_convert_turn(turn, f"{column}[{index}]") for index, turn in enumerate(_get_turns(row, column))]


def _convert_turn(turn: Any, location: str) -> Message:
    if not isinstance(turn, Mapping) or "role" not in turn or not ("content" in turn or turn.get("tool_calls")):
        raise SFTError(f"{location} must have 'role' and 'content'")
    role = _get_role(turn["role"], ROLES, location)
    message: Message = {"role": role, "content": _join_parts(turn.get("content"), location)}
    if role == "assistant":
        if reasoning := _get_reasoning(turn, location):
            message["reasoning_content"] = reasoning
        if turn.get("tool_calls"):
            message["tool_calls"] = convert_tool_calls(turn["tool_calls"], f"{location}.tool_calls")
            message["content"] = message["content"] or ""
    elif turn.get("tool_calls"):
        raise SFTError(f"{location}: a {role} message has tool_calls; only an assistant calls tools")
    if role == "tool":
        for key in ("tool_call_id", "name"):
            if turn.get(key) is not None:
                message[key] = _get_text(turn, key)
                _check_unicode(message[key], f"{key!r} of {location}")
    return _add_train_flag(message, turn, location)


def _convert_sharegpt_turn(turn: Any, location: str) -> Message:
    if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
        raise SFTError(f"{location} must have 'from' and 'value'")
    role = _get_role(turn["from"], SHAREGPT_ROLES, location)
    message: Message = {"role": role, "content": turn["value"]}
    if turn["from"] == "function_call":
        message["tool_calls"] = convert_function_call(turn["value"], location)
        message["content"] = ""
    return _add_train_flag(message, turn, location)


def _get_role(role: Any, roles: Mapping[str, str], location: str) -> str:
    if not isinstance(role, str) or role not in roles:
        raise SFTError(f"{location}: unknown role {reprlib.repr(role)}; use one of: {', '.join(roles)}")
    return roles[role]


def _join_parts(content: Any, location: str) -> Any:
    """Join a list of text parts to one text; any other content is returned as it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            name = f"a part of type {kind!r}" if isinstance(kind, str) and kind != "text" else "a part without text"
            raise SFTError(f"{location} has {reprlib.repr(name)[1:-1]}; only parts of type 'text' can be trained")
        texts.append(part["text"])
    return "".join(texts)


def _get_reasoning(turn: SourceRow, location: str) -> str:
    """Return the reasoning of an assistant's message, which may be under either of two keys."""
    texts = {text for key in REASONING_KEYS if (text := _get_text(turn, key)).strip()}
    if len(texts) > 1:
        raise SFTError(f"{location} has different texts as {' and '.join(REASONING_KEYS)}; keep one of them")
    for text in texts:
        _check_unicode(text, f"the reasoning of {location}")
    return texts.pop() if texts else ""


def _add_train_flag(message: Message, turn: SourceRow, location: str) -> Message:
    """Set `train` to False if the message is excluded from training.

    Raises SFTError for values other than true, false, 0 and 1, and for a message to train that is no assistant's.
    """
    flags = {key: turn[key] for key in FLAGS if turn.get(key) is not None}
    for key, value in flags.items():
        if not (isinstance(value, bool) if key == "train" else value in (0, 1) and not isinstance(value, bool)):
            values = "true or false" if key == "train" else "0 or 1: shares of a message's loss are not supported"
            raise SFTError(f"{location}: {key} is {reprlib.repr(value)}; it must be {values}")
    if len({bool(value) for value in flags.values()}) > 1:
        raise SFTError(f"{location}: train and weight contradict each other; keep one of them")
    if any(flags.values()) and message["role"] != "assistant":
        raise SFTError(f"{location}: a {message['role']} message cannot be trained; remove {', '.join(flags)}")
    if flags and message["role"] == "assistant" and not any(flags.values()):
        message["train"] = False
    return message


def _get_system_message(row: SourceRow) -> list[Message]:
    system = _get_text(row, "system")
    return [{"role": "system", "content": system}] if system.strip() else []


def _get_text(row: SourceRow, column: str) -> str:
    """Return the text of a column; a missing or null one is the empty string."""
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise SFTError(f"{column!r} must be a string, got {describe_type(value)}")
    return value or ""


def _is_blank(message: Message) -> bool:
    content = message["content"]
    is_empty = content is None or (isinstance(content, str) and not content.strip())
    return is_empty and not message.get("tool_calls")


def _check_messages(messages: list[Message]) -> None:
    """Raise SFTError unless the messages have texts and the last one is an assistant's after others."""
    for index, message in enumerate(messages):
        _check_content(message, index)
    if not any(message["role"] == "assistant" for message in messages):
        raise SFTError("no answer: the conversation has no assistant message")
    if messages[-1]["role"] != "assistant":
        role = messages[-1]["role"]
        raise SFTError(f"no answer: the last message has role {role}; add an assistant message, or remove this one")
    if len(messages) == 1:
        raise SFTError("the conversation has no message before its answer")


def _check_content(message: Message, index: int) -> None:
    content: Any = message["content"]
    name = f"the content of messages[{index}] ({message['role']})"
    if not isinstance(content, str):
        raise SFTError(f"{name} must be a string, got {describe_type(content)}")
    if message["role"] != "tool" and _is_blank(message):
        raise SFTError(f"{'no answer: ' if message['role'] == 'assistant' else ''}{name} is empty")
    _check_unicode(content, name)


def _check_unicode(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # a JSON escape may spell half of a surrogate pair
        raise SFTError(f"{name} contains a lone surrogate, which is not valid Unicode text; remove it") from None


FORMATS = {
    row_format.name: row_format
    for row_format in (
        RowFormat("messages", ("messages",), OBJECT_COLUMNS, _convert_messages),
        RowFormat(
            "sharegpt", ("conversations",), ("system", *OBJECT_COLUMNS), _convert_sharegpt, message_keys=SHAREGPT_KEYS
        ),
        RowFormat("alpaca", ("instruction", "output"), ("input", "system", "history"), _convert_alpaca, "output"),
        RowFormat(
            "prompt-completion", ("prompt", "completion"), OBJECT_COLUMNS, _convert_prompt_completion, "completion"
        ),
        RowFormat("text", ("text",), (), _convert_text),
    )
}
