"""Splits: row hashes, mixing by weight, held-out rows and overlap with them."""

import hashlib
import logging
import random
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from support.source_rows import QUICK, fails, talk

from sft_pipeline.data.messages import format_conversation, parse_conversation
from sft_pipeline.data.splits import drop_overlap, hash_row, hash_rows, mix_datasets, split_held_out
from sft_pipeline.utils.errors import SFTError


def hash_talk(*args, **keys):
    return hash_row({"messages": talk(*args, **keys)})


def table(rows):
    """A dataset of the messages of each row."""
    texts = [format_conversation({"messages": messages}) for messages in rows]
    return Dataset.from_dict({"conversation": texts, "origin": [f"row {n}" for n in range(len(rows))]})


def test_row_hash_is_pinned_and_counts_role_order_and_text():
    """The hash of a row without tools and reasoning is that of earlier releases: the same rows stay held out."""
    reference = hashlib.blake2b(b'[["user", "Hi"], ["assistant", "\\u00e9"]]', digest_size=8).digest()
    assert hash_talk(answer="é") == int.from_bytes(reference, "big") == 794376867648640232
    different = [talk(), talk("Hi "), talk("Hello", "Hi"), talk(system="Hi"), talk()[:1], talk() * 2, talk()[::-1]]
    assert len({hash_row({"messages": messages}) for messages in different}) == len(different)
    assert hash_row({"messages": talk()}, "mix") != hash_talk()


def test_row_hash_counts_what_the_model_reads():
    """Tools, calls and reasoning count; which answers are trained, and the template's arguments, do not."""
    user, answer = talk()
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "42"}}}
    number = {"type": "function", "function": {"name": "f", "arguments": {"a": 42}}}
    rows = [
        {"messages": [user, answer]},
        {"messages": [user, answer], "tools": [call]},
        {"messages": [user, {**answer, "reasoning_content": "Hm."}]},
        {"messages": [user, {**answer, "tool_calls": [call]}]},
        {"messages": [user, {**answer, "tool_calls": [number]}]},
        {"messages": [user, {"role": "tool", "content": "x"}, answer]},
        {"messages": [user, {"role": "tool", "content": "x", "name": "f"}, answer]},
        {"text": "Hi"},
        {"text": "Hello"},
    ]
    assert len({hash_row(row) for row in rows}) == len(rows)
    untrained = {"messages": [user, {**answer, "train": False}], "chat_template_kwargs": {"x": 1}}
    assert hash_row(untrained) == hash_row(rows[0])


def test_row_hash_is_the_same_in_another_process():
    row = {"messages": [{"role": "user", "content": "冬瓜"}], "tools": [{"b": 1, "a": None}]}
    code = f"from sft_pipeline.data.splits import hash_row; print(hash_row({row!r}))"
    here = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=here)
    assert int(run.stdout) == hash_row(row)


def numbered(rows):
    return [talk(str(number)) for number in rows]


def users(dataset):
    return [parse_conversation(text)["messages"][0]["content"] for text in dataset["conversation"]]


def test_row_hashes_are_the_hash_of_each_row():
    assert hash_rows(table(numbered(range(50)))).tolist() == [hash_talk(str(number)) for number in range(50)]


@QUICK
@given(st.lists(st.integers(0, 30), min_size=2, max_size=40), st.sampled_from([1, 3, 0.2, 0.5]), st.randoms())
def test_a_split_survives_reordering_and_shares_no_row(numbers, held_out, shuffler):
    def split(values):
        try:
            return [sorted(users(side)) for side in split_held_out(table(numbered(values)), held_out)]
        except SFTError:  # all rows on one side
            return None

    shuffled = list(numbers)
    shuffler.shuffle(shuffled)
    sides = split(numbers)
    assert split(shuffled) == sides
    if sides:
        train, eval_rows = sides
        assert not set(train) & set(eval_rows)
        assert sorted(train + eval_rows) == sorted(map(str, numbers))


def test_a_count_and_a_share_hold_out_what_they_say():
    dataset = table(numbered(range(2000)))
    train, held_out = split_held_out(dataset, 20)
    assert (len(train), len(held_out)) == (1980, 20)
    by_hash = sorted(range(2000), key=lambda number: hash_talk(str(number)))
    assert sorted(users(held_out)) == sorted(str(number) for number in by_hash[:20])
    train, held_out = split_held_out(dataset, 0.1)
    assert 150 < len(held_out) < 250 and len(train) + len(held_out) == 2000
    assert set(users(split_held_out(table(numbered(range(1000))), 0.1)[1])) <= set(
        users(held_out)
    )  # more rows move none across
    assert len(split_held_out(dataset, 5.0)[1]) == 5


def test_a_count_takes_all_copies():
    first = min(range(10), key=lambda number: hash_talk(str(number)))
    train, held_out = split_held_out(table(numbered(list(range(10)) + [first] * 3)), 1)
    assert users(held_out) == [str(first)] * 4 and len(train) == 9


@pytest.mark.parametrize(
    "held_out, parts",
    [
        (0, ["held_out: 0 must be a share between 0 and 1"]),
        (-3, ["held_out: -3 must be"]),
        (1.5, ["held_out: 1.5 must be"]),
        (float("nan"), ["held_out: nan must be"]),
        (float("inf"), ["held_out: inf must be"]),
        (10, ["held_out: 10 leaves none of 10 rows to train on; lower it"]),
        (99, ["held_out: 99 leaves none of 10 rows to train on; lower it"]),
        (1e-9, ["held_out: 1e-09 selects none of 10 rows; give a number of rows"]),
    ],
)
def test_hold_out_refuses(held_out, parts):
    fails(lambda: split_held_out(table(numbered(range(10))), held_out), *parts)


def test_mix_takes_each_part_by_its_weight():
    a, b = table(numbered(range(100))), table(numbered(range(100, 110)))
    assert users(mix_datasets([a, b])) == users(a) + users(b)
    assert users(mix_datasets([a, b], [0, 2])) == users(b) * 2
    half = users(mix_datasets([a], [0.5]))
    assert len(half) == 50 and half == sorted(set(half), key=int)
    assert sorted(users(mix_datasets([a, b], [1.5, 1]))) == sorted(users(a) + half + users(b))
    assert len(mix_datasets([b], [0.01])) == 1
    shuffled = table(numbered(random.Random(0).sample(range(100), 100)))
    assert sorted(users(mix_datasets([shuffled], [0.5])), key=int) == half


def test_what_mix_takes_says_nothing_about_what_is_held_out():
    half = mix_datasets([table(numbered(range(2000)))], [0.5])
    assert 60 < len(split_held_out(half, 0.1)[1]) < 140  # with one hash for both it would be 200


@pytest.mark.parametrize(
    "weights, parts",
    [
        ([1], ["train_data_weights: 1 weights for 2 datasets"]),
        ([1, -1], ["train_data_weights: -1 must be 0 or more"]),
        ([1, float("nan")], ["train_data_weights: nan must be"]),
        ([float("inf"), 1], ["train_data_weights: inf must be"]),
        ([0, 0.0], ["train_data_weights: all weights are 0"]),
    ],
)
def test_mix_refuses(weights, parts):
    fails(lambda: mix_datasets([table([talk()]), table([talk()])], weights), *parts)


def test_drop_overlap(caplog):
    train, held_out = table(numbered([1, 2, 3, 2])), table(numbered([2, 9]))
    with caplog.at_level(logging.INFO, "sft_pipeline"):
        assert users(drop_overlap(train, held_out)) == ["1", "3"]
        assert drop_overlap(train, table(numbered([9]))) is train
    assert caplog.messages == ["dropped 2 training rows that are in the evaluation data too"]
    fails(lambda: drop_overlap(held_out, held_out), "no row is left to train on")
