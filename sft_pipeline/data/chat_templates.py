"""Messages to token ids and back: one object serves training, evaluation, chat and the saved `chat_template`.

    template = build_template("role", tokenizer)
    [runs] = template.render([messages])            # training ids, as runs of (ids, supervised)
    ids = template.encode_prompt(messages)                 # generation; always a prefix of the training ids
    text = template.parse(answer_ids)

The prefix holds by construction: training and generation cut a conversation into the same pieces at the same places
and tokenize each piece alone. Text of a row is always encoded as text: `<|im_end|>` in a message becomes the ids of
its characters, never the control token.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from sft_pipeline.data.messages import Message
from sft_pipeline.data.text_encoder import TextEncoder
from sft_pipeline.utils.errors import SFTError, format_error

# What stands for a control token's spelling in a row while jinja puts the row into the template: private-use
# characters, which no tokenizer has as a special token.
SENTINEL = "\ue000sft{}\ue001"
STAND_IN = re.compile(SENTINEL.format("([0-9]+)"))
MARKS = {"system": "\n#SYSTEM:", "user": "\n#USER:", "assistant": "\n#ASSISTANT:"}


class TemplatePiece(NamedTuple):
    """A stretch of a conversation that is tokenized alone: either text, or one control token's id."""

    text: str
    token_id: int | None
    supervised: bool


class TokenSpan(NamedTuple):
    """Ids that are all supervised or all not."""

    ids: list[int]
    supervised: bool


class Template:
    """What both templates share: pieces to ids, in batches. A subclass says how messages become pieces."""

    name: str
    chat_template: str  # the jinja text to save with the tokenizer
    marks: tuple[str, ...] = ()  # texts of that template, not control tokens, before which a piece begins
    stop_token_id: int

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._encode = TextEncoder(tokenizer)

    def split_conversation(self, messages: list[Message], train_on: str = "all") -> list[TemplatePiece]:
        """The whole conversation, up to its last answer's stop token."""
        raise NotImplementedError

    def split_prompt(self, messages: list[Message]) -> list[TemplatePiece]:
        """A conversation that ends with a user message, up to where the answer begins."""
        raise NotImplementedError

    def render(self, conversations: Iterable[list[Message]], train_on: str = "all") -> list[list[TokenSpan]]:
        """Training ids of each conversation as runs. train_on: "all" assistant turns are supervised, or the "last".

        Raises SFTError where the template rewrites earlier turns, so that what was trained could not be prompted.
        """
        return self._to_runs([self.split_conversation(messages, train_on) for messages in conversations])

    def encode_prompt(self, messages: list[Message]) -> list[int]:
        """Ids to generate an answer from."""
        [runs] = self._to_runs([self.split_prompt(messages)])
        return list(itertools.chain.from_iterable(run.ids for run in runs))

    def parse(self, ids: list[int]) -> str:
        """The answer's text: what stands before the stop token."""
        end = ids.index(self.stop_token_id) if self.stop_token_id in ids else len(ids)
        return str(self.tokenizer.decode(ids[:end], skip_special_tokens=True)).strip()

    def _to_runs(self, rows: list[list[TemplatePiece]]) -> list[list[TokenSpan]]:
        """Tokenize all rows' texts in one call."""
        try:
            known = self._encode(piece.text for pieces in rows for piece in pieces if piece.token_id is None)
        except (TypeError, UnicodeEncodeError) as error:
            raise SFTError("a text holds half a character (a lone surrogate), which no tokenizer takes") from error
        return [
            [TokenSpan(known[p.text] if p.token_id is None else [p.token_id], p.supervised) for p in pieces]
            for pieces in rows
        ]


class RoleTemplate(Template):
    """`<|im_start|>` then `\\n#SYSTEM:`, `\\n#USER:`, `\\n#ASSISTANT:` and their texts; `<|im_end|>` ends each answer.

    A tokenizer without `<|im_start|>` and `<|im_end|>` lends its bos and eos token.
    """

    name = "role"
    marks = tuple(MARKS.values())

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        vocabulary = tokenizer.get_vocab()
        self.start_token_id = vocabulary.get("<|im_start|>", tokenizer.bos_token_id)
        stop = vocabulary.get("<|im_end|>", tokenizer.eos_token_id)
        if stop is None:
            raise SFTError(
                "template role: the tokenizer has neither <|im_end|> nor an eos token, so no answer could stop; "
                "set eos_token in its tokenizer_config.json"
            )
        self.stop_token_id = stop
        self.chat_template = self._jinja()

    def split_conversation(self, messages: list[Message], train_on: str = "all") -> list[TemplatePiece]:
        start = [] if self.start_token_id is None else [TemplatePiece("", self.start_token_id, False)]
        last = len(messages) - 1
        return start + [
            piece
            for at, message in enumerate(messages)
            for piece in self._turn(message, supervised=train_on == "all" or at == last)
        ]

    def split_prompt(self, messages: list[Message]) -> list[TemplatePiece]:
        return [*self.split_conversation(messages), TemplatePiece(MARKS["assistant"], None, False)]

    def _turn(self, message: Message, supervised: bool) -> list[TemplatePiece]:
        role, content = message["role"], message["content"]
        if role != "assistant":
            return [TemplatePiece(MARKS[role] + content, None, False)]
        answer = [TemplatePiece(content, None, supervised), TemplatePiece("", self.stop_token_id, supervised)]
        return [TemplatePiece(MARKS["assistant"], None, False), *answer]

    def _jinja(self) -> str:
        """The same text as a chat template, for tools that know only that."""
        start = "" if self.start_token_id is None else self.tokenizer.convert_ids_to_tokens(self.start_token_id)
        stop = self.tokenizer.convert_ids_to_tokens(self.stop_token_id)
        assistant = json.dumps(MARKS["assistant"])
        return (
            f"{{{{ {json.dumps(start)} }}}}{{% for message in messages %}}"
            f"{{% if message['role'] == 'assistant' %}}{{{{ {assistant} + message['content'] + {json.dumps(stop)} }}}}"
            "{% else %}{{ '\\n#' + message['role'].upper() + ':' + message['content'] }}{% endif %}"
            f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {assistant} }}}}{{% endif %}}"
        )


class ChatTemplate(Template):
    """The tokenizer's own chat template (ChatML and others), rendered by transformers' sandboxed jinja."""

    name = "chat"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        if not tokenizer.chat_template:
            raise SFTError("template chat: the tokenizer has no chat template; use `template: role`")
        self.chat_template = tokenizer.chat_template
        self._control = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        longest_first = sorted(self._control, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None
        # The stand-ins' own first character has a stand-in too: a row may spell one.
        self._shown = [*longest_first, SENTINEL[0]]
        self._hidden = {text: SENTINEL.format(at) for at, text in enumerate(self._shown)}
        self._to_hide = re.compile("|".join(map(re.escape, self._shown)))
        self.stop_token_id = self._find_stop()

    def split_conversation(self, messages: list[Message], train_on: str = "all") -> list[TemplatePiece]:
        text, bounds = self._bounds(messages, strict=train_on == "all")
        supervised = bounds if train_on == "all" else bounds[-1:]
        pieces = self._cut(text, bounds, supervised)
        # What a template writes behind the last stop token, mostly a line end, is never generated: leave it out.
        last = max((at for at, piece in enumerate(pieces) if piece.supervised), default=len(pieces) - 1)
        return pieces[: last + 1]

    def split_prompt(self, messages: list[Message]) -> list[TemplatePiece]:
        text, bounds = self._bounds(messages, strict=False, generate=True)
        return self._cut(text, bounds, [])

    def _bounds(
        self, messages: list[Message], strict: bool, generate: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text and each answer's (start, end) in it, found by rendering what stands before the answer.

        A history that the template rewrites has no such place: an error if `strict`, else left uncut, but the last
        answer of a training row always needs one.
        """
        hidden = [{**message, "content": self._hide(message["content"])} for message in messages]
        text, bounds = self._jinja(hidden, generate), []
        answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        for at in answers:
            before = self._jinja(hidden[:at], True)
            through = text if at == len(hidden) - 1 else self._jinja(hidden[: at + 1], False)
            if text.startswith(before) and text.startswith(through) and through.startswith(before):
                bounds.append((len(before), len(through)))
            elif strict or (not generate and at == answers[-1]):
                raise SFTError(
                    f"the chat template rewrites the conversation before answer {answers.index(at) + 1} of "
                    f"{len(answers)}, so its prompt is no prefix; use `train_on: last` or `template: role`"
                )
        return text, bounds

    def _cut(self, text: str, bounds: list[tuple[int, int]], supervised: list[tuple[int, int]]) -> list[TemplatePiece]:
        """Pieces of the rendered text, cut at answers and at control tokens; supervised through the stop token."""
        edges = [0, *itertools.chain.from_iterable(bounds), len(text)]
        pieces: list[TemplatePiece] = []
        for start, end in itertools.pairwise(edges):
            part = self._tokens_apart(text[start:end])
            stops = [at for at, piece in enumerate(part) if piece.token_id == self.stop_token_id]
            if (start, end) in supervised and stops:
                part = [piece._replace(supervised=at <= stops[-1]) for at, piece in enumerate(part)]
            pieces += part
        return pieces

    def _tokens_apart(self, text: str) -> list[TemplatePiece]:
        """Control tokens as ids, and between them the text with the rows' own spellings put back."""
        parts = self._split.split(text) if self._split else [text]
        return [
            TemplatePiece("", self._control[part], False)
            if part in self._control
            else TemplatePiece(self._show(part), None, False)
            for part in parts
            if part
        ]

    def _jinja(self, messages: list[Message], generate: bool) -> str:
        """Sandboxed by transformers: a template reaches neither files nor code."""
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate))
        except Exception as error:  # a template is a program: what it raises may be anything
            reason = format_error(error)
            raise SFTError(f"the chat template refuses the conversation ({type(error).__name__}: {reason})") from error

    def _hide(self, content: str) -> str:
        """The content with every control token's spelling replaced, so that rendering cannot tell it from text."""
        return self._to_hide.sub(lambda match: self._hidden[match[0]], content)

    def _show(self, text: str) -> str:
        return STAND_IN.sub(lambda match: self._shown[int(match[1])], text)

    def _find_stop(self) -> int:
        """The first control token after an answer."""
        asked, answered = {"role": "user", "content": "sft-question"}, {"role": "assistant", "content": "sft-answer"}
        text = self._jinja([asked, answered], False)
        after = self._tokens_apart(text.split("sft-answer", 1)[-1])
        stop = next((piece.token_id for piece in after if piece.token_id is not None), None)
        if stop is None:
            raise SFTError(
                "the chat template writes no stop token after an answer, so a model trained on it would never stop; "
                "use `template: role` or a chat template that ends answers with the eos token"
            )
        return stop


TEMPLATES: dict[str, type[Template]] = {"role": RoleTemplate, "chat": ChatTemplate}


def build_template(name: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template called `name` ("role" or "chat") over `tokenizer`. Raises SFTError for one it cannot serve."""
    if not tokenizer.is_fast:
        raise SFTError(f"{type(tokenizer).__name__} is no fast tokenizer; convert it to a tokenizer.json first")
    return TEMPLATES[name](tokenizer)
