"""Overlap with references against rouge_score, SQuAD's rules and hand counts, in English and in Chinese."""

import math
import re
import string
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.texts import ascii_text, quick

from sft_pipeline.evaluation.metrics.reference_overlap import (
    compute_bleu_percent,
    compute_chrf_percent,
    compute_common_subsequence_length,
    compute_exact_match,
    compute_rouge_l,
    compute_word_f1,
)


@quick
@given(st.lists(st.integers(0, 4), max_size=30), st.lists(st.integers(0, 4), max_size=30))
def test_common_subsequence_agrees_with_the_dynamic_programme(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    assert compute_common_subsequence_length(a, b) == table[-1][-1]


@quick
@given(ascii_text, ascii_text)
def test_rouge_l_agrees_with_rouge_score_on_ascii(answer, reference):
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge_score is the reference")
    expected = rouge_scorer.RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure
    assert compute_rouge_l(answer, reference) == pytest.approx(expected)


def test_rouge_l_serves_chinese():
    assert compute_rouge_l("我喜欢看书。", "我很喜欢书") == pytest.approx(2 * 4 / 10)
    assert compute_rouge_l("", "") == compute_rouge_l("a", "！") == 0


def squad_reference(text):
    """The normalization of SQuAD's script, for ASCII."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


@quick
@given(ascii_text, ascii_text)
def test_exact_match_and_f1_agree_with_squad_on_ascii(answer, reference):
    a, b = squad_reference(answer), squad_reference(reference)
    assert compute_exact_match(answer, reference) == (a == b)
    common = sum((Counter(a.split()) & Counter(b.split())).values())
    precision, recall = common / max(1, len(a.split())), common / max(1, len(b.split()))
    expected = 2 * precision * recall / (precision + recall) if common else float(a == b)
    assert compute_word_f1(answer, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "reference", "match", "f1"),
    [
        ("答案是：北京。", "答案是北京", 1, 1),
        ("北京", "北京市", 0, 0.8),
        ("１２ 个", "12个", 1, 1),
        ("The “cat”", "a cat!", 1, 1),
        ("", "", 1, 1),
        ("the", "", 1, 1),
        ("", "cat", 0, 0),
    ],
)
def test_exact_match_and_f1_serve_chinese_and_empty_texts(answer, reference, match, f1):
    assert compute_exact_match(answer, reference) == match
    assert compute_word_f1(answer, reference) == pytest.approx(f1)


def test_bleu_by_hand():
    """Precisions 4/5, 3/4, 2/3, 1/2, and the brevity penalty exp(1 - 6/5)."""
    expected = 100 * math.exp(1 - 6 / 5) * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert compute_bleu_percent(["a b c d x"], ["a b c d e f"]) == pytest.approx(expected)
    assert compute_bleu_percent(["天地玄黄吗"], ["天地玄黄宇宙"]) == pytest.approx(expected)


def test_bleu_takes_13a_for_english_and_zh_once_a_reference_is_chinese():
    answers = ["x &lt; y is one of the cases"] * 2
    assert compute_bleu_percent(answers, ["x < y is one of the cases"] * 2) == pytest.approx(100)
    assert compute_bleu_percent(answers, ["x < y is one of the cases", "你"]) < 90  # 13a alone decodes entities


def test_bleu_and_chrf_of_copies_strangers_and_empty_answers(caplog):
    texts = ["我们今天去公园玩 .", "The cat sat on the mat ."] * 60
    assert compute_bleu_percent(texts, texts) == pytest.approx(100)
    assert compute_chrf_percent(texts, texts) == pytest.approx(100)
    assert compute_bleu_percent([""] * 120, texts) == compute_chrf_percent([""] * 120, texts) == 0
    assert compute_chrf_percent(["xyz"], ["你好"]) == 0
    assert not caplog.records
