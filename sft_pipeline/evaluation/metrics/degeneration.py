"""Repetition in answers, loops (复读机), and copies of the prompt: what a badly trained model produces.

Pure functions of texts. What each returns for an empty text is in its docstring.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from sft_pipeline.evaluation.metrics.words import split_units, split_words

LOOP_REPEATS = 3
LOOP_CHARACTERS = 30


def compute_repeated_ngram_share(sequence: Sequence[Hashable], n: int) -> float:
    """Return the share of the sequence's n-grams that occur earlier in it: 1 - distinct n-grams / n-grams.

    This is seq-rep-n of Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training", which takes the
    model's tokens. 0 for a sequence shorter than n.
    """
    total = len(sequence) - n + 1
    return 1 - len(_collect_ngrams(sequence, n)) / total if total > 0 else 0.0


def compute_distinct_n_share(answers: Sequence[str], n: int) -> float:
    """Return distinct n-grams / n-grams over all answers (Li et al. 2016, "A Diversity-Promoting Objective").

    0 if no answer has an n-gram.
    """
    sequences = [split_units(answer) for answer in answers]
    total = sum(max(0, len(sequence) - n + 1) for sequence in sequences)
    distinct = set().union(*(_collect_ngrams(sequence, n) for sequence in sequences))
    return len(distinct) / total if total else 0.0


def count_loop_characters(answer: str, repeats: int = LOOP_REPEATS) -> int:
    """Return the length of the longest suffix of the answer that is one period repeated `repeats` times or more.

    White space is removed first, because the last repetition lacks the separator that follows the others, and so are
    U+FFFD at the end: a character cut by the token limit decodes to them. The last repetition may be cut: a suffix of
    length L has period p if every character equals the one p positions earlier, and counts if L >= repeats * p.
    0 without such a suffix. Linear time: the prefix function of Knuth, Morris and Pratt 1977 over the reversed text
    gives the smallest period of every suffix.
    """
    reversed_text = "".join(answer.split()).rstrip("\ufffd")[::-1]
    # border[i]: length of the longest proper prefix of reversed_text[: i + 1] that is also its suffix
    border = [0] * len(reversed_text)
    longest = 0
    for i, character in enumerate(reversed_text):
        length = border[i - 1] if i else 0
        while length and reversed_text[length] != character:
            length = border[length - 1]
        border[i] = length + (i > 0 and reversed_text[length] == character)
        if i + 1 >= repeats * (i + 1 - border[i]):
            longest = i + 1
    return longest


def is_loop(answer: str) -> bool:
    """Return whether the answer ends in a loop: one period, 3 times or more, over 30 characters or more.

    3 times, because people repeat a phrase twice for emphasis. 30 characters without white space, so that "ha ha ha",
    "......" and the last line of a table are no loops, while a short English sentence (12 characters) counts after 3
    repetitions and a Chinese one (8) after 4. Counting characters instead of words works for both languages and
    detects "hahaha…". A loop with a counter ("1. yes 2. yes 3. yes") has no exact period; rep-n detects it. False for
    an empty answer.
    """
    return count_loop_characters(answer) >= LOOP_CHARACTERS


def compute_prompt_echo(prompt: str, answer: str) -> float:
    """Return the length in words of the longest run of prompt words in the answer / words of the prompt.

    1 for an answer that contains the whole prompt. 0 for an empty answer or prompt.
    """
    vocabulary: dict[str, int] = {}
    prompt_ids, answer_ids = (
        np.array([vocabulary.setdefault(word, len(vocabulary)) for word in split_words(text)], dtype=np.int64)
        for text in (prompt, answer)
    )
    # run[j + 1]: length of the common run that ends at answer_ids[j]
    run = np.zeros(len(answer_ids) + 1, dtype=np.int64)
    longest = 0
    for word in prompt_ids:
        run[1:] = np.where(answer_ids == word, run[:-1] + 1, 0)
        longest = max(longest, int(run.max()))
    return longest / len(prompt_ids) if len(prompt_ids) else 0.0


def _collect_ngrams(sequence: Sequence[Hashable], n: int) -> set[tuple[Hashable, ...]]:
    return {tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)}
