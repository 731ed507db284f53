"""Messages: a system prompt is added to a conversation that has none."""

from support.conversations import (
    build_conversation,
)

from sft_pipeline.data.messages import add_system_prompt


def test_add_system_prompt():
    messages = build_conversation(["q", "a"])
    assert add_system_prompt(messages, "s") == build_conversation(["q", "a"], "s")
    assert add_system_prompt(messages, None) is messages and add_system_prompt(messages, "") is messages
    messages_with_system = build_conversation(["q", "a"], "own")
    assert add_system_prompt(messages_with_system, "s") is messages_with_system
    assert add_system_prompt([], "s") == [{"role": "system", "content": "s"}]
