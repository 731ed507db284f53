"""Results of an evaluation: metrics of its table, and changes since step 0."""

import math

import pytest
from support.step_results import make_results, make_row

from sft_pipeline.evaluation.bootstrap import compute_paired_difference
from sft_pipeline.evaluation.metrics.instruction_following import load_instructions
from sft_pipeline.evaluation.step_results import compute_changes, compute_table_metrics, join_answers

LOOP = "again and " * 12


def test_references_without_words_have_no_bleu():
    metrics = compute_table_metrics([make_row("a", reference="?!")])
    assert metrics["stop_rate"] == 1 and "bleu_percent" not in metrics


def test_changes_are_paired_differences_over_common_rows():
    old = [make_row(LOOP, False), make_row("a"), make_row("b", error="too long"), make_row("c", False, prompt="other")]
    new = [make_row("x"), make_row("y"), make_row("z"), make_row("c")]
    instruction = load_instructions()[0]
    first, last = (
        make_results(0, [*old, make_row(instruction.bad, instruction=instruction.id)]),
        make_results(4, [*new, make_row(instruction.good, instruction=instruction.id)], nll=(2.0, 5.0)),
    )
    changes = compute_changes(first, last)
    expected = compute_paired_difference([0, 1], [1, 1])
    stop = {"before": 0.5, "after": 1.0, "difference": 0.5, "low": expected.low, "high": expected.high, "items": 2}
    assert changes["stop_rate"] == stop
    assert changes["loop_rate"]["before"] == 0.5 and changes["loop_rate"]["after"] == 0
    followed = {"before": 0.0, "after": 1.0, "difference": 1.0, "low": None, "high": None, "items": 1}
    assert changes["instructions_followed_rate"] == followed
    loss = compute_paired_difference([4, 6], [2, 5], a_weights=[2, 3], b_weights=[2, 3])
    assert changes["nll_nats_per_token"] == {
        "before": 2.0, "after": 1.4, "difference": pytest.approx(-0.6), "low": loss.low, "high": loss.high, "items": 2,
    }  # fmt: skip
    assert [answer["before"] for answer in join_answers(first, last)] == [LOOP, "a", "b"]


def test_a_nan_loss_has_no_interval_and_different_rows_no_change():
    diverged = compute_changes(make_results(0, []), make_results(4, [], nll=(math.nan, 1.0)))["nll_nats_per_token"]
    assert math.isnan(diverged["after"]) and diverged["low"] is None and diverged["before"] == 2
    assert compute_changes(make_results(0, []), make_results(4, [], tokens=(2.0, 4.0))) == {}
