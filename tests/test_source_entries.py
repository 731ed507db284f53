"""Entries of train_data and eval_data: a name, or an object with options."""

import json

import pytest
import yaml

from sft_pipeline.arguments import SourceEntry
from sft_pipeline.config import SFTConfig, build_config_record, parse_config
from sft_pipeline.data.pipeline import load_splits
from sft_pipeline.utils.errors import SFTError

MODEL = "model_name_or_path: tiny\nuse_cpu: true\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(yaml text) is a config file beside a.jsonl (4 rows) and b.jsonl (2 rows)."""
    monkeypatch.chdir(tmp_path)
    for name, count in (("a", 4), ("b", 2)):
        rows = [{"instruction": f"{name} {index}", "output": "yes"} for index in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(text: str) -> str:
        (tmp_path / "run.yaml").write_text(MODEL + text)
        return str(tmp_path / "run.yaml")

    return write


def test_an_entry_with_options_is_recorded_and_read_again(write, tmp_path):
    entry = {"path": "org/rows", "name": "zh", "split": "train[:5%]", "revision": "v1", "data_files": ["a.json"]}
    config = parse_config(
        write(f"train_data: [a.jsonl, {json.dumps(entry)}]\neval_data: {{path: org/rows, split: test}}")
    )
    assert [SourceEntry.parse(text) for text in config.train_data] == [SourceEntry("a.jsonl"), SourceEntry(**entry)]
    assert SourceEntry.parse(config.eval_data[0]).label == "org/rows (split: test)"
    record = build_config_record(config)
    assert record["train_data"] == ["a.jsonl", entry] and record["eval_data"] == [{"path": "org/rows", "split": "test"}]
    again = parse_config(write(yaml.safe_dump({"train_data": record["train_data"], "eval_data": record["eval_data"]})))
    assert again.train_data == config.train_data and again.eval_data == config.eval_data
    assert SFTConfig(str(tmp_path), use_cpu=True, train_data=["a.jsonl", entry]).train_data == config.train_data


def test_a_weight_repeats_an_entrys_rows(write):
    train, _ = load_splits(parse_config(write("train_data: [a.jsonl, {path: b.jsonl, weight: 3}]")))
    assert len(train) == 4 + 3 * 2
    train, _ = load_splits(parse_config(write("train_data: [{path: a.jsonl, weight: 0.5}, b.jsonl]")))
    assert len(train) == 2 + 2


def test_entries_on_the_command_line_are_json(write):
    config = parse_config(write(""), ["--train_data", "a.jsonl", '{"path": "b.jsonl", "weight": 2}'])
    assert [SourceEntry.parse(text).weight for text in config.train_data] == [None, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train_data: [{path: a, slit: b}]", "train_data: an entry has the unknown key slit; it may have path, name, "),
        ("train_data: [{split: test}]", 'train_data: the entry {"split": "test"} has no path; add it'),
        ("train_data: [{path: 7}]", "train_data: path of an entry is 7; give a text"),
        ("train_data: [{path: a, data_files: []}]", "train_data: data_files of an entry is []; give a text"),
        ("train_data: [{path: a, weight: much}]", "train_data: weight of an entry is 'much'; give a number"),
        ("train_data: ['{path']", "train_data: '{path' is not JSON ("),
        (
            "train_data: [a.jsonl]\neval_data: [{path: b.jsonl, weight: 2}]",
            "eval_data: b.jsonl has a weight, and each held-out row counts once; remove it",
        ),
        (
            "train_data: [{path: a.jsonl, weight: 2}]\ntrain_data_weights: [1]",
            "train_data: a.jsonl has a weight, and train_data_weights is set; remove one of them",
        ),
    ],
)
def test_a_bad_entry_is_named(text, message, write):
    with pytest.raises(SFTError) as error:
        parse_config(write(text))
    assert message in str(error.value)
