"""Answers to prompts with tools: the prompt's ids, the stop tokens, and the message that is read from the text."""

import pytest
from support.agent import CALL, OSLO, PLAIN, REPLY, TOOLS, script_answers, write_call
from support.templates import AGENT_TEMPLATE
from support.tiny import build_model

from sft_pipeline.data.chat_templates import build_template
from sft_pipeline.data.messages import split_answer
from sft_pipeline.inference import answers as answers_module
from sft_pipeline.inference.answers import answer_prompts
from sft_pipeline.inference.engine import generate
from sft_pipeline.inference.sampling import SamplingParams

PROMPTS = [split_answer(row)[0] for row in (CALL, REPLY, PLAIN)]


def apply_chat_template(tokenizer, prompt, **kwargs) -> list[int]:
    return tokenizer.apply_chat_template(
        prompt["messages"], tools=prompt.get("tools"), add_generation_prompt=True, return_dict=False, **kwargs
    )


@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}])
def test_prompts_with_tools_are_those_of_apply_chat_template_with_qwen3(kwargs, qwen3):
    """Needs the Qwen3 tokenizer, whose template is the one that people use; skipped without it."""
    model, template = build_model(len(qwen3)), build_template("chat", qwen3, chat_template_kwargs=kwargs)
    ids = [apply_chat_template(qwen3, prompt, **kwargs) for prompt in PROMPTS]
    completions = generate(model, ids, template.stop_token_ids, SamplingParams(max_new_tokens=6))
    answers = answer_prompts(model, template, PROMPTS, 6)
    texts = [qwen3.decode(completion.ids, skip_special_tokens=True).strip() for completion in completions]
    assert [answer.text for answer in answers] == texts and all(texts)
    by_row = answer_prompts(
        model, build_template("chat", qwen3), [{**p, "chat_template_kwargs": kwargs} for p in PROMPTS], 6
    )
    assert by_row == answers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Yes.", {"content": "Yes."}),
        ("<think>\nHm.\n</think>\n\nYes.", {"content": "Yes.", "reasoning_content": "Hm."}),
        ("<think>\n\n</think>\n\nYes.", {"content": "Yes."}),
        (write_call("get_weather", '{"city": "Oslo"}'), {"content": "", "tool_calls": [OSLO]}),
        (
            "<think>\nHm.\n</think>\n\nI look.\n" + write_call("get_weather", '{"city": "Oslo"}'),
            {"content": "I look.", "reasoning_content": "Hm.", "tool_calls": [OSLO]},
        ),
        ("", {"content": ""}),
        (None, None),
    ],
)
def test_an_answer_is_read_by_its_template(text, message, tiny_model, make_tokenizer, monkeypatch):
    template = build_template("chat", make_tokenizer(AGENT_TEMPLATE))
    script_answers(monkeypatch, template.tokenizer, text)
    [answer] = answer_prompts(tiny_model, template, PROMPTS[:1], 6)
    assert answer.message == (message and {"role": "assistant", **message})
    assert answer.text == (text or "") and answer.error == (None if message else "too long")


def test_every_stop_token_of_the_template_ends_an_answer(tiny_model, tokenizer, monkeypatch):
    template = build_template("chat", tokenizer)
    monkeypatch.setattr(template, "stop_token_ids", [2, 7])
    seen = []
    monkeypatch.setattr(
        answers_module, "generate", lambda *args, **kwargs: seen.append(args[2]) or generate(*args, **kwargs)
    )
    answer_prompts(tiny_model, template, [{"messages": PLAIN["messages"][:1]}], 2)
    assert seen == [[2, 7]]


def test_tools_are_in_the_prompt(make_tokenizer):
    template = build_template("chat", make_tokenizer(AGENT_TEMPLATE))
    ids = template.encode_prompt(PROMPTS[1])
    assert ids == apply_chat_template(template.tokenizer, PROMPTS[1])
    assert all(tool["function"]["description"] in template.tokenizer.decode(ids) for tool in TOOLS)
