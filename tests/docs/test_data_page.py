"""docs/data.md: its example rows are read as it says, and its commands parse."""

import json
import re
import shlex
from pathlib import Path

import pytest

from sft_pipeline.config import parse_config
from sft_pipeline.data.formats import FORMATS
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
}


def test_every_format_has_an_example_in_the_order_of_the_code():
    assert list(EXAMPLES) == list(FORMATS) == list(CONVERSATIONS)


@pytest.mark.parametrize("row_format", CONVERSATIONS)
@pytest.mark.parametrize("kind", [".json", ".jsonl"])
def test_the_examples_are_read(row_format, kind, tmp_path, caplog):
    file = tmp_path / f"rows{kind}"
    file.write_text(EXAMPLES[row_format] if kind == ".jsonl" else f"[{EXAMPLES[row_format]}]", encoding="utf-8")
    with caplog.at_level("INFO", logger="sft_pipeline"):
        [row] = load_conversations(str(file))
    assert row["messages"] == CONVERSATIONS[row_format]
    assert f"1 rows, read as {row_format} ({', '.join(json.loads(EXAMPLES[row_format]))})" in caplog.text


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
