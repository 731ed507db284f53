"""Conversations with tools and reasoning, a tiny model that has a template for them, and answers that are scripted."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.templates import AGENT_TEMPLATE
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sft_pipeline.data.messages import Conversation, Message
from sft_pipeline.inference import answers as answers_module
from sft_pipeline.inference.engine import Completion


def make_tool(name: str) -> dict:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    return {"type": "function", "function": {"name": name, "description": f"Call {name}.", "parameters": parameters}}


def make_call(name: str = "get_weather", **arguments: object) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str = "", *calls: dict, reasoning: str | None = None) -> Message:
    message: Message = {"role": "assistant", "content": text}
    if reasoning:
        message["reasoning_content"] = reasoning
    return message | ({"tool_calls": list(calls)} if calls else {})


def tool(text: str) -> Message:
    return {"role": "tool", "content": text}


def write_call(name: str, arguments: str) -> str:
    """Write a call as AGENT_TEMPLATE does."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


TOOLS = [make_tool("get_weather"), make_tool("get_time")]
OSLO = make_call(city="Oslo")
QUESTION = [{"role": "system", "content": "You are 冬瓜."}, user("Is it cold in Oslo?")]
CALL: Conversation = {"messages": [*QUESTION, assistant("", OSLO, reasoning="I must look.")], "tools": TOOLS}
REPLY: Conversation = {
    "messages": [*CALL["messages"], tool('{"degrees":\n 4}'), assistant("Yes, 4 degrees.", reasoning="4 is cold.")],
    "tools": TOOLS,
}
PLAIN: Conversation = {"messages": [user("Say text."), assistant("the text")]}
CONVERSATIONS = [CALL, REPLY, PLAIN]


def save_agent(model_folder: Path, folder: Path, chat_template: str = AGENT_TEMPLATE) -> Path:
    """Save the tiny model with another chat template."""
    shutil.copytree(model_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(file: Path, rows: Sequence[object]) -> str:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def script_answers(
    monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase, *texts: str | None
) -> list[list[int]]:
    """Let models answer with these texts, one a prompt; returns the list of the prompts that they will have got.

    None stands for a prompt that cannot be answered.
    """
    scripted, prompts_seen = iter(texts), []

    def generate(model, prompts, *args, on_token=None, on_done=None, **kwargs) -> list[Completion]:
        completions = []
        for index, prompt in enumerate(prompts):
            prompts_seen.append(list(prompt))
            text = next(scripted)
            if text is None:
                completion = Completion([], [], "error", "too long")
            else:
                ids = tokenizer(text)["input_ids"]
                for token in ids if on_token else ():
                    on_token(index, token)
                completion = Completion(ids, [-1.0] * len(ids), "stop", text=text)
            if on_done:
                on_done(index, completion)
            completions.append(completion)
        return completions

    monkeypatch.setattr(answers_module, "generate", generate)
    return prompts_seen
