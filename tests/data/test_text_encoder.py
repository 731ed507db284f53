"""Texts to ids: cached ids of words give the ids of every Unicode text, and the cache is never stale."""

import itertools
import pickle
import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.conversations import TEXT, build_bare_tokenizer
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
# White space of every kind in runs, combining marks, singletons of NFC, contractions, digits, jamo, letters without
# case, and added tokens.
PARTS = [*WHITE_SPACE, "  ", "\n ", " \n", "\u0301", "\u0338", "A", "a", "é", "\u212b", "\u0344", "\u1100", "\u1161"]
PARTS += ["'s", "'LL", "12", "٣", "½", "冬瓜", "🙂", "!?", "_", "<think>", "</think>", "<|im_end|>", "the answer", "\0"]
MIXED_TEXT = st.lists(st.sampled_from(PARTS) | st.just(" ") | CHARACTERS, max_size=14).map("".join)

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
QWEN, LLAMA = (pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS)
BY_WORD = {
    "GPT-2": GPT2,
    "SmolLM2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    "Qwen": pre_tokenizers.Sequence([QWEN, BYTES]),
    "Llama 3": pre_tokenizers.Sequence([LLAMA, BYTES]),
    "a trained model's": pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n!?", "merged_with_next"), pre_tokenizers.Split("A", "isolated"), QWEN, BYTES]
    ),
}
WHOLE_TEXTS = {
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


def build_variant(make_tokenizer, pre_tokenizer, normalizer=None):
    """Build the tiny tokenizer with other components and with added tokens that are matched in texts."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.backend_tokenizer.normalizer = normalizer
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


@pytest.fixture(scope="module", params=BY_WORD)
def word_tokenizer(request, make_tokenizer):
    return build_variant(make_tokenizer, BY_WORD[request.param], normalizers.NFC() if request.param == "Qwen" else None)


def check_ids(tokenizer, texts: list[str]) -> None:
    assert TextEncoder(tokenizer)(texts) == dict(zip(texts, encode_as_text(tokenizer, texts)))


# ---- exactness


@THOROUGH
@given(st.lists(MIXED_TEXT | TEXT, max_size=6))
def test_concatenated_ids_of_words_are_the_ids_of_the_text(word_tokenizer, texts):
    assert can_encode_by_word(word_tokenizer.backend_tokenizer)
    check_ids(word_tokenizer, texts)


@THOROUGH
@given(st.lists(MIXED_TEXT | TEXT, max_size=6))
def test_the_qwen3_tokenizer(qwen3, texts):
    assert can_encode_by_word(qwen3.backend_tokenizer)
    check_ids(qwen3, texts)


def test_characters_of_every_script_beside_every_kind_of_space(word_tokenizer):
    """Before a space, after one, and between other white space."""
    sample = [chr(c) for c in [*range(0, 0x3100, 3), *range(0x3100, sys.maxunicode, 307)] if not 0xD800 <= c < 0xE000]
    texts = ["".join(f"a{c} b {c}\n {c}\u3000 " for c in sample[i : i + 50]) for i in range(0, len(sample), 50)]
    check_ids(word_tokenizer, texts)


def test_white_space_lists_every_character_that_a_pattern_matches_as_white_space():
    """Then no split follows a character that a pattern matches as white space, with or without NFC."""
    non_spaces = [
        c for c in map(chr, range(sys.maxunicode + 1)) if not 0xD800 <= ord(c) < 0xE000 and c not in WHITE_SPACE
    ]
    assert not any(c.isspace() for c in non_spaces) and all(c.isspace() for c in WHITE_SPACE)
    split = pre_tokenizers.Split(Regex(r"\s"), "isolated")
    for i in range(0, len(non_spaces), 100_000):
        assert len(split.pre_tokenize_str("".join(non_spaces[i : i + 100_000]))) == 1
    assert not any(unicodedata.normalize("NFC", c)[-1] in WHITE_SPACE for c in non_spaces)
    assert all(unicodedata.normalize("NFC", c + " ") == unicodedata.normalize("NFC", c) + " " for c in non_spaces)


@QUICK
@given(MIXED_TEXT)
def test_split_words(text):
    words = split_words(text)
    assert "".join(words) == text
    for previous, word in itertools.pairwise(word for word in words if word):
        assert word[0] == " " and not previous[-1].isspace()
    assert all(" " not in word.lstrip() or any(pair in word for pair in text_encoder.DOUBLE_SPACES) for word in words)


def test_split_words_by_hand():
    assert split_words("") == [""]
    assert split_words(" The answer,\n\nis 42. ") == ["", " The", " answer,\n\nis", " 42.", " "]
    assert split_words("a  b c\n d") == ["a", "  b", " c\n d"]


# ---- tokenizers that encode whole texts


@pytest.mark.parametrize("kind", WHOLE_TEXTS)
def test_other_pre_tokenizers_encode_whole_texts(make_tokenizer, kind):
    tokenizer = build_variant(make_tokenizer, WHOLE_TEXTS[kind])
    assert not can_encode_by_word(tokenizer.backend_tokenizer)
    check_ids(tokenizer, ["the answer is 42", "a  b", "", "the answer is 42"])


@pytest.mark.parametrize("kind", ADDED)
def test_added_tokens_that_cross_a_space(make_tokenizer, kind):
    tokenizer = make_tokenizer()
    assert can_encode_by_word(tokenizer.backend_tokenizer)
    tokenizer.add_tokens([ADDED[kind]])
    assert not can_encode_by_word(tokenizer.backend_tokenizer)
    check_ids(tokenizer, ["the a b", "a <a> b", "b<a> b"])


def test_other_normalizers_and_models(make_tokenizer):
    assert not can_encode_by_word(build_variant(make_tokenizer, GPT2, normalizers.NFKC()).backend_tokenizer)
    assert not can_encode_by_word(build_variant(make_tokenizer, GPT2, normalizers.Strip()).backend_tokenizer)
    nfc = normalizers.Sequence([normalizers.NFC()])
    assert can_encode_by_word(build_variant(make_tokenizer, GPT2, nfc).backend_tokenizer)
    tokenizer = build_bare_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = GPT2
    assert not can_encode_by_word(tokenizer.backend_tokenizer)  # a WordLevel model
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.model.dropout = 0.5
    assert not can_encode_by_word(tokenizer.backend_tokenizer)


# ---- the cache of words


@QUICK
@given(st.lists(st.lists(MIXED_TEXT, max_size=4), max_size=5))
def test_the_cache_is_bounded(tokenizer, calls):
    encode = TextEncoder(tokenizer)
    previous = text_encoder.MAX_CACHED_WORDS, text_encoder.MAX_CACHED_WORD_LENGTH
    text_encoder.MAX_CACHED_WORDS, text_encoder.MAX_CACHED_WORD_LENGTH = 6, 4
    try:
        for texts in calls:
            assert encode(texts) == dict(zip(texts, encode_as_text(tokenizer, texts)))
            assert len(encode._word_ids) <= 6 and all(len(word) <= 4 for word in encode._word_ids)
    finally:
        text_encoder.MAX_CACHED_WORDS, text_encoder.MAX_CACHED_WORD_LENGTH = previous


def test_a_cached_word_is_not_encoded_again(tokenizer, monkeypatch):
    encode, calls = TextEncoder(tokenizer), []
    plain = text_encoder.encode_as_text
    monkeypatch.setattr(
        text_encoder, "encode_as_text", lambda tokenizer, texts: calls.append(sorted(texts)) or plain(tokenizer, texts)
    )
    first = encode(["the answer", "the answer", "no answer"])
    assert encode(["the text, answer"]) == {"the text, answer": plain(tokenizer, ["the text, answer"])[0]}
    assert calls == [[" answer", "no", "the"], [" text,"]]
    first["the answer"].clear()  # the caller's list is a copy
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
def test_a_changed_tokenizer_clears_the_cache(make_tokenizer, change):
    tokenizer = make_tokenizer()
    encode, texts = TextEncoder(tokenizer), ["The answer 42 IS", "the Answer"]
    encode(texts)
    CHANGES[change](tokenizer.backend_tokenizer)
    assert encode(texts) == dict(zip(texts, encode_as_text(tokenizer, texts)))


def test_the_cache_is_not_pickled(tokenizer):
    encode = TextEncoder(tokenizer)
    empty = len(pickle.dumps(encode))
    ids = encode(["the answer is in the text " * 9])
    assert encode._word_ids and len(pickle.dumps(encode)) == empty
    assert pickle.loads(pickle.dumps(encode))(list(ids)) == ids


# ---- encode_as_text


@QUICK
@given(st.lists(TEXT, max_size=4))
def test_encode_as_text_is_transformers_split_special_tokens(tokenizer, texts):
    plain = [tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids for text in texts]
    assert encode_as_text(tokenizer, texts) == plain


def test_encode_as_text_restores_the_tokenizer(make_tokenizer):
    tokenizer = make_tokenizer()
    expected = tokenizer("a<|im_end|>b").input_ids
    tokenizer("a b c d", truncation=True, max_length=2, padding="max_length")
    assert len(encode_as_text(tokenizer, ["the long long answer"])[0]) > 2
    assert not tokenizer.backend_tokenizer.encode_special_tokens
    assert tokenizer("a<|im_end|>b").input_ids == expected


def test_the_reference_ids_of_a_single_text(qwen3):
    assert encode_as_text(qwen3, ["如何学习python?"]) == [[100007, 100134, 12669, 30]]
