"""Prompt sets: selection of prompts and few-shot examples."""

import pytest
from support.model_comparison import exchange, row

from sft_pipeline.evaluation.prompt_set import add_examples, select_prompts
from sft_pipeline.utils.errors import SFTError


def test_prompts_are_in_order_and_distinct_and_examples_are_other_rows():
    system = {"role": "system", "content": "s"}
    rows = [row("a", "1"), row("b", "2"), row("a", "3"), row("c", "4"), row("b", "5", system)]
    prompts = select_prompts(rows, 2, 1)
    assert prompts.rows == rows[:2] and prompts.references == ["1", "2"] and prompts.texts == ["a", "b"]
    assert prompts.examples == [exchange("c", "4")]
    assert select_prompts(rows, 50, 0).rows == [rows[0], rows[1], rows[3], rows[4]]


def test_an_example_is_the_first_exchange_of_a_row():
    system = {"role": "system", "content": "s"}
    long = row("more", "2", system, *exchange("first", "1"))
    assert select_prompts([row("a", "0"), long], 1, 1).examples == [exchange("first", "1")]


def test_examples_follow_the_system_message():
    system = {"role": "system", "content": "s"}
    examples = [exchange("x", "y"), exchange("z", "w")]
    assert add_examples(row("a", "b", system), examples) == row("a", "b", system, *examples[0], *examples[1])
    assert add_examples(row("a", "b"), []) == row("a", "b")


@pytest.mark.parametrize("few_shot", [3, 5])
def test_too_few_rows_for_the_examples(few_shot):
    with pytest.raises(SFTError, match=f"^few_shot {few_shot}: the data has 3 different rows, too few for prompts"):
        select_prompts([row(text, "1") for text in "abc"], 50, few_shot)
