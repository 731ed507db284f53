"""Prompt sets: selection of prompts and few-shot examples."""

import pytest
from support.agent import CALL, REPLY, TOOLS, assistant, user
from support.model_comparison import exchange, row

from sft_pipeline.evaluation.prompt_set import add_examples, drop_texts, select_prompts
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


def test_examples_have_no_tools_and_no_reasoning():
    thought = {"messages": [user("c"), assistant("4", reasoning="hm")]}
    calling = {"messages": CALL["messages"]}  # its tools are in no column
    rows = [row("a", "1"), CALL, thought, REPLY, row("t", "2") | {"tools": TOOLS}, calling]
    prompts = select_prompts(rows, 50, 2)
    assert prompts.rows == [CALL, *rows[3:]]
    assert prompts.examples == [exchange("a", "1"), exchange("c", "4")]


def test_rows_with_tools_are_prompts():
    prompts = select_prompts([CALL, REPLY, CALL], 50, 0)
    assert prompts.rows == [CALL, REPLY] and [prompt["tools"] for prompt in prompts.prompts] == [TOOLS] * 2
    assert prompts.texts[0] == "Is it cold in Oslo?" and prompts.texts[1].endswith(' → {"degrees": 4}')
    assert prompts.references == ['get_weather({"city": "Oslo"})', "Yes, 4 degrees."]
    assert select_prompts([REPLY], 50, 0).rows == [{**CALL, "messages": REPLY["messages"][:3]}, REPLY]
    message = (
        r"^few_shot 1: the data has 2 different rows \(0 without tools\), too few for prompts besides the examples;"
    )
    with pytest.raises(SFTError, match=message):
        select_prompts([CALL, REPLY], 50, 1)


def test_texts_are_left_out(caplog):
    rows, text = [row("a", "1"), row("b", "2")], {"text": "Once upon a time"}
    with caplog.at_level("INFO", "sft_pipeline"):
        assert drop_texts([text, rows[0], text, rows[1]], "rows.jsonl") == rows
        assert drop_texts(rows, "rows.jsonl") == rows
    assert caplog.messages == ["rows.jsonl: 2 texts have no prompt and are left out"]
    with pytest.raises(
        SFTError, match="^rows.jsonl: its rows are texts without a prompt to answer; give rows of messages$"
    ):
        drop_texts([text], "rows.jsonl")


@pytest.mark.parametrize("few_shot", [3, 5])
def test_too_few_rows_for_the_examples(few_shot):
    with pytest.raises(SFTError, match=f"^few_shot {few_shot}: the data has 3 different rows, too few for prompts"):
        select_prompts([row(text, "1") for text in "abc"], 50, few_shot)
