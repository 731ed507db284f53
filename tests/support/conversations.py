"""Random conversations, the Qwen3 tokenizer, and tokenizers made for a test."""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from support.tiny import CONTROL
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sft_pipeline.data.messages import Conversation, replace_messages

ROOT = Path(__file__).parents[2]

QWEN3 = Path(os.environ.get("QWEN3_TOKENIZER") or ROOT.parent / "shared" / "models" / "qwen3-tokenizer")

SYSTEM = "你是小冬瓜智能体,请安全详细回答用户 USER 的问题"

# Control tokens, whole and in halves, newlines, spaces, Chinese, emoji, and the role headers of both templates.
PARTS = [*CONTROL, "<|im_", "end|>", "\n", " ", "\n\n ", "冬瓜", "你好", "🙂", "é"]
PARTS += ["the answer", "\n#USER:", "assistant\n"]
CONTENT = st.lists(st.sampled_from(PARTS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=3), max_size=5)
TEXT = CONTENT.map("".join)
BOTH = pytest.mark.parametrize("name", ["role", "chat"])
QUICK = settings(deadline=None, max_examples=60)


def build_conversation(texts: list[str], system: str | None = None, **keys: Any) -> Conversation:
    """Build user, assistant, user, ... messages from texts, after a system message if there is one.

    keys: of the conversation, such as tools.
    """
    turns = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]
    start = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": [*start, *turns], **keys}


def cut_conversation(conversation: Conversation, end: int) -> Conversation:
    """Return the conversation with its messages before `end`."""
    return replace_messages(conversation, conversation["messages"][:end])


def conversations(text: st.SearchStrategy[str]) -> st.SearchStrategy[Conversation]:
    """One to three exchanges, with a system message or none."""
    texts = st.integers(1, 3).flatmap(lambda exchanges: st.lists(text, min_size=2 * exchanges, max_size=2 * exchanges))
    return st.builds(build_conversation, texts, st.none() | text)


def render_sequences(template, conversation, train_on="all") -> list[tuple[list[int], list[bool]]]:
    """Return of each training sequence of a conversation the ids and whether each is supervised."""
    [sequences] = template.render([conversation], train_on)
    return [
        (
            [i for span in sequence.spans for i in span.ids],
            [span.supervised for span in sequence.spans for _ in span.ids],
        )
        for sequence in sequences
    ]


def render_row(template, conversation, train_on="all") -> tuple[list[int], list[bool]]:
    """Return the ids of the only training sequence of a conversation, and whether each is supervised."""
    [sequence] = render_sequences(template, conversation, train_on)
    return sequence


def build_bare_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Build a tokenizer of letters that has no special tokens but `special`."""
    vocab = {character: index for index, character in enumerate("?abcdefghijklmnopqrstuvwxyz#:\nSYTEMUARNI")}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)
