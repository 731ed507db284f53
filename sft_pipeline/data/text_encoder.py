"""Text to token ids, each text alone and always as text: `<|im_end|>` in it never becomes the control token.

    encode = TextEncoder(tokenizer)
    ids = encode(["What is the question?"])      # {text: its ids}

Three quarters of encoding is the tokenizer's pre-tokenization, which it does anew for a word that it has met a
thousand times. So texts are cut into words and the words' ids remembered, where the text's ids are those of its words.

They are, at a space that follows a character that is no white space, under these rules. The patterns of PATTERNS (and
GPT-2's, which ByteLevel brings itself) match a space at a match's start or inside a run of white space, and nowhere
else, so that one match ends before such a space and another begins there; no pattern looks behind, and only a run of
white space looks ahead, which the left word does not end with. NFC never composes a space with what precedes it. BPE
sees one match at a time. Added tokens that hold white space or look at their neighbours could reach across; a
tokenizer that has one, or any other part, is asked for whole texts.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase

# Qwen's and Llama 3's.
PATTERNS = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in ("", "{1,3}")
]
# All that Python calls white space, which is all that the tokenizer's \s matches and four control characters.
WHITE_SPACE = (
    "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
)
WHITE_SPACE += "\u2028\u2029\u202f\u205f\u3000"
GAPS = [character + " " for character in WHITE_SPACE]
WORD_START = re.compile(r"(?<=\S)(?= )")
LONGEST = 32  # characters of a word worth remembering: a Chinese text is one word
MOST = 100_000  # words, some 30 MB


class TextEncoder:
    """Ids of texts, equal to `encode_as_text`. Asks the tokenizer for each word once, until MOST are known.

    What is remembered is forgotten when the tokenizer is given another part, token or option (another BPE of as many
    tokens is not noticed), and stays behind when the object is pickled.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, tuple[int, ...]] = {}  # tuples of numbers cost the garbage collector nothing
        self._rules: tuple[Any, ...] = ()
        self._cuts = False

    def __reduce__(self) -> tuple[type[TextEncoder], tuple[PreTrainedTokenizerBase]]:
        return TextEncoder, (self._tokenizer,)

    def __call__(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Each text's ids, by text."""
        self._heed_changes()
        different = list(dict.fromkeys(texts))
        if not self._cuts:
            return dict(zip(different, encode_as_text(self._tokenizer, different)))
        cut = [split_words(text) for text in different]
        fresh = list(set(itertools.chain.from_iterable(cut)).difference(self._known))
        self._known.update(zip(fresh, map(tuple, encode_as_text(self._tokenizer, fresh))))
        ids = [list(itertools.chain.from_iterable(map(self._known.__getitem__, words))) for words in cut]
        self._forget(fresh)
        return dict(zip(different, ids))

    def _heed_changes(self) -> None:
        rules = _rules(self._tokenizer.backend_tokenizer)
        if rules != self._rules:
            self._rules, self._cuts = rules, can_encode_by_word(self._tokenizer.backend_tokenizer)
            self._known.clear()

    def _forget(self, fresh: list[str]) -> None:
        """Long words at once, and all when they are too many: those that are frequent come back."""
        for word in fresh:
            if len(word) > LONGEST:
                del self._known[word]
        if len(self._known) > MOST:
            self._known.clear()


def split_words(text: str) -> list[str]:
    """The text cut before each space that follows no white space."""
    if any(gap in text for gap in GAPS):
        return WORD_START.split(text)
    first, *others = text.split(" ")
    return [first, *[" " + word for word in others]]  # the same, and much faster


def can_encode_by_word(backend: Tokenizer) -> bool:
    """Whether a text's ids are its words' ids in turn; the reasons are at the head of this file."""
    # Digits, which parts them from all else, reaches across no space wherever it stands, nor does a text without one.
    parts = [part for part in list_components(backend.pre_tokenizer) if part["type"] != "Digits" and not _is_cut(part)]
    first, *others = parts or [{}]
    return (
        isinstance(backend.model, BPE)
        and not backend.model.dropout
        and [part["type"] for part in list_components(backend.normalizer)] in ([], ["NFC"])
        and (_is_split(first) or (_is_byte_level(first) and first["use_regex"]))
        and all(_is_split(part) or _is_byte_level(part) for part in others)
        and not any(
            token.lstrip or token.rstrip or token.single_word or set(token.content) & set(WHITE_SPACE)
            for token in backend.get_added_tokens_decoder().values()
        )
    )


def _is_byte_level(part: dict[str, Any]) -> bool:
    return part.get("type") == "ByteLevel" and not part["add_prefix_space"]


def _is_split(part: dict[str, Any]) -> bool:
    """One of PATTERNS, each match a piece."""
    plain = {"type": "Split", "behavior": "Isolated", "invert": False}
    return any(part == {**plain, "pattern": {"Regex": pattern}} for pattern in PATTERNS)


def _is_cut(part: dict[str, Any]) -> bool:
    """A cut at each occurrence of a text (see tokenizer_export.py)."""
    text = part["pattern"].get("String", " ") if part["type"] == "Split" else " "
    return " " not in text and not part["invert"] and part["behavior"] in ("Isolated", "MergedWithNext")


def list_components(component: Any) -> list[dict[str, Any]]:
    """The parts of a normalizer or pre-tokenizer as tokenizer.json has them."""
    if component is None:
        return []
    state = json.loads(component.__getstate__())
    return state.get("pretokenizers") or state.get("normalizers") or [state]


def _rules(backend: Tokenizer) -> tuple[Any, ...]:
    """What decides a text's ids and can be changed on a tokenizer, but for the words of its BPE."""
    names = ("dropout", "unk_token", "fuse_unk", "byte_fallback", "ignore_merges")
    model = backend.model
    return (
        backend,
        backend.get_vocab_size(),
        repr(backend.get_added_tokens_decoder()),
        list_components(backend.normalizer),
        list_components(backend.pre_tokenizer),
        type(model),
        [getattr(model, name, None) for name in (*names, "continuing_subword_prefix", "end_of_word_suffix")],
    )


def encode_as_text(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of each text, in which no control token appears even where the text spells one.

    The same as `tokenizer(texts, add_special_tokens=False, split_special_tokens=True)`, a fifth faster because no
    character offsets are made.
    """
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = before
