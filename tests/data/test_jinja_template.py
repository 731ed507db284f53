"""Any chat template: one sequence or several, stop tokens, and what a template does not write."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.conversations import QUICK, TEXT, build_conversation, cut_conversation, render_row, render_sequences
from support.source_rows import fails
from support.templates import (
    AGENT_TEMPLATE,
    NO_PLACE_TEMPLATE,
    OPENING_TEMPLATE,
    THINKING_TEMPLATE,
    TWO_STOPS_TEMPLATE,
)
from support.tiny import CHATML, build_tokenizer
from tokenizers import processors

from sft_pipeline.data.chat_templates import build_template

OTHER = "; remove it from the row, or give a chat_template that does"


def user(content="q"):
    return {"role": "user", "content": content}


def answer(content="a", **keys):
    return {"role": "assistant", "content": content, **keys}


def call(name="find", **arguments):
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}


def result(content="42"):
    return {"role": "tool", "content": content, "tool_call_id": "c1", "name": "find"}


def tool(name="find", description="Finds.", **properties):
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def build(jinja=AGENT_TEMPLATE, **kwargs):
    return build_template("chat", build_tokenizer(jinja), chat_template_kwargs=kwargs)


AGENT = build()
# A question with a call and an answer, both with reasoning, then a second question.
CONVERSATION = {
    "messages": [
        {"role": "system", "content": "s"},
        user("q1"),
        answer("", reasoning_content="r1", tool_calls=[call(city="Oslo")]),
        result(),
        answer("a1", reasoning_content="r2"),
        user("q2"),
        answer("a2", reasoning_content="r3"),
    ],
    "tools": [tool()],
}


# ---- sequences


def list_turns(sequence):
    """Yield (index of a trained message, text of its prompt, text of its target) of a sequence."""
    prompt = ""
    turns = iter(sequence.turns)
    for supervised, spans in itertools.groupby(sequence.spans, key=lambda span: span.supervised):
        text = AGENT.tokenizer.decode([i for span in spans for i in span.ids])
        if supervised:
            yield next(turns), prompt, text
        prompt += text
    assert next(turns, None) is None


def check_turns(conversation, train_on="all"):
    """Each trained answer is in one sequence, under the prompt that the template renders of the messages before it."""
    [sequences] = AGENT.render([conversation], train_on)
    messages, tools = conversation["messages"], conversation.get("tools")
    trained = []
    for sequence in sequences:
        for index, prompt, target in list_turns(sequence):
            trained.append(index)
            prompt_text, text = (
                AGENT.tokenizer.apply_chat_template(messages[:end], tools, tokenize=False, add_generation_prompt=asked)
                for end, asked in ((index, True), (index + 1, False))
            )
            assert (prompt, prompt + target + "\n") == (prompt_text, text)
            assert AGENT.tokenizer.decode(AGENT.encode_prompt(cut_conversation(conversation, index))) == prompt
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    expected = answers if train_on == "all" else answers[-1:]
    assert trained == [index for index in expected if messages[index].get("train", True)]
    return sequences


def test_reasoning_of_earlier_questions_is_left_out():
    """The call and its answer share a sequence; the second question's prompt lacks the reasoning before it."""
    sequences = check_turns(CONVERSATION)
    assert [sequence.turns for sequence in sequences] == [(2, 4), (6,)]
    texts = [AGENT.tokenizer.decode([i for span in sequence.spans for i in span.ids]) for sequence in sequences]
    assert "r1" in texts[0] and "r2" in texts[0] and "q2" not in texts[0]
    assert "r1" not in texts[1] and "r2" not in texts[1] and "a1" in texts[1] and texts[1].endswith("a2<|im_end|>")


def test_the_last_answer_alone_is_the_last_sequence():
    [sequence] = check_turns(CONVERSATION, "last")
    assert sequence == AGENT.render([CONVERSATION])[0][-1]


TOOLS = st.lists(st.builds(lambda text, key: tool("find", text, **{key: {}}), TEXT, TEXT), max_size=2)
CALLS = st.lists(st.builds(lambda key, value: call("f" + key, **{key: [value]}), TEXT, TEXT), min_size=1, max_size=2)
REASONING = TEXT.map(lambda text: text + "!")


@st.composite
def exchanges(draw):
    """A question, some calls with results, and an answer; each answer with reasoning or without, trained or not."""
    turns = [user(draw(TEXT))]
    for calls in [*draw(st.lists(CALLS, max_size=2)), []]:
        turns.append(answer(draw(TEXT)))
        turns[-1] |= {"reasoning_content": draw(REASONING)} if draw(st.booleans()) else {}
        turns[-1] |= {"train": False} if draw(st.integers(0, 3)) == 0 else {}
        if calls:
            turns[-1]["tool_calls"] = calls
            turns += [result(draw(TEXT)) for _ in calls]
    return turns


@st.composite
def agent_conversations(draw):
    start = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    turns = list(itertools.chain.from_iterable(draw(st.lists(exchanges(), min_size=1, max_size=3))))
    return {"messages": [*start, *turns], **({"tools": tools} if (tools := draw(TOOLS)) else {})}


@QUICK
@given(agent_conversations(), st.sampled_from(["all", "last"]))
def test_each_answer_is_trained_under_the_prompt_that_it_will_get(conversation, train_on):
    """Control tokens that a text, a result, an argument, a description or reasoning spells stay text."""
    sequences = check_turns(conversation, train_on)
    harmless = AGENT.render([replace_texts(conversation)], train_on)[0]
    assert list_control_ids(sequences) == list_control_ids(harmless)


def list_control_ids(sequences):
    return [[i for span in sequence.spans for i in span.ids if i < 3] for sequence in sequences]


def replace_texts(value, key=None):
    """Replace every text of a conversation but roles and types by one without control tokens."""
    if isinstance(value, dict):
        return {name if name in KEYS else "k": replace_texts(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [replace_texts(item) for item in value]
    return value if key in ("role", "type") or not isinstance(value, str) else "x" if value else ""


KEYS = {
    "messages",
    "tools",
    "role",
    "content",
    "train",
    "reasoning_content",
    "tool_calls",
    "tool_call_id",
    "id",
    "type",
}
KEYS |= {"function", "name", "arguments", "description", "parameters", "properties"}


def test_a_template_that_opens_the_answer_unasked():
    template, plain = build(OPENING_TEMPLATE), build(CHATML)
    conversation = build_conversation(["q1", "a1", "q2", "a2"], "s")
    assert render_row(template, conversation) == render_row(plain, conversation)
    prompt = cut_conversation(conversation, -1)
    assert template.encode_prompt(prompt) == plain.encode_prompt(prompt)
    assert template.stop_token_ids == [2]


def test_a_template_with_two_stop_tokens():
    """A call ends with another token than a text, and both end a generated answer."""
    template = build(TWO_STOPS_TEMPLATE)
    assert template.stop_token_ids == [2, 0] and template.stop_token_id == 2
    messages = [user(), answer("", tool_calls=[call(a="1")]), result(), answer("So.")]
    ids, supervised = render_row(template, {"messages": messages})
    trained = template.tokenizer.decode([i for i, flag in zip(ids, supervised) if flag])
    assert trained == '{"name": "find", "parameters": {"a": "1"}}<|endoftext|>So.<|im_end|>'
    targets = [i for i, flag in zip(ids, supervised) if flag]
    called = template.parse(targets)
    assert called == answer("", tool_calls=[{"type": "function", "function": call(a="1")["function"]}])
    assert template.parse(targets[targets.index(0) + 1 :]) == answer("So.")


def test_arguments_are_given_as_text_where_objects_are_written_in_pythons_notation():
    repr_template = AGENT_TEMPLATE.replace("(call.function.arguments | tojson)", "call.function.arguments | string")
    template = build(repr_template)
    assert (AGENT.features.arguments_form, template.features.arguments_form) == ("object", "text")
    conversation = {"messages": [user(), answer("", tool_calls=[call(a=None, b="冬瓜")])]}
    assert render_row(template, conversation) == render_row(AGENT, conversation)


@pytest.mark.parametrize("key", ["thinking", "reasoning"])
def test_reasoning_is_given_under_the_key_that_the_template_reads(key):
    template = build(AGENT_TEMPLATE.replace("reasoning_content", key))
    conversation = {"messages": [user(), answer(reasoning_content="r")]}
    assert render_row(template, conversation) == render_row(AGENT, conversation)


def test_features():
    found = AGENT.features
    assert (found.knows_developer, found.reasoning_key, found.writes_tool_results) == (False, "reasoning_content", True)
    assert (found.arguments_form, found.writes_tools) == ("object", True)
    plain = build(CHATML).features
    assert (plain.knows_developer, plain.reasoning_key, plain.arguments_form, plain.writes_tools) == (
        *(True, None, None),
        False,
    )


def test_developer_becomes_system_where_the_template_knows_only_that():
    developer, system = (
        {"messages": [{"role": role, "content": "s"}, user(), answer()]} for role in ("developer", "system")
    )
    assert render_row(AGENT, developer) == render_row(AGENT, system)
    assert "<|im_start|>developer\ns" in build_tokenizer().decode(render_row(build(CHATML), developer)[0])


# ---- flags


def test_an_answer_that_is_not_trained_is_context():
    messages = [dict(message) for message in CONVERSATION["messages"]]
    messages[2]["train"] = False
    sequences = check_turns({**CONVERSATION, "messages": messages})
    assert [sequence.turns for sequence in sequences] == [(4,), (6,)]
    messages[4]["train"] = False
    assert [sequence.turns for sequence in check_turns({**CONVERSATION, "messages": messages})] == [(6,)]
    messages[6]["train"] = False
    assert check_turns({**CONVERSATION, "messages": messages}) == []


def test_what_an_untrained_answer_has_need_not_be_written():
    template = build(CHATML)
    fails(lambda: template.render([{"messages": [user(), answer(reasoning_content="r")]}]), "its reasoning")
    conversation = {"messages": [user(), answer(reasoning_content="r", train=False), user(), answer("b")]}
    ids, supervised = render_row(template, conversation)
    assert template.tokenizer.decode([i for i, flag in zip(ids, supervised) if flag]) == "b<|im_end|>"


# ---- template arguments


def test_template_arguments_of_the_config_and_of_the_row():
    template = build(THINKING_TEMPLATE, mode="config", enable_thinking=False)
    conversation = build_conversation(["q", "a"])
    prompt = template.tokenizer.decode(template.encode_prompt(cut_conversation(conversation, 1)))
    assert prompt == (
        "<|im_start|>config<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    ids, supervised = render_row(template, conversation)
    assert template.tokenizer.decode([i for i, flag in zip(ids, supervised) if flag]) == "a<|im_end|>"
    conversation["chat_template_kwargs"] = {"mode": "row", "enable_thinking": True}
    ids, supervised = render_row(template, conversation)
    assert template.tokenizer.decode(ids[:5]).startswith("<|im_start|>row")
    trained = template.tokenizer.decode([i for i, flag in zip(ids, supervised) if flag])
    assert trained == "<think>\n\n</think>\n\na<|im_end|>"


def test_control_tokens_that_the_arguments_of_a_row_spell_stay_text():
    template = build(THINKING_TEMPLATE)
    hostile, harmless = (
        render_row(template, build_conversation(["q", "a"], chat_template_kwargs={"mode": mode}))[0]
        for mode in ("a<|im_end|>b", "a b")
    )
    assert [i for i in hostile if i < 3] == [i for i in harmless if i < 3]
    assert "<|im_start|>a<|im_end|>b<|im_end|>" in template.tokenizer.decode(hostile)


def test_reasoning_that_template_arguments_switch_off():
    template = build(THINKING_TEMPLATE, enable_thinking=False)
    conversation = {"messages": [user(), answer(reasoning_content="r")]}
    fails(
        lambda: template.render([conversation]),
        "the chat template has no place where the answer messages[1] begins: its prompt goes on with",
        "give another chat_template, or let chat_template_kwargs not switch its reasoning off",
    )
    assert render_row(template, {**conversation, "chat_template_kwargs": {"enable_thinking": True}})


@pytest.mark.parametrize("name", ["tokenize", "tools", "conversation", "add_generation_prompt", "chat_template"])
def test_arguments_that_are_not_the_templates(name):
    part = f"chat_template_kwargs: {name} is not an argument of the template; remove it"
    conversation = build_conversation(["q", "a"], chat_template_kwargs={name: 1})
    fails(lambda: AGENT.render([conversation]), part)
    fails(lambda: AGENT.encode_prompt(cut_conversation(conversation, 1)), part)
    fails(lambda: build(AGENT_TEMPLATE, **{name: 1}), part)


def test_text_and_calls_of_one_answer_are_both_trained():
    """The text beside a call was lost elsewhere (https://github.com/hiyouga/LLaMA-Factory/issues/9107)."""
    both = answer("I look it up.", reasoning_content="r1", tool_calls=[call(city="Oslo")])
    [sequence] = check_turns({"messages": [user("q1"), both], "tools": [tool()]})
    [(_, _, target)] = list_turns(sequence)
    assert all(text in target for text in ("r1", "I look it up.", '"city": "Oslo"'))


# ---- what a template does not write, or cannot


NO_RESULTS = AGENT_TEMPLATE.replace("message.role == 'tool'", "message.role == 'nobody'")
NO_SYSTEM = AGENT_TEMPLATE.replace("(message.role == 'system' and not (tools and loop.first))", "false")
NO_NAMES = AGENT_TEMPLATE.replace("(tool | tojson)", "tool.function.description")
HIDING = CHATML.replace("message['content']", "message['content'] | replace('secret', '')")
STRICT = AGENT_TEMPLATE.replace(
    "{%- elif message.role == 'tool' %}",
    "{%- elif message.role == 'tool' %}{% if not messages[loop.index0 - 1].tool_calls %}"
    "{{ raise_exception('a result\\nwithout a call') }}{% endif %}",
)
SILENT = CHATML.replace("'<|im_end|>\n'", "('' if message['content'] == 'endless' else '<|im_end|>\n')")
CALLED = answer("", tool_calls=[call(city="Oslo")])


@pytest.mark.parametrize(
    "chat_template, messages, tools, part",
    [
        (CHATML, [user(), answer()], [tool()], "the chat template does not write tools" + OTHER),
        (CHATML, [user(), CALLED], None, "messages[1]: the chat template does not write its tool calls" + OTHER),
        (
            CHATML,
            [user(), answer(reasoning_content="r")],
            None,
            "messages[1]: the chat template does not write its reasoning" + OTHER,
        ),
        (
            HIDING,
            [user(), answer("a secret")],
            None,
            "messages[1]: the chat template does not write its content" + OTHER,
        ),
        (
            HIDING,
            [user("q secret"), answer()],
            None,
            "messages[0]: the chat template does not write this user message" + OTHER,
        ),
        (
            NO_RESULTS,
            [user(), CALLED, result(""), answer()],
            None,
            "messages[2]: the chat template does not write tool results" + OTHER,
        ),
        (
            NO_SYSTEM,
            [{"role": "system", "content": "s!"}, user(), answer()],
            None,
            "messages[0]: the chat template does not write this system or developer message" + OTHER,
        ),
        (
            NO_SYSTEM,
            [{"role": "developer", "content": "s!"}, user(), answer()],
            None,
            "messages[0]: the chat template does not write this system or developer message" + OTHER,
        ),
        (NO_NAMES, [user(), answer()], [tool()], "the chat template does not write the tool find" + OTHER),
        (
            STRICT,
            [user(), result(), answer()],
            None,
            "the chat template cannot render the conversation (TemplateError: a result without a call); "
            "fix the row or the chat template, or use `template: role`",
        ),
        (
            SILENT,
            [user(), answer("endless")],
            None,
            "the chat template writes no stop token (<|im_end|>) after messages[1]; give another chat_template, or",
        ),
        (
            NO_PLACE_TEMPLATE,
            [user(), answer("A <|im_end|> spelled")],
            None,
            "the chat template has no place where the answer messages[1] begins: its prompt goes on with '<think>' "
            "where the conversation has 'A <|im_end|> spelled<|im_end|>\\n'; give another chat_template, or",
        ),
        (
            NO_PLACE_TEMPLATE,
            [user(), answer("<think")],
            None,
            "its prompt goes on with '>' where the conversation has '<|im_end|>\\n'",
        ),
    ],
)
def test_what_is_not_written_is_refused(chat_template, messages, tools, part):
    conversation = {"messages": messages, **({"tools": tools} if tools else {})}
    fails(lambda: build(chat_template).render([conversation]), part)


def test_what_a_prompt_lacks_is_refused():
    messages = [user(), CALLED, result()]
    fails(
        lambda: build(NO_RESULTS).encode_prompt({"messages": messages}), "messages[2]: the chat template does not write"
    )
    fails(lambda: build(CHATML).encode_prompt({"messages": [user()], "tools": [tool()]}), "does not write tools")
    fails(lambda: build(HIDING).encode_prompt({"messages": [user("secret")]}), "does not write this user message")


def test_arguments_that_are_nested_too_deeply():
    value = {}
    for _ in range(600):
        value = {"a": value}
    conversation = {"messages": [user(), answer("", tool_calls=[call(a=value)])]}
    fails(
        lambda: AGENT.render([conversation]),
        "its tools or arguments are nested too deeply; write the inner ones as text",
    )


# ---- answers


@pytest.mark.parametrize(
    "text, message",
    [
        (" So.\n", answer("So.")),
        ("<think>\nHm.\n</think>\n\nSo.", answer("So.", reasoning_content="Hm.")),
        ("Hm.\n</think>\n\nSo.", answer("So.", reasoning_content="Hm.")),  # the prompt has the opening tag
        ("<think>\n\n</think>\n\nSo.", answer("So.")),
        (
            'Hm.</think>\n\nI look.\n<tool_call>\n{"name": "find", "arguments": {"a": "1"}}\n</tool_call>',
            answer(
                "I look.",
                reasoning_content="Hm.",
                tool_calls=[{"type": "function", "function": call(a="1")["function"]}],
            ),
        ),
        ("<tool_call>\nfind()\n</tool_call>", answer("<tool_call>\nfind()\n</tool_call>")),
    ],
)
def test_answers_are_parsed(text, message):
    assert AGENT.parse_text(text) == message


def test_answers_of_a_template_without_reasoning_and_calls_stay_text():
    text = '<think>\nHm.\n</think>\n\n{"name": "find", "arguments": {}}'
    assert build(CHATML).parse_text(text) == answer(text)


def test_a_trained_answer_is_parsed_as_it_was():
    [first, second] = render_sequences(AGENT, CONVERSATION)
    prompt = AGENT.encode_prompt(cut_conversation(CONVERSATION, 2))
    assert AGENT.parse(first[0][len(prompt) :]) == {
        **CONVERSATION["messages"][2],
        "tool_calls": [{"type": "function", "function": call(city="Oslo")["function"]}],
    }
    prompt = AGENT.encode_prompt(cut_conversation(CONVERSATION, 6))
    assert AGENT.parse(second[0][len(prompt) :]) == CONVERSATION["messages"][6]


# ---- texts


@pytest.mark.parametrize("name", ["role", "chat"])
def test_a_text_is_one_sequence_that_ends_with_the_eos_token(tokenizer, name):
    ids, supervised = render_row(build_template(name, tokenizer), {"text": "Once <|im_end|>\n"})
    assert tokenizer.decode(ids) == "Once <|im_end|>\n<|im_end|>" and ids.count(2) == 1 and all(supervised)


def test_a_text_begins_with_the_bos_token_where_the_tokenizer_adds_it(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    template = build_template("chat", tokenizer)
    assert render_row(template, {"text": "Once"})[0][0] != 1
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    ids, supervised = render_row(template, {"text": "Once"})
    assert ids == [*tokenizer("Once").input_ids, 2] and supervised == [False] + [True] * (len(ids) - 1)
