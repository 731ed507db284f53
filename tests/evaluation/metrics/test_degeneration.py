"""Degeneration: repetition, loops and copies of the prompt against exhaustive search."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.texts import quick

from sft_pipeline.evaluation.metrics import degeneration
from sft_pipeline.evaluation.metrics.registry import METRICS
from sft_pipeline.evaluation.metrics.words import split_words

mixed_text = st.text(alphabet="ab 你好吗，。!", max_size=25)
few_letters = st.text(alphabet="ab ", max_size=60)


@quick
@given(st.lists(st.integers(0, 3), max_size=20), st.integers(1, 4))
def test_repeated_ngrams_agree_with_counting(sequence, n):
    seen, repeats = [], 0
    for i in range(len(sequence) - n + 1):
        gram = sequence[i : i + n]
        repeats += gram in seen
        seen.append(gram)
    assert degeneration.compute_repeated_ngram_share(sequence, n) == pytest.approx(repeats / len(seen) if seen else 0)


def test_rep_and_distinct_by_hand():
    answers = ["a b a b a b", "a b c d e f", "", "你好你好你"]
    assert METRICS["rep_2_share"].compute({"predictions": answers}) == pytest.approx((0.6 + 0 + 0 + 0.5) / 4)
    assert degeneration.compute_distinct_n_share(["a b c", "A b d"], 2) == 0.75
    assert degeneration.compute_distinct_n_share(["", "a"], 2) == 0


@quick
@given(few_letters, st.integers(2, 4))
def test_loops_agree_with_trying_every_tail_and_period(text, repeats):
    text = "".join(text.split())
    longest = 0
    for length in range(1, len(text) + 1):
        tail = text[-length:]
        periods = range(1, length // repeats + 1)
        if any(all(tail[i] == tail[i - p] for i in range(p, length)) for p in periods):
            longest = length
    assert degeneration.count_loop_characters(text, repeats) == longest


@quick
@given(mixed_text, st.text(alphabet="ab你好，.", min_size=1, max_size=30), st.integers(3, 9), st.data())
def test_any_period_thrice_over_thirty_characters_is_a_loop_wherever_it_is_cut(start, period, repeats, data):
    cut = data.draw(st.integers(0, len(period) - 1))
    tail = period * repeats + period[:cut]
    found = degeneration.count_loop_characters(start + tail)
    assert found >= len(tail)
    assert degeneration.is_loop(start + tail) == (found >= 30)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("What is it? I am a student. I am a student. I am a student. I am", True),
        ("I am a student.\n\nI am a student.\nI am a student.", True),
        ("人工智能是什么？" * 4, True),
        ("人工智能是什么？" * 3, False),
        ("你可能猜到，" * 6 + "你可能\ufffd", True),
        ("ha" * 40, True),
        ("0" * 40, True),
        ("ha ha ha ha!", False),
        ("No. No. No.", False),
        ("| a | b |\n| --- | --- | --- |", False),
        ("I am a student. " * 9 + "And that is all there is to say about it.", False),
        (" \n" * 90, False),
        ("", False),
    ],
)
def test_what_is_a_loop(answer, expected):
    assert degeneration.is_loop(answer) is expected
    assert METRICS["loop_rate"].compute({"predictions": [answer, "Fine."]}) == expected / 2


def test_loops_take_linear_time_in_the_answer():
    assert degeneration.count_loop_characters("ab" * 100_000) == 200_000


@quick
@given(mixed_text, mixed_text)
def test_prompt_echo_agrees_with_trying_every_run(prompt, answer):
    asked, answered = split_words(prompt), split_words(answer)
    runs = [asked[i:j] for i in range(len(asked)) for j in range(i + 1, len(asked) + 1)]
    spots = {tuple(answered[i : i + n]) for n in range(1, len(answered) + 1) for i in range(len(answered))}
    longest = max((len(run) for run in runs if tuple(run) in spots), default=0)
    assert degeneration.compute_prompt_echo(prompt, answer) == pytest.approx(longest / len(asked) if asked else 0)
    assert degeneration.compute_prompt_echo(prompt, f"{answer} {prompt}") == (1 if asked else 0)


def test_prompt_echo_in_both_languages():
    assert degeneration.compute_prompt_echo("What is the sun?", "The sun is a star.") == 0.5
    columns = {"prompts": ["什么是太阳？", "Hi"], "predictions": ["太阳是恒星。", ""]}
    assert METRICS["prompt_echo_share"].compute(columns) == 0.2
