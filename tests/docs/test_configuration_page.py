"""docs/configuration.md describes every key of this project, with its default."""

import dataclasses
import re
from pathlib import Path

from transformers import TrainingArguments

from sft_pipeline.arguments import SFTArguments
from sft_pipeline.config import RECORDED_KEYS, SFTConfig

TEXT = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
SECTION = TEXT[TEXT.index("## Keys of this project") : TEXT.index("## The rows of a step")]
NOT_LITERAL = {"required", "none", "1 each", "all"}  # what the table writes for no default or an empty one


def read_table() -> dict[str, str]:
    """Return the keys and the defaults that the table states."""
    defaults = {}
    for keys, values in re.findall(r"^\| (`.*?) \| (.*?) \|", SECTION, re.MULTILINE):
        names = re.findall(r"`(\w+)`", keys)
        cells = [re.sub(r" \(.*\)$", "", value) for value in values.split(", ")]
        assert len(names) == len(cells), f"{keys}: {values}"
        defaults.update(zip(names, cells))
    return defaults


def test_every_key_is_described():
    assert sorted(read_table()) == sorted(field.name for field in dataclasses.fields(SFTArguments))


def test_defaults_are_those_of_the_code():
    table = read_table()
    for field in dataclasses.fields(SFTArguments):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if table[field.name] in NOT_LITERAL:
            assert default in (None, [], dataclasses.MISSING, "all"), field.name
        elif isinstance(default, bool | str):
            assert table[field.name] == str(default).lower(), field.name
        elif isinstance(default, list):
            assert table[field.name] == ", ".join(default), field.name
        else:
            assert float(table[field.name]) == default, field.name


def test_the_changed_defaults_are_listed():
    names = [name for name in RECORDED_KEYS if name in SFTConfig.__annotations__]
    ours, library = (
        {key.name: key.default for key in dataclasses.fields(cls)} for cls in (SFTConfig, TrainingArguments)
    )
    sentence = " ".join(SECTION[SECTION.index("have another default here:") : SECTION.index("All others have")].split())
    for name in names:
        assert ours[name] != library[name], name
        assert f"`{name}` {str(ours[name]).lower()}" in sentence, name
    assert sentence.count("`") == 2 * len(names)
