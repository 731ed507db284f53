"""The role template refuses what it does not write, by the message."""

import pytest
from support.conversations import build_conversation, render_row, render_sequences
from support.source_rows import fails

from sft_pipeline.data.chat_templates import build_template

CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
REMEDY = "use `template: chat` with a chat template that does"


@pytest.mark.parametrize(
    "message, part",
    [
        ({"role": "tool", "content": "x"}, "messages[1]: `template: role` does not write the role tool"),
        (
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            "messages[1]: `template: role` does not write tool_calls",
        ),
        (
            {"role": "assistant", "content": "a", "reasoning_content": "Hm."},
            "messages[1]: `template: role` does not write reasoning_content",
        ),
    ],
)
def test_messages_that_it_does_not_write(tokenizer, message, part):
    conversation = build_conversation(["q", "a"])
    conversation["messages"].insert(1, message)
    fails(lambda: build_template("role", tokenizer).render([conversation]), f"{part}; {REMEDY}")


@pytest.mark.parametrize("keys", [{"tools": [CALL]}, {"chat_template_kwargs": {"x": 1}}])
def test_what_it_does_not_write_of_a_conversation(tokenizer, keys):
    template = build_template("role", tokenizer)
    part = f"`template: role` does not write {next(iter(keys))}; {REMEDY}"
    fails(lambda: template.render([build_conversation(["q", "a"], **keys)]), part)
    fails(lambda: template.encode_prompt(build_conversation(["q"], **keys)), part)


def test_it_takes_no_template_arguments(tokenizer):
    fails(
        lambda: build_template("role", tokenizer, None, {"x": 1}),
        "chat_template_kwargs: `template: role` takes none; remove them or use `template: chat`",
    )


def test_a_developer_message_is_a_system_message(tokenizer):
    template = build_template("role", tokenizer)
    system = build_conversation(["q", "a"], "s")
    developer = {"messages": [{"role": "developer", "content": "s"}, *system["messages"][1:]]}
    assert render_row(template, developer) == render_row(template, system)
    rendered = tokenizer.apply_chat_template(
        developer["messages"], chat_template=template.chat_template, tokenize=False
    )
    assert rendered == tokenizer.decode(render_row(template, system)[0])


def test_any_order_of_turns(tokenizer):
    messages = [{"role": role, "content": role[0]} for role in ("user", "user", "assistant", "assistant", "system")]
    ids, supervised = render_row(build_template("role", tokenizer), {"messages": messages})
    assert tokenizer.decode(ids) == ("<|im_start|>\n#USER:u\n#USER:u\n#ASSISTANT:a<|im_end|>\n#ASSISTANT:a<|im_end|>")
    assert supervised.count(True) == 4


def test_answers_that_are_not_trained(tokenizer):
    template = build_template("role", tokenizer)
    conversation = build_conversation(["q", "a", "q", "b"])
    whole, _ = render_row(template, conversation)
    first, last = conversation["messages"][1], conversation["messages"][3]
    first["train"] = False
    ids, supervised = render_row(template, conversation)
    trained = [i for i, flag in zip(ids, supervised) if flag]
    assert ids == whole and tokenizer.decode(trained) == "b<|im_end|>"
    last["train"] = False
    assert render_sequences(template, conversation) == render_sequences(template, conversation, "last") == []
    del first["train"]
    ids, _ = render_row(template, conversation)
    assert tokenizer.decode(ids).endswith("a<|im_end|>")  # what follows the last trained answer is left out
    assert render_sequences(template, conversation, "last") == []
