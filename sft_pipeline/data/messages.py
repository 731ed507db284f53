"""A message of a conversation, `{"role": "user", "content": "..."}`, in the form of transformers' chat templates."""

from __future__ import annotations

Message = dict[str, str]


def add_system_prompt(messages: list[Message], system_prompt: str | None) -> list[Message]:
    """Prepend `system_prompt` as a system message, unless the conversation begins with one already."""
    if not system_prompt or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]
