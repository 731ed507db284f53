"""Encode texts separately and always as text: `<|im_end|>` in a text never becomes the control token.

    encode = TextEncoder(tokenizer)
    ids = encode(["What is the question?"])      # {text: its ids}

Three quarters of the encoding time is the tokenizer's pre-tokenization, which it repeats for every occurrence of a
word. So texts are split into words and the ids of words are cached, if the ids of a text are the concatenated ids of
its words.

This holds for a split before each space that follows a character other than white space, for these reasons:

- The patterns in PATTERNS (and GPT-2's, built into ByteLevel) match a space only at the start of a match or inside a
  run of white space, so one match ends before such a space and another begins there. No pattern looks behind, and only
  a run of white space looks ahead, which the word to the left does not end with.
- NFC never composes a space with the character before it.
- BPE sees one match at a time.
- Added tokens that contain white space or look at their neighbors could cross the boundary. A tokenizer that has one,
  or any other component, encodes whole texts.
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

# The patterns of Qwen and of Llama 3.
PATTERNS = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in ("", "{1,3}")
]
# All white space of Python: everything that the tokenizers library's \s matches, plus four control characters.
WHITE_SPACE = (
    "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
)
WHITE_SPACE += "\u2028\u2029\u202f\u205f\u3000"
DOUBLE_SPACES = [character + " " for character in WHITE_SPACE]
WORD_START = re.compile(r"(?<=\S)(?= )")
MAX_CACHED_WORD_LENGTH = 32  # characters; longer words rarely repeat (a text without spaces, like Chinese, is one word)
MAX_CACHED_WORDS = 100_000  # about 30 MB


class TextEncoder:
    """Encode texts like `encode_as_text`, with a cache of the ids of words.

    The cache is cleared if the tokenizer's components, tokens or options change (replacing its BPE by another one with
    as many tokens is not detected), and it is not pickled.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._word_ids: dict[str, tuple[int, ...]] = {}  # the garbage collector does not track tuples of ints
        self._state: tuple[Any, ...] = ()
        self._by_word = False

    def __reduce__(self) -> tuple[type[TextEncoder], tuple[PreTrainedTokenizerBase]]:
        return TextEncoder, (self._tokenizer,)

    def __call__(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Return {text: its ids}."""
        self._check_tokenizer()
        unique = list(dict.fromkeys(texts))
        if not self._by_word:
            return dict(zip(unique, encode_as_text(self._tokenizer, unique)))
        words_of_texts = [split_words(text) for text in unique]
        missing = list(set(itertools.chain.from_iterable(words_of_texts)).difference(self._word_ids))
        self._word_ids.update(zip(missing, map(tuple, encode_as_text(self._tokenizer, missing))))
        ids = [list(itertools.chain.from_iterable(map(self._word_ids.__getitem__, words))) for words in words_of_texts]
        self._remove_words(missing)
        return dict(zip(unique, ids))

    def _check_tokenizer(self) -> None:
        """Clear the cache if the tokenizer has changed since the last call."""
        state = _get_state(self._tokenizer.backend_tokenizer)
        if state != self._state:
            self._state, self._by_word = state, can_encode_by_word(self._tokenizer.backend_tokenizer)
            self._word_ids.clear()

    def _remove_words(self, added: list[str]) -> None:
        """Remove the long words of those just added, and all words if there are too many: frequent ones come back."""
        for word in added:
            if len(word) > MAX_CACHED_WORD_LENGTH:
                del self._word_ids[word]
        if len(self._word_ids) > MAX_CACHED_WORDS:
            self._word_ids.clear()


def split_words(text: str) -> list[str]:
    """Split the text before each space that does not follow white space."""
    if any(pair in text for pair in DOUBLE_SPACES):
        return WORD_START.split(text)
    first, *following = text.split(" ")
    return [first, *[" " + word for word in following]]  # the same result, much faster


def can_encode_by_word(backend: Tokenizer) -> bool:
    """Return whether the ids of a text are the concatenated ids of its words (reasons in the module's docstring)."""
    # Digits separates digits from everything else: it never crosses a space, in any position, nor does a split at a
    # literal text without a space.
    components = [
        part
        for part in list_components(backend.pre_tokenizer)
        if part["type"] != "Digits" and not _is_literal_split(part)
    ]
    first, *following = components or [{}]
    return (
        isinstance(backend.model, BPE)
        and not backend.model.dropout
        and [part["type"] for part in list_components(backend.normalizer)] in ([], ["NFC"])
        and (_is_pattern_split(first) or (_is_byte_level(first) and first["use_regex"]))
        and all(_is_pattern_split(part) or _is_byte_level(part) for part in following)
        and not any(
            token.lstrip or token.rstrip or token.single_word or set(token.content) & set(WHITE_SPACE)
            for token in backend.get_added_tokens_decoder().values()
        )
    )


def _is_byte_level(part: dict[str, Any]) -> bool:
    return part.get("type") == "ByteLevel" and not part["add_prefix_space"]


def _is_pattern_split(part: dict[str, Any]) -> bool:
    """Whether the component splits at every match of one of PATTERNS."""
    isolated = {"type": "Split", "behavior": "Isolated", "invert": False}
    return any(part == {**isolated, "pattern": {"Regex": pattern}} for pattern in PATTERNS)


def _is_literal_split(part: dict[str, Any]) -> bool:
    """Whether the component splits at each occurrence of a text without a space (see tokenizer_export.py)."""
    literal = part["pattern"].get("String", " ") if part["type"] == "Split" else " "
    return " " not in literal and not part["invert"] and part["behavior"] in ("Isolated", "MergedWithNext")


def list_components(component: Any) -> list[dict[str, Any]]:
    """List the components of a normalizer or pre-tokenizer as they are written in tokenizer.json."""
    if component is None:
        return []
    state = json.loads(component.__getstate__())
    return state.get("pretokenizers") or state.get("normalizers") or [state]


def _get_state(backend: Tokenizer) -> tuple[Any, ...]:
    """Return everything mutable that decides the ids of a text, except the merges and tokens of the model."""
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
    """Return the ids of each text, without control tokens even if the text spells one.

    Equal to `tokenizer(texts, add_special_tokens=False, split_special_tokens=True)`, and a fifth faster because no
    character offsets are computed. Turns off the tokenizer's truncation and padding.
    """
    backend = tokenizer.backend_tokenizer
    previous = backend.encode_special_tokens
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = previous
