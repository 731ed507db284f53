"""Conversations as transformers' chat templates take them, and as JSON text in Arrow.

Arrow merges the keys of objects over all rows and fills them with nulls, so that the arguments of one tool would turn
up in the calls of every other. As JSON text a conversation keeps its values: `"42"` stays text, null and absent differ.
"""

from __future__ import annotations

import json
from typing import Any, TypedDict

# Keys: `role` and `content` (text); of an assistant message also `reasoning_content`, `tool_calls` (a list of
# `{"type": "function", "function": {"name": ..., "arguments": {...}}}`, some with an `id`) and `train`, which is there
# only where it is False; of a tool message also `tool_call_id` and `name`.
Message = dict[str, Any]

# Roles whose message takes the place of the system prompt, if it is the first one.
SYSTEM_ROLES = ("system", "developer")


class Conversation(TypedDict, total=False):
    """Messages, with the tools and the template arguments of this conversation; or a text without turns."""

    messages: list[Message]
    tools: list[dict[str, Any]]
    chat_template_kwargs: dict[str, Any]
    text: str


def add_system_prompt(conversation: Conversation, system_prompt: str | None) -> Conversation:
    """Prepend `system_prompt` as a system message, unless the conversation begins with one already or is a text."""
    messages = conversation.get("messages")
    if not system_prompt or messages is None or (messages and messages[0]["role"] in SYSTEM_ROLES):
        return conversation
    return {**conversation, "messages": [{"role": "system", "content": system_prompt}, *messages]}


def replace_messages(conversation: Conversation, messages: list[Message]) -> Conversation:
    """Return the conversation with other messages and the same tools and template arguments."""
    return {**conversation, "messages": messages}


def split_answer(conversation: Conversation) -> tuple[Conversation, Message]:
    """Split a conversation into the prompt of its last message, and that message."""
    *prompt, answer = conversation["messages"]
    return replace_messages(conversation, prompt), answer


def list_questions(conversation: Conversation) -> list[Conversation]:
    """List what a conversation can be asked: the conversation, whose last message is the reference.

    Where that calls no tool but an earlier message does, the conversation up to its first call comes before it. A text
    can be asked nothing.
    """
    messages = conversation.get("messages", [])
    calls = [index + 1 for index, message in enumerate(messages) if message.get("tool_calls")]
    ends = [*calls[:1], len(messages)]
    if messages and messages[-1].get("tool_calls"):
        ends = ends[-1:]
    return [replace_messages(conversation, messages[:end]) for end in ends if messages]


def format_conversation(conversation: Conversation) -> str:
    """Format as JSON text. Raises ValueError or TypeError for values that JSON does not have, such as NaN and dates."""
    return json.dumps(conversation, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def parse_conversation(text: str) -> Conversation:
    """Parse what `format_conversation` wrote."""
    return json.loads(text)
