"""docs/data.md: its example rows are read as it says, and its commands parse."""

import json
import re
import shlex
from pathlib import Path

import pytest
from support.conversations import build_conversation
from support.templates import AGENT_TEMPLATE
from support.tiny import build_tokenizer

from sft_pipeline.config import parse_config
from sft_pipeline.data.chat_templates import build_template
from sft_pipeline.data.encode import Encoder, encode_dataset
from sft_pipeline.data.formats import FORMATS, MESSAGE_KEYS
from sft_pipeline.data.shards import SETTINGS
from sft_pipeline.data.sources import load_conversations

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^### (.+)\n\n```json\n(.+)\n```$", TEXT, re.MULTILINE))
SYSTEM = {"role": "system", "content": "Be brief."}
FRUIT = [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "A pear."}]
CONVERSATIONS = {
    "messages": [SYSTEM, *FRUIT],
    "sharegpt": [SYSTEM, *FRUIT, {"role": "user", "content": "Another."}, {"role": "assistant", "content": "A fig."}],
    "alpaca": [
        SYSTEM,
        *[{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}],
        *[{"role": "user", "content": "Translate to German.\ncat"}, {"role": "assistant", "content": "Katze."}],
    ],
    "prompt-completion": FRUIT,
    "text": None,
}
QUESTION = {"role": "user", "content": "Is it cold in Oslo?"}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}


def test_every_format_has_an_example_in_the_order_of_the_code():
    assert list(EXAMPLES) == list(FORMATS) == list(CONVERSATIONS)


@pytest.mark.parametrize("row_format", CONVERSATIONS)
@pytest.mark.parametrize("kind", [".json", ".jsonl"])
def test_the_examples_are_read(row_format, kind, tmp_path, caplog):
    file = tmp_path / f"rows{kind}"
    file.write_text(EXAMPLES[row_format] if kind == ".jsonl" else f"[{EXAMPLES[row_format]}]", encoding="utf-8")
    with caplog.at_level("INFO", logger="sft_pipeline"):
        [row] = load_conversations(str(file))
    if row_format == "text":
        assert row == json.loads(EXAMPLES["text"])
    else:
        assert row == {"messages": CONVERSATIONS[row_format]}
    assert f"1 rows, read as {row_format} ({', '.join(json.loads(EXAMPLES[row_format]))})" in caplog.text


def test_the_examples_with_tools_are_read():
    """Both are the same conversation, but for what sharegpt has no place for."""
    examples = [json.loads(line) for line in re.findall(r"^```json\n(.+)\n```$", TEXT, re.MULTILINE)]
    with_tools = [row for row in examples if "tools" in row]
    assert len(examples) == len(FORMATS) + 2
    [first], [second] = (load_conversations([row]) for row in with_tools)
    answer = {"role": "assistant", "content": "Yes, -4 degrees."}
    assert second["messages"] == [
        QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "-4"},
        answer,
    ]
    assert first["messages"] == [
        QUESTION,
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "I look it up.",
            "tool_calls": [{"id": "c1", **CALL}],
        },
        {"role": "tool", "content": "-4", "tool_call_id": "c1"},
        answer,
    ]
    assert first["tools"] == with_tools[0]["tools"] and first["chat_template_kwargs"] == {"enable_thinking": True}
    assert second["tools"][0]["function"] == {"name": "get_weather", "description": "Degrees in a city."}


def test_the_keys_of_a_message_are_listed():
    table = TEXT[TEXT.index("| key | of | |") : TEXT.index("The column `tools`")]
    named = {
        name for cell in re.findall(r"^\| (`.+?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)
    }
    assert named == set(MESSAGE_KEYS) - {"role"}


def test_the_account_is_that_of_such_rows(cache):
    """The account of two questions with reasoning, of one without, and of a row that is not trained."""
    conversation = build_conversation(["Why?", "So.", "And?", "Yes."])
    for message in conversation["messages"][1::2]:
        message["reasoning_content"] = "Hm."
    untrained = build_conversation(["q", "a"])
    untrained["messages"][1]["train"] = False
    rows = [conversation, build_conversation(["Hi", "Yes?"]), untrained]
    template = build_template("chat", build_tokenizer(AGENT_TEMPLATE))
    assert f"```\n{encode_dataset(rows, Encoder(template))[1]}\n```" in TEXT


def test_the_commands_parse(monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = re.findall(r"\./launch\.sh (\w+) ([^`\n]+)", TEXT)
    assert [name for name, _ in commands] == ["preview", "prepare", "train"]
    for _, words in commands:
        config, *keys = shlex.split(words.replace("--row 3", ""))
        parse_config(config, keys)


def test_compared_settings_are_listed():
    compared = TEXT[TEXT.index("\nCompared are") : TEXT.index("\n## Memory")]
    named = set(re.findall(r"`(\w+)`", compared))
    assert named == {*SETTINGS, "train_data", "eval_data"}


def test_lines_are_short():
    assert [line for line in TEXT.splitlines() if len(line) > 120 and not line.startswith(("|", "{"))] == []
