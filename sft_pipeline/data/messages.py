"""A message of a conversation: `{"role": "user", "content": "..."}`, as transformers' chat templates take it."""

from __future__ import annotations

Message = dict[str, str]


def add_system_prompt(messages: list[Message], system_prompt: str | None) -> list[Message]:
    """The conversation led by `system_prompt`, unless it brings a system message of its own."""
    if not system_prompt or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]
