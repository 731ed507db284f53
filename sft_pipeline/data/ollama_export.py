"""Write a trained model's chat template in the language of Ollama, which is that of Go's `text/template`.

    modelfile = build_modelfile(tokenizer, stop_tokens)      # the tokenizer as it is saved with the model

Ollama does not read the jinja template of a model folder. Most of those templates put fixed texts around each message;
these texts are found by rendering a few conversations, and then checked on others. Of a template that does more, as one
that writes tools, only this part is translated. Ollama's rendering: github.com/ollama/ollama, template/template.go.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from sft_pipeline.data.messages import Message
from sft_pipeline.utils.errors import SFTError

SYSTEM, USER, ANSWER = "Sys tem0", "Ques tion0", "Ans wer0"  # contents to be found again in what is rendered
MODELFILE = "Modelfile"


@dataclass(frozen=True)
class MessageTexts:
    """The fixed texts of a chat template: those before and after the content of each role, and the generation prompt.

    opening: the text at the start of every conversation. default_system: the system message that a conversation without
    one gets, or None. If `system_in_user` the system message has no texts of its own: it stands before the content of
    the first user message, with `system_end` between.
    """

    system_start: str
    system_end: str
    user_start: str
    user_end: str
    answer_start: str
    answer_end: str
    generation_prompt: str
    opening: str = ""
    default_system: str | None = None
    system_in_user: bool = False

    def render(self, messages: list[Message]) -> str:
        """Render messages that end with a user's, with the generation prompt, as Ollama would from the Modelfile."""
        if messages[0]["role"] != "system" and self.default_system is not None:
            messages = [{"role": "system", "content": self.default_system}, *messages]
        texts, system = self.opening, ""
        for message in messages:
            content = message["content"]
            if message["role"] == "system" and self.system_in_user:
                system = content + self.system_end
            elif message["role"] == "system":
                texts += self.system_start + content + self.system_end
            elif message["role"] == "user":
                texts += self.user_start + system + content + self.user_end
                system = ""
            else:
                texts += self.answer_start + content + self.answer_end
        return texts + self.generation_prompt

    def format_template(self) -> str:
        """Return the template in Ollama's language. A conversation that ends with an answer is continued there."""
        content, start, end = "{{ .Content }}", _literal(self.user_start), _literal(self.user_end)
        system = f"{_literal(self.system_start)}{content}{_literal(self.system_end)}"
        user = f"{start}{content}{end}"
        if self.system_in_user:
            system = "{{- $system = .Content }}"
            with_system = f'{{{{ $system }}}}{_literal(self.system_end)}{{{{- $system = "" }}}}'
            user = f"{start}{{{{- if $system }}}}{with_system}{{{{- end }}}}{content}{end}"
        answer = (
            f"{_literal(self.answer_start)}{content}{{{{- if not $last }}}}{_literal(self.answer_end)}{{{{- end }}}}"
        )
        lines = [
            f'{{{{- $system := "" }}}}{_literal(self.opening)}',
            "{{- range $index, $message := .Messages }}",
            "{{- $last := eq (len (slice $.Messages $index)) 1 }}",
            f'{{{{- if eq .Role "system" }}}}{system}',
            f'{{{{- else if eq .Role "user" }}}}{user}',
            f'{{{{- else if eq .Role "assistant" }}}}{answer}',
            "{{- end }}",
            f'{{{{- if and $last (ne .Role "assistant") }}}}{_literal(self.generation_prompt)}{{{{- end }}}}',
            "{{- end }}",
        ]
        return "\n".join(lines)


def _literal(text: str) -> str:
    """Return a text as a string constant of the template, so that its line ends survive the trimming around it."""
    return f"{{{{- {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def build_modelfile(tokenizer: PreTrainedTokenizerBase, stop_tokens: list[str]) -> str:
    """Return the Modelfile of a folder with this tokenizer: template, system prompt, stop tokens, greedy decoding.

    Raises SFTError for a chat template that is more than fixed texts around each message.
    """
    texts = find_message_texts(tokenizer)
    lines = ["FROM .", f'TEMPLATE """{texts.format_template()}"""']
    if texts.default_system is not None:
        if '"""' in texts.default_system:
            raise SFTError('ollama: the system prompt holds """, which a Modelfile cannot quote; change it')
        lines.append(f'SYSTEM """{texts.default_system}"""')
    lines += [f"PARAMETER stop {json.dumps(token, ensure_ascii=False)}" for token in stop_tokens]
    # The model was evaluated so; Ollama's own defaults sample, and penalize what the prompt has said.
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]
    return "\n".join(lines) + "\n"


def find_message_texts(tokenizer: PreTrainedTokenizerBase) -> MessageTexts:
    """Find the texts that the tokenizer's chat template puts around messages.

    Without the bos token where the tokenizer adds it to a text, as Ollama does then too. Raises SFTError if they do not
    give what the template renders.
    """
    one_turn: list[Message] = [{"role": "user", "content": USER}]
    with_system: list[Message] = [{"role": "system", "content": SYSTEM}, *one_turn]
    answered: list[Message] = [*one_turn, {"role": "assistant", "content": ANSWER}]
    try:
        before_user, user_end = _split(_render(tokenizer, one_turn, False), USER)
        before_answer, generation_prompt = (
            _split(_render(tokenizer, messages, True), USER)[1].removeprefix(user_end)
            for messages in (answered, one_turn)
        )
        answer_end = _split(_render(tokenizer, answered, False), ANSWER)[1]
        _, between = _split(_render(tokenizer, [*answered, *one_turn], True), ANSWER)
        user_start = _split(between, USER)[0].removeprefix(answer_end)
        answer_start = _split(before_answer, ANSWER)[0]
        system_start, after_system = _split(_render(tokenizer, with_system, False), SYSTEM)
        between = _split(after_system, USER)[0]
    except ValueError as error:
        raise _build_error(f"it does not write {error} once") from error
    system_in_user = not between.endswith(user_start)
    system_end = between if system_in_user else between.removesuffix(user_start)
    opening, default_system = before_user.removesuffix(user_start), None
    if opening and opening.startswith(system_start) and opening.endswith(system_end):
        opening, default_system = "", opening.removeprefix(system_start).removesuffix(system_end)
    texts = MessageTexts(
        system_start.removeprefix(opening), system_end, user_start, user_end, answer_start, answer_end,
        generation_prompt, opening, default_system, system_in_user,
    )  # fmt: skip
    for messages in _list_conversations():
        if texts.render(messages) != _render(tokenizer, messages, True):
            roles = ", ".join(message["role"] for message in messages)
            raise _build_error(f"what it writes around a message is not the same in a conversation of {roles}")
    return texts


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], add_generation_prompt: bool) -> str:
    """Render with the tokenizer's chat template, without a bos token that the tokenizer adds.

    Raises SFTError if the template raises an error.
    """
    conversation: Any = messages
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template raises what it likes
        roles = ", ".join(message["role"] for message in messages)
        raise _build_error(f"it does not render a conversation of {roles}") from error
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return str(text).removeprefix(str(tokenizer.bos_token)) if adds_bos else str(text)


def _split(text: str, content: str) -> tuple[str, str]:
    """Split a text at a content. Raises ValueError with the content if it is not in it exactly once."""
    prefix, *suffixes = text.split(content)
    if len(suffixes) != 1:
        raise ValueError(content)
    return prefix, suffixes[0]


def _list_conversations() -> Iterator[list[Message]]:
    """Yield the conversations that a translation is checked on: one to three turns, with and without system message."""
    contents = (
        'Why is "it" so?',
        "Because.\n\nIt is:\n- a\\b\n- {c}",
        "冬瓜 汤？",
        "<b>Yes</b>: {{ 1 }}",
        "And {% x %}",
    )
    for turns in (1, 2, 3):
        messages: list[Message] = [
            {"role": ("user", "assistant")[index % 2], "content": contents[index]} for index in range(2 * turns - 1)
        ]
        yield messages
        yield [{"role": "system", "content": 'Answer in "verse".'}, *messages]


def _build_error(reason: str) -> SFTError:
    return SFTError(
        f"ollama: the chat template cannot be written in Ollama's language as fixed texts around each message, as "
        f"{reason}; leave --ollama out, and write the Modelfile by hand"
    )
