"""Encoding: the shift, the length policies, the account that adds up, and the cache."""

import dataclasses
import os

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import CHATML
from tokenizers import normalizers

from sft_pipeline.data import encode
from sft_pipeline.data.chat_templates import TokenSpan, build_template
from sft_pipeline.data.encode import (
    TRUNCATED,
    IGNORED,
    KEPT,
    TOO_LONG,
    UNSUPERVISED,
    Encoder,
    build_input_ids_and_labels,
    encode_dataset,
)
from sft_pipeline.data.messages import add_system_prompt
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.files import get_cache_dir

STOP = 2
FORGETFUL = CHATML.replace("message['content']", "(message['content'] if message.role == 'user' or loop.last else '')")
BOTH = pytest.mark.parametrize("name", ["role", "chat"])
QUICK = settings(deadline=None, max_examples=50)
# Lengths of user and assistant messages in turn; "?" and "x" are one token each, so a length is a number of tokens.
LENGTHS = st.integers(1, 4).flatmap(lambda n: st.lists(st.integers(1, 12), min_size=2 * n, max_size=2 * n))
CONVERSATIONS = st.lists(LENGTHS, min_size=1, max_size=5)


def conversation(lengths: list[int]) -> list[dict[str, str]]:
    """Each turn begins with its number, so that no two are alike."""
    text = [(f"{at}" + "x?" * 6)[:length] for at, length in enumerate(lengths)]
    return [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(text)]


def encode_rows(encoder: Encoder, conversations) -> list[tuple[list[int], list[int], str]]:
    batch = {"messages": conversations, "origin": [f"rows.json row {at}" for at in range(len(conversations))]}
    columns = encoder(batch)
    assert list(columns) == ["input_ids", "labels", "outcome"]
    return list(zip(*columns.values()))


def table(conversations, name: str = "rows.json") -> Dataset:
    origins = [f"{name} row {at}" for at in range(len(conversations))]
    return Dataset.from_dict({"messages": conversations, "origin": origins})


def simple_rows(count: int) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": f"q{at}"}, {"role": "assistant", "content": f"a{at}"}] for at in range(count)]


def full_row(encoder: Encoder, messages) -> tuple[list[int], list[bool]]:
    """Ids and whether each is supervised, by the plainest reading of the template's runs."""
    [runs] = encoder.template.render([add_system_prompt(messages, encoder.system_prompt)], encoder.train_on)
    return [i for run in runs for i in run.ids], [run.supervised for run in runs for _ in run.ids]


# ---- the shift


def test_shift_by_hand():
    runs = [TokenSpan([5, 6], False), TokenSpan([7, 8], True), TokenSpan([9], False), TokenSpan([STOP], True)]
    assert build_input_ids_and_labels(runs) == ([5, 6, 7, 8, 9, STOP], [IGNORED, 7, 8, IGNORED, STOP, IGNORED])
    assert build_input_ids_and_labels(runs, 3) == ([5, 6, 7], [IGNORED, 7, IGNORED])
    assert build_input_ids_and_labels([TokenSpan([7, 8], True)]) == ([7, 8], [8, IGNORED])


@BOTH
@pytest.mark.parametrize("train_on", ["all", "last"])
@QUICK
@given(CONVERSATIONS)
def test_a_label_is_the_next_token_where_it_is_supervised(tokenizer, name, train_on, rows):
    encoder = Encoder(build_template(name, tokenizer), "s", train_on=train_on)
    conversations = [conversation(lengths) for lengths in rows]
    for messages, (ids, labels, outcome) in zip(conversations, encode_rows(encoder, conversations)):
        tokens, supervised = full_row(encoder, messages)
        assert (ids, outcome, len(labels), labels[-1]) == (tokens, KEPT, len(ids), IGNORED)
        for at, label in enumerate(labels[:-1]):
            assert label == (ids[at + 1] if supervised[at + 1] else IGNORED)
        answers = len(messages) // 2 if train_on == "all" else 1
        assert labels.count(STOP) == answers  # the stop token of every supervised turn


# ---- the length policies


@BOTH
@QUICK
@given(CONVERSATIONS, st.integers(1, 90))
def test_drop(tokenizer, name, rows, max_length):
    encoder = Encoder(build_template(name, tokenizer), "s", max_length, "drop")
    conversations = [conversation(lengths) for lengths in rows]
    for messages, (ids, labels, outcome) in zip(conversations, encode_rows(encoder, conversations)):
        tokens, _ = full_row(encoder, messages)
        if len(tokens) <= max_length:
            assert (ids, outcome) == (tokens, KEPT)
        else:
            assert (ids, labels, outcome) == ([], [], TOO_LONG)


@BOTH
@QUICK
@given(CONVERSATIONS, st.integers(1, 90))
def test_truncate_answer(tokenizer, name, rows, max_length):
    encoder = Encoder(build_template(name, tokenizer), "s", max_length, "truncate_answer", "last")
    conversations = [conversation(lengths) for lengths in rows]
    for messages, (ids, labels, outcome) in zip(conversations, encode_rows(encoder, conversations)):
        tokens, supervised = full_row(encoder, messages)
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
    conversations = [conversation(lengths) for lengths in rows]
    for messages, row in zip(conversations, encode_rows(encoder, conversations)):
        # The longest of the conversation's ends (all of it, less one exchange, ...) that fits; the last one at least.
        ends = [encode_rows(unlimited, [messages[at:]])[0] for at in range(0, len(messages), 2)]
        fitting = [end for end in ends if len(end[0]) <= max_length]
        expected = (*fitting[0][:2], KEPT if fitting[0] is ends[0] else TRUNCATED) if fitting else ([], [], TOO_LONG)
        assert row == expected


def test_truncate_turns_keeps_the_rows_own_system_message(tokenizer):
    messages = [{"role": "system", "content": "own"}, *conversation([9, 9, 9, 9])]
    encoder = Encoder(build_template("role", tokenizer), "default", 60, "truncate_turns")
    [(ids, _, outcome)] = encode_rows(encoder, [messages])
    assert outcome == TRUNCATED
    last_question, last_answer = (message["content"] for message in messages[-2:])
    assert tokenizer.decode(ids) == (
        f"<|im_start|>\n#SYSTEM:own\n#USER:{last_question}\n#ASSISTANT:{last_answer}<|im_end|>"
    )


def test_a_row_cut_at_the_stop_token_alone(tokenizer):
    """One token too many, and that is the stop token."""
    template = build_template("role", tokenizer)
    messages = conversation([3, 5])
    length = len(full_row(Encoder(template), messages)[0])
    [(ids, labels, outcome)] = encode_rows(Encoder(template, None, length - 1, "truncate_answer"), [messages])
    assert (len(ids), outcome) == (length - 1, TRUNCATED)
    assert STOP not in ids and STOP not in labels


def test_a_row_with_nothing_supervised(tokenizer):
    question = [{"role": "user", "content": "q"}]
    for overlong in ("drop", "truncate_answer", "truncate_turns"):
        encoder = Encoder(build_template("role", tokenizer), None, 100, overlong)
        assert encode_rows(encoder, [question]) == [([], [], UNSUPERVISED)]


# ---- errors


def test_a_template_that_rewrites_history_names_the_row(make_tokenizer, cache):
    template = build_template("chat", make_tokenizer(FORGETFUL))
    rows = [conversation([3, 3]), conversation([3, 3, 3, 3])]
    with pytest.raises(SFTError, match="^rows.json row 1: the chat template rewrites the conversation before answer 1"):
        encode_rows(Encoder(template), rows)
    with pytest.raises(SFTError, match="^rows.json row 1: the chat template rewrites"):
        encode_dataset(table(rows), Encoder(template))
    encoded, account = encode_dataset(table(rows), Encoder(template, train_on="last"))
    assert len(encoded) == account.kept == 2


def test_no_row_is_left(tokenizer, cache):
    template = build_template("role", tokenizer)
    with pytest.raises(SFTError, match="^no row is left to train on: 2 rows, 0 kept .*dropped: 2 nothing supervised"):
        encode_dataset(table([[{"role": "user", "content": "q"}]] * 2), Encoder(template))
    with pytest.raises(SFTError, match="no row is left to train on: .*dropped: 3 longer than max_length"):
        encode_dataset(table(simple_rows(3)), Encoder(template, max_length=4))


# ---- the whole data set and its account


@settings(deadline=None, max_examples=8)
@given(
    st.lists(LENGTHS, min_size=1, max_size=8),
    st.integers(25, 60),
    st.sampled_from(["drop", "truncate_answer", "truncate_turns"]),
)
def test_the_account_adds_up(tokenizer, rows, max_length, overlong):
    encoder = Encoder(build_template("role", tokenizer), None, max_length, overlong)
    # One row that is always kept, and one with nothing supervised.
    conversations = [conversation(lengths) for lengths in [*rows, [1, 1]]] + [[{"role": "user", "content": "q"}]]
    encoded, account = encode_dataset(table(conversations), encoder)
    expected = [(ids, labels) for ids, labels, _ in encode_rows(encoder, conversations) if ids]
    outcomes = [outcome for _, _, outcome in encode_rows(encoder, conversations)]
    assert encoded.column_names == ["input_ids", "labels"]
    assert list(zip(encoded["input_ids"], encoded["labels"])) == expected
    assert account.rows == len(conversations) == account.kept + sum(account.dropped.values())
    assert account.truncated == outcomes.count(TRUNCATED) <= account.kept == len(expected)
    assert account.dropped == {r: outcomes.count(r) for r in (TOO_LONG, UNSUPERVISED) if r in outcomes}
    lengths = [len(ids) for ids, _ in expected]
    assert max(lengths) <= max_length and account.tokens == sum(lengths)
    assert account.supervised_tokens == sum(label != IGNORED for _, labels in expected for label in labels)
    assert (account.length_quantiles["least"], account.length_quantiles["most"]) == (min(lengths), max(lengths))
    assert account.length_quantiles["median"] == int(np.median(lengths))


def test_the_account_in_words(tokenizer, cache):
    rows = [conversation([3, 5]), conversation([9, 12, 9, 12]), [{"role": "user", "content": "q"}]]
    encoder = Encoder(build_template("role", tokenizer), None, 32)
    _, account = encode_dataset(table(rows), encoder)
    share = account.supervised_tokens / account.tokens
    assert str(account) == (
        "3 rows, 1 kept (0 of them truncated), dropped: 1 longer than max_length, 1 nothing supervised\n"
        f"{account.tokens} tokens, {share:.0%} supervised; tokens a row: least {account.tokens}, 25% {account.tokens}, "
        f"median {account.tokens}, 75% {account.tokens}, 95% {account.tokens}, most {account.tokens}"
    )
    assert account.supervised_tokens == 6
    _, account = encode_dataset(table(rows[:1]), encoder)
    assert "dropped: none\n" in str(account)
    _, account = encode_dataset(table(rows[:1]), encoder)
    assert "dropped: none (encoded before)\n" in str(account)


def test_rows_are_stored_in_32_bits(tokenizer, cache):
    encoded, _ = encode_dataset(table(simple_rows(2)), Encoder(build_template("chat", tokenizer)))
    assert {feature.feature.dtype for feature in encoded.features.values()} == {"int32"}


# ---- the cache


def test_the_same_again_is_read_from_the_cache(tokenizer, make_tokenizer, cache):
    rows = simple_rows(5)
    first, account = encode_dataset(table(rows), Encoder(build_template("role", tokenizer), "s"))
    assert not account.cached
    # Other objects of the same content: nothing but the content counts.
    again, account = encode_dataset(table(rows), Encoder(build_template("role", make_tokenizer()), "s"))
    assert account.cached and again.to_list() == first.to_list()
    assert len(list((cache / "encoded").iterdir())) == 1


CHANGES = {
    "max_length": {"max_length": 999},
    "system_prompt": {"system_prompt": "other"},
    "overlong": {"overlong": "truncate_answer"},
    "train_on": {"train_on": "last"},
}


@pytest.mark.parametrize("change", [*CHANGES, "data", "origin", "template", "tokenizer", "chat template", "code"])
def test_a_change_encodes_anew(tokenizer, make_tokenizer, cache, monkeypatch, change):
    encoder = Encoder(build_template("chat", tokenizer), "s")
    rows, name = simple_rows(3), "rows.json"
    assert not encode_dataset(table(rows), encoder)[1].cached
    assert encode_dataset(table(rows), encoder)[1].cached
    changed = dataclasses.replace(encoder, **CHANGES.get(change, {}))
    if change == "data":
        rows[2][1]["content"] += "!"
    elif change == "origin":
        name = "others.json"
    elif change == "template":
        changed = dataclasses.replace(encoder, template=build_template("role", tokenizer))
    elif change == "tokenizer":
        own = make_tokenizer()
        own.backend_tokenizer.normalizer = normalizers.Lowercase()
        changed = dataclasses.replace(encoder, template=build_template("chat", own))
    elif change == "chat template":
        own = make_tokenizer(CHATML.replace("<|im_end|>\n", "<|im_end|>"))
        changed = dataclasses.replace(encoder, template=build_template("chat", own))
    elif change == "code":
        monkeypatch.setattr(encode, "_code", lambda: "another release")
    assert not encode_dataset(table(rows, name), changed)[1].cached
    assert encode_dataset(table(rows, name), changed)[1].cached
    monkeypatch.undo()
    # And what was there is there still.
    monkeypatch.setenv("SFT_PIPELINE_CACHE", str(cache))
    assert encode_dataset(table(simple_rows(3)), encoder)[1].cached


def test_a_run_that_was_broken_off_leaves_nothing_to_read(make_tokenizer, cache):
    template = build_template("chat", make_tokenizer(FORGETFUL))
    good, bad = conversation([3, 3]), conversation([3, 3, 3, 3])
    rows = table([good] * 1500 + [bad])  # the first thousand are written before the bad row is met
    for _ in range(2):
        with pytest.raises(SFTError, match="row 1500: "):
            encode_dataset(rows, Encoder(template))
        assert not list((cache / "encoded").iterdir())


def test_two_processes_give_the_rows_of_one(tokenizer, tmp_path, monkeypatch):
    rows = table([*simple_rows(4100), [{"role": "user", "content": "q"}], *simple_rows(3)])
    encoder = Encoder(build_template("role", tokenizer), "s")
    made = []
    for num_proc in (1, 2):
        monkeypatch.setenv("SFT_PIPELINE_CACHE", str(tmp_path / str(num_proc)))
        encoded, account = encode_dataset(rows, encoder, num_proc)
        assert not account.cached and (account.rows, account.kept) == (4104, 4103)
        made.append((encoded["input_ids"][:], encoded["labels"][:]))
        again, account = encode_dataset(rows, encoder, num_proc)
        assert account.cached and again["input_ids"][:] == made[-1][0]
        files = list((tmp_path / str(num_proc)).glob("encoded/*/rows*.arrow"))
        assert len(files) == num_proc
    assert made[0] == made[1]


def test_an_error_in_another_process_is_the_same_line(make_tokenizer, cache):
    template = build_template("chat", make_tokenizer(FORGETFUL))
    rows = table([*simple_rows(4100), conversation([3, 3, 3, 3])])
    with pytest.raises(SFTError, match="^rows.json row 4100: the chat template rewrites"):
        encode_dataset(rows, Encoder(template), num_proc=2)
    assert not list((cache / "encoded").iterdir())


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("SFT_PIPELINE_CACHE", str(tmp_path))
    assert get_cache_dir() == tmp_path
    monkeypatch.delenv("SFT_PIPELINE_CACHE")
    assert str(get_cache_dir()) == os.path.expanduser("~/.cache/sft_pipeline")
