"""Messages as short texts for tables, text metrics and the judge: without reasoning, a tool call as `name({...})`."""

from __future__ import annotations

import json

from sft_pipeline.data.messages import Message
from sft_pipeline.inference.answers import Answer

ARROW = " → "  # between the messages of a prompt


def format_message(message: Message) -> str:
    """Return the content of a message, then its tool calls: `Let me look. get_weather({"city": "Oslo"})`.

    Reasoning is left out. The result of a tool is on one line.
    """
    content = message["content"]
    if message["role"] == "tool":
        return " ".join(content.split())
    functions = [call["function"] for call in message.get("tool_calls", ())]
    calls = "; ".join(f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})" for call in functions)
    return f"{content} {calls}".strip() if calls else content


def format_answer(answer: Answer) -> str:
    """Return the text of an answer without its reasoning; an empty text if there is no answer."""
    return format_message(answer.message) if answer.message else ""


def format_prompt(messages: list[Message]) -> str:
    """Return the last user message of a prompt, and what follows it: tool calls and their results.

    `Is it cold in Oslo? → get_weather({"city": "Oslo"}) → 4 degrees`
    """
    start = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=0)
    return ARROW.join(format_message(message) for message in messages[start:])
