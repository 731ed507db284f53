"""Conversations: a system prompt is added to one that has none, and JSON text keeps every value."""

import pytest
from support.conversations import build_conversation

from sft_pipeline.data.messages import (
    add_system_prompt,
    format_conversation,
    list_questions,
    parse_conversation,
    replace_messages,
    split_answer,
)

CALL = {"type": "function", "function": {"name": "f", "arguments": {"code": "42", "count": 42, "unit": None, "x": []}}}


def test_add_system_prompt():
    conversation = build_conversation(["q", "a"], tools=[{"type": "function"}])
    with_system = build_conversation(["q", "a"], "s", tools=[{"type": "function"}])
    assert add_system_prompt(conversation, "s") == with_system
    assert add_system_prompt(conversation, None) is conversation and add_system_prompt(conversation, "") is conversation
    assert add_system_prompt(with_system, "other") is with_system
    developer = {"messages": [{"role": "developer", "content": "own"}, *conversation["messages"]]}
    assert add_system_prompt(developer, "s") is developer
    assert add_system_prompt({"messages": []}, "s") == {"messages": [{"role": "system", "content": "s"}]}
    text = {"text": "no turns"}
    assert add_system_prompt(text, "s") is text


def test_json_text_keeps_values():
    """A text that looks like a number, a null, an empty list, and which keys there are, in their order."""
    answer = {"role": "assistant", "content": "冬瓜\u2028", "tool_calls": [CALL]}
    conversation = {
        "messages": [{"role": "user", "content": "42"}, answer],
        "chat_template_kwargs": {"b": None, "a": 1},
    }
    text = format_conversation(conversation)
    assert "\n" not in text and parse_conversation(text) == conversation
    assert list(parse_conversation(text)["chat_template_kwargs"]) == ["b", "a"]
    with pytest.raises(ValueError):
        format_conversation({"chat_template_kwargs": {"x": float("nan")}})


def test_the_last_message_is_split_off():
    conversation = build_conversation(["q", "a"], tools=[])
    prompt, answer = split_answer(conversation)
    assert prompt == build_conversation(["q"], tools=[]) and answer == {"role": "assistant", "content": "a"}
    assert replace_messages(prompt, conversation["messages"]) == conversation


def test_a_conversation_is_asked_its_first_call_and_its_last_answer():
    ask, reply = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    result, tools = {"role": "tool", "content": "r"}, [{"function": {"name": "f"}}]
    messages = [ask, call, result, call, result, reply]
    questions = list_questions({"messages": messages, "tools": tools})
    assert questions == [{"messages": messages[:2], "tools": tools}, {"messages": messages, "tools": tools}]
    assert list_questions({"messages": [ask, reply]}) == [{"messages": [ask, reply]}]
    assert list_questions({"messages": messages[:4]}) == [{"messages": messages[:4]}], "the last answer is a call"
    assert list_questions({"text": "t"}) == []
