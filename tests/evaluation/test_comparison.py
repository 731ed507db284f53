"""Comparison of models: metrics, paired differences, and rows that are left out."""

import math
from dataclasses import replace

import pytest
from support.agent import CALL
from support.model_comparison import make_results, row

from sft_pipeline.evaluation import tables
from sft_pipeline.evaluation.bootstrap import compute_paired_difference
from sft_pipeline.evaluation.comparison import compare_models
from sft_pipeline.evaluation.metrics.registry import INSTRUCTIONS_FOLLOWED, TOOL_CALLS_MATCHED
from sft_pipeline.evaluation.prompt_set import PromptSet

pytestmark = pytest.mark.usefixtures("few_instructions")


def test_names_have_the_number_of_examples(comparison):
    names = [entry.name for entry in comparison.entries]
    assert names == ["first", "first, 2 examples", "second", "second, 2 examples"]
    assert (comparison.rows, comparison.left_out) == (5, 0) and comparison.instructions == 6


def test_differences_are_those_of_the_metrics(comparison):
    first, *entries = comparison.entries
    assert first.differences == {}
    names = {"nll_nats_per_token", "bits_per_byte", "loop_rate", "answer_length_ratio", INSTRUCTIONS_FOLLOWED}
    for entry in entries:
        assert names <= set(entry.differences)
        for name, interval in entry.differences.items():
            assert interval.low <= interval.difference <= interval.high
            assert interval.difference == pytest.approx(entry.metrics[name] - first.metrics[name], abs=1e-9), name
    assert entries[1].differences["nll_nats_per_token"].difference != 0


def test_a_difference_is_paired_and_weighted(evaluated, comparison):
    _, records = evaluated
    sides = [[(loss.nll_nats, loss.tokens) for loss in records[index].losses] for index in (0, 2)]
    (a, a_weights), (b, b_weights) = (zip(*side) for side in sides)
    expected = compute_paired_difference(a, b, a_weights=a_weights, b_weights=b_weights)
    assert comparison.entries[2].differences["nll_nats_per_token"] == expected


def test_a_model_against_itself_differs_by_nothing(evaluated):
    questions, records = evaluated
    _, same = compare_models([records[0], records[0]], questions).entries
    assert same.differences
    for interval in same.differences.values():
        assert (interval.difference, interval.low, interval.high) == (0, 0, 0)


def test_a_prompt_with_an_error_is_left_out_for_all_models():
    questions = PromptSet([row(text, "yes", *[]) for text in "abc"], [])
    comparison = compare_models(
        [make_results("a", ["yes", "no", "no"]), make_results("b", ["no", "yes", "yes"], errors=(0,))], questions
    )
    assert [entry.metrics["exact_match_rate"] for entry in comparison.entries] == [0, 1]
    assert (comparison.rows, comparison.left_out) == (2, 1) and comparison.entries[0].metrics[
        INSTRUCTIONS_FOLLOWED
    ] == 1
    assert "2 held-out rows, 6 instructions, 1 excluded" in tables.format_markdown(comparison)


def test_tool_calls_are_compared_over_the_rows_that_have_them():
    questions = PromptSet([CALL, row("a", "yes"), CALL, CALL], [])
    none, all_ = (make_results(name, ["x", "yes", "x", "x"]) for name in "ab")
    none, all_ = (
        replace(none, calls_match=[False, None, False, None]),
        replace(all_, calls_match=[True, None, True, None]),
    )
    comparison = compare_models([none, all_], questions)
    assert [entry.metrics[TOOL_CALLS_MATCHED] for entry in comparison.entries] == [0, 1]
    difference = comparison.entries[1].differences[TOOL_CALLS_MATCHED]
    assert (difference.difference, difference.items) == (1, 2)
    assert "| tool calls, % | 0.0 | 100.0 [+100.0, +100.0] |" in tables.format_markdown(comparison)


def test_a_loss_that_is_missing_leaves_the_row_out():
    questions = PromptSet([row(text, "yes") for text in "ab"], [])
    whole, cut = make_results("a", ["yes", "no"]), make_results("b", ["yes", "no"])
    cut.losses[0] = None
    assert compare_models([whole, cut], questions).rows == 1


def test_a_diverged_model_shows_its_nan_without_an_interval():
    questions = PromptSet([row(text, "yes") for text in "ab"], [])
    results = [make_results("a", ["yes", "no"]), make_results("b", ["yes", "no"], math.nan)]
    _, diverged = compare_models(results, questions).entries
    assert math.isnan(diverged.metrics["nll_nats_per_token"]) and "nll_nats_per_token" not in diverged.differences
    assert "word_f1" in diverged.differences


def test_references_without_words_are_left_out_of_the_length_ratio():
    questions = PromptSet([row("a", "yes"), row("b", "!"), row("c", "yes")], [])
    records = [make_results("a", ["yes", "!", "yes"]), make_results("b", ["yes yes", "!", "yes yes"])]
    assert compare_models(records, questions).entries[1].differences["answer_length_ratio"].difference == 1
