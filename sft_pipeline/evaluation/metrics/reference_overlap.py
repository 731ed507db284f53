"""How close answers come to their references: BLEU, chrF, ROUGE-L, exact match and F1, in English and in Chinese.

`_percent` runs from 0 to 100, as sacrebleu prints it; `_rate` and `_f1` from 0 to 1. A function over lists raises
SFTError for empty lists and lists of different lengths; one over a pair has a value for empty texts, stated there.
"""

import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import sacrebleu

from sft_pipeline.evaluation.metrics.degeneration import require_items, require_same_length
from sft_pipeline.evaluation.metrics.words import count_han, words


def bleu_percent(answers: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU by sacrebleu (Post 2018), up to 4-grams, tokenizer "13a", or "zh" where a reference has Chinese.

    "13a" takes a Chinese sentence for one word; "zh" cuts Chinese characters singly and leaves the rest almost as
    "13a" does. The references alone choose, so two models are always measured alike.
    """
    _check(answers, references)
    tokenize = "zh" if any(map(count_han, references)) else "13a"
    # force: sacrebleu otherwise logs a warning about tokenized input, for answers that end in " ." it has no say in.
    return sacrebleu.corpus_bleu(list(answers), [list(references)], tokenize=tokenize, force=True).score


def chrf_percent(answers: Sequence[str], references: Sequence[str]) -> float:
    """Corpus chrF2 by sacrebleu (Popović 2015): F-score over character 1- to 6-grams, so no tokenizer."""
    _check(answers, references)
    return sacrebleu.corpus_chrf(list(answers), [list(references)]).score


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, "ROUGE"); 0 if either text has no words.

    Equals rouge_score's rougeL without stemming on ASCII; its tokenizer drops Chinese, `words` keeps it.
    """
    answered, wanted = words(answer), words(reference)
    if not answered or not wanted:
        return 0.0
    return 2 * common_subsequence_length(answered, wanted) / (len(answered) + len(wanted))


def rouge_l_f1(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean over answers of `rouge_l`."""
    return _mean_over_pairs(rouge_l, answers, references)


def exact_match(answer: str, reference: str) -> float:
    """1 if both have the same words after SQuAD's normalization, else 0; two empty texts match."""
    return float(normalized_words(answer) == normalized_words(reference))


def exact_match_rate(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean over answers of `exact_match`."""
    return _mean_over_pairs(exact_match, answers, references)


def word_f1(answer: str, reference: str) -> float:
    """F1 of the bags of words after SQuAD's normalization; if either is empty, 1 for both empty and 0 otherwise."""
    answered, wanted = normalized_words(answer), normalized_words(reference)
    if not answered or not wanted:
        return float(answered == wanted)
    return 2 * (Counter(answered) & Counter(wanted)).total() / (len(answered) + len(wanted))


def mean_word_f1(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean over answers of `word_f1`."""
    return _mean_over_pairs(word_f1, answers, references)


def normalized_words(text: str) -> list[str]:
    """SQuAD's normalization (Rajpurkar et al. 2016): lower case, no punctuation, no articles, cut at white space.

    Punctuation is ASCII's, as there, and every Unicode mark ("，", "。"); full-width forms are made plain (NFKC), and
    Chinese characters are words by themselves, as in CMRC 2018.
    """
    plain = "".join(c for c in unicodedata.normalize("NFKC", text).lower() if not _is_punctuation(c))
    spaced = "".join(f" {c} " if count_han(c) else c for c in plain)
    return [word for word in spaced.split() if word not in ("a", "an", "the")]


def common_subsequence_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    Bit-parallel (Hyyrö 2004, "Bit-parallel LCS-length computation revisited"): one addition of len(a)-bit integers
    for each item of b stands for a row of the dynamic programme; the zeros left over count the subsequence.
    """
    places: dict[str, int] = {}
    for i, item in enumerate(a):
        places[item] = places.get(item, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for item in b:
        matched = row & places.get(item, 0)
        row = ((row + matched) | (row - matched)) & full
    return len(a) - row.bit_count()


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def _mean_over_pairs(figure: Callable[[str, str], float], answers: Sequence[str], references: Sequence[str]) -> float:
    _check(answers, references)
    return float(np.mean([figure(*pair) for pair in zip(answers, references, strict=True)]))


def _check(answers: Sequence[str], references: Sequence[str]) -> None:
    require_items(answers)
    require_same_length(answers=answers, references=references)
