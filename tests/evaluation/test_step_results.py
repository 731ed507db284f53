"""Results of an evaluation: metrics of its table, and changes since step 0."""

import math

import pytest
from support.agent import CALL, user, write_call
from support.step_results import make_results, make_row
from support.templates import AGENT_TEMPLATE

from sft_pipeline.data.chat_templates import build_template
from sft_pipeline.data.messages import split_answer
from sft_pipeline.evaluation.bootstrap import compute_paired_difference
from sft_pipeline.evaluation.metrics.instruction_following import load_instructions
from sft_pipeline.evaluation.step_results import (
    EvalPrompt,
    build_table_row,
    compute_changes,
    compute_table_metrics,
    join_answers,
)
from sft_pipeline.inference.answers import Answer

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


def test_tool_calls_change_over_the_rows_whose_reference_calls_tools():
    old = [make_row("x"), *(make_row("a", prompt=str(i), calls_match=False) for i in range(3))]
    new = [
        make_row("x"),
        *(make_row("a", prompt=str(i), calls_match=True) for i in range(2)),
        make_row("a", error="no"),
    ]
    change = compute_changes(make_results(0, old), make_results(4, new))["tool_call_match_rate"]
    assert change == {"before": 0, "after": 1, "difference": 1, "low": 1, "high": 1, "items": 2}
    assert "tool_call_match_rate" not in compute_changes(make_results(0, old[:1]), make_results(4, new[:1]))


def answer(template, text: str) -> Answer:
    return Answer(text, True, 9, message=template.parse_text(text))


def test_a_table_row_has_texts_that_are_read_and_compared(make_tokenizer):
    template = build_template("chat", make_tokenizer(AGENT_TEMPLATE))
    prompt, reference = split_answer(CALL)
    call = write_call("get_weather", '{"city": "Oslo"}')
    row = build_table_row(template, EvalPrompt(prompt, reference), answer(template, f"<think>Cold?</think>{call}"))
    assert row == {
        "instruction": None,
        "prompt": "Is it cold in Oslo?",
        "reference": 'get_weather({"city": "Oslo"})',
        "reasoning": "Cold?",
        "answer": 'get_weather({"city": "Oslo"})',
        "stopped": True,
        "tokens": 9,
        "followed": None,
        "calls_match": True,
        "error": None,
    }
    failed = build_table_row(template, EvalPrompt(prompt, reference), Answer("", False, 0, "too long"))
    assert (failed["answer"], failed["calls_match"], failed["error"]) == ("", None, "too long")


def test_an_instruction_is_checked_without_the_reasoning(make_tokenizer):
    template, instruction = build_template("chat", make_tokenizer(AGENT_TEMPLATE)), load_instructions()[0]
    prompt = EvalPrompt({"messages": [user(instruction.prompt)]}, instruction=instruction.id)
    for thought, text in ((instruction.bad, instruction.good), (instruction.good, instruction.bad)):
        row = build_table_row(template, prompt, answer(template, f"<think>\n{thought}\n</think>\n\n{text}"))
        assert row["followed"] is (text == instruction.good) and row["calls_match"] is None


def test_a_nan_loss_has_no_interval_and_different_rows_no_change():
    diverged = compute_changes(make_results(0, []), make_results(4, [], nll=(math.nan, 1.0)))["nll_nats_per_token"]
    assert math.isnan(diverged["after"]) and diverged["low"] is None and diverged["before"] == 2
    assert compute_changes(make_results(0, []), make_results(4, [], tokens=(2.0, 4.0))) == {}
