"""Convert conversations to token ids and back, the same way for training, evaluation, chat and the saved template.

    template = build_template("chat", tokenizer)
    [sequences] = template.render([conversation])     # training sequences, each a list of spans (ids, supervised)
    ids = template.encode_prompt(prompt)              # ids for generation
    message = template.parse(answer_ids)

An answer is trained under the ids that it will be prompted with: its prompt is what the template renders of the
messages before it, its target what the template writes for it, up to a stop token. As long as each prompt begins with
the previous prompt and target, the answers of a conversation share one sequence. Where the template rewrites the
history, as by leaving out the reasoning of earlier answers, a new sequence begins.

Training and generation split a conversation into pieces at the same positions and tokenize each piece separately. The
text of a row is always encoded as text: `<|im_end|>` in a message becomes the ids of its characters, never the control
token.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from sft_pipeline.data.messages import Conversation, Message
from sft_pipeline.data.text_encoder import TextEncoder
from sft_pipeline.utils.errors import SFTError


class TemplatePiece(NamedTuple):
    """A part of a conversation that is tokenized separately: text, or the id of one control token."""

    text: str
    token_id: int | None


class Turn(NamedTuple):
    """An assistant's message as the template writes it.

    context: the pieces of its prompt; if it `continues` the previous turn, only those after that turn's target. target:
    the pieces that are generated, up to the stop token; None where the answer is still to come.
    """

    message_index: int
    continues: bool
    context: list[TemplatePiece]
    target: list[TemplatePiece] | None


class TokenSpan(NamedTuple):
    """Consecutive ids that are either all supervised or all not."""

    ids: list[int]
    supervised: bool


class TokenSequence(NamedTuple):
    """A training sequence. turns: the indices of the messages that it trains; none for a text."""

    spans: list[TokenSpan]
    turns: tuple[int, ...]


class PieceSequence(NamedTuple):
    """A training sequence before it is tokenized: pieces, each with whether it is supervised."""

    pieces: list[tuple[TemplatePiece, bool]]
    turns: tuple[int, ...]


class Template:
    """Base class: builds sequences of turns. Subclasses define how a conversation is split into turns and pieces.

    stop_token_ids: the tokens that end an answer; the first one ends an answer of text. chat_template: the jinja text
    to save with the tokenizer.
    """

    name: Literal["role", "chat"]
    chat_template: str
    role_headers: tuple[str, ...] = ()  # texts (not control tokens) before which a piece begins
    stop_token_ids: list[int]

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self._encode_texts = TextEncoder(tokenizer)

    @property
    def stop_token_id(self) -> int:
        return self.stop_token_ids[0]

    def split_turns(self, conversation: Conversation, trained: Collection[int]) -> list[Turn]:
        """Split a conversation into turns. trained: the indices of the assistant messages that are supervised.

        Raises SFTError if the template does not write something of a trained turn or of the messages before it.
        """
        raise NotImplementedError

    def split_prompt(self, conversation: Conversation) -> list[TemplatePiece]:
        """Split a conversation without its next answer into pieces, up to where that answer begins."""
        raise NotImplementedError

    def render(self, conversations: Iterable[Conversation], train_on: str = "all") -> list[list[TokenSequence]]:
        """Return the training sequences of each conversation; none if nothing of it is supervised.

        train_on: "all" supervises every assistant message, "last" only the last one; in both cases without those whose
        `train` is False. A text is one sequence, supervised as a whole, with the eos token at its end.

        Raises SFTError for a conversation that the template cannot render, or does not write as a whole.
        """
        rows = [self._split_sequences(conversation, train_on) for conversation in conversations]
        ids = self._encode_pieces(piece for row in rows for sequence in row for piece, _ in sequence.pieces)
        return [
            [
                TokenSequence(
                    [TokenSpan(ids[piece], supervised) for piece, supervised in sequence.pieces], sequence.turns
                )
                for sequence in row
            ]
            for row in rows
        ]

    def encode_prompt(self, conversation: Conversation) -> list[int]:
        """Return the ids from which the next answer is generated."""
        pieces = self.split_prompt(conversation)
        ids = self._encode_pieces(pieces)
        return list(itertools.chain.from_iterable(ids[piece] for piece in pieces))

    def parse(self, ids: list[int]) -> Message:
        """Decode the generated ids of an answer, up to the stop token, as an assistant's message."""
        end = next((index for index, token in enumerate(ids) if token in self.stop_token_ids), len(ids))
        return self.parse_text(str(self.tokenizer.decode(ids[:end], skip_special_tokens=True)))

    def parse_text(self, text: str) -> Message:
        """Convert the text of an answer to an assistant's message."""
        return {"role": "assistant", "content": text.strip()}

    def _split_sequences(self, conversation: Conversation, train_on: str) -> list[PieceSequence]:
        """Split a conversation into its training sequences."""
        if "text" in conversation:
            return [PieceSequence(self._split_text(conversation["text"]), ())]
        trained = list_trained_turns(conversation["messages"], train_on)
        sequences = [PieceSequence([], ())]
        for turn in self.split_turns(conversation, trained):
            pieces, turns = sequences.pop() if turn.continues else PieceSequence([], ())
            is_trained = turn.message_index in trained
            pieces += [(piece, False) for piece in turn.context]
            pieces += [(piece, is_trained) for piece in turn.target or ()]
            sequences.append(PieceSequence(pieces, (*turns, turn.message_index) if is_trained else turns))
        return [_cut_after_supervised(sequence) for sequence in sequences if sequence.turns]

    def _split_text(self, text: str) -> list[tuple[TemplatePiece, bool]]:
        """Split a text without turns: all of it is supervised, after the bos token where the tokenizer adds one."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        adds_bos = bos is not None and self.tokenizer("")["input_ids"][:1] == [bos]
        start = [(TemplatePiece("", bos), False)] if adds_bos else []
        end = TemplatePiece("", self.stop_token_id if eos is None else eos)
        return [*start, (TemplatePiece(text, None), True), (end, True)]

    def _encode_pieces(self, pieces: Iterable[TemplatePiece]) -> dict[TemplatePiece, list[int]]:
        """Tokenize all different texts in one call; return the ids of each piece."""
        unique = dict.fromkeys(pieces)
        try:
            ids = self._encode_texts(piece.text for piece in unique if piece.token_id is None)
        except (TypeError, UnicodeEncodeError) as error:
            raise SFTError(
                "a text contains a lone surrogate (half of a UTF-16 pair), which cannot be tokenized; remove it"
            ) from error
        return {piece: ids[piece.text] if piece.token_id is None else [piece.token_id] for piece in unique}


def list_trained_turns(messages: list[Message], train_on: str) -> list[int]:
    """List the indices of the assistant messages that are supervised."""
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    selected = turns if train_on == "all" else turns[-1:]
    return [index for index in selected if messages[index].get("train", True)]


def _cut_after_supervised(sequence: PieceSequence) -> PieceSequence:
    """Cut off what follows the last supervised piece, such as a message that is not trained."""
    end = max(index for index, (_, supervised) in enumerate(sequence.pieces) if supervised)
    return PieceSequence(sequence.pieces[: end + 1], sequence.turns)
