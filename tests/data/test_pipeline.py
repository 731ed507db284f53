"""From a config's sources to training and held-out rows."""

import json
import logging
from pathlib import Path

import pytest

from sft_pipeline.arguments import SFTArguments
from sft_pipeline.data.chat_templates import build_template
from sft_pipeline.data.messages import parse_conversation
from sft_pipeline.data.pipeline import build_encoder, load_one_row, load_splits, prepare_data
from sft_pipeline.utils.errors import SFTError


def alpaca(start: int, stop: int) -> list[dict[str, str]]:
    return [{"instruction": f"question {index}", "output": f"answer {index}"} for index in range(start, stop)]


@pytest.fixture
def file(tmp_path):
    """file(name, start, stop) is the path of a file with the rows from start to stop."""

    def file(name: str, start: int, stop: int, *more: dict[str, str]) -> str:
        path = tmp_path / name
        path.write_text(json.dumps([*alpaca(start, stop), *more]), encoding="utf-8")
        return str(path)

    return file


def arguments(train: str | list[str], **keys) -> SFTArguments:
    return SFTArguments("m", [train] if isinstance(train, str) else train, **keys)


def questions(dataset) -> list[int]:
    """The numbers of the rows, sorted."""
    conversations = map(parse_conversation, dataset["conversation"])
    return sorted(int(row["messages"][0]["content"].split()[1]) for row in conversations)


def test_nothing_held_out(file):
    train, held_out = load_splits(arguments([file("a.json", 0, 4), file("b.json", 4, 6)]))
    assert held_out is None
    assert questions(train) == list(range(6))
    assert train["origin"][:] == [*(f"a.json row {index}" for index in range(4)), "b.json row 0", "b.json row 1"]


def test_held_out_by_count(file):
    train, held_out = load_splits(arguments(file("a.json", 0, 20), held_out=6))
    assert len(held_out) == 6
    assert sorted(questions(train) + questions(held_out)) == list(range(20))


def test_held_out_by_share(file):
    train, held_out = load_splits(arguments(file("a.json", 0, 200), held_out=0.25))
    assert 30 <= len(held_out) <= 70
    assert sorted(questions(train) + questions(held_out)) == list(range(200))


def test_held_out_rows_are_the_same_in_another_order(file, tmp_path):
    _, held_out = load_splits(arguments(file("a.json", 0, 20), held_out=6))
    (tmp_path / "b.json").write_text(json.dumps(alpaca(0, 20)[::-1]), encoding="utf-8")
    _, again = load_splits(arguments(str(tmp_path / "b.json"), held_out=6))
    assert questions(again) == questions(held_out)


def test_rows_of_eval_data_are_not_trained(file, caplog):
    keys = {"eval_data": [file("held.json", 15, 22), file("more.json", 30, 32)]}
    with caplog.at_level(logging.INFO, logger="sft_pipeline"):
        train, held_out = load_splits(arguments(file("a.json", 0, 20), **keys))
    assert questions(held_out) == [*range(15, 22), 30, 31]
    assert questions(train) == list(range(15))
    assert "dropped 5 training rows that are in the evaluation data too" in caplog.text


def test_eval_data_that_has_all(file):
    with pytest.raises(SFTError, match="train_data: every row is in the evaluation data too"):
        load_splits(arguments(file("a.json", 0, 3), eval_data=[file("held.json", 0, 3)]))


def test_weights(file):
    sources = [file("a.json", 0, 4), file("b.json", 4, 8)]
    train, held_out = load_splits(arguments(sources, train_data_weights=[2.0, 0.5]))
    assert held_out is None and len(train) == 10
    assert [index for index in questions(train) if index < 4] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len({index for index in questions(train) if index >= 4}) == 2


def test_weights_multiply_what_the_held_out_rows_leave(file):
    sources = [file("a.json", 0, 10), file("b.json", 10, 20)]
    train, held_out = load_splits(arguments(sources, train_data_weights=[3.0, 1.0], held_out=8))
    assert len(held_out) == 8
    remaining = set(range(20)) - set(questions(held_out))
    assert questions(train) == sorted(
        [index for index in remaining if index < 10] * 3 + [index for index in remaining if index >= 10]
    )


def test_weights_beside_eval_data(file):
    train, held_out = load_splits(
        arguments(file("a.json", 0, 4), train_data_weights=[2.0], eval_data=[file("held.json", 3, 5)])
    )
    assert questions(train) == [0, 0, 1, 1, 2, 2] and questions(held_out) == [3, 4]


def test_weights_too_few(file):
    with pytest.raises(SFTError, match="train_data_weights: 1 weights for 2 datasets"):
        load_splits(arguments([file("a.json", 0, 2), file("b.json", 2, 4)], train_data_weights=[1.0]))


def test_bad_rows_are_skipped_when_asked(file):
    bad = file("a.json", 0, 3, {"instruction": "question 3", "output": ""})
    with pytest.raises(SFTError, match="a.json row 3"):
        load_splits(arguments(bad))
    assert questions(load_splits(arguments(bad, skip_bad_rows=True))[0]) == [0, 1, 2]


def test_a_missing_file():
    with pytest.raises(SFTError, match="none.json: no such file or folder"):
        load_splits(arguments("none.json"))


def test_prepare(file, tokenizer, cache, caplog):
    sft = arguments(file("a.json", 0, 10), held_out=3, template="role", system_prompt="s")
    template = build_template("role", tokenizer)
    with caplog.at_level(logging.INFO, logger="sft_pipeline"):
        prepared = prepare_data(sft, template)
    assert (len(prepared.train), len(prepared.held_out), len(prepared.held_out_conversations)) == (7, 3, 3)
    assert (prepared.train_stats.kept, prepared.held_out_stats.kept) == (7, 3)
    assert f"training rows: {prepared.train_stats}" in caplog.text
    assert f"held-out rows: {prepared.held_out_stats}" in caplog.text
    # The held-out rows are encoded from the held-out conversations, in their order, with the system prompt.
    texts = [tokenizer.decode(ids) for ids in prepared.held_out["input_ids"]]
    for text, conversation in zip(texts, prepared.held_out_conversations["conversation"], strict=True):
        question, answer = (message["content"] for message in parse_conversation(conversation)["messages"])
        assert text == f"<|im_start|>\n#SYSTEM:s\n#USER:{question}\n#ASSISTANT:{answer}<|im_end|>"


@pytest.mark.parametrize("keys", [{"held_out": 3}, {"max_train_rows": 9}, {"train_data_weights": [2.0, 1.0]}])
def test_rows_of_each_source_are_counted(keys, file, tokenizer, cache):
    """What is read of it, and what is left of that after rows are held out, repeated, limited and dropped."""
    long = {"instruction": "Say 99", "input": "", "output": "the text " * 60}
    sources = [file("a.json", 0, 8), file("b.json", 8, 12, long)]
    sft = arguments(sources, max_length=60, **keys)
    prepared = prepare_data(sft, build_template("role", tokenizer))
    numbers = questions(load_splits(sft)[0])
    expected = {"a": sum(number < 8 for number in numbers), "b": sum(8 <= number < 99 for number in numbers)}
    assert prepared.train_stats.dropped.get("longer than max_length", 0) == numbers.count(99)
    assert prepared.sources == {
        sources[0]: {"rows": 8, "kept": expected["a"]},
        sources[1]: {"rows": 5, "kept": expected["b"]},
    }
    assert sum(expected.values()) == len(prepared.train) and "source_index" not in prepared.train.column_names
    again = prepare_data(sft, build_template("role", tokenizer))
    assert again.train_stats.cached and again.sources == prepared.sources


def test_prepare_without_held_out_rows(file, tokenizer, cache):
    prepared = prepare_data(arguments(file("a.json", 0, 2)), build_template("chat", tokenizer))
    assert prepared.held_out is prepared.held_out_stats is prepared.held_out_conversations is None


def test_the_encoder_has_the_configs_settings(tokenizer):
    keys = {"system_prompt": "s", "max_length": 77, "overlong": "truncate_turns", "train_on": "last"}
    encoder = build_encoder(arguments("a.json", **keys), build_template("role", tokenizer))
    assert {key: getattr(encoder, key) for key in keys} == keys


def test_one_row_is_the_row_that_is_trained(file, tokenizer, cache):
    sft = arguments([file("a.json", 0, 3), file("b.json", 3, 5)], system_prompt="s")
    template = build_template("chat", tokenizer)
    prepared = prepare_data(sft, template)
    for index in range(5):
        row, origin = load_one_row(sft, template, index)
        columns = {name: value for name, value in row.items() if name not in ("outcome", "dropped_sequences")}
        assert columns == prepared.train[index]
        assert origin == (f"a.json row {index}" if index < 3 else f"b.json row {index - 3}")


@pytest.mark.parametrize("row", [-1, 3])
def test_a_row_that_is_not_there(file, tokenizer, row):
    with pytest.raises(SFTError, match=f"^row {row}: out of range; train_data has rows 0 to 2$"):
        load_one_row(arguments(file("a.json", 0, 3)), build_template("role", tokenizer), row)


def test_a_row_that_is_dropped(file, tokenizer):
    sft = arguments(file("a.json", 0, 3), max_length=5)
    message = r"^a.json row 1: dropped \(longer than max_length\); raise max_length or change overlong$"
    with pytest.raises(SFTError, match=message):
        load_one_row(sft, build_template("role", tokenizer), 1)


def test_the_projects_own_rows(tokenizer, cache):
    """What the quickstart trains on parses and fits, and no held-out row is trained."""
    path = Path(__file__).parents[2] / "configs" / "data" / "quickstart.jsonl"
    train, held_out = load_splits(arguments(str(path), held_out=40))
    assert len(held_out) >= 40 and len(train) > len(held_out)
    assert not set(train["conversation"]) & set(held_out["conversation"])


def test_a_row_with_nothing_trained(tmp_path, tokenizer):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": False}]
    (tmp_path / "a.json").write_text(json.dumps([{"messages": messages}]))
    message = r"^a.json row 0: dropped \(nothing supervised\); mark an answer with train: true, or change train_on$"
    with pytest.raises(SFTError, match=message):
        load_one_row(arguments(str(tmp_path / "a.json")), build_template("role", tokenizer), 0)


def test_texts_and_conversations_are_mixed_by_weight(file, tmp_path, tokenizer, cache):
    """Texts are held out and repeated like other rows, and are no prompts."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"text {number} is long"}) + "\n" for number in range(4)))
    sft = arguments([file("a.json", 0, 6), str(texts)], train_data_weights=[1.0, 3.0], max_length=40, held_out=3)
    prepared = prepare_data(sft, build_template("chat", tokenizer))
    held_out = [parse_conversation(text) for text in prepared.held_out_conversations["conversation"]]
    kept_texts = 4 - sum("text" in row for row in held_out)
    kept_conversations = 6 - sum("messages" in row for row in held_out)
    decoded = [tokenizer.decode(ids) for ids in prepared.train["input_ids"]]
    assert sum(text.startswith("<|im_start|>") for text in decoded) == kept_conversations
    assert sum(text.startswith("text ") and text.endswith("long<|im_end|>") for text in decoded) == 3 * kept_texts


def test_other_ids_of_the_saved_chat_template_are_logged(tmp_path, tokenizer, cache, caplog):
    rows = [{"instruction": text, "output": "yes"} for text in ("hi", "<|im_end|>")]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with caplog.at_level(logging.INFO, logger="sft_pipeline"):
        prepare_data(arguments(str(tmp_path / "a.json"), template="chat"), build_template("chat", tokenizer))
    assert "the saved chat template gives other ids than training for 1 of 2 rows" in caplog.text
