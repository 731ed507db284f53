"""Convert messages to token ids and back, the same way for training, evaluation, chat and the saved `chat_template`.

    template = build_template("role", tokenizer)
    [spans] = template.render([messages])     # training ids, as spans of (ids, supervised)
    ids = template.encode_prompt(messages)    # ids for generation, always a prefix of the training ids
    text = template.parse(answer_ids)

The prompt is a prefix by construction: training and generation split a conversation into pieces at the same positions
and tokenize each piece separately. The text of a row is always encoded as text: `<|im_end|>` in a message becomes the
ids of its characters, never the control token.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from sft_pipeline.data.messages import Message
from sft_pipeline.data.text_encoder import TextEncoder
from sft_pipeline.utils.errors import SFTError, format_error

# Replaces a control token's spelling in a message while jinja renders the conversation. The delimiters are private-use
# characters, which no tokenizer has as a special token.
PLACEHOLDER = "\ue000sft{}\ue001"
PLACEHOLDER_PATTERN = re.compile(PLACEHOLDER.format("([0-9]+)"))
ROLE_HEADERS = {"system": "\n#SYSTEM:", "user": "\n#USER:", "assistant": "\n#ASSISTANT:"}


class TemplatePiece(NamedTuple):
    """A part of a conversation that is tokenized separately: text, or the id of one control token."""

    text: str
    token_id: int | None
    supervised: bool


class TokenSpan(NamedTuple):
    """Consecutive ids that are either all supervised or all not."""

    ids: list[int]
    supervised: bool


class Template:
    """Base class: encodes pieces in batches. Subclasses define how messages are split into pieces."""

    name: Literal["role", "chat"]
    chat_template: str  # the jinja text to save with the tokenizer
    role_headers: tuple[str, ...] = ()  # texts (not control tokens) before which a piece begins
    stop_token_id: int

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._encode_texts = TextEncoder(tokenizer)

    def split_conversation(self, messages: list[Message], train_on: str = "all") -> list[TemplatePiece]:
        """Split a whole conversation into pieces, up to the stop token of its last answer."""
        raise NotImplementedError

    def split_prompt(self, messages: list[Message]) -> list[TemplatePiece]:
        """Split a conversation that ends with a user message into pieces, up to where the answer begins."""
        raise NotImplementedError

    def render(self, conversations: Iterable[list[Message]], train_on: str = "all") -> list[list[TokenSpan]]:
        """Return the training ids of each conversation as spans.

        train_on: "all" supervises every assistant message, "last" only the last one.

        Raises SFTError if the chat template rewrites earlier messages, because the prompt would then not be a prefix
        of the training ids.
        """
        return self._encode_pieces([self.split_conversation(messages, train_on) for messages in conversations])

    def encode_prompt(self, messages: list[Message]) -> list[int]:
        """Return the ids from which the next answer is generated."""
        [spans] = self._encode_pieces([self.split_prompt(messages)])
        return list(itertools.chain.from_iterable(span.ids for span in spans))

    def parse(self, ids: list[int]) -> str:
        """Decode the generated ids of an answer, up to the stop token."""
        end = ids.index(self.stop_token_id) if self.stop_token_id in ids else len(ids)
        return str(self.tokenizer.decode(ids[:end], skip_special_tokens=True)).strip()

    def _encode_pieces(self, conversations: list[list[TemplatePiece]]) -> list[list[TokenSpan]]:
        """Tokenize the texts of all conversations in one call."""
        texts = (piece.text for pieces in conversations for piece in pieces if piece.token_id is None)
        try:
            ids = self._encode_texts(texts)
        except (TypeError, UnicodeEncodeError) as error:
            raise SFTError(
                "a text contains a lone surrogate (half of a UTF-16 pair), which cannot be tokenized; remove it"
            ) from error
        return [
            [
                TokenSpan(ids[piece.text] if piece.token_id is None else [piece.token_id], piece.supervised)
                for piece in pieces
            ]
            for pieces in conversations
        ]


class RoleTemplate(Template):
    """`<|im_start|>`, then each text after `\\n#SYSTEM:`, `\\n#USER:` or `\\n#ASSISTANT:`; `<|im_end|>` ends an answer.

    If the tokenizer has no `<|im_start|>` or `<|im_end|>`, its bos or eos token is used instead.
    """

    name = "role"
    role_headers = tuple(ROLE_HEADERS.values())

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        vocab = tokenizer.get_vocab()
        self.start_token_id = vocab.get("<|im_start|>", tokenizer.bos_token_id)
        stop_token_id = vocab.get("<|im_end|>", tokenizer.eos_token_id)
        if stop_token_id is None:
            raise SFTError(
                "template role: the tokenizer has neither <|im_end|> nor an eos token to end an answer with; "
                "set eos_token in its tokenizer_config.json"
            )
        self.stop_token_id = stop_token_id
        self.chat_template = self._build_jinja()

    def split_conversation(self, messages: list[Message], train_on: str = "all") -> list[TemplatePiece]:
        pieces = [] if self.start_token_id is None else [TemplatePiece("", self.start_token_id, False)]
        for index, message in enumerate(messages):
            pieces += self._split_message(message, supervised=train_on == "all" or index == len(messages) - 1)
        return pieces

    def split_prompt(self, messages: list[Message]) -> list[TemplatePiece]:
        return [*self.split_conversation(messages), TemplatePiece(ROLE_HEADERS["assistant"], None, False)]

    def _split_message(self, message: Message, supervised: bool) -> list[TemplatePiece]:
        role, content = message["role"], message["content"]
        if role != "assistant":
            return [TemplatePiece(ROLE_HEADERS[role] + content, None, False)]
        return [
            TemplatePiece(ROLE_HEADERS["assistant"], None, False),
            TemplatePiece(content, None, supervised),
            TemplatePiece("", self.stop_token_id, supervised),
        ]

    def _build_jinja(self) -> str:
        """Build the jinja chat template that renders the same text, for tools that only support chat templates."""
        start = "" if self.start_token_id is None else self.tokenizer.convert_ids_to_tokens(self.start_token_id)
        stop = self.tokenizer.convert_ids_to_tokens(self.stop_token_id)
        assistant = json.dumps(ROLE_HEADERS["assistant"])
        return (
            f"{{{{ {json.dumps(start)} }}}}{{% for message in messages %}}"
            f"{{% if message['role'] == 'assistant' %}}{{{{ {assistant} + message['content'] + {json.dumps(stop)} }}}}"
            "{% else %}{{ '\\n#' + message['role'].upper() + ':' + message['content'] }}{% endif %}"
            f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {assistant} }}}}{{% endif %}}"
        )


class ChatTemplate(Template):
    """The tokenizer's own chat template (ChatML and others), rendered by transformers in its jinja sandbox."""

    name = "chat"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        if not tokenizer.chat_template:
            raise SFTError("template chat: the tokenizer has no chat template; use `template: role`")
        self.chat_template = tokenizer.chat_template
        self._control_ids = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        longest_first = sorted(self._control_ids, key=len, reverse=True)
        self._control_pattern = (
            re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None
        )
        # A message may contain the placeholders' first character, so that is replaced by a placeholder too.
        self._spellings = [*longest_first, PLACEHOLDER[0]]
        self._placeholders = {text: PLACEHOLDER.format(index) for index, text in enumerate(self._spellings)}
        self._spelling_pattern = re.compile("|".join(map(re.escape, self._spellings)))
        self.stop_token_id = self._find_stop_token()

    def split_conversation(self, messages: list[Message], train_on: str = "all") -> list[TemplatePiece]:
        text, answers = self._find_answers(messages, strict=train_on == "all")
        pieces = self._split_text(text, answers, supervised=answers if train_on == "all" else answers[-1:])
        # What a template writes after the last stop token, usually a newline, is never generated: leave it out.
        end = max((i for i, piece in enumerate(pieces) if piece.supervised), default=len(pieces) - 1)
        return pieces[: end + 1]

    def split_prompt(self, messages: list[Message]) -> list[TemplatePiece]:
        text, answers = self._find_answers(messages, strict=False, add_generation_prompt=True)
        return self._split_text(text, answers, supervised=[])

    def _find_answers(
        self, messages: list[Message], strict: bool, add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the rendered text and the (start, end) of each answer in it, placeholders included.

        An answer starts where the rendered prompt of that answer ends. If the template renders the messages before an
        answer differently in the whole conversation than in that prompt, there is no such position. This raises
        SFTError if `strict`, or for the last answer of a training row; other such answers are left out.
        """
        escaped = [{**message, "content": self._insert_placeholders(message["content"])} for message in messages]
        text = self._render_jinja(escaped, add_generation_prompt)
        answers: list[tuple[int, int]] = []
        positions = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i in positions:
            prompt = self._render_jinja(escaped[:i], True)
            answered = text if i == len(escaped) - 1 else self._render_jinja(escaped[: i + 1], False)
            if text.startswith(prompt) and text.startswith(answered) and answered.startswith(prompt):
                answers.append((len(prompt), len(answered)))
            elif strict or (not add_generation_prompt and i == positions[-1]):
                raise SFTError(
                    f"the chat template rewrites the conversation before answer {positions.index(i) + 1} of "
                    f"{len(positions)}, so the prompt is not a prefix of the row; "
                    "use `train_on: last` or `template: role`"
                )
        return text, answers

    def _split_text(
        self, text: str, answers: list[tuple[int, int]], supervised: list[tuple[int, int]]
    ) -> list[TemplatePiece]:
        """Split the rendered text at answers and control tokens.

        The answers in `supervised` are supervised up to and including their last stop token.
        """
        edges = [0, *itertools.chain.from_iterable(answers), len(text)]
        pieces: list[TemplatePiece] = []
        for start, end in itertools.pairwise(edges):
            section = self._split_control_tokens(text[start:end])
            stops = [i for i, piece in enumerate(section) if piece.token_id == self.stop_token_id]
            if (start, end) in supervised and stops:
                section = [
                    TemplatePiece(piece.text, piece.token_id, supervised=i <= stops[-1])
                    for i, piece in enumerate(section)
                ]
            pieces += section
        return pieces

    def _split_control_tokens(self, text: str) -> list[TemplatePiece]:
        """Split the text at control tokens, and restore the spellings in the text between them."""
        parts = self._control_pattern.split(text) if self._control_pattern else [text]
        return [
            TemplatePiece("", self._control_ids[part], False)
            if part in self._control_ids
            else TemplatePiece(self._restore_spellings(part), None, False)
            for part in parts
            if part
        ]

    def _render_jinja(self, messages: list[Message], add_generation_prompt: bool) -> str:
        """Render in transformers' sandbox, where a template has access to neither files nor code."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except Exception as error:  # a template is a program and may raise anything
            reason = format_error(error)
            raise SFTError(
                f"the chat template cannot render the conversation ({type(error).__name__}: {reason}); "
                "fix the row or the chat template, or use `template: role`"
            ) from error

    def _insert_placeholders(self, content: str) -> str:
        """Replace every control token's spelling, so that the rendered text has only the template's own tokens."""
        return self._spelling_pattern.sub(lambda match: self._placeholders[match[0]], content)

    def _restore_spellings(self, text: str) -> str:
        """Undo `_insert_placeholders`."""
        return PLACEHOLDER_PATTERN.sub(lambda match: self._spellings[int(match[1])], text)

    def _find_stop_token(self) -> int:
        """Return the id of the first control token that the template writes after an answer."""
        messages = [{"role": "user", "content": "sft-question"}, {"role": "assistant", "content": "sft-answer"}]
        text = self._render_jinja(messages, False)
        pieces = self._split_control_tokens(text.split("sft-answer", 1)[-1])
        stop_token_id = next((piece.token_id for piece in pieces if piece.token_id is not None), None)
        if stop_token_id is None:
            raise SFTError(
                "the chat template writes no stop token after an answer, so a model trained on it would never stop; "
                "use `template: role` or a chat template that ends answers with the eos token"
            )
        return stop_token_id


TEMPLATES: dict[str, type[Template]] = {"role": RoleTemplate, "chat": ChatTemplate}


def build_template(name: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Build the template `name` ("role" or "chat"). Raises SFTError if the tokenizer does not support it."""
    if not tokenizer.is_fast:
        raise SFTError(f"{type(tokenizer).__name__} is not a fast tokenizer; convert it to a tokenizer.json first")
    return TEMPLATES[name](tokenizer)
