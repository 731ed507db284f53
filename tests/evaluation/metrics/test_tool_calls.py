"""Tool calls of answers and references: read as JSON where the template can, else compared as text."""

import pytest
from support.agent import CALL, OSLO, PLAIN, REPLY, TOOLS, assistant, make_call, user, write_call
from support.templates import AGENT_TEMPLATE

from sft_pipeline.data.chat_templates import build_template
from sft_pipeline.evaluation.metrics.registry import METRICS
from sft_pipeline.evaluation.metrics.tool_calls import match_tool_calls

WEATHER = write_call("get_weather", '{"city": "Oslo"}')
# As Qwen3-Coder writes calls.
XML_TEMPLATE = """{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}
{%- for call in message.tool_calls or [] %}{{ '\n<tool_call>\n<function=' + call.function.name + '>' }}
{%- for name, value in call.function.arguments.items() %}{{ '\n<parameter=' + name + '>\n' + value + '\n</parameter>' }}
{%- endfor %}{{ '\n</function>\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt }}"""


def write_xml(city: str) -> str:
    return f"<tool_call>\n<function=get_weather>\n<parameter=city>\n{city}\n</parameter>\n</function>\n</tool_call>"


@pytest.fixture(scope="module")
def template(make_tokenizer):
    return build_template("chat", make_tokenizer(AGENT_TEMPLATE))


@pytest.fixture(scope="module")
def xml_template(make_tokenizer):
    return build_template("chat", make_tokenizer(XML_TEMPLATE))


@pytest.mark.parametrize(
    ("answer", "matches"),
    [
        (WEATHER, True),
        (f"<think>\nLet me see.\n</think>\n\n{WEATHER}", True),
        (f"Let me look.\n{WEATHER}", True),
        ('{"name":"get_weather","parameters":{"city":"Oslo"}}', True),
        (write_call("get_time", '{"city": "Oslo"}'), False),
        (write_call("get_weather", '{"city": "oslo"}'), False),
        (write_call("get_weather", '{"city": "Oslo", "days": 1}'), False),
        (write_call("get_weather", "{}"), False),
        (f"{WEATHER}\n{WEATHER}", False),
        ("It is cold.", False),
        (f"<think>\n{WEATHER}\n</think>\n\nIt is cold.", False),
        (WEATHER[:-20], False),
        ("", False),
    ],
)
def test_the_calls_are_compared_and_nothing_else(template, answer, matches):
    assert match_tool_calls(template, CALL, answer) is matches


def test_order_counts_between_calls_and_not_within_their_arguments(template):
    calls = make_call("get_time", city="Oslo", at={"day": 1, "hour": 2.5}), OSLO
    row = {"messages": [user("When?"), assistant("I look.", *calls)], "tools": TOOLS}
    time = write_call("get_time", '{"at": {"hour": 2.5, "day": 1}, "city": "Oslo"}')
    assert match_tool_calls(template, row, f"{time}\n{WEATHER}") is True
    assert match_tool_calls(template, row, f"{WEATHER}\n{time}") is False


@pytest.mark.parametrize("written", ['"1"', "1.0", "true", "null", "[1]"])
def test_values_of_other_types_differ(template, written):
    row = {"messages": [user("Hi"), assistant("", make_call(n=1))]}
    assert match_tool_calls(template, row, write_call("get_weather", '{"n": 1}')) is True
    assert match_tool_calls(template, row, write_call("get_weather", f'{{"n": {written}}}')) is False


@pytest.mark.parametrize("row", [PLAIN, REPLY])
def test_a_reference_without_calls_has_no_value(template, row):
    assert match_tool_calls(template, row, WEATHER) is None


def test_a_reference_that_is_not_trained_is_compared(template):
    row = {"messages": [user("Hi"), assistant("", OSLO) | {"train": False}]}
    assert match_tool_calls(template, row, WEATHER) is True


@pytest.mark.parametrize(
    ("answer", "matches"),
    [
        (write_xml("Oslo"), True),
        (f"I look.\n\n{write_xml('Oslo')}\n", True),
        (write_xml("Oslo").replace("\n", " "), True),
        (write_xml("Bergen"), False),
        (f"{write_xml('Bergen')}\n{write_xml('Oslo')}", False),
        (f"{write_xml('Oslo')}\n{write_xml('Oslo')}", False),
        ("I look.", False),
        (WEATHER, False),
    ],
)
@pytest.mark.parametrize("content", ["", "Let me look."])
def test_calls_in_another_notation_are_compared_as_text(xml_template, answer, matches, content):
    row = {"messages": [user("Hi"), assistant(content, OSLO)]}
    assert match_tool_calls(xml_template, row, answer) is matches


def test_the_metric_is_of_the_rows_whose_reference_calls_tools():
    metric = METRICS["tool_call_match_rate"]
    columns = {"calls_match": [1.0, None, 0.0, 0.0, None]}
    assert metric.compute(columns) == pytest.approx(1 / 3) and metric.format(1 / 3) == "33.3%"
    numerators, denominators = metric.compute_rows(columns)
    assert numerators.tolist() == [1, 0, 0, 0, 0] and denominators.tolist() == [1, 0, 1, 1, 0]
