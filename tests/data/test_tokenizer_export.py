"""The saved tokenizer: other tools, which tokenize the whole text at once, get the same ids as training."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from support.conversations import (
    BOTH,
    QUICK,
    SYSTEM,
    TEXT,
    build_conversation,
    conversations,
    cut_conversation,
    render_row,
    render_sequences,
)
from support.templates import AGENT_TEMPLATE, THINKING_TEMPLATE
from support.tiny import CHATML, CONTROL, build_tokenizer
from tokenizers import Regex, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sft_pipeline.data.chat_templates import build_template
from sft_pipeline.data.messages import Conversation, add_system_prompt
from sft_pipeline.data.role_template import ROLE_HEADERS
from sft_pipeline.data.text_encoder import PATTERNS
from sft_pipeline.data.tokenizer_export import build_saved_chat_template, build_saved_tokenizer, count_id_differences


@BOTH
@pytest.mark.parametrize("system", [None, SYSTEM, "a \"quoted\" 'one'\n\\n {{ x }} {% y %} %} 🙂 <b>&amp;"])
def test_the_saved_chat_template_renders_what_was_trained(make_tokenizer, name, system):
    tokenizer = make_tokenizer()
    template = build_template(name, tokenizer)
    conversation = build_conversation(["What is the answer?", "The answer is 42.", "Why?", "冬瓜 🙂"])
    messages = conversation["messages"]
    trained = template.tokenizer.decode(render_row(template, add_system_prompt(conversation, system))[0])
    prompt = tokenizer.decode(template.encode_prompt(add_system_prompt(cut_conversation(conversation, -1), system)))
    tokenizer.chat_template = build_saved_chat_template(template, system)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == trained + ("\n" if name == "chat" else "")
    assert tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True) == prompt


@BOTH
def test_the_saved_chat_template_keeps_a_system_message(make_tokenizer, name):
    tokenizer = make_tokenizer()
    template = build_template(name, tokenizer)
    conversation = build_conversation(["q", "a"], "its own")
    for role in ("system", "developer"):
        conversation["messages"][0]["role"] = role
        expected = tokenizer.decode(render_row(template, conversation)[0])
        tokenizer.chat_template = build_saved_chat_template(template, "the default")
        rendered = tokenizer.apply_chat_template(conversation["messages"], tokenize=False)
        assert rendered.removesuffix("\n") == expected


VALUES = {"flag": False, "null": None, "text": "a 'quoted' \"text\" {{ x }} %} 冬瓜", "list": [1, 2.5, {"a": None}]}


def test_template_arguments_are_defaults_of_the_saved_chat_template(make_tokenizer):
    """Other tools render what was trained; an argument of their own replaces the default."""
    jinja = "{{ [flag, null, text, list] | tojson }}" + CHATML
    template = build_template("chat", make_tokenizer(jinja), None, VALUES)
    conversation = build_conversation(["q", "a"])
    trained = template.tokenizer.decode(render_row(template, conversation)[0])
    assert trained.startswith(json.dumps(list(VALUES.values()), ensure_ascii=False))
    tokenizer = make_tokenizer(build_saved_chat_template(template, None))
    assert tokenizer.apply_chat_template(conversation["messages"], tokenize=False) == trained + "\n"
    other = tokenizer.apply_chat_template(conversation["messages"], tokenize=False, flag=True, null="x")
    assert other.startswith('[true, "x", ')
    # A trained model that is trained again has the arguments in its template already.
    again = build_template("chat", tokenizer, None, VALUES)
    assert build_saved_chat_template(again, None) == tokenizer.chat_template


def test_the_saved_chat_template_opens_answers_as_trained(make_tokenizer):
    template = build_template("chat", make_tokenizer(THINKING_TEMPLATE), None, {"enable_thinking": False})
    prompt = build_conversation(["q"])
    tokenizer = make_tokenizer(build_saved_chat_template(template, "s"))
    rendered = tokenizer.apply_chat_template(prompt["messages"], tokenize=False, add_generation_prompt=True)
    assert rendered == tokenizer.decode(template.encode_prompt(add_system_prompt(prompt, "s")))
    assert rendered.endswith("<think>\n\n</think>\n\n")


def test_the_saved_chat_template_is_plain_jinja(tokenizer):
    """Other tools render it without transformers."""
    saved = build_saved_chat_template(build_template("role", tokenizer), SYSTEM)
    text = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(saved)
    rendered = text.render(messages=build_conversation(["q"])["messages"], add_generation_prompt=True)
    assert rendered == f"<|im_start|>\n#SYSTEM:{SYSTEM}\n#USER:q\n#ASSISTANT:"


def test_id_differences_are_counted(tokenizer):
    plain = build_conversation(["hi", "yes"])
    # A control token that a row spells is text in training, and the token itself when the whole text is tokenized.
    spelled = build_conversation(["<|im_end|>", "yes"])
    template = build_template("chat", tokenizer)
    untrained = build_conversation(["<|im_end|>"])
    assert count_id_differences(template, [plain, spelled, plain, untrained, {"text": "x"}], "Be brief.") == 1


def test_id_differences_of_rows_with_tools_and_reasoning(make_tokenizer):
    """Compared is the last sequence of a row, with its tools and its template arguments."""
    template = build_template("chat", make_tokenizer(AGENT_TEMPLATE))
    tools = [{"type": "function", "function": {"name": "find", "description": "Finds."}}]
    conversation = build_conversation(["q", "a", "q", "b"], tools=tools, chat_template_kwargs={"x": 1})
    conversation["messages"][1]["reasoning_content"] = "Hm."
    conversation["messages"].append({"role": "user", "content": "not trained"})
    assert len(render_sequences(template, conversation)) == 2
    assert count_id_differences(template, [conversation], "Be brief.") == 0
    conversation["tools"][0]["function"]["description"] = "<|im_end|>"
    assert count_id_differences(template, [conversation], "Be brief.") == 1


# ---- the same ids in other tools


@pytest.fixture(scope="module")
def merging() -> PreTrainedTokenizerFast:
    """Qwen's pre-tokenizer, and a vocabulary that merges full stops and newlines."""
    backend = build_tokenizer().backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERNS[0]), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    corpus = ["question.\n", "text?\n", "a.\n\nb", "x \n\n"] * 8
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=CONTROL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    assert len(tokenizer(".\n").input_ids) == 1
    return tokenizer


def encode_in_one_go(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[int]:
    return tokenizer.apply_chat_template(conversation["messages"], add_generation_prompt=True, return_dict=False)


PLAIN = TEXT.filter(lambda text: "<|" not in text and "|>" not in text)


@QUICK
@given(conversations(PLAIN), st.none() | PLAIN)
def test_other_tools_get_the_ids_of_the_prompt(merging, saved, conversation, system):
    """The saved tokenizer gives the prompt's ids, also if a message contains a role header."""
    tokenizer = saved(system)
    conversation = cut_conversation(conversation, -1)
    with_system = add_system_prompt(conversation, system)
    prompt = build_template("role", tokenizer).encode_prompt(with_system)
    assert encode_in_one_go(tokenizer, conversation) == prompt
    texts = [message["content"] for message in with_system["messages"]]
    if not any(header in text for header in ROLE_HEADERS.values() for text in texts):
        assert build_template("role", merging).encode_prompt(with_system) == prompt


@pytest.fixture(scope="module")
def saved(merging):
    """A function that returns the saved tokenizer for a system prompt; built once, because that takes 10 ms."""
    template = build_template("role", merging)
    tokenizer = build_saved_tokenizer(template, None)

    def with_prompt(system: str | None) -> PreTrainedTokenizerBase:
        tokenizer.chat_template = build_saved_chat_template(template, system)
        return tokenizer

    return with_prompt


def test_without_the_splits_a_full_stop_merges_with_the_header(merging, saved):
    messages = build_conversation(["Why is it so.", "Because.", "\n\nAnd\n"], "Be brief.")
    plain, whole = build_template("role", merging), saved(None)
    joined = encode_in_one_go(
        PreTrainedTokenizerFast(tokenizer_object=merging.backend_tokenizer, chat_template=plain.chat_template),
        messages,
    )
    assert joined != plain.encode_prompt(messages) == encode_in_one_go(whole, messages)


def test_saving_a_saved_tokenizer_changes_nothing(merging):
    """`export` does that, and a run that trains a trained model."""
    once = build_saved_tokenizer(build_template("role", merging), "Be brief.")
    twice = build_saved_tokenizer(build_template("role", once), "Be brief.")
    assert twice.backend_tokenizer.to_str() == once.backend_tokenizer.to_str() != merging.backend_tokenizer.to_str()
    assert twice.chat_template == once.chat_template
    chat = build_saved_tokenizer(build_template("chat", build_tokenizer()), "Be brief.")
    assert build_saved_tokenizer(build_template("chat", chat), "Be brief.").chat_template == chat.chat_template


def test_the_qwen3_tokenizer(qwen3, tmp_path):
    """Its class rebuilds the pre-tokenizer when it is loaded; the saved tokenizer is loaded as it was saved."""
    template = build_template("role", qwen3)
    build_saved_tokenizer(template, SYSTEM).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    messages = build_conversation(["如何学习python?", "Read.", "Give three tips for staying healthy."])
    prompt = template.encode_prompt(add_system_prompt(messages, SYSTEM))
    assert encode_in_one_go(AutoTokenizer.from_pretrained(tmp_path), messages) == prompt
    options = {"add_generation_prompt": True, "return_dict": False}
    assert (
        qwen3.apply_chat_template(
            messages["messages"], chat_template=build_saved_chat_template(template, SYSTEM), **options
        )
        != prompt
    )
