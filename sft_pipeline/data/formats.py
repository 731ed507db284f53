"""Convert rows of four known formats to messages: pure functions on dictionaries, no files.

| format | columns | one row |
| --- | --- | --- |
| messages | `messages` | list of {role, content} |
| sharegpt | `conversations`, optional `system` | list of {from, value}; human = user, gpt = assistant |
| alpaca | `instruction`, `output`, optional `input`, `system`, `history` | history is a list of [user, assistant] |
| prompt-completion | `prompt`, `completion` | both strings, or both lists of {role, content} |

Every row becomes [system], user, assistant, user, assistant, ...: an optional system message, then user and assistant
alternating, the assistant last. Any other row raises SFTError with the reason. Alpaca's input is appended to the
instruction after a newline, as in LLaMA-Factory (Zheng et al. 2024); with an empty input the instruction is used alone.

Other columns, and other keys of a message, are not read: `list_unread_names`.

In error messages `messages[i]` is message i of the converted conversation, counted from 0, system message included.
"""

import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sft_pipeline.data.messages import Message
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.sanitize import format_line

SourceRow = Mapping[str, Any]

ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", **ROLES}
MESSAGE_KEYS, SHAREGPT_KEYS = ("role", "content"), ("from", "value")


@dataclass(frozen=True)
class RowFormat:
    """A row format: its name, its columns, and the function that converts a row to messages."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[SourceRow], list[Message]]
    answer_column: str | None = None  # holds the answer alone; a row that is only a prompt may lack it
    message_keys: tuple[str, str] = MESSAGE_KEYS  # of a message in a column that holds a list of them

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


def convert_to_messages(row: Any, row_format: RowFormat) -> list[Message]:
    """Convert a row to messages. Raises SFTError with the reason only: the caller knows the file and line."""
    messages = _convert_row(row, row_format, require_answer=True)
    _check_messages(messages)
    return messages


def convert_to_prompt(row: Any, row_format: RowFormat) -> tuple[list[Message], str | None]:
    """Convert a row to (messages, reference): a conversation that ends with a user message, and the answer after it.

    The reference is None if the row has no answer or a blank one. Raises SFTError with the reason only.
    """
    messages = _convert_row(row, row_format, require_answer=False)
    if all(message["role"] == "system" for message in messages):
        raise SFTError("the conversation has no user message")
    answer = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
    if isinstance(answer, str) and not answer.strip():
        answer = None
    # A placeholder for a missing answer, so that the same checks apply.
    _check_messages([*messages, {"role": "assistant", "content": "to come" if answer is None else answer}])
    return messages, answer


def list_unread_names(row: Any, row_format: RowFormat) -> list[str]:
    """List what a row holds and `row_format` does not read, each name once: "id", "messages[].weight".

    Null values are left out: Arrow fills the keys that a row lacks with them.
    """
    if not isinstance(row, Mapping):
        return []
    read = row_format.required + row_format.optional
    names = [str(column) for column, value in row.items() if column not in read and value is not None]
    for column in read:
        turns = row.get(column)
        if isinstance(turns, list):
            for turn in turns:
                # Most have the two keys that are read and no other.
                if isinstance(turn, Mapping) and len(turn) > len(row_format.message_keys):
                    unread = [key for key in turn if key not in row_format.message_keys and turn[key] is not None]
                    names += [f"{column}[].{key}" for key in unread]
    return list(dict.fromkeys(map(format_line, names))) if names else names


def describe_type(value: Any) -> str:
    """Return the type name of a value for an error message: "null" for None."""
    return "null" if value is None else type(value).__name__


def _convert_row(row: Any, row_format: RowFormat, require_answer: bool) -> list[Message]:
    if not isinstance(row, Mapping):
        raise SFTError(f"expected an object with columns, got {describe_type(row)}")
    for column in row_format.get_required_columns(require_answer):
        if row.get(column) is None:
            present = ", ".join(str(key) for key, value in row.items() if value is not None) or "no column"
            raise SFTError(f"missing {column!r}, which {row_format.name} rows require; the row has {present}")
    return row_format.convert(row)


def _convert_alpaca(row: SourceRow) -> list[Message]:
    question = "\n".join(text for text in (_get_text(row, "instruction"), _get_text(row, "input")) if text)
    turns = [turn for pair in _get_history(row) for turn in pair] + [question, _get_text(row, "output")]
    roles = ("user", "assistant") * (len(turns) // 2)
    return _get_system_message(row) + [{"role": role, "content": text} for role, text in zip(roles, turns)]


def _get_history(row: SourceRow) -> list[list[str]]:
    history = row.get("history") or []
    if not (isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)):
        raise SFTError("'history' must be a list of [user, assistant] pairs")
    return history


def _convert_messages(row: SourceRow) -> list[Message]:
    return _convert_turns(row, "messages")


def _convert_sharegpt(row: SourceRow) -> list[Message]:
    return _get_system_message(row) + _convert_turns(row, "conversations", SHAREGPT_KEYS, SHAREGPT_ROLES)


def _convert_prompt_completion(row: SourceRow) -> list[Message]:
    prompt, completion = row["prompt"], row.get("completion")
    if completion is None:  # a prompt alone
        completion = "" if isinstance(prompt, str) else []
    if isinstance(prompt, str) and isinstance(completion, str):
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _convert_turns(row, "prompt") + _convert_turns({"completion": completion}, "completion")
    raise SFTError("'prompt' and 'completion' must both be strings or both be lists of messages")


def _convert_turns(
    row: SourceRow, column: str, keys: tuple[str, str] = MESSAGE_KEYS, roles: Mapping[str, str] = ROLES
) -> list[Message]:
    """Convert a column that holds a list of messages, given its keys for role and text and its names of the roles."""
    turns = row[column]
    if not isinstance(turns, list):
        raise SFTError(f"{column!r} must be a list of messages, got {describe_type(turns)}")
    return [_convert_turn(turn, f"{column}[{index}]", keys, roles) for index, turn in enumerate(turns)]


def _convert_turn(turn: Any, location: str, keys: tuple[str, str], roles: Mapping[str, str]) -> Message:
    role_key, text_key = keys
    if not isinstance(turn, Mapping) or role_key not in turn or text_key not in turn:
        raise SFTError(f"{location} must have {role_key!r} and {text_key!r}")
    role = turn[role_key]
    if not isinstance(role, str) or role not in roles:
        raise SFTError(f"{location}: unknown role {reprlib.repr(role)}; use one of: {', '.join(roles)}")
    return {"role": roles[role], "content": turn[text_key]}


def _get_system_message(row: SourceRow) -> list[Message]:
    system = _get_text(row, "system")
    return [{"role": "system", "content": system}] if system.strip() else []


def _get_text(row: SourceRow, column: str) -> str:
    """Return the text of a column; a missing or null one is the empty string."""
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise SFTError(f"{column!r} must be a string, got {describe_type(value)}")
    return value or ""


def _check_messages(messages: list[Message]) -> None:
    """Raise SFTError unless the messages are [system], then user and assistant alternating, each with text."""
    for index, message in enumerate(messages):
        _check_content(message, index)
    start = 1 if messages and messages[0]["role"] == "system" else 0
    if len(messages) == start:
        raise SFTError("the conversation has no user message")
    for index in range(start, len(messages)):
        role, expected = messages[index]["role"], ("user", "assistant")[(index - start) % 2]
        if role != expected:
            order = "the order is an optional system message, then user and assistant alternating"
            raise SFTError(f"messages[{index}]: expected role {expected}, got {role}; {order}")
    if messages[-1]["role"] == "user":
        raise SFTError("no answer: the last message has role user; add an assistant message")


def _check_content(message: Message, index: int) -> None:
    text: Any = message["content"]
    name = f"the content of messages[{index}] ({message['role']})"
    if not isinstance(text, str):
        raise SFTError(f"{name} must be a string, got {describe_type(text)}")
    if not text.strip():
        raise SFTError(f"{'no answer: ' if message['role'] == 'assistant' else ''}{name} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:  # a JSON escape may spell half of a surrogate pair
        raise SFTError(f"{name} contains a lone surrogate, which is not valid Unicode text; remove it") from None


FORMATS = {
    row_format.name: row_format
    for row_format in (
        RowFormat("messages", ("messages",), (), _convert_messages),
        RowFormat("sharegpt", ("conversations",), ("system",), _convert_sharegpt, message_keys=SHAREGPT_KEYS),
        RowFormat("alpaca", ("instruction", "output"), ("input", "system", "history"), _convert_alpaca, "output"),
        RowFormat("prompt-completion", ("prompt", "completion"), (), _convert_prompt_completion, "completion"),
    )
}
