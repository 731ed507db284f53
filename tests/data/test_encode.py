"""Encoding: the shift, the length policies, the counts of the outcomes, and the cache."""

import dataclasses
import itertools
import os

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from support.conversations import BOTH, TEXT, build_conversation, render_row, render_sequences
from support.templates import AGENT_TEMPLATE, THINKING_TEMPLATE
from support.tiny import CHATML, build_tokenizer
from tokenizers import normalizers

from sft_pipeline.data import encode
from sft_pipeline.data.chat_templates import build_template
from sft_pipeline.data.encode import (
    IGNORED,
    KEPT,
    TOO_LONG,
    TRUNCATED,
    UNSUPERVISED,
    Encoder,
    build_input_ids_and_labels,
    encode_dataset,
    hash_texts,
    hash_tokenizer,
)
from sft_pipeline.data.messages import add_system_prompt, format_conversation
from sft_pipeline.data.padding import split_sequences
from sft_pipeline.data.template import TokenSequence, TokenSpan
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.files import get_cache_dir

STOP = 2
QUICK = settings(deadline=None, max_examples=50)
# Lengths of user and assistant messages in turn; "?" and "x" are one token each, so a length is a number of tokens.
LENGTHS = st.integers(1, 4).flatmap(lambda n: st.lists(st.integers(1, 12), min_size=2 * n, max_size=2 * n))
CONVERSATIONS = st.lists(LENGTHS, min_size=1, max_size=5)


def build_turns(lengths: list[int], system: str | None = None):
    """Build a conversation of messages of these lengths. Each begins with its number, so that no two are alike."""
    return build_conversation([(f"{index}" + "x?" * 6)[:length] for index, length in enumerate(lengths)], system)


QUESTION = build_conversation(["q"])  # nothing to train


def encode_columns(encoder: Encoder, conversations) -> list[dict]:
    """Encode conversations; returns the columns of each row."""
    origins = [f"rows.json row {index}" for index in range(len(conversations))]
    columns = encoder({"conversation": [format_conversation(row) for row in conversations], "origin": origins})
    assert list(columns) == list(encode.FEATURES)
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def encode_rows(encoder: Encoder, conversations) -> list[tuple[list[int], list[int], str]]:
    """Encode conversations of one sequence each; returns (input_ids, labels, outcome) of each."""
    rows = encode_columns(encoder, conversations)
    for row in rows:
        length = len(row["input_ids"])
        assert row["sequence_lengths"] == ([length] if length else []) and row["computed_tokens"] == length
        assert row["dropped_sequences"] == 0 or not length
    return [(row["input_ids"], row["labels"], row["outcome"]) for row in rows]


def build_dataset(conversations, name: str = "rows.json") -> Dataset:
    origins = [f"{name} row {index}" for index in range(len(conversations))]
    return Dataset.from_dict({"conversation": list(map(format_conversation, conversations)), "origin": origins})


def build_short_rows(count: int):
    return [build_conversation([f"q{index}", f"a{index}"]) for index in range(count)]


def render_whole_row(encoder: Encoder, conversation) -> tuple[list[int], list[bool]]:
    """Return the ids of the row and whether each is supervised, without a length limit."""
    return render_row(encoder.template, add_system_prompt(conversation, encoder.system_prompt), encoder.train_on)


# ---- the shift


def test_shift_by_hand():
    spans = [TokenSpan([5, 6], False), TokenSpan([7, 8], True), TokenSpan([9], False), TokenSpan([STOP], True)]
    sequence = TokenSequence(spans, (1,))
    assert build_input_ids_and_labels(sequence) == ([5, 6, 7, 8, 9, STOP], [IGNORED, 7, 8, IGNORED, STOP, IGNORED])
    assert build_input_ids_and_labels(sequence, 3) == ([5, 6, 7], [IGNORED, 7, IGNORED])
    assert build_input_ids_and_labels(TokenSequence([TokenSpan([7, 8], True)], ())) == ([7, 8], [8, IGNORED])


@BOTH
@pytest.mark.parametrize("train_on", ["all", "last"])
@QUICK
@given(CONVERSATIONS)
def test_a_label_is_the_next_token_where_it_is_supervised(tokenizer, name, train_on, rows):
    encoder = Encoder(build_template(name, tokenizer), "s", train_on=train_on)
    conversations = [build_turns(lengths) for lengths in rows]
    for messages, (ids, labels, outcome) in zip(conversations, encode_rows(encoder, conversations)):
        tokens, supervised = render_whole_row(encoder, messages)
        assert (ids, outcome, len(labels), labels[-1]) == (tokens, KEPT, len(ids), IGNORED)
        for index, label in enumerate(labels[:-1]):
            assert label == (ids[index + 1] if supervised[index + 1] else IGNORED)
        answers = len(messages["messages"]) // 2 if train_on == "all" else 1
        assert labels.count(STOP) == answers  # the stop token of every supervised turn


# ---- the length policies


@BOTH
@QUICK
@given(CONVERSATIONS, st.integers(1, 90))
def test_drop(tokenizer, name, rows, max_length):
    encoder = Encoder(build_template(name, tokenizer), "s", max_length, "drop")
    conversations = [build_turns(lengths) for lengths in rows]
    for messages, (ids, labels, outcome) in zip(conversations, encode_rows(encoder, conversations)):
        tokens, _ = render_whole_row(encoder, messages)
        if len(tokens) <= max_length:
            assert (ids, outcome) == (tokens, KEPT)
        else:
            assert (ids, labels, outcome) == ([], [], TOO_LONG)


@BOTH
@QUICK
@given(CONVERSATIONS, st.integers(1, 90))
def test_truncate_answer(tokenizer, name, rows, max_length):
    encoder = Encoder(build_template(name, tokenizer), "s", max_length, "truncate_answer", "last")
    conversations = [build_turns(lengths) for lengths in rows]
    for messages, (ids, labels, outcome) in zip(conversations, encode_rows(encoder, conversations)):
        tokens, supervised = render_whole_row(encoder, messages)
        if len(tokens) <= max_length:
            assert (ids, outcome) == (tokens, KEPT)
        elif not any(supervised[1:max_length]):
            assert (ids, labels, outcome) == ([], [], TOO_LONG)
        else:
            assert (ids, outcome) == (tokens[:max_length], TRUNCATED)
            assert STOP not in labels  # the only supervised stop token was the row's last
            assert any(label != IGNORED for label in labels)


@BOTH
@QUICK
@given(CONVERSATIONS, st.integers(20, 90))
def test_truncate_turns(tokenizer, name, rows, max_length):
    encoder = Encoder(build_template(name, tokenizer), "s", max_length, "truncate_turns")
    unlimited = dataclasses.replace(encoder, max_length=10_000)
    conversations = [build_turns(lengths) for lengths in rows]
    for messages, row in zip(conversations, encode_rows(encoder, conversations)):
        # The longest end of the conversation that fits: all of it, or without the first exchange, and so on.
        turns = messages["messages"]
        ends = [encode_rows(unlimited, [{"messages": turns[index:]}])[0] for index in range(0, len(turns), 2)]
        fitting = [end for end in ends if len(end[0]) <= max_length]
        expected = (*fitting[0][:2], KEPT if fitting[0] is ends[0] else TRUNCATED) if fitting else ([], [], TOO_LONG)
        assert row == expected


def test_truncate_turns_keeps_the_rows_own_system_message(tokenizer):
    conversation = build_turns([9, 9, 9, 9], "own")
    encoder = Encoder(build_template("role", tokenizer), "default", 60, "truncate_turns")
    [(ids, _, outcome)] = encode_rows(encoder, [conversation])
    assert outcome == TRUNCATED
    last_question, last_answer = (message["content"] for message in conversation["messages"][-2:])
    assert tokenizer.decode(ids) == (
        f"<|im_start|>\n#SYSTEM:own\n#USER:{last_question}\n#ASSISTANT:{last_answer}<|im_end|>"
    )


def test_a_row_cut_at_the_stop_token_alone(tokenizer):
    """One token too many, and that is the stop token."""
    template = build_template("role", tokenizer)
    messages = build_turns([3, 5])
    length = len(render_whole_row(Encoder(template), messages)[0])
    [(ids, labels, outcome)] = encode_rows(Encoder(template, None, length - 1, "truncate_answer"), [messages])
    assert (len(ids), outcome) == (length - 1, TRUNCATED)
    assert STOP not in ids and STOP not in labels


def test_a_row_with_nothing_supervised(tokenizer):
    for overlong in ("drop", "truncate_answer", "truncate_turns"):
        encoder = Encoder(build_template("role", tokenizer), None, 100, overlong)
        assert encode_rows(encoder, [QUESTION]) == [([], [], UNSUPERVISED)]


# ---- several sequences of a row


@pytest.fixture(scope="module")
def agent():
    return build_template("chat", build_tokenizer(AGENT_TEMPLATE))


def build_reasoning(*lengths: int, system: str | None = None):
    """Build a conversation of exchanges whose answers have so many tokens of reasoning; one sequence an exchange."""
    conversation = build_conversation([f"{word}{index}" for index in range(len(lengths)) for word in "qa"], system)
    answers = [message for message in conversation["messages"] if message["role"] == "assistant"]
    for answer, length in zip(answers, lengths):
        answer["reasoning_content"] = "?" * length
    return conversation


def list_row(row) -> list[tuple[list[int], list[int]]]:
    """The sequences of a row as (input_ids, labels)."""
    return [(ids.tolist(), labels.tolist()) for ids, labels in split_sequences(row)] if row["input_ids"] else []


def test_the_sequences_of_a_row_are_shifted_each_alone(agent):
    conversation = build_reasoning(3, 5, 2, system="s")
    [row] = encode_columns(Encoder(agent), [conversation])
    sequences = render_sequences(agent, conversation)
    assert len(sequences) == 3 == len(row["sequence_lengths"]) and row["outcome"] == KEPT
    for (ids, labels), (tokens, supervised) in zip(list_row(row), sequences, strict=True):
        assert ids == tokens
        assert labels == [i if flag else IGNORED for i, flag in zip(ids[1:], supervised[1:])] + [IGNORED]
    # Shared beginnings are computed once, but where a branch of few tokens costs more than it saves.
    beginnings = {tuple(ids[:end]) for ids, _ in list_row(row) for end in range(1, len(ids) + 1)}
    assert len(beginnings) <= row["computed_tokens"] < len(row["input_ids"]) == sum(row["sequence_lengths"])


def test_each_trained_answer_is_a_target_once(agent):
    conversation = build_reasoning(3, 5, 2, 1)
    conversation["messages"][3]["train"] = False
    [row] = encode_columns(Encoder(agent), [conversation])
    trained = agent.tokenizer.decode([label for label in row["labels"] if label != IGNORED])
    assert trained == "".join(
        f"<think>\n{'?' * length}\n</think>\n\na{index}<|im_end|>" for index, length in ((0, 3), (2, 2), (3, 1))
    )


def test_max_length_is_a_sequences(agent):
    """Early sequences that fit are kept, and the account says how many were not."""
    conversation = build_reasoning(1, 1, 60)
    encoder = Encoder(agent)
    [whole] = encode_columns(encoder, [conversation])
    lengths = whole["sequence_lengths"]
    limit = lengths[1]
    assert lengths[2] > limit > lengths[0]
    [row] = encode_columns(dataclasses.replace(encoder, max_length=limit), [conversation])
    assert list_row(row) == list_row(whole)[:2]
    assert (row["outcome"], row["dropped_sequences"]) == (KEPT, 1)
    [row] = encode_columns(dataclasses.replace(encoder, max_length=lengths[0] - 1), [conversation])
    assert (row["input_ids"], row["outcome"], row["dropped_sequences"]) == ([], TOO_LONG, 0)


def test_truncate_answer_cuts_the_sequences_that_are_too_long(agent):
    conversation = build_reasoning(1, 1, 60)
    [whole] = encode_columns(Encoder(agent), [conversation])
    limit = whole["sequence_lengths"][1]
    [row] = encode_columns(Encoder(agent, None, limit, "truncate_answer"), [conversation])
    assert list_row(row)[:2] == list_row(whole)[:2]
    ids, labels = list_row(row)[2]
    assert ids == list_row(whole)[2][0][:limit] and labels[-1] == IGNORED and STOP not in labels
    assert (row["outcome"], row["dropped_sequences"]) == (TRUNCATED, 0)


@QUICK
@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.sampled_from([None, "s"]), st.integers(8, 120))
def test_truncate_turns_of_several_sequences(agent, lengths, system, max_length):
    """A sequence that is too long becomes that of its answer after as many of the last exchanges as fit."""
    conversation = build_reasoning(*lengths, system=system)
    start = 1 if system else 0
    expected, truncated, dropped = [], False, 0
    for number in range(len(lengths)):
        end = start + 2 * number + 2
        for first in range(number + 1):
            messages = conversation["messages"][:start] + conversation["messages"][start + 2 * first : end]
            ids, supervised = render_sequences(agent, {"messages": messages}, "last")[0]
            if len(ids) <= max_length:
                expected.append((ids, [i if s else IGNORED for i, s in zip(ids[1:], supervised[1:])] + [IGNORED]))
                truncated |= first > 0
                break
        else:
            dropped += 1
    [row] = encode_columns(Encoder(agent, None, max_length, "truncate_turns"), [conversation])
    assert list_row(row) == expected
    outcome = TOO_LONG if not expected else TRUNCATED if truncated else KEPT
    assert (row["outcome"], row["dropped_sequences"]) == (outcome, dropped if expected else 0)


def test_the_account_of_conversations_and_sequences(agent, cache):
    rows = [build_reasoning(1, 1, 60), build_reasoning(2), build_reasoning(90), QUESTION]
    limit = encode_columns(Encoder(agent), rows[:1])[0]["sequence_lengths"][1]
    encoded, stats = encode_dataset(build_dataset(rows), Encoder(agent, max_length=limit))
    lengths = [length for row in encoded for length in row["sequence_lengths"]]
    assert (stats.rows, stats.kept, stats.sequences, stats.dropped_sequences) == (4, 2, 3, 1)
    assert (stats.tokens, stats.computed_tokens) == (sum(lengths), sum(encoded["computed_tokens"]))
    assert stats.computed_tokens < stats.tokens and stats.length_quantiles["most"] == max(lengths)
    assert str(stats).splitlines()[:2] == [
        "4 rows, 2 kept (0 of them truncated), dropped: 1 longer than max_length, 1 nothing supervised",
        f"3 sequences, without 1 longer than max_length; {stats.computed_tokens} tokens are computed, as sequences of "
        "a row share their beginnings",
    ]


def test_rows_of_conversations_as_json_text(agent, cache):
    """A list of conversations is encoded like a dataset of their JSON text."""
    rows = [build_reasoning(1, 1), build_reasoning(2)]
    encoded, _ = encode_dataset(rows, Encoder(agent))
    assert encoded.to_list() == encode_dataset(build_dataset(rows), Encoder(agent))[0].to_list()


# ---- texts


@BOTH
@QUICK
@given(TEXT.filter(str.strip), st.integers(2, 12), st.sampled_from(["drop", "truncate_answer", "truncate_turns"]))
def test_a_text_is_cut_into_pieces_that_overlap_by_a_token(tokenizer, name, text, max_length, overlong):
    """Every token but the first is a target exactly once, in order, and the eos token is the last."""
    template = build_template(name, tokenizer)
    [row] = encode_columns(Encoder(template, "s", max_length, overlong), [{"text": text}])
    ids, _ = render_row(template, {"text": text})
    pieces = list_row(row)
    assert [label for label in row["labels"] if label != IGNORED] == ids[1:]
    assert ids[-1] == template.stop_token_id and ids.count(STOP) == 1
    for piece_ids, piece_labels in pieces:
        assert len(piece_ids) <= max_length and piece_labels == [*piece_ids[1:], IGNORED]
    assert all(len(piece_ids) == max_length for piece_ids, _ in pieces[:-1])
    assert all(first[0][-1] == second[0][0] for first, second in itertools.pairwise(pieces))
    assert (row["outcome"], row["dropped_sequences"]) == (KEPT, 0)


def test_a_text_that_no_piece_can_hold(tokenizer):
    [row] = encode_columns(Encoder(build_template("role", tokenizer), max_length=1), [{"text": "abc"}])
    assert (row["input_ids"], row["outcome"]) == ([], TOO_LONG)


def test_texts_and_conversations_in_one_batch(tokenizer):
    rows = [{"text": "one"}, build_conversation(["q", "a"]), {"text": "two two"}]
    encoder = Encoder(build_template("chat", tokenizer), "s")
    assert encode_columns(encoder, rows) == [encode_columns(encoder, [row])[0] for row in rows]


def test_template_arguments_change_the_ids(make_tokenizer):
    rows = [build_conversation(["q", "a"]), build_conversation(["q", "a"], chat_template_kwargs={"mode": "b"})]
    plain, other = (
        encode_rows(Encoder(build_template("chat", make_tokenizer(THINKING_TEMPLATE), None, kwargs)), rows)
        for kwargs in (None, {"mode": "b"})
    )
    assert plain[0] != other[0] == plain[1] == other[1]


# ---- errors


REFUSING = "{% if messages[0].content == 'bad' %}{{ raise_exception('a bad text') }}{% endif %}" + CHATML
BAD = build_conversation(["bad", "a"])


def test_a_conversation_that_the_template_refuses_is_named(make_tokenizer, cache):
    template = build_template("chat", make_tokenizer(REFUSING))
    rows = [build_turns([3, 3]), BAD]
    with pytest.raises(SFTError, match="^rows.json row 1: the chat template cannot render the conversation"):
        encode_rows(Encoder(template), rows)
    with pytest.raises(SFTError, match="^rows.json row 1: the chat template cannot render"):
        encode_dataset(build_dataset(rows), Encoder(template))
    with pytest.raises(SFTError, match="^row 1: the chat template cannot render"):
        encode_dataset(rows, Encoder(template))


def test_a_conversation_that_is_refused_without_its_oldest_turns_is_named(make_tokenizer):
    template = build_template("chat", make_tokenizer(REFUSING))
    rows = [build_turns([3, 3]), build_conversation(["q", "a" * 50, "bad", "b"])]
    encoder = Encoder(template, None, 60, "truncate_turns")
    with pytest.raises(SFTError, match="^rows.json row 1: the chat template cannot render the conversation"):
        encode_rows(encoder, rows)


def test_no_row_is_left(tokenizer, cache):
    template = build_template("role", tokenizer)
    with pytest.raises(SFTError, match="^no row is left to train on: 2 rows, 0 kept .*dropped: 2 nothing supervised"):
        encode_dataset(build_dataset([QUESTION] * 2), Encoder(template))
    with pytest.raises(SFTError, match="no row is left to train on: .*dropped: 3 longer than max_length"):
        encode_dataset(build_dataset(build_short_rows(3)), Encoder(template, max_length=4))


# ---- the whole data set and its statistics


@settings(deadline=None, max_examples=8)
@given(
    st.lists(LENGTHS, min_size=1, max_size=8),
    st.integers(25, 60),
    st.sampled_from(["drop", "truncate_answer", "truncate_turns"]),
)
def test_the_counts_add_up(tokenizer, rows, max_length, overlong):
    encoder = Encoder(build_template("role", tokenizer), None, max_length, overlong)
    # One row that is always kept, and one with nothing supervised.
    conversations = [build_turns(lengths) for lengths in [*rows, [1, 1]]] + [QUESTION]
    encoded, stats = encode_dataset(build_dataset(conversations), encoder)
    expected = [(ids, labels) for ids, labels, _ in encode_rows(encoder, conversations) if ids]
    outcomes = [outcome for _, _, outcome in encode_rows(encoder, conversations)]
    assert encoded.column_names == ["input_ids", "labels", "sequence_lengths", "computed_tokens"]
    assert list(zip(encoded["input_ids"], encoded["labels"])) == expected
    assert stats.rows == len(conversations) == stats.kept + sum(stats.dropped.values())
    assert stats.truncated == outcomes.count(TRUNCATED) <= stats.kept == len(expected)
    assert stats.dropped == {r: outcomes.count(r) for r in (TOO_LONG, UNSUPERVISED) if r in outcomes}
    lengths = [len(ids) for ids, _ in expected]
    assert max(lengths) <= max_length and stats.tokens == stats.computed_tokens == sum(lengths)
    assert stats.sequences == stats.kept and stats.dropped_sequences == 0  # of rows that are kept
    assert stats.supervised_tokens == sum(label != IGNORED for _, labels in expected for label in labels)
    assert (stats.length_quantiles["least"], stats.length_quantiles["most"]) == (min(lengths), max(lengths))
    assert stats.length_quantiles["median"] == int(np.median(lengths))


def test_the_printed_statistics(tokenizer, cache):
    rows = [build_turns([3, 5]), build_turns([9, 12, 9, 12]), QUESTION]
    encoder = Encoder(build_template("role", tokenizer), None, 32)
    _, stats = encode_dataset(build_dataset(rows), encoder)
    share = stats.supervised_tokens / stats.tokens
    assert str(stats) == (
        "3 rows, 1 kept (0 of them truncated), dropped: 1 longer than max_length, 1 nothing supervised\n"
        f"{stats.tokens} tokens, {share:.0%} supervised; tokens per sequence: least {stats.tokens}, "
        f"25% {stats.tokens}, median {stats.tokens}, 75% {stats.tokens}, 95% {stats.tokens}, most {stats.tokens}"
    )
    assert stats.supervised_tokens == 6
    _, stats = encode_dataset(build_dataset(rows[:1]), encoder)
    assert "dropped: none\n" in str(stats)
    _, stats = encode_dataset(build_dataset(rows[:1]), encoder)
    assert "dropped: none (read from the cache)\n" in str(stats)


def test_rows_are_stored_in_32_bits(tokenizer, cache):
    encoded, _ = encode_dataset(build_dataset(build_short_rows(2)), Encoder(build_template("chat", tokenizer)))
    dtypes = {getattr(feature, "feature", feature).dtype for feature in encoded.features.values()}
    assert dtypes == {"int32"}


# ---- the cache


def test_equal_content_is_read_from_the_cache(tokenizer, make_tokenizer, cache):
    rows = build_short_rows(5)
    first, stats = encode_dataset(build_dataset(rows), Encoder(build_template("role", tokenizer), "s"))
    assert not stats.cached
    # Other objects with the same content.
    cached_rows, stats = encode_dataset(build_dataset(rows), Encoder(build_template("role", make_tokenizer()), "s"))
    assert stats.cached and cached_rows.to_list() == first.to_list()
    assert len(list((cache / "encoded").iterdir())) == 1


CHANGES = {
    "max_length": {"max_length": 999},
    "system_prompt": {"system_prompt": "other"},
    "overlong": {"overlong": "truncate_answer"},
    "train_on": {"train_on": "last"},
}


@pytest.mark.parametrize(
    "change", [*CHANGES, *("data", "origin", "template", "tokenizer", "chat template", "kwargs", "format")]
)
def test_a_change_encodes_again(tokenizer, make_tokenizer, cache, monkeypatch, change):
    encoder = Encoder(build_template("chat", tokenizer), "s")
    rows, name = build_short_rows(3), "rows.json"
    assert not encode_dataset(build_dataset(rows), encoder)[1].cached
    assert encode_dataset(build_dataset(rows), encoder)[1].cached
    changed = dataclasses.replace(encoder, **CHANGES.get(change, {}))
    if change == "data":
        rows[2]["messages"][1]["content"] += "!"
    elif change == "origin":
        name = "others.json"
    elif change == "template":
        changed = dataclasses.replace(encoder, template=build_template("role", tokenizer))
    elif change == "tokenizer":
        changed_tokenizer = make_tokenizer()
        changed_tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
        changed = dataclasses.replace(encoder, template=build_template("chat", changed_tokenizer))
    elif change == "chat template":
        changed_tokenizer = make_tokenizer(CHATML.replace("<|im_end|>\n", "<|im_end|>"))
        changed = dataclasses.replace(encoder, template=build_template("chat", changed_tokenizer))
    elif change == "kwargs":
        changed = dataclasses.replace(encoder, template=build_template("chat", make_tokenizer(), None, {"x": 1}))
    elif change == "format":
        monkeypatch.setattr(encode, "ENCODING_FORMAT", encode.ENCODING_FORMAT + 1)
    assert not encode_dataset(build_dataset(rows, name), changed)[1].cached
    assert encode_dataset(build_dataset(rows, name), changed)[1].cached
    monkeypatch.undo()
    # The previous result is still in the cache.
    monkeypatch.setenv("SFT_PIPELINE_CACHE", str(cache))
    assert encode_dataset(build_dataset(build_short_rows(3)), encoder)[1].cached


FIXED_SYSTEM = "Be brief."
FIXED_TURNS = build_conversation(["Why?", "So.\n", "冬 <|im_end|>", "the answer"])
# Ids of the system prompt, first question, first answer, second question, second answer.
FIXED_IDS = {
    "role": (
        [1, 201, 5, 273, 297, 28, 36, 71, 223, 68, 84, 75, 71, 72, 16],
        [201, 5, 276, 28, 57, 74, 91, 33, 201, 5, 269, 275, 268, 54, 28],
        [53, 81, 16, 201, 2],
        [201, 5, 276, 28, 164, 231, 108, 223, 30, 94, 75, 79, 65, 71, 80, 70, 94, 32, 201, 5, 269, 275, 268, 54, 28],
        [288, 290, 284, 264, 2],
    ),
    "chat": (
        [1, 285, 296, 201, 36, 71, 223, 68, 84, 75, 71, 72, 16, 2],
        [201, 1, 289, 201, 57, 74, 91, 33, 2, 201, 1, 277, 287, 298, 201],
        [53, 81, 16, 201, 2],
        [201, 1, 289, 201, 164, 231, 108, 223, 30, 94, 75, 79, 65, 71, 80, 70, 94, 32, 2, 201, 1, 277, 287, 298, 201],
        [288, 290, 284, 264, 2],
    ),
}


@BOTH
def test_ids_and_labels_of_this_format(tokenizer, name):
    """Users' caches hold rows like these: rows that change need another ENCODING_FORMAT."""
    system, question_1, answer_1, question_2, answer_2 = FIXED_IDS[name]
    ids = system + question_1 + answer_1 + question_2 + answer_2
    mask_1, mask_2 = [IGNORED] * len(system + question_1), [IGNORED] * len(question_2)
    labels = (mask_1 + answer_1 + mask_2 + answer_2)[1:]
    last_labels = (mask_1 + [IGNORED] * len(answer_1) + mask_2 + answer_2)[1:]
    last_turns = system + question_2 + answer_2
    last_turns_labels = ([IGNORED] * len(system) + mask_2 + answer_2)[1:]
    expected = {
        ("drop", len(ids), "all"): (ids, [*labels, IGNORED], KEPT),
        ("drop", len(ids), "last"): (ids, [*last_labels, IGNORED], KEPT),
        ("drop", 50, "all"): ([], [], TOO_LONG),
        ("truncate_answer", 50, "all"): (ids[:50], [*labels[:49], IGNORED], TRUNCATED),
        ("truncate_turns", 50, "all"): (last_turns, [*last_turns_labels, IGNORED], TRUNCATED),
    }
    template = build_template(name, tokenizer)
    rows = {
        (overlong, max_length, train_on): encode_rows(
            Encoder(template, FIXED_SYSTEM, max_length, overlong, train_on), [FIXED_TURNS]
        )[0]
        for overlong, max_length, train_on in expected
    }
    assert rows == expected, (
        "the same messages give other ids or labels: raise ENCODING_FORMAT in sft_pipeline/data/encode.py, so that "
        "cached rows are encoded again, and update FIXED_IDS"
    )


def test_the_cache_key_depends_on_settings_template_tokenizer_and_format_alone(tokenizer, make_tokenizer, monkeypatch):
    encoder = Encoder(build_template("chat", tokenizer), "s", 100, "drop", "last")
    key = encoder.compute_cache_key()
    settings_of_key = repr(("s", 100, "drop", "last", "chat"))
    format_number = str(encode.ENCODING_FORMAT)
    assert key == hash_texts(settings_of_key, CHATML, "{}", hash_tokenizer(tokenizer), format_number)
    truncating = make_tokenizer()
    truncating("a b c", truncation=True, max_length=2, padding="max_length")  # encoding turns both off
    assert dataclasses.replace(encoder, template=build_template("chat", truncating)).compute_cache_key() == key

    lowercasing = make_tokenizer()
    lowercasing.backend_tokenizer.normalizer = normalizers.Lowercase()
    other_tokenizers = [lowercasing, make_tokenizer(CHATML.replace("<|im_end|>\n", "<|im_end|>"))]
    changes = [{"system_prompt": None}, {"max_length": 99}, {"overlong": "truncate_turns"}, {"train_on": "all"}]
    changes += [{"template": build_template("chat", changed)} for changed in other_tokenizers]
    changes += [{"template": build_template("role", tokenizer)}]
    changes += [{"template": build_template("chat", make_tokenizer(), None, {"x": value})} for value in (1, None, "1")]
    keys = {dataclasses.replace(encoder, **change).compute_cache_key() for change in changes}
    monkeypatch.setattr(encode, "ENCODING_FORMAT", encode.ENCODING_FORMAT + 1)
    assert len(keys | {key, encoder.compute_cache_key()}) == len(changes) + 2


def test_a_failed_encoding_leaves_nothing_in_the_cache(make_tokenizer, cache):
    template = build_template("chat", make_tokenizer(REFUSING))
    rows = build_dataset(
        [build_turns([3, 3])] * 1500 + [BAD]
    )  # the first thousand are written before the bad row is reached
    for _ in range(2):
        with pytest.raises(SFTError, match="row 1500: "):
            encode_dataset(rows, Encoder(template))
        assert not list((cache / "encoded").iterdir())


def test_two_processes_give_the_rows_of_one(tokenizer, tmp_path, monkeypatch):
    rows = build_dataset([*build_short_rows(4100), QUESTION, *build_short_rows(3)])
    encoder = Encoder(build_template("role", tokenizer), "s")
    results = []
    for num_proc in (1, 2):
        monkeypatch.setenv("SFT_PIPELINE_CACHE", str(tmp_path / str(num_proc)))
        encoded, stats = encode_dataset(rows, encoder, num_proc)
        assert not stats.cached and (stats.rows, stats.kept) == (4104, 4103)
        results.append((encoded["input_ids"][:], encoded["labels"][:]))
        cached_rows, stats = encode_dataset(rows, encoder, num_proc)
        assert stats.cached and cached_rows["input_ids"][:] == results[-1][0]
        files = list((tmp_path / str(num_proc)).glob("encoded/*/rows*.arrow"))
        assert len(files) == num_proc
    assert results[0] == results[1]


def test_an_error_in_another_process_is_the_same_line(make_tokenizer, cache):
    template = build_template("chat", make_tokenizer(REFUSING))
    rows = build_dataset([*build_short_rows(4100), BAD])
    with pytest.raises(SFTError, match="^rows.json row 4100: the chat template cannot render"):
        encode_dataset(rows, Encoder(template), num_proc=2)
    assert not list((cache / "encoded").iterdir())


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("SFT_PIPELINE_CACHE", str(tmp_path))
    assert get_cache_dir() == tmp_path
    monkeypatch.delenv("SFT_PIPELINE_CACHE")
    assert str(get_cache_dir()) == os.path.expanduser("~/.cache/sft_pipeline")
