"""Rows of four known shapes -> messages: pure functions on dictionaries, no files.

| shape | columns | one row |
| --- | --- | --- |
| messages | `messages` | list of {role, content}; other keys of a message are ignored |
| sharegpt | `conversations`, optional `system` | list of {from, value}; human = user, gpt = assistant |
| alpaca | `instruction`, `output`, optional `input`, `system`, `history` | history is a list of [user, assistant] |
| prompt-completion | `prompt`, `completion` | both text, or both lists of {role, content} |

Every row becomes [system], user, assistant, user, assistant, ...: an optional system message, then the two in turn,
the assistant last. Whatever does not is refused, with the reason. Alpaca's input goes on a line of its own below the
instruction, as in LLaMA-Factory (Zheng et al. 2024); with an empty input the instruction stands alone.
"""

import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sft_pipeline.data.messages import Message
from sft_pipeline.utils.errors import SFTError

SourceRow = Mapping[str, Any]

ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", **ROLES}


@dataclass(frozen=True)
class RowFormat:
    """A shape of rows: its name, its columns, and the function from a row to messages."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[SourceRow], list[Message]]
    answer: str | None = None  # the column of the answer alone, which a prompt may lack

    def used(self, columns: Collection[str]) -> list[str]:
        """Those of `columns` that this shape reads, in the order of `columns`."""
        return [column for column in columns if column in self.required + self.optional]

    def needed(self, answered: bool) -> list[str]:
        """The columns a row must have, with its answer or without."""
        return [column for column in self.required if answered or column != self.answer]


def detect_format(columns: Collection[str], name: str = "the data", answered: bool = True) -> RowFormat:
    """The shape that these columns have; where several fit, the one that stands first in FORMATS. Rows that are not
    `answered` are prompts, whose columns may lack the answer's.

    Raises SFTError, naming the file (`name`), its columns and the known shapes, if none fits.
    """
    for candidate in FORMATS.values():
        if set(candidate.needed(answered)) <= set(columns):
            return candidate
    known = "; ".join(f"{shape.name} ({', '.join(shape.needed(answered))})" for shape in FORMATS.values())
    found = ", ".join(map(str, columns)) or "none"
    raise SFTError(f"{name}: its columns ({found}) fit no known shape; rename them to one of: {known}")


def convert_to_messages(row: Any, shape: RowFormat) -> list[Message]:
    """One row as messages. Raises SFTError with the reason alone: the caller knows where the row stands."""
    messages = _convert(row, shape, answered=True)
    _check(messages)
    return messages


def convert_to_prompt(row: Any, shape: RowFormat) -> tuple[list[Message], str | None]:
    """What a model is shown of a row: a conversation that ends with the user's message, and the answer that stood
    behind it, if one did. Raises SFTError with the reason alone."""
    messages = _convert(row, shape, answered=False)
    if not messages:
        raise SFTError("an empty conversation")
    answer = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
    if isinstance(answer, str) and not answer.strip():
        answer = None
    _check([*messages, {"role": "assistant", "content": "to come" if answer is None else answer}])
    return messages, answer


def _convert(row: Any, shape: RowFormat, answered: bool) -> list[Message]:
    if not isinstance(row, Mapping):
        raise SFTError(f"a row must be an object with columns, this is {_kind(row)}")
    missing = [column for column in shape.needed(answered) if row.get(column) is None]
    if missing:
        keys = ", ".join(str(key) for key, value in row.items() if value is not None) or "none"
        raise SFTError(f"no {missing[0]!r} (the row has: {keys}), which {shape.name} rows need")
    return shape.convert(row)


def _alpaca(row: SourceRow) -> list[Message]:
    question = "\n".join(text for text in (_text(row, "instruction"), _text(row, "input")) if text)
    turns = [turn for pair in _history(row) for turn in pair] + [question, _text(row, "output")]
    speakers = ("user", "assistant") * (len(turns) // 2)
    return _system(row) + [{"role": role, "content": text} for role, text in zip(speakers, turns)]


def _history(row: SourceRow) -> list[list[str]]:
    history = row.get("history") or []
    pairs = isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)
    if not pairs:
        raise SFTError("'history' must be a list of [user, assistant] pairs")
    return history


def _messages(row: SourceRow) -> list[Message]:
    return _turns(row, "messages")


def _sharegpt(row: SourceRow) -> list[Message]:
    return _system(row) + _turns(row, "conversations", ("from", "value"), SHAREGPT_ROLES)


def _prompt_completion(row: SourceRow) -> list[Message]:
    prompt, completion = row["prompt"], row.get("completion")
    if completion is None:  # a prompt alone
        completion = "" if isinstance(prompt, str) else []
    if isinstance(prompt, str) and isinstance(completion, str):
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _turns(row, "prompt") + _turns({"completion": completion}, "completion")
    raise SFTError("'prompt' and 'completion' must both be text or both be lists of messages")


def _turns(
    row: SourceRow, column: str, keys: tuple[str, str] = ("role", "content"), roles: Mapping[str, str] = ROLES
) -> list[Message]:
    if not isinstance(row[column], list):
        raise SFTError(f"{column!r} is {_kind(row[column])}, not a list of messages")
    return [_turn(turn, f"{column}[{index}]", keys, roles) for index, turn in enumerate(row[column])]


def _turn(turn: Any, place: str, keys: tuple[str, str], roles: Mapping[str, str]) -> Message:
    role_key, text_key = keys
    if not isinstance(turn, Mapping) or role_key not in turn or text_key not in turn:
        raise SFTError(f"{place} must have {role_key!r} and {text_key!r}")
    role = turn[role_key]
    if not isinstance(role, str) or role not in roles:
        raise SFTError(f"{place} has the unknown role {reprlib.repr(role)}; known are {', '.join(roles)}")
    return {"role": roles[role], "content": turn[text_key]}


def _system(row: SourceRow) -> list[Message]:
    system = _text(row, "system")
    return [{"role": "system", "content": system}] if system.strip() else []


def _text(row: SourceRow, column: str) -> str:
    """A cell that may be left out: nothing is the empty text."""
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise SFTError(f"{column!r} is {_kind(value)}, not text")
    return value or ""


def _check(messages: list[Message]) -> None:
    """Raise SFTError unless the messages are [system], then user and assistant in turn, each with text."""
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    for message in messages:
        _check_text(message["content"], message["role"])
    if not turns:
        raise SFTError("an empty conversation")
    for number, turn in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if turn["role"] != expected:
            order = "an optional system message, then user and assistant in turn"
            raise SFTError(f"a message of the {turn['role']} where the {expected} should speak; the order is {order}")
    if len(turns) % 2:
        raise SFTError("no answer: the last message is the user's")


def _check_text(text: Any, role: str) -> None:
    if not isinstance(text, str):
        raise SFTError(f"a message of the {role} is {_kind(text)}, not text")
    if not text.strip():
        raise SFTError(("no answer: " if role == "assistant" else "") + f"the {role}'s text is empty")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON may spell half a surrogate pair, which no UTF-8 can hold
        raise SFTError(f"a message of the {role} holds half a character (a lone surrogate)") from None


def _kind(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


FORMATS = {
    shape.name: shape
    for shape in (
        RowFormat("messages", ("messages",), (), _messages),
        RowFormat("sharegpt", ("conversations",), ("system",), _sharegpt),
        RowFormat("alpaca", ("instruction", "output"), ("input", "system", "history"), _alpaca, "output"),
        RowFormat("prompt-completion", ("prompt", "completion"), (), _prompt_completion, "completion"),
    )
}
