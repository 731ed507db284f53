"""What people are shown of a row, and the JSON that scripts read."""

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text
from support.conversations import build_conversation
from support.templates import AGENT_TEMPLATE
from support.tiny import build_tokenizer

from sft_pipeline.data.chat_templates import build_template
from sft_pipeline.data.encode import Encoder, encode_dataset
from sft_pipeline.data.messages import format_conversation
from sft_pipeline.data.preview import build_preview, decode_tokens, format_row_json, print_positions, print_row
from sft_pipeline.data.text_encoder import encode_as_text

PIECES = st.sampled_from(["冬瓜", "🙂", "é", "the answer", " ", "\n", "<|im_end|>", "[bold]", "x"])
TEXT = st.lists(PIECES, max_size=6).map("".join)


def encode_conversation(tokenizer, conversation, name="chat", **settings_of_encoder):
    encoder = Encoder(build_template(name, tokenizer), **settings_of_encoder)
    columns = encoder({"conversation": [format_conversation(conversation)], "origin": ["rows.json row 3"]})
    return {key: columns[key][0] for key in ("input_ids", "labels", "sequence_lengths", "computed_tokens")}


def encode(tokenizer, question="Why?", answer="冬瓜 [b]🙂", name="role", **settings_of_encoder):
    conversation = build_conversation([question, answer])
    return encode_conversation(tokenizer, conversation, name, **settings_of_encoder)


@pytest.fixture(scope="module")
def agent():
    return build_tokenizer(AGENT_TEMPLATE)


@pytest.fixture
def two_sequences(agent):
    """An encoded row whose second sequence lacks the reasoning of the first answer."""
    conversation = build_conversation(["Why?", "So.", "And?", "Yes."])
    for message in conversation["messages"][1::2]:
        message["reasoning_content"] = "Hm."
    return encode_conversation(agent, conversation)


def rendered(draw, *arguments, styles=False, width=80) -> str:
    """What draw(*arguments, console) prints, with its colours (ANSI) or without."""
    console = Console(width=width, record=True, file=io.StringIO(), force_terminal=True, color_system="standard")
    draw(*arguments, console)
    return console.export_text(styles=styles)


def colour(text: Text, part: str) -> set[str]:
    """The styles of the characters of `part`, which stands in `text` once; line ends have none."""
    assert text.plain.count(part) == 1
    start = text.plain.index(part)
    positions = [i for i in range(start, start + len(part)) if text.plain[i] != "\n"]
    return {" ".join(str(span.style) for span in text.spans if span.start <= i < span.end) for i in positions}


# ---- whole characters


def test_a_character_of_several_tokens_stays_whole(tokenizer):
    ids = encode_as_text(tokenizer, ["a瓜🙂b"])[0]
    assert len(ids) == 1 + 3 + 4 + 1
    assert decode_tokens(ids, tokenizer) == ["a", "", "", "瓜", "", "", "", "🙂", "b"]
    parts = ["瓜(1/3)", "瓜(2/3)", "瓜(3/3)", *(f"🙂({part}/4)" for part in range(1, 5))]
    assert decode_tokens(ids, tokenizer, parts=True) == ["a", *parts, "b"]


def test_a_character_that_was_cut_does_not_swallow_the_row(tokenizer):
    ids = encode_as_text(tokenizer, ["a瓜"])[0][:-1]
    texts = decode_tokens(ids, tokenizer)
    assert len(texts) == len(ids) and "".join(texts) == "a\ufffd"
    assert decode_tokens([], tokenizer) == []


@settings(deadline=None, max_examples=100)
@given(TEXT)
def test_the_texts_are_the_text(tokenizer, text):
    ids = encode_as_text(tokenizer, [text])[0]
    texts = decode_tokens(ids, tokenizer)
    assert len(texts) == len(decode_tokens(ids, tokenizer, parts=True)) == len(ids)
    assert "".join(texts) == text


# ---- JSON


@pytest.mark.parametrize("name", ["role", "chat"])
def test_json_is_one_line_with_its_three_keys(tokenizer, name):
    row = encode(tokenizer, question="two\nlines\u2028", name=name)
    line = format_row_json(row, tokenizer)
    assert "\n" not in line and "冬瓜" in line
    values = json.loads(line)
    assert list(values) == ["input_ids", "labels", "text", "sequences"]
    assert {key: values[key] for key in ("input_ids", "labels")} == {key: row[key] for key in ("input_ids", "labels")}
    assert values["sequences"] == [{key: values[key] for key in ("input_ids", "labels", "text")}]
    assert values["text"] == tokenizer.decode(row["input_ids"])
    assert len(values["input_ids"]) == len(values["labels"])


def test_json_of_several_sequences(agent, two_sequences):
    """They are one line too, and there are no keys of a single sequence."""
    line = format_row_json(two_sequences, agent)
    values = json.loads(line)
    assert "\n" not in line and list(values) == ["sequences"]
    first, second = values["sequences"]
    assert first["input_ids"] + second["input_ids"] == two_sequences["input_ids"]
    assert first["labels"] + second["labels"] == two_sequences["labels"]
    assert [sequence["text"] for sequence in (first, second)] == [
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\nHm.\n</think>\n\nSo.<|im_end|>",
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nHm.\n</think>\n\nYes.<|im_end|>",
    ]


# ---- the running text


def test_show(tokenizer):
    row = encode(tokenizer)
    trained = sum(label != -100 for label in row["labels"])
    lines = rendered(print_row, row, tokenizer, "rows.json row 3")
    assert lines == (
        f"rows.json row 3: {len(row['input_ids'])} tokens, {trained} trained (green)\n"
        "<|im_start|>\n#USER:Why?\n#ASSISTANT:冬瓜 [b]🙂<|im_end|>\n"
        "first trained token '冬(1/3)', last '<|im_end|>' (the stop token)\n"
    )


def test_show_colours_what_is_trained(tokenizer):
    """Green is the answer and its stop token."""
    text = Text.from_ansi(rendered(print_row, encode(tokenizer, answer="So."), tokenizer, "row", styles=True))
    assert colour(text, "<|im_start|>\n#USER:Why?\n#ASSISTANT:") == {""}
    assert colour(text, "So.<|im_end|>") == {"color(2)"}  # green


def test_show_several_sequences_with_what_is_shared_in_grey(agent, two_sequences):
    shown = rendered(print_row, two_sequences, agent, "rows.json row 3", styles=True, width=120)
    text = Text.from_ansi(shown)
    first, second = json.loads(format_row_json(two_sequences, agent))["sequences"]
    pairs = zip(first["input_ids"], second["input_ids"])
    shared = next(index for index, (a, b) in enumerate(pairs) if a != b)
    counts = [(len(part["input_ids"]), sum(label != -100 for label in part["labels"])) for part in (first, second)]
    lines = text.plain.splitlines()
    assert lines[0] == f"rows.json row 3, sequence 1 of 2: {counts[0][0]} tokens, {counts[0][1]} trained (green)"
    assert (
        f"rows.json row 3, sequence 2 of 2: {counts[1][0]} tokens, {shared} shared with an earlier one (grey), "
        f"{counts[1][1]} trained (green)"
    ) in text.plain
    start = text.plain.index("sequence 2 of 2")
    end = Text.assemble(*[text[start:]])
    assert colour(end, "user\nWhy?") == {"color(8)"}  # grey
    assert colour(end, "So.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n") == {""}
    assert colour(end, "<think>\nHm.\n</think>\n\nYes.<|im_end|>") == {"color(2)"}
    assert text.plain.count("first trained token '<', last '<|im_end|>' (the stop token)") == 2


def test_show_says_that_a_row_is_cut(tokenizer):
    whole = encode(tokenizer, answer="the answer")
    row = encode(tokenizer, answer="the answer", max_length=len(whole["input_ids"]) - 1, overlong="truncate_answer")
    last = rendered(print_row, row, tokenizer, "row").splitlines()[-1]
    assert last.startswith("first trained token ") and last.endswith("(no stop token: the row is cut)")


def test_show_a_row_with_nothing_trained(tokenizer):
    row = {"input_ids": [5, 6], "labels": [-100, -100]}
    lines = rendered(print_row, row, tokenizer, "row").splitlines()
    assert lines[0] == "row: 2 tokens, 0 trained (green)" and len(lines) == 2


@pytest.mark.parametrize("title", ["data[a].json row 1", "[/x].json row 1"])
def test_brackets_in_a_files_name_are_no_style(tokenizer, title):
    assert rendered(print_row, encode(tokenizer), tokenizer, title).startswith(f"{title}: ")


# ---- a line a position


def test_show_positions(tokenizer):
    row = encode(tokenizer, answer="x瓜")
    lines = rendered(print_positions, row, tokenizer).splitlines()
    assert lines[0].split() == ["position", "id", "token", "target", "trained"]
    assert len(lines) == 1 + len(row["input_ids"])
    assert lines[1].split()[:3] == ["0", "1", "<|im_start|>"] and lines[1].split()[-1] == "no"
    end = [line.split() for line in lines[-5:]]
    length, ids = len(row["input_ids"]), row["input_ids"]
    assert end[0] == [str(length - 5), str(ids[-5]), "x", "瓜(1/3)", "yes"]
    assert end[1] == [str(length - 4), str(ids[-4]), "瓜(1/3)", "瓜(2/3)", "yes"]
    assert end[3] == [str(length - 2), str(ids[-2]), "瓜(3/3)", "<|im_end|>", "yes"]
    assert end[4] == [str(length - 1), "2", "<|im_end|>", "no"]
    assert sum(line.rstrip().endswith("yes") for line in lines) == 5


def test_positions_of_several_sequences(agent, two_sequences):
    lines = rendered(print_positions, two_sequences, agent).splitlines()
    assert sum(line.split()[0] == "position" for line in lines) == 2
    yes = sum(line.rstrip().endswith("yes") for line in lines)
    assert yes == sum(label != -100 for label in two_sequences["labels"])


def test_positions_show_line_ends_and_brackets_as_they_are(tokenizer):
    text = rendered(print_positions, encode(tokenizer, question="[bold]\n[/x]", answer="So."), tokenizer)
    tokens = [line.split()[2] for line in text.splitlines()[1:]]
    assert "".join(tokens) == "<|im_start|>\\n#USER:[bold]\\n[/x]\\n#ASSISTANT:So.<|im_end|>"


# ---- what a run saves for its report


def test_the_first_row_and_the_lengths_of_a_report(agent, cache):
    """The first row is a list of its sequences, and a bar counts sequences."""
    conversation = build_conversation(["Why?", "So.", "And?", "Yes."])
    conversation["messages"][1]["reasoning_content"] = "Hm."
    rows, stats = encode_dataset([conversation, build_conversation(["q", "a"])], Encoder(build_template("chat", agent)))
    preview = build_preview(rows, agent)
    sequences = preview["first_row"]
    assert [list(sequence) for sequence in sequences] == [["tokens", "trained", "shared"]] * 2
    assert sequences[0]["shared"] == 0 < sequences[1]["shared"] < len(sequences[0]["tokens"])
    for sequence in sequences:
        pairs = zip(sequence["tokens"], sequence["trained"], strict=True)
        assert "".join(token for token, trained in pairs if trained).endswith("<|im_end|>")
    assert sum(preview["lengths"]["rows"]) == stats.sequences == 3
    edges = preview["lengths"]["edges"]
    assert edges[0] == stats.length_quantiles["least"] and edges[-1] > stats.length_quantiles["most"]
