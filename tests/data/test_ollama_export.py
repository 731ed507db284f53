"""The Modelfile of an exported model renders conversations as the chat template does, also in Go's own language."""

import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support import tiny
from tokenizers.processors import TemplateProcessing

from sft_pipeline.data.chat_templates import build_template
from sft_pipeline.data.ollama_export import build_modelfile, find_message_texts
from sft_pipeline.data.tokenizer_export import build_saved_tokenizer
from sft_pipeline.utils.errors import SFTError

RENDERER = Path(__file__).parents[1] / "support" / "ollama_render.go"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# With a system message of its own where there is none, as SmolLM2 has it.
SMOLLM2 = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are \"helpful\".<|im_end|>\\n' }}{% endif %}"
    + CHATML
)
LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}"
    "{{ message.content + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
# The system message is part of the first user message, and the assistant is called model.
GEMMA = (
    "{{ bos_token }}{% set first = '' %}{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content + '\\n\\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for message in messages %}{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) }}"
    "{{ '\\n' + (first if loop.first else '') + message.content + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
# As Qwen3 with enable_thinking: false: the prompt goes on where an earlier answer does not.
OPENING = CHATML.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif")
TEMPLATES = {"ChatML": CHATML, "SmolLM2": SMOLLM2, "Llama 3": LLAMA_3, "Gemma": GEMMA, "Qwen3": OPENING, "role": None}


@pytest.fixture(params=[*TEMPLATES])
def tokenizer(request):
    return build_tokenizer(request.param, system_prompt=None)


def build_tokenizer(name: str, system_prompt: str | None):
    tokenizer = tiny.build_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|eot_id|>", "<end_of_turn>"]})
    if TEMPLATES[name]:
        tokenizer.chat_template = TEMPLATES[name]
    return build_saved_tokenizer(build_template("chat" if TEMPLATES[name] else "role", tokenizer), system_prompt)


def write_conversations(count: int) -> list[list[dict[str, str]]]:
    """Return conversations of 1 to 5 messages that end with a user's, half of them with a system message."""
    words = [
        "Why",
        "is",
        '"it"',
        "so?",
        "\n\n",
        "冬瓜",
        "{{ .Content }}",
        "\\",
        "`tick`",
        "<b>",
        "$last",
        "'",
        "{% if %}",
    ]
    source, conversations = random.Random(7), []
    for index in range(count):
        texts = ["a" + " ".join(source.choices(words, k=source.randint(1, 9))) + "z" for _ in range(6)]
        turns = range(source.choice([1, 3, 5]))
        messages = [{"role": ("user", "assistant")[turn % 2], "content": texts[turn]} for turn in turns]
        conversations.append([{"role": "system", "content": texts[5]}, *messages] if index % 2 else messages)
    return conversations


def render(tokenizer, messages) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_the_texts_around_messages_give_what_the_template_renders(tokenizer):
    texts = find_message_texts(tokenizer)
    for messages in write_conversations(50):
        assert texts.render(messages) == render(tokenizer, messages)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system_prompt", [None, 'Answer in "short"\nlines.'])
def test_go_renders_the_template_as_jinja_does(name, system_prompt):
    """With Go's own `text/template`, on 50 conversations."""
    if shutil.which("go") is None:
        pytest.skip("Go is not installed (Debian: golang-go)")
    tokenizer, conversations = build_tokenizer(name, system_prompt), write_conversations(50)
    template, system = read_modelfile(build_modelfile(tokenizer, ["<|im_end|>"]))
    source = json.dumps({"template": template, "system": system, "conversations": conversations})
    result = subprocess.run(["go", "run", str(RENDERER)], input=source, capture_output=True, text=True, check=False)
    assert not result.returncode, result.stderr
    assert json.loads(result.stdout) == [render(tokenizer, messages) for messages in conversations]


def read_modelfile(text: str) -> tuple[str, str | None]:
    """Return the template and system message, as Ollama's parser reads them: what stands between triple quotes."""
    template = re.search(r'^TEMPLATE """(.*?)"""', text, re.DOTALL | re.MULTILINE)
    system = re.search(r'^SYSTEM """(.*?)"""', text, re.DOTALL | re.MULTILINE)
    return template[1], system and system[1]


def test_a_bos_token_is_left_out_only_where_the_tokenizer_adds_it():
    """SmolLM2's bos token is `<|im_start|>`, which its template writes before every message."""
    tokenizer = tiny.build_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.chat_template = CHATML
    assert find_message_texts(tokenizer).user_start == "<|im_start|>user\n"
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    assert find_message_texts(tokenizer).opening == "<|im_start|>"
    backend = tokenizer.backend_tokenizer
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    backend.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    assert find_message_texts(tokenizer).opening == ""


def test_a_modelfile_has_system_prompt_stop_tokens_and_greedy_decoding():
    text = build_modelfile(build_tokenizer("ChatML", "Be brief."), ["<|im_end|>", "<|endoftext|>"])
    assert text.startswith('FROM .\nTEMPLATE """{{- $system := "" }}\n')
    assert text.endswith(
        'SYSTEM """Be brief."""\nPARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\n'
        "PARAMETER temperature 0\nPARAMETER repeat_penalty 1\n"
    )
    assert (
        "SYSTEM" not in build_modelfile(build_tokenizer("ChatML", None), []).partition("PARAMETER")[0].split('"""')[2]
    )


NUMBERED = CHATML.replace("message.content", "loop.index ~ message.content")
DOUBLED = CHATML.replace("message.content", "message.content ~ message.content")
WITHOUT_SYSTEM = "{{ raise_exception('no system') if messages[0].role == 'system' }}" + CHATML


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (NUMBERED, "what it writes around a message is not the same in a conversation of user;"),
        (DOUBLED, "it does not write Ques tion0 once"),
        (WITHOUT_SYSTEM, "it does not render a conversation of system, user;"),
    ],
)
def test_a_template_of_another_kind_is_refused(template, reason):
    tokenizer = tiny.build_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(SFTError, match=r"^ollama: the chat template cannot be written in Ollama's language") as error:
        build_modelfile(tokenizer, [])
    assert reason in str(error.value) and str(error.value).endswith("write the Modelfile by hand")


def test_a_system_prompt_that_cannot_be_quoted_is_refused():
    with pytest.raises(SFTError, match='^ollama: the system prompt holds """, which a Modelfile cannot quote'):
        build_modelfile(build_tokenizer("ChatML", 'a """ b'), [])
