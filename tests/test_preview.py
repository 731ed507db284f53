"""What people are shown of a row, and the JSON that scripts read."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from sft_pipeline.data.encode import Encoder
from sft_pipeline.data.templates import build_template, encode_as_text
from sft_pipeline.preview import as_json, show, show_positions, token_texts

PIECES = st.sampled_from(["冬瓜", "🙂", "é", "the answer", " ", "\n", "<|im_end|>", "\ufffd", "[bold]", "x"])
TEXT = st.lists(PIECES, max_size=6).map("".join)


def encode(tokenizer, question="Why?", answer="冬瓜 [b]🙂", name="role", **settings_of_encoder):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    encoder = Encoder(build_template(name, tokenizer), **settings_of_encoder)
    columns = encoder({"messages": [messages], "origin": ["rows.json row 3"]})
    return {key: columns[key][0] for key in ("input_ids", "labels")}


def rendered(draw, *arguments, styles=False, width=80) -> str:
    with open("/dev/null", "w", encoding="utf-8") as nowhere:
        console = Console(width=width, record=True, file=nowhere, force_terminal=True, color_system="standard")
        draw(*arguments, console)
        return console.export_text(styles=styles)


# ---- whole characters


def test_a_character_of_several_tokens_stays_whole(tokenizer):
    ids = encode_as_text(tokenizer, ["a瓜🙂b"])[0]
    assert len(ids) == 1 + 3 + 4 + 1
    assert token_texts(ids, tokenizer) == ["a", "", "", "瓜", "", "", "", "🙂", "b"]
    parts = ["瓜(1/3)", "瓜(2/3)", "瓜(3/3)", *(f"🙂({at}/4)" for at in range(1, 5))]
    assert token_texts(ids, tokenizer, parts=True) == ["a", *parts, "b"]


def test_a_character_that_was_cut_does_not_swallow_the_row(tokenizer):
    ids = encode_as_text(tokenizer, ["a瓜"])[0][:-1]
    texts = token_texts(ids, tokenizer)
    assert len(texts) == len(ids) and "".join(texts) == "a\ufffd"
    assert token_texts([], tokenizer) == []


@settings(deadline=None, max_examples=100)
@given(TEXT)
def test_the_texts_are_the_text(tokenizer, text):
    ids = encode_as_text(tokenizer, [text])[0]
    texts = token_texts(ids, tokenizer)
    assert len(texts) == len(token_texts(ids, tokenizer, parts=True)) == len(ids)
    assert "".join(texts) == text


# ---- JSON


@pytest.mark.parametrize("name", ["role", "chat"])
def test_json_is_one_line_with_its_three_keys(tokenizer, name):
    row = encode(tokenizer, question="two\nlines\u2028", name=name)
    line = as_json(row, tokenizer)
    assert "\n" not in line and "冬瓜" in line
    values = json.loads(line)
    assert list(values) == ["input_ids", "labels", "text"]
    assert {key: values[key] for key in row} == row
    assert values["text"] == tokenizer.decode(row["input_ids"])
    assert len(values["input_ids"]) == len(values["labels"])


# ---- the running text


def test_show(tokenizer):
    row = encode(tokenizer)
    trained = sum(label != -100 for label in row["labels"])
    lines = rendered(show, row, tokenizer, "rows.json row 3")
    assert lines == (
        f"rows.json row 3: {len(row['input_ids'])} tokens, {trained} trained (green)\n"
        "<|im_start|>\n#USER:Why?\n#ASSISTANT:冬瓜 [b]🙂<|im_end|>\n"
        "first trained token '\ufffd', last '<|im_end|>' (the stop token)\n"
    )


def test_show_colours_what_is_trained(tokenizer):
    """Dim up to the answer, green from there: the answer and its stop token."""
    text = rendered(show, encode(tokenizer, answer="So."), tokenizer, "row", styles=True)
    [line] = [line for line in text.splitlines() if "#ASSISTANT" in line]
    given_part, _, answer_part = line.partition("\x1b[32m")
    assert "#ASSISTANT" in "".join(given_part.split("\x1b[0m\x1b[2m")) or "\x1b[2m" in given_part
    assert "\x1b[32m" not in given_part and "\x1b[2m" not in answer_part
    assert "So" in answer_part.replace("\x1b[0m\x1b[32m", "") and "<|im_end|>" in answer_part


def test_show_says_that_a_row_is_cut(tokenizer):
    whole = encode(tokenizer, answer="the answer")
    row = encode(tokenizer, answer="the answer", max_length=len(whole["input_ids"]) - 1, overlong="truncate_answer")
    last = rendered(show, row, tokenizer, "row").splitlines()[-1]
    assert last.startswith("first trained token ") and last.endswith("(no stop token: the row is cut)")


def test_show_a_row_with_nothing_trained(tokenizer):
    row = {"input_ids": [5, 6], "labels": [-100, -100]}
    lines = rendered(show, row, tokenizer, "row").splitlines()
    assert lines[0] == "row: 2 tokens, 0 trained (green)" and len(lines) == 2


@pytest.mark.parametrize("title", ["data[a].json row 1", "[/x].json row 1"])
def test_brackets_in_a_files_name_are_no_style(tokenizer, title):
    assert rendered(show, encode(tokenizer), tokenizer, title).startswith(f"{title}: ")


# ---- a line a position


def test_show_positions(tokenizer):
    row = encode(tokenizer, answer="x瓜")
    lines = rendered(show_positions, row, tokenizer).splitlines()
    assert lines[0].split() == ["position", "id", "token", "target", "trained"]
    assert len(lines) == 1 + len(row["input_ids"])
    assert lines[1].split()[:3] == ["0", "1", "<|im_start|>"] and lines[1].split()[-1] == "no"
    end = [line.split() for line in lines[-5:]]
    at, ids = len(row["input_ids"]), row["input_ids"]
    assert end[0] == [str(at - 5), str(ids[-5]), "x", "瓜(1/3)", "yes"]
    assert end[1] == [str(at - 4), str(ids[-4]), "瓜(1/3)", "瓜(2/3)", "yes"]
    assert end[3] == [str(at - 2), str(ids[-2]), "瓜(3/3)", "<|im_end|>", "yes"]
    assert end[4] == [str(at - 1), "2", "<|im_end|>", "no"]
    assert sum(line.endswith("yes") or line.rstrip().endswith("yes") for line in lines) == 5


def test_positions_show_line_ends_and_brackets_as_they_are(tokenizer):
    text = rendered(show_positions, encode(tokenizer, question="[bold]\n[/x]"), tokenizer, width=200)
    cells = [line.split() for line in text.splitlines()]
    assert any("\\n" in row for row in cells) and any("[" in row for row in cells)
