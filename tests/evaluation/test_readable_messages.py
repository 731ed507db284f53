"""Messages as short texts."""

import pytest
from support.agent import CALL, OSLO, QUESTION, REPLY, assistant, make_call, tool, user

from sft_pipeline.evaluation.readable_messages import format_answer, format_message, format_prompt
from sft_pipeline.inference.answers import Answer


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (user(" a\nb "), " a\nb "),
        (assistant("Yes.", reasoning="Why not?"), "Yes."),
        (assistant("", OSLO), 'get_weather({"city": "Oslo"})'),
        (
            assistant("I look.", OSLO, make_call("f", 名="冬瓜")),
            'I look. get_weather({"city": "Oslo"}); f({"名": "冬瓜"})',
        ),
        (assistant("", make_call("f")), "f({})"),
        (tool('{"a":\n  1}'), '{"a": 1}'),
    ],
)
def test_a_message(message, text):
    assert format_message(message) == text


def test_a_prompt_begins_with_its_last_user_message():
    assert format_prompt(QUESTION) == "Is it cold in Oslo?"
    expected = 'Is it cold in Oslo? → get_weather({"city": "Oslo"}) → {"degrees": 4}'
    assert format_prompt(REPLY["messages"][:-1]) == expected
    assert format_prompt([*REPLY["messages"], user("Thanks.")]) == "Thanks."
    assert format_prompt(QUESTION[:1]) == "You are 冬瓜."


def test_an_answer_is_without_its_reasoning_and_an_error_is_empty():
    answer = Answer("<think>a</think>b", True, 3, message=assistant("b", reasoning="a"))
    assert format_answer(answer) == "b"
    assert format_answer(Answer("", False, 0, "too long")) == ""
    assert format_answer(Answer("x", True, 1, message=CALL["messages"][-1])) == 'get_weather({"city": "Oslo"})'
