"""Compare the tool calls of an answer with those of its reference."""

from __future__ import annotations

import json

from sft_pipeline.data.messages import Conversation, Message
from sft_pipeline.data.template import Template


def match_tool_calls(template: Template, conversation: Conversation, answer: str) -> bool | None:
    """Return whether `answer` calls the functions that the last message of the conversation calls, in the same order
    with the same arguments. None if that message calls none.

    Content and reasoning do not count, nor does the order of arguments. If the template writes calls in a notation that
    it cannot read back, such as XML, they are compared as text, in which only white space may differ.
    """
    reference, message = conversation["messages"][-1], template.parse_text(answer)
    if not reference.get("tool_calls"):
        return None
    written = template.parse_text(_write_last_answer(template, conversation))
    if _list_calls(written) == _list_calls(reference):
        return _list_calls(message) == _list_calls(reference)
    # The calls begin with what the template writes between the content and the name of the first function.
    expected = _normalize(written["content"]).removeprefix(_normalize(reference["content"])).lstrip()
    opening = expected.partition(reference["tool_calls"][0]["function"]["name"])[0].rstrip()
    text = _normalize(message["content"])
    return opening in text and text[text.find(opening) :] == expected


def _list_calls(message: Message) -> list[str]:
    """List the calls as JSON text, in which 1, 1.0 and true differ."""
    functions = [call["function"] for call in message.get("tool_calls", ())]
    return [json.dumps([call["name"], call["arguments"]], sort_keys=True) for call in functions]


def _write_last_answer(template: Template, conversation: Conversation) -> str:
    """Return the last message as the template writes it, without control tokens."""
    turn = template.split_turns(conversation, [len(conversation["messages"]) - 1])[-1]
    return "".join(piece.text for piece in turn.target or ())


def _normalize(text: str) -> str:
    return " ".join(text.split())
