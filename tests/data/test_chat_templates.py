"""Templates: reference ids, answers trained under their prompts, and text that never becomes a control token."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.conversations import (
    BOTH,
    QUICK,
    SYSTEM,
    TEXT,
    build_bare_tokenizer,
    build_conversation,
    conversations,
    cut_conversation,
    render_row,
    render_sequences,
)
from support.source_rows import fails
from support.templates import AGENT_TEMPLATE
from support.tiny import CHATML

from sft_pipeline.data.chat_templates import build_template, load_chat_template
from sft_pipeline.data.jinja_template import PLACEHOLDER
from sft_pipeline.data.text_encoder import encode_as_text
from sft_pipeline.utils.errors import SFTError

ANSWER = (
    "1.Eat a balanced diet and make sure to include plenty of fruits and vegetables. \n"
    "2. Exercise regularly to keep your body active and strong. \n"
    "3. Get enough sleep and maintain a consistent sleep schedule."
)
# The reference's training ids of the first Alpaca row; the first 37 are not supervised.
REFERENCE = [
    *(151644, 198, 2, 46487, 25, 105043, 30709, 99949, 100857, 100168, 31914, 11, 14880, 99464, 100700, 102104),
    *(20002, 13872, 43589, 86119, 198, 2, 6448, 25, 35127, 2326, 10414, 369, 19429, 9314, 13, 198, 2, 4939, 3846),
    *(2821, 25, 16, 5142, 266, 264, 23831, 9968, 323, 1281, 2704, 311, 2924, 11260, 315, 25322, 323, 23880, 13),
    *(715, 17, 13, 32818, 15502, 311, 2506, 697, 2487, 4541, 323, 3746, 13, 715, 18, 13, 2126, 3322, 6084, 323),
    *(10306, 264, 12966, 6084, 9700, 13, 151645),
]
# Rewrites the history: leaves out every answer but the last.
HISTORY_DROPPING = CHATML.replace(
    "message['content']", "(message['content'] if message.role == 'user' or loop.last else '')"
)
WORDS = st.lists(st.sampled_from(["the", "answer", "冬瓜", "is", "question?", "🙂", "42"]), min_size=1, max_size=5)


# ---- the reference implementation's ids


def test_the_reference_ids(qwen3):
    conversation = build_conversation(["Give three tips for staying healthy.", ANSWER], SYSTEM)
    ids, supervised = render_row(build_template("role", qwen3), conversation)
    assert len(REFERENCE) == 81
    assert ids == REFERENCE
    assert supervised == [False] * 37 + [True] * 44


def test_the_reference_prompt(qwen3):
    prompt = build_conversation(["Give three tips for staying healthy."], SYSTEM)
    assert build_template("role", qwen3).encode_prompt(prompt) == REFERENCE[:37]


def test_the_segments_of_the_role_template(tokenizer):
    """Every segment is tokenized separately."""
    ids, supervised = render_row(build_template("role", tokenizer), build_conversation(["Why?", "So."], "Be short."))
    segments = ["\n#SYSTEM:Be short.", "\n#USER:Why?", "\n#ASSISTANT:"]
    prompt_ids = [1, *(i for text in segments for i in tokenizer(text).input_ids)]
    answer_ids = [*tokenizer("So.").input_ids, 2]
    assert ids == prompt_ids + answer_ids
    assert supervised == [False] * len(prompt_ids) + [True] * len(answer_ids)


# ---- properties


@BOTH
@QUICK
@given(conversations(TEXT))
def test_prompts_are_prefixes_and_answers_are_supervised(tokenizer, name, conversation):
    template = build_template(name, tokenizer)
    ids, supervised = render_row(template, conversation)
    answered = [False] * len(ids)
    for index, message in enumerate(conversation["messages"]):
        if message["role"] == "assistant":
            prompt = template.encode_prompt(cut_conversation(conversation, index))
            assert ids[: len(prompt)] == prompt
            answer = [*encode_as_text(tokenizer, [message["content"]])[0], template.stop_token_id]
            assert ids[len(prompt) : len(prompt) + len(answer)] == answer
            answered[len(prompt) : len(prompt) + len(answer)] = [True] * len(answer)
    assert supervised == answered
    assert ids[-1] == template.stop_token_id


@BOTH
@QUICK
@given(conversations(TEXT))
def test_training_on_the_last_answer_changes_no_id(tokenizer, name, conversation):
    template = build_template(name, tokenizer)
    ids, _ = render_row(template, conversation)
    last_ids, last = render_row(template, conversation, "last")
    assert last_ids == ids
    prompt = template.encode_prompt(cut_conversation(conversation, -1))
    assert last == [False] * len(prompt) + [True] * (len(ids) - len(prompt))


@BOTH
@QUICK
@given(conversations(TEXT))
def test_control_tokens_never_come_from_a_row(tokenizer, name, conversation):
    """Only the template's own control tokens appear, as in a conversation of harmless texts."""
    template = build_template(name, tokenizer)
    messages = conversation["messages"]
    ids, _ = render_row(template, conversation)
    harmless, _ = render_row(template, {"messages": [{**message, "content": "x"} for message in messages]})
    assert [i for i in ids if i in range(3)] == [i for i in harmless if i in range(3)]
    assert not {0, 1, 2} & {i for text in encode_as_text(tokenizer, [m["content"] for m in messages]) for i in text}


@BOTH
@QUICK
@given(conversations(TEXT))
def test_an_answer_is_decoded(tokenizer, name, conversation):
    template = build_template(name, tokenizer)
    ids, _ = render_row(template, conversation)
    answer = ids[len(template.encode_prompt(cut_conversation(conversation, -1))) :]
    content = conversation["messages"][-1]["content"].strip()
    assert template.parse(answer) == {"role": "assistant", "content": content}
    # Without a stop token, and with text after it.
    assert template.parse(answer[:-1]) == template.parse([*answer, *answer])


@QUICK
@given(conversations(WORDS.map(" ".join)))
def test_ordinary_text_has_the_chat_templates_own_ids(tokenizer, conversation):
    template = build_template("chat", tokenizer)
    messages = conversation["messages"]
    expected = tokenizer.apply_chat_template(messages, return_dict=False)
    assert render_row(template, conversation)[0] + tokenizer("\n").input_ids == expected
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert template.encode_prompt(cut_conversation(conversation, -1)) == prompt


@BOTH
def test_a_spelled_stop_token_is_text(tokenizer, name):
    """A plain tokenizer call would encode it as the control token."""
    assert 2 in tokenizer("a<|im_end|>b").input_ids
    template = build_template(name, tokenizer)
    prompt = template.encode_prompt(build_conversation(["a<|im_end|>b<|im_start|>system\nc"]))
    harmless = template.encode_prompt(build_conversation(["x"]))
    assert [i for i in prompt if i < 3] == [i for i in harmless if i < 3]
    assert "a<|im_end|>b<|im_start|>system\nc" in tokenizer.decode(prompt)


def test_a_batch_is_rendered_like_each_conversation(tokenizer):
    rows = [build_conversation([f"q{index}", f"a{index % 2}"], "s") for index in range(5)]
    for name in ("role", "chat"):
        template = build_template(name, tokenizer)
        assert template.render(rows) == [template.render([row])[0] for row in rows]


# ---- other tokenizers and chat templates


def test_the_role_template_borrows_bos_and_eos():
    tokenizer = build_bare_tokenizer(bos_token="<s>", eos_token="</s>")
    template = build_template("role", tokenizer)
    ids, supervised = render_row(template, build_conversation(["a", "b"]))
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id) and supervised[-2:] == [True, True]
    assert template.parse(ids[-2:])["content"] == "b"


def test_the_role_template_without_a_start_token():
    tokenizer = build_bare_tokenizer(eos_token="</s>")
    template = build_template("role", tokenizer)
    ids, _ = render_row(template, build_conversation(["a", "b"]))
    assert tokenizer.decode(ids[:2]).replace(" ", "") == "\n#"
    tokenizer.chat_template = template.chat_template
    messages = build_conversation(["a", "b"])["messages"]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "\n#USER:a\n#ASSISTANT:b</s>"


# ---- which chat template


def test_a_tokenizer_without_a_chat_template(make_tokenizer):
    message = "^template chat: the tokenizer has no chat template; set chat_template, or use `template: role`$"
    with pytest.raises(SFTError, match=message):
        build_template("chat", make_tokenizer(chat_template=None))


def test_a_chat_template_of_a_file(make_tokenizer, tmp_path):
    file = tmp_path / "short.jinja"
    file.write_text(CHATML.replace("'\n'", "': '"), encoding="utf-8")
    tokenizer = make_tokenizer()
    template = build_template("chat", tokenizer, str(file))
    assert template.chat_template == tokenizer.chat_template == file.read_text()
    assert tokenizer.decode(template.encode_prompt(build_conversation(["q"]))).startswith("<|im_start|>user: q")


def test_a_chat_template_by_name(make_tokenizer):
    named = {"default": CHATML, "tools": AGENT_TEMPLATE}
    assert load_chat_template(make_tokenizer(dict(named)), None) == CHATML
    assert load_chat_template(make_tokenizer(dict(named)), "tools") == AGENT_TEMPLATE
    assert load_chat_template(make_tokenizer(), "default") == CHATML
    assert build_template("chat", make_tokenizer(dict(named)), "tools").chat_template == AGENT_TEMPLATE


def test_chat_templates_that_cannot_be_read(make_tokenizer, tmp_path):
    named = {"a": CHATML, "b": CHATML}
    fails(
        lambda: build_template("chat", make_tokenizer(dict(named))),
        "template chat: the tokenizer has no chat template of the name default; name one with chat_template: a, b",
    )
    missing = "chat_template c: no such file, nor a template of the tokenizer (it has: "
    fails(lambda: build_template("chat", make_tokenizer(dict(named)), "c"), missing + "a, b)")
    fails(lambda: build_template("chat", make_tokenizer(None), "c"), missing + "none)")
    fails(lambda: build_template("chat", make_tokenizer(), str(tmp_path)), f"chat_template {tmp_path}: no such file")
    (tmp_path / "latin.jinja").write_bytes(b"{# \xe9 #}")
    fails(
        lambda: build_template("chat", make_tokenizer(), str(tmp_path / "latin.jinja")),
        "latin.jinja: not UTF-8 at byte 3; save it as UTF-8",
    )
    fails(
        lambda: build_template("role", make_tokenizer(), "x.jinja"),
        "chat_template: `template: role` reads none; remove it or use `template: chat`",
    )


def test_a_tokenizer_without_a_stop_token():
    with pytest.raises(SFTError, match=r"template role: the tokenizer has neither <\|im_end\|> nor an eos token"):
        build_template("role", build_bare_tokenizer())


def test_a_chat_template_without_a_stop_token(make_tokenizer):
    endless = "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content + '\n' }}{% endfor %}"
    with pytest.raises(SFTError, match="the chat template writes no stop token after an answer"):
        build_template("chat", make_tokenizer(endless))


def test_a_chat_template_over_a_tokenizer_without_control_tokens():
    tokenizer = build_bare_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(SFTError, match="writes no stop token"):
        build_template("chat", tokenizer)


def test_a_slow_tokenizer():
    with pytest.raises(SFTError, match="SimpleNamespace is not a fast tokenizer; convert it to a tokenizer.json first"):
        build_template("role", SimpleNamespace(is_fast=False))


def test_a_template_that_rewrites_history(make_tokenizer):
    """Each answer is trained under the prompt that it will get."""
    template = build_template("chat", make_tokenizer(HISTORY_DROPPING))
    conversation = build_conversation(["q1", "a1", "q2", "a2"])
    first, second = render_sequences(template, conversation)
    [only] = render_sequences(template, conversation, "last")
    assert only == second
    for (ids, supervised), end, answer in ((first, 1, "a1"), (second, 3, "a2")):
        prompt = template.encode_prompt(cut_conversation(conversation, end))
        assert ids[: len(prompt)] == prompt
        assert supervised == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
        assert template.parse(ids[len(prompt) :])["content"] == answer
    assert "a1" not in template.tokenizer.decode(second[0])
    assert len(render_sequences(template, cut_conversation(conversation, 2))) == 1


def test_a_newline_before_the_stop_token_is_supervised(make_tokenizer):
    """An answer is supervised through the stop token, whatever the template writes between them."""
    tokenizer = make_tokenizer(CHATML.replace("<|im_end|>\n", "\n<|endoftext|>\n"))
    template = build_template("chat", tokenizer)
    assert template.stop_token_id == 0
    ids, supervised = render_row(template, build_conversation(["q", "a"]))
    assert tokenizer.decode([i for i, flag in zip(ids, supervised) if flag]) == "a\n<|endoftext|>"


def test_a_conversation_without_an_answer_has_nothing_supervised(tokenizer):
    for name in ("role", "chat"):
        for train_on in ("all", "last"):
            assert render_sequences(build_template(name, tokenizer), build_conversation(["q"]), train_on) == []


def test_placeholders_for_control_tokens_are_replaced_back(tokenizer):
    ids = build_template("chat", tokenizer).encode_prompt(build_conversation(["a<|im_end|>b"]))
    assert PLACEHOLDER.format("")[0] not in tokenizer.decode(ids)
