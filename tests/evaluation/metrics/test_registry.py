"""Loss, behaviour and the tables against plain references, with the value or error for empty input.

Overlap with references is tested in test_reference_overlap.py.
"""

import math
import random
import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_pipeline.evaluation.metrics import degeneration, likelihood, registry
from sft_pipeline.evaluation.metrics.words import count_han, units, words
from sft_pipeline.utils.errors import SFTError

quick = settings(deadline=None, max_examples=100)
ascii_text = st.text(alphabet=string.ascii_letters + string.digits + "   \n.,;:'!?-_$%<>&", max_size=60)
mixed_text = st.text(alphabet="ab 你好吗，。!", max_size=25)
few_letters = st.text(alphabet="ab ", max_size=60)

# Segmentation


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hi, 你好! snake_case 3.5", ["hi", "你", "好", "snake", "case", "3", "5"]),
        ("我用Python写1000行。", ["我", "用", "python", "写", "1000", "行"]),
        ("すしテ 한국어 Ünï été \U00020000x", ["す", "し", "テ", "한국어", "ünï", "été", "\U00020000", "x"]),
        ("e\u0301te\u0301", ["été"]),
        ("", []),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


@quick
@given(st.text(), ascii_text)
def test_units_are_the_words_and_the_marks_and_lose_nothing(text, ascii_words):
    assert [unit for unit in units(text) if words(unit)] == words(text)
    assert "".join(units(ascii_words)) == re.sub(r"\s", "", ascii_words.lower())


def test_count_han():
    assert count_han("你好，abc！すし") == 2


# Likelihood


@quick
@given(st.lists(st.tuples(st.floats(0, 700), st.integers(1, 99), st.integers(1, 400)), min_size=1, max_size=9))
def test_loss_figures_sum_the_rows_before_dividing(rows):
    nll, tokens, sizes = (list(column) for column in zip(*rows, strict=True))
    found = registry.loss_figures(nll, tokens, [t // 2 for t in tokens], sizes)
    assert found == pytest.approx(registry.loss_figures(sum(nll), sum(tokens), sum(t // 2 for t in tokens), sum(sizes)))
    assert found["nll_nats_per_token"] == pytest.approx(math.fsum(nll) / sum(tokens))
    assert math.log(found["perplexity"]) == pytest.approx(found["nll_nats_per_token"], abs=1e-12)
    assert found["bits_per_byte"] * sum(sizes) == pytest.approx(math.fsum(nll) * math.log2(math.e))


def test_a_uniform_model_over_256_bytes_has_8_bits_a_byte_and_perplexity_256():
    assert likelihood.bits_per_byte(10 * math.log(256), 10) == pytest.approx(8)
    assert likelihood.perplexity(10 * math.log(256), 10) == pytest.approx(256)
    assert likelihood.token_accuracy([1, 0, 2], [2, 2, 4]) == 0.375
    assert likelihood.utf8_bytes("a你") == 4


def test_a_diverged_loss_shows():
    assert likelihood.perplexity(1e6, 10) == math.inf
    assert math.isnan(likelihood.nll_nats_per_token([1.0, math.nan], [1, 1]))


@pytest.mark.parametrize("denominator", [0, [], [0, 0]])
def test_likelihood_without_tokens_is_an_error(denominator):
    for figure in (likelihood.nll_nats_per_token, likelihood.perplexity, likelihood.token_accuracy):
        with pytest.raises(SFTError, match="no supervised tokens to average over: the held-out set is empty"):
            figure([], denominator)
    with pytest.raises(SFTError, match="no bytes of supervised text to average over"):
        likelihood.bits_per_byte([], denominator)


# Behaviour


def test_stop_and_cap_rates():
    reasons = ["stop", "length", "stop", "error"]
    assert degeneration.stop_rate(reasons) == 0.5 and degeneration.cap_rate(reasons) == 0.25


@quick
@given(st.lists(st.integers(0, 3), max_size=20), st.integers(1, 4))
def test_repeated_ngrams_agree_with_counting(sequence, n):
    seen, repeats = [], 0
    for i in range(len(sequence) - n + 1):
        gram = sequence[i : i + n]
        repeats += gram in seen
        seen.append(gram)
    assert degeneration.repeated_ngram_share(sequence, n) == pytest.approx(repeats / len(seen) if seen else 0)


def test_rep_and_distinct_by_hand():
    answers = ["a b a b a b", "a b c d e f", "", "你好你好你"]
    assert degeneration.rep_n_share(answers, 2) == pytest.approx((0.6 + 0 + 0 + 0.5) / 4)
    assert degeneration.distinct_n_share(["a b c", "A b d"], 2) == 0.75
    assert degeneration.distinct_n_share(["", "a"], 2) == 0


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
    assert degeneration.loop_characters(text, repeats) == longest


@quick
@given(mixed_text, st.text(alphabet="ab你好，.", min_size=1, max_size=30), st.integers(3, 9), st.data())
def test_any_period_thrice_over_thirty_characters_is_a_loop_wherever_it_is_cut(start, period, repeats, data):
    cut = data.draw(st.integers(0, len(period) - 1))
    tail = period * repeats + period[:cut]
    found = degeneration.loop_characters(start + tail)
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
    assert degeneration.loop_rate([answer, "Fine."]) == expected / 2


def test_loops_take_linear_time_in_the_answer():
    assert degeneration.loop_characters("ab" * 100_000) == 200_000


@quick
@given(mixed_text, mixed_text)
def test_prompt_echo_agrees_with_trying_every_run(prompt, answer):
    asked, answered = words(prompt), words(answer)
    runs = [asked[i:j] for i in range(len(asked)) for j in range(i + 1, len(asked) + 1)]
    spots = {tuple(answered[i : i + n]) for n in range(1, len(answered) + 1) for i in range(len(answered))}
    longest = max((len(run) for run in runs if tuple(run) in spots), default=0)
    assert degeneration.prompt_echo(prompt, answer) == pytest.approx(longest / len(asked) if asked else 0)
    assert degeneration.prompt_echo(prompt, f"{answer} {prompt}") == (1 if asked else 0)


def test_prompt_echo_in_both_languages():
    assert degeneration.prompt_echo("What is the sun?", "The sun is a star.") == 0.5
    assert degeneration.prompt_echo_share(["什么是太阳？", "Hi"], ["太阳是恒星。", ""]) == 0.2


def test_answer_length_ratio_is_of_totals():
    assert degeneration.answer_length_ratio(["a b c d", "你好吗", ""], ["a", "你好！", "c d"]) == pytest.approx(7 / 5)
    with pytest.raises(SFTError, match="needs references with words in them: all are empty"):
        degeneration.answer_length_ratio(["a"], ["!"])


# Tables


def test_answer_figures_are_the_means_of_row_figures():
    generator = random.Random(0)
    vocabulary = ["a", "b", "你好", "stop.", "喂"]
    texts = [" ".join(generator.choices(vocabulary, k=generator.randint(0, 30))) for _ in range(60)]
    answers, prompts, references = [*texts[:20], "好" * 90], texts[20:41], [t + " end" for t in texts[39:]]
    reasons = generator.choices(["stop", "length"], k=21)
    together = registry.answer_figures(answers, prompts=prompts, references=references, finish_reasons=reasons)
    rows = [
        registry.row_figures(a, prompt=p, reference=r, finish_reason=f)
        for a, p, r, f in zip(answers, prompts, references, reasons, strict=True)
    ]
    shared = set(together) & set(rows[0])
    assert shared == set(rows[0]) - {"answer_words", "reference_words"}
    assert set(together) - shared == {
        "distinct_1_share", "distinct_2_share", "answer_length_ratio", "bleu_percent", "chrf_percent",
    }  # fmt: skip
    for name in shared:
        assert together[name] == pytest.approx(sum(row[name] for row in rows) / 21), name
    lengths = [sum(row[name] for row in rows) for name in ("answer_words", "reference_words")]
    assert together["answer_length_ratio"] == pytest.approx(lengths[0] / lengths[1])
    assert together["loop_rate"] >= 1 / 21


def test_figures_without_their_columns_are_left_out():
    always = {"rep_2_share", "rep_3_share", "rep_4_share", "loop_rate"}
    assert set(registry.answer_figures(["a"])) == always | {"distinct_1_share", "distinct_2_share"}
    assert set(registry.row_figures("")) == always | {"answer_words"}


@pytest.mark.parametrize(
    "call",
    [
        lambda: registry.answer_figures([]),
        lambda: registry.stopping_figures([]),
        lambda: registry.overlap_figures([], []),
        lambda: degeneration.distinct_n_share([], 1),
        lambda: degeneration.loop_rate([]),
        lambda: degeneration.prompt_echo_share([], []),
    ],
)
def test_no_answers_is_an_error(call):
    with pytest.raises(SFTError, match="no answers to score: give at least one prompt that was answered"):
        call()


@pytest.mark.parametrize("column", ["prompts", "references", "finish_reasons"])
def test_columns_of_different_lengths_are_an_error(column):
    with pytest.raises(SFTError, match=r"one of each is needed for every answer, got .*\b1\b"):
        registry.answer_figures(["a", "b"], **{column: ["a"]})
