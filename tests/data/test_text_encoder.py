"""Text to ids: the words' ids are the text's, for every Unicode text, and what is remembered is never stale."""

import itertools
import pickle
import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.conversations import TEXT, bare_tokenizer
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from sft_pipeline.data import text_encoder
from sft_pipeline.data.text_encoder import (
    PATTERNS,
    WHITE_SPACE,
    TextEncoder,
    can_encode_by_word,
    encode_as_text,
    split_words,
)

QUICK = settings(deadline=None, max_examples=60)
THOROUGH = settings(deadline=None, max_examples=400)
CHARACTERS = st.characters(exclude_categories=["Cs"])
# White space of every kind in runs, marks that compose with what precedes them, singletons of NFC, contractions,
# digits, jamo, letters without case, and added tokens.
PARTS = [*WHITE_SPACE, "  ", "\n ", " \n", "\u0301", "\u0338", "A", "a", "é", "\u212b", "\u0344", "\u1100", "\u1161"]
PARTS += ["'s", "'LL", "12", "٣", "½", "冬瓜", "🙂", "!?", "_", "<think>", "</think>", "<|im_end|>", "the answer", "\0"]
ROUGH = st.lists(st.sampled_from(PARTS) | st.just(" ") | CHARACTERS, max_size=14).map("".join)

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
QWEN, LLAMA = (pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS)
CUT = {
    "GPT-2": GPT2,
    "SmolLM2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    "Qwen": pre_tokenizers.Sequence([QWEN, BYTES]),
    "Llama 3": pre_tokenizers.Sequence([LLAMA, BYTES]),
    "a trained model's": pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n!?", "merged_with_next"), pre_tokenizers.Split("A", "isolated"), QWEN, BYTES]
    ),
}
WHOLE = {
    "none": None,
    "bytes alone": BYTES,
    "a prefix space": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "spaces that are letters by then": pre_tokenizers.Sequence([BYTES, QWEN]),
    "another pattern": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\w+ \w+"), "isolated"), BYTES]),
    "its gaps": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERNS[0]), "isolated", invert=True), BYTES]),
    "another behaviour": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERNS[0]), "removed"), BYTES]),
    "a cut at a space": pre_tokenizers.Sequence([pre_tokenizers.Split("e a", "isolated"), QWEN, BYTES]),
    "digits alone": pre_tokenizers.Digits(),
    "another kind": pre_tokenizers.Metaspace(),
}
ADDED = {
    "lstrip": AddedToken("<a>", lstrip=True),
    "rstrip": AddedToken("<a>", rstrip=True),
    "single_word": AddedToken("<a>", single_word=True),
    "a space within": AddedToken("a b"),
}


def make(make_tokenizer, pre_tokenizer, normalizer=None):
    """The tests' tokenizer with other parts, and with added tokens that are matched in texts."""
    own = make_tokenizer()
    own.backend_tokenizer.pre_tokenizer = pre_tokenizer
    own.backend_tokenizer.normalizer = normalizer
    own.add_tokens(["<think>", "</think>"])
    return own


@pytest.fixture(scope="module", params=CUT)
def cutting(request, make_tokenizer):
    return make(make_tokenizer, CUT[request.param], normalizers.NFC() if request.param == "Qwen" else None)


def agree(tokenizer, texts: list[str]) -> None:
    assert TextEncoder(tokenizer)(texts) == dict(zip(texts, encode_as_text(tokenizer, texts)))


# ---- exactness


@THOROUGH
@given(st.lists(ROUGH | TEXT, max_size=6))
def test_the_ids_of_words_are_those_of_the_text(cutting, texts):
    assert can_encode_by_word(cutting.backend_tokenizer)
    agree(cutting, texts)


@THOROUGH
@given(st.lists(ROUGH | TEXT, max_size=6))
def test_qwen3s_own_tokenizer(qwen3, texts):
    assert can_encode_by_word(qwen3.backend_tokenizer)
    agree(qwen3, texts)


def test_characters_of_every_script_beside_every_kind_of_space(cutting):
    """Before a space, behind one, and between white space of other kinds."""
    some = [chr(c) for c in [*range(0, 0x3100, 3), *range(0x3100, sys.maxunicode, 307)] if not 0xD800 <= c < 0xE000]
    agree(cutting, ["".join(f"a{c} b {c}\n {c}\u3000 " for c in some[at : at + 50]) for at in range(0, len(some), 50)])


def test_no_character_but_those_of_white_space_is_white_space_to_a_pattern():
    """So that no cut follows what a pattern takes for white space, before or after NFC."""
    others = [c for c in map(chr, range(sys.maxunicode + 1)) if not 0xD800 <= ord(c) < 0xE000 and c not in WHITE_SPACE]
    assert not any(c.isspace() for c in others) and all(c.isspace() for c in WHITE_SPACE)
    split = pre_tokenizers.Split(Regex(r"\s"), "isolated")
    for at in range(0, len(others), 100_000):
        assert len(split.pre_tokenize_str("".join(others[at : at + 100_000]))) == 1
    assert not any(unicodedata.normalize("NFC", c)[-1] in WHITE_SPACE for c in others)
    assert all(unicodedata.normalize("NFC", c + " ") == unicodedata.normalize("NFC", c) + " " for c in others)


@QUICK
@given(ROUGH)
def test_words(text):
    words = split_words(text)
    assert "".join(words) == text
    for before, word in itertools.pairwise(word for word in words if word):
        assert word[0] == " " and not before[-1].isspace()
    assert all(" " not in word.lstrip() or any(gap in word for gap in text_encoder.DOUBLE_SPACES) for word in words)


def test_words_by_hand():
    assert split_words("") == [""]
    assert split_words(" The answer,\n\nis 42. ") == ["", " The", " answer,\n\nis", " 42.", " "]
    assert split_words("a  b c\n d") == ["a", "  b", " c\n d"]


# ---- tokenizers that are asked for whole texts


@pytest.mark.parametrize("kind", WHOLE)
def test_other_pre_tokenizers_get_whole_texts(make_tokenizer, kind):
    own = make(make_tokenizer, WHOLE[kind])
    assert not can_encode_by_word(own.backend_tokenizer)
    agree(own, ["the answer is 42", "a  b", "", "the answer is 42"])


@pytest.mark.parametrize("kind", ADDED)
def test_added_tokens_that_reach_across_a_space(make_tokenizer, kind):
    own = make_tokenizer()
    assert can_encode_by_word(own.backend_tokenizer)
    own.add_tokens([ADDED[kind]])
    assert not can_encode_by_word(own.backend_tokenizer)
    agree(own, ["the a b", "a <a> b", "b<a> b"])


def test_other_normalizers_and_models(make_tokenizer):
    assert not can_encode_by_word(make(make_tokenizer, GPT2, normalizers.NFKC()).backend_tokenizer)
    assert not can_encode_by_word(make(make_tokenizer, GPT2, normalizers.Strip()).backend_tokenizer)
    assert can_encode_by_word(make(make_tokenizer, GPT2, normalizers.Sequence([normalizers.NFC()])).backend_tokenizer)
    own = bare_tokenizer()
    own.backend_tokenizer.pre_tokenizer = GPT2
    assert not can_encode_by_word(own.backend_tokenizer)  # a WordLevel model
    own = make_tokenizer()
    own.backend_tokenizer.model.dropout = 0.5
    assert not can_encode_by_word(own.backend_tokenizer)


# ---- what is remembered


@QUICK
@given(st.lists(st.lists(ROUGH, max_size=4), max_size=5))
def test_later_calls_know_and_forget(tokenizer, calls):
    encode = TextEncoder(tokenizer)
    before = text_encoder.MAX_CACHED_WORDS, text_encoder.MAX_CACHED_WORD_LENGTH
    text_encoder.MAX_CACHED_WORDS, text_encoder.MAX_CACHED_WORD_LENGTH = 6, 4
    try:
        for texts in calls:
            assert encode(texts) == dict(zip(texts, encode_as_text(tokenizer, texts)))
            assert len(encode._known) <= 6 and all(len(word) <= 4 for word in encode._known)
    finally:
        text_encoder.MAX_CACHED_WORDS, text_encoder.MAX_CACHED_WORD_LENGTH = before


def test_a_known_word_is_not_asked_for_again(tokenizer, monkeypatch):
    encode, asked = TextEncoder(tokenizer), []
    plain = text_encoder.encode_as_text
    monkeypatch.setattr(
        text_encoder, "encode_as_text", lambda own, texts: asked.append(sorted(texts)) or plain(own, texts)
    )
    first = encode(["the answer", "the answer", "no answer"])
    assert encode(["the text, answer"]) == {"the text, answer": plain(tokenizer, ["the text, answer"])[0]}
    assert asked == [[" answer", "no", "the"], [" text,"]]
    first["the answer"].clear()  # the caller's own list
    assert encode(["the answer"]) == {"the answer": plain(tokenizer, ["the answer"])[0]}


def lowercase(backend):
    backend.normalizer = normalizers.Lowercase()


def swap_pre_tokenizer(backend):
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), BYTES])


CHANGES = {
    "normalizer": lowercase,
    "pre-tokenizer": swap_pre_tokenizer,
    "added token": lambda backend: backend.add_tokens(["nsw"]),
    "spelled special token": lambda backend: backend.add_special_tokens([AddedToken("The", special=True)]),
    "option of the model": lambda backend: setattr(backend.model, "continuing_subword_prefix", "##"),
    "another model": lambda backend: setattr(backend, "model", models.WordLevel({"?": 0}, unk_token="?")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_tokenizer_is_asked_again(make_tokenizer, change):
    own = make_tokenizer()
    encode, texts = TextEncoder(own), ["The answer 42 IS", "the Answer"]
    encode(texts)
    CHANGES[change](own.backend_tokenizer)
    assert encode(texts) == dict(zip(texts, encode_as_text(own, texts)))


def test_what_is_remembered_is_not_pickled(tokenizer):
    encode = TextEncoder(tokenizer)
    empty = len(pickle.dumps(encode))
    ids = encode(["the answer is in the text " * 9])
    assert encode._known and len(pickle.dumps(encode)) == empty
    assert pickle.loads(pickle.dumps(encode))(list(ids)) == ids


# ---- the plain way


@QUICK
@given(st.lists(TEXT, max_size=4))
def test_encode_as_text_is_transformers_split_special_tokens(tokenizer, texts):
    plain = [tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids for text in texts]
    assert encode_as_text(tokenizer, texts) == plain


def test_encode_as_text_leaves_the_tokenizer_as_it_was(make_tokenizer):
    own = make_tokenizer()
    before = own("a<|im_end|>b").input_ids
    own("a b c d", truncation=True, max_length=2, padding="max_length")
    assert len(encode_as_text(own, ["the long long answer"])[0]) > 2
    assert not own.backend_tokenizer.encode_special_tokens
    assert own("a<|im_end|>b").input_ids == before
