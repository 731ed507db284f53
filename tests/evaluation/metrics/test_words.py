"""Words: segmentation and counts of characters and bytes."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.texts import ascii_text, quick

from sft_pipeline.evaluation.metrics.words import count_han, count_utf8_bytes, split_units, split_words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hi, 你好! snake_case 3.5", ["hi", "你", "好", "snake", "case", "3", "5"]),
        ("我用Python写1000行。", ["我", "用", "python", "写", "1000", "行"]),
        ("すしテ 한국어 Ünï été \U00020000x", ["す", "し", "テ", "한국어", "ünï", "été", "\U00020000", "x"]),
        ("e\u0301te\u0301", ["été"]),
        ("", []),
    ],
)
def test_words(text, expected):
    assert split_words(text) == expected


@quick
@given(st.text(), ascii_text)
def test_units_are_the_words_and_the_marks_and_lose_nothing(text, ascii_words):
    assert [unit for unit in split_units(text) if split_words(unit)] == split_words(text)
    assert "".join(split_units(ascii_words)) == re.sub(r"\s", "", ascii_words.lower())


def test_count_han():
    assert count_han("你好，abc！すし") == 2


def test_count_utf8_bytes():
    assert count_utf8_bytes("a你") == 4
