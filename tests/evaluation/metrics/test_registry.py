"""Loss, rates of answers and the registry against plain references, with the value or error for empty input.

Functions of texts are tested with their modules, `evaluate` in test_hf_metrics.py.
"""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.texts import quick

from sft_pipeline.evaluation.metrics.hf_metrics import compute_metrics
from sft_pipeline.evaluation.metrics.registry import METRICS, NUMBER_COLUMNS, build_answer_columns, get_metric
from sft_pipeline.utils.errors import SFTError

# Loss


def score_losses(*columns):
    return compute_metrics(dict(zip(NUMBER_COLUMNS, columns, strict=True)))


@quick
@given(st.lists(st.tuples(st.floats(0, 700), st.integers(1, 99), st.integers(1, 400)), min_size=1, max_size=9))
def test_loss_metrics_sum_the_rows_before_dividing(rows):
    nll, tokens, sizes = (list(column) for column in zip(*rows, strict=True))
    found = score_losses(nll, tokens, [t // 2 for t in tokens], sizes)
    assert found == pytest.approx(score_losses([sum(nll)], [sum(tokens)], [sum(t // 2 for t in tokens)], [sum(sizes)]))
    assert found["nll_nats_per_token"] == pytest.approx(math.fsum(nll) / sum(tokens))
    assert math.log(found["perplexity"]) == pytest.approx(found["nll_nats_per_token"], abs=1e-12)
    assert found["bits_per_byte"] * sum(sizes) == pytest.approx(math.fsum(nll) * math.log2(math.e))


def test_a_uniform_model_over_256_bytes_has_8_bits_a_byte_and_perplexity_256():
    found = score_losses([10 * math.log(256), 0.0], [10, 0], [4, 1], [10, 0])
    assert found["bits_per_byte"] == pytest.approx(8)
    assert found["perplexity"] == pytest.approx(256)
    assert METRICS["token_accuracy"].compute({"correct": [1, 0, 2], "tokens": [2, 2, 4]}) == 0.375


def test_a_diverged_loss_shows():
    assert METRICS["perplexity"].compute({"nll_nats": [1e6], "tokens": [10]}) == math.inf
    assert math.isnan(score_losses([1.0, math.nan], [1, 1], [0, 0], [4, 4])["nll_nats_per_token"])


@pytest.mark.parametrize("denominators", [[], [0], [0, 0]])
def test_a_ratio_without_a_denominator_is_an_error(denominators):
    columns = dict.fromkeys(NUMBER_COLUMNS, denominators)
    for name in ("nll_nats_per_token", "perplexity", "token_accuracy"):
        with pytest.raises(SFTError, match=r"^\w+: all rows of tokens are empty or 0; add rows that are not$"):
            METRICS[name].compute(columns)
    with pytest.raises(SFTError, match="^bits_per_byte: all rows of utf8_bytes are empty or 0"):
        METRICS["bits_per_byte"].compute(columns)


# Answers


def test_stop_and_cap_rates():
    reasons = {"finish_reasons": ["stop", "length", "stop", "error"]}
    assert METRICS["stop_rate"].compute(reasons) == 0.5 and METRICS["cap_rate"].compute(reasons) == 0.25


def test_answer_length_ratio_is_of_totals():
    columns = {"predictions": ["a b c d", "你好吗", ""], "references": ["a", "你好！", "c d"]}
    assert METRICS["answer_length_ratio"].compute(columns) == pytest.approx(7 / 5)
    with pytest.raises(SFTError, match="^answer_length_ratio: all rows of references are empty or 0"):
        METRICS["answer_length_ratio"].compute({"predictions": ["a"], "references": ["!"]})


# The registry


def test_a_value_over_rows_is_the_sum_of_the_rows_numerators_over_that_of_their_denominators():
    generator = random.Random(0)
    vocabulary = ["a", "b", "你好", "stop.", "喂"]
    texts = [" ".join(generator.choices(vocabulary, k=generator.randint(0, 30))) for _ in range(60)]
    answers, prompts, references = [*texts[:20], "好" * 90], texts[20:41], [t + " end" for t in texts[39:]]
    reasons = generator.choices(["stop", "length"], k=21)
    losses = {name: [generator.uniform(1, 50) for _ in range(21)] for name in NUMBER_COLUMNS}
    columns = {**losses, **build_answer_columns(answers, prompts, references, reasons, [None] * 21)}
    metrics = compute_metrics(columns)
    assert set(metrics) == set(METRICS) - {"instructions_followed_rate", "tool_call_match_rate"}
    without_rows = {"perplexity", "distinct_1_share", "distinct_2_share", "bleu_percent", "chrf_percent"}
    assert without_rows == {name for name, metric in METRICS.items() if metric.compute_row is None}
    for name in set(metrics) - without_rows:
        numerators, denominators = METRICS[name].compute_rows(columns)
        assert metrics[name] == pytest.approx(sum(numerators) / sum(denominators)), name
        assert len(numerators) == 21
        if name not in ("nll_nats_per_token", "bits_per_byte", "token_accuracy", "answer_length_ratio"):
            assert (denominators == 1).all()
    assert metrics["loop_rate"] >= 1 / 21


def test_metrics_without_their_columns_are_left_out():
    always = {"rep_2_share", "rep_3_share", "rep_4_share", "distinct_1_share", "distinct_2_share", "loop_rate"}
    assert set(compute_metrics({"predictions": ["a"]})) == always
    without_words = build_answer_columns(["a"], ["b"], ["!"], ["stop"], [None])
    assert set(compute_metrics(without_words)) == always | {"stop_rate", "cap_rate", "prompt_echo_share"}


def test_rows_whose_reference_calls_tools_count_in_the_match_rate_and_not_in_the_overlap():
    answers, prompts, reasons = ["the answer", 'f({"n": 1})', "of 3 words"], ["a", "b", "c"], ["stop"] * 3
    references, calls_match = ["the answer", 'f({"n": 1})', "of three words"], [None, True, None]
    columns = build_answer_columns(answers, prompts, references, reasons, calls_match)
    metrics, texts = compute_metrics(columns), {"predictions": answers[::2], "references": references[::2]}
    overlap = [name for name, metric in METRICS.items() if "references" in metric.columns]
    assert len(overlap) == 6
    for name in overlap:
        assert metrics[name] == METRICS[name].compute(texts), name
    _, denominators = METRICS["word_f1"].compute_rows(columns)
    assert metrics["tool_call_match_rate"] == metrics["stop_rate"] == 1 and denominators.tolist() == [1, 0, 1]
    calls_alone = build_answer_columns(answers, prompts, references, reasons, [True, False, False])
    metrics = compute_metrics(calls_alone)
    assert metrics["tool_call_match_rate"] == 1 / 3 and not metrics.keys() & set(overlap)


def test_no_answers_is_an_error():
    for name in ("predictions", "finish_reasons", "nll_nats"):
        with pytest.raises(SFTError, match="^no answers to score; give at least one$"):
            compute_metrics({name: []})


@pytest.mark.parametrize("column", ["prompts", "references", "finish_reasons"])
def test_columns_of_different_lengths_are_an_error(column):
    with pytest.raises(SFTError, match=rf"^columns of different lengths: .*'predictions': 2, '{column}': 1"):
        compute_metrics({"predictions": ["a", "b"], column: ["a"]})


def test_titles_units_and_formats():
    loss, rate = METRICS["nll_nats_per_token"], METRICS["loop_rate"]
    assert (loss.label, loss.heading) == ("held-out loss, nats/token",) * 2
    assert (loss.format(1.23456), loss.format_change(0.5), loss.rounded.format(2)) == ("1.235", "+0.500", "2.000")
    assert (rate.label, rate.heading) == ("answers in a loop", "loop (复读机) rate, %")
    assert (rate.format(0.256), rate.format_change(0.5), rate.format_number(0.5, "+")) == ("25.6%", "+50.0%", "+50.0")
    assert (rate.rounded.format(0.256), rate.rounded.format_change(-0.5)) == ("26%", "-50%")
    names = [metric.heading for metric in METRICS.values()]
    assert len(set(names)) == len(names) and all(metric.description for metric in METRICS.values())


def test_stored_values_that_are_no_metric_by_themselves_have_a_title():
    group = get_metric("instructions_followed_rate_language_en")
    assert (group.title, group.format(0.5)) == ("instructions followed, language en", "50.0%")
    count = get_metric("answer_errors")
    assert (count.label, count.format(24), count.format_change(1234567)) == ("answer errors", "24", "+1.23457e+06")
