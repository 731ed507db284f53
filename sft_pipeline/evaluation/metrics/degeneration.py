"""How a model behaves when it answers: does it stop, repeat itself (复读机), parrot the prompt, ramble?

Every figure is a pure function over texts. `_rate`, `_share` and `_ratio` run from 0 to 1 (a ratio may exceed 1).
A function over a list of answers raises SFTError when the list is empty; one over a single answer has a value for
the empty string, which its docstring states.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from sft_pipeline.evaluation.metrics.words import units, words
from sft_pipeline.utils.errors import SFTError

LOOP_REPEATS = 3
LOOP_CHARACTERS = 30


def stop_rate(finish_reasons: Sequence[str]) -> float:
    """Share of answers the model ended itself: finish reason "stop"."""
    return _share_of(finish_reasons, "stop")


def cap_rate(finish_reasons: Sequence[str]) -> float:
    """Share of answers cut by the token limit: finish reason "length". Other reasons, as an error, count in neither."""
    return _share_of(finish_reasons, "length")


def repeated_ngram_share(sequence: Sequence[Hashable], n: int) -> float:
    """Share of the n-grams of one sequence that occurred before in it: 1 - distinct n-grams / n-grams.

    This is seq-rep-n of Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training" (there over the
    model's tokens). 0 for a sequence shorter than n, which repeats nothing.
    """
    total = len(sequence) - n + 1
    return 1 - len(_ngrams(sequence, n)) / total if total > 0 else 0.0


def rep_n_share(answers: Sequence[str], n: int) -> float:
    """Mean over answers of `repeated_ngram_share` over their units (words, CJK characters, punctuation marks).

    Compare within one language: Chinese characters repeat more often than English words do.
    """
    return _mean([repeated_ngram_share(units(answer), n) for answer in answers])


def distinct_n_share(answers: Sequence[str], n: int) -> float:
    """Distinct n-grams of all the answers together / their n-grams (Li et al. 2016, "A Diversity-Promoting Objective").

    It falls as the number of answers grows: compare models over the same prompts. 0 where no answer has an n-gram.
    """
    require_items(answers)
    sequences = [units(answer) for answer in answers]
    total = sum(max(0, len(sequence) - n + 1) for sequence in sequences)
    distinct = set().union(*(_ngrams(sequence, n) for sequence in sequences))
    return len(distinct) / total if total else 0.0


def loop_characters(answer: str, repeats: int = LOOP_REPEATS) -> int:
    """Length in characters of the longest tail of `answer` in which some period stands at least `repeats` times.

    White space is left out, as the last repetition lacks the one that divides it from the next, and so are the U+FFFD
    at the end that a character cut by the token limit decodes to. The last repetition may be cut short: a tail of
    length L has period p if every character equals the one p places before it, and counts if L >= repeats * p. 0 if
    there is no such tail. Linear time: the prefix function of Knuth, Morris and Pratt 1977 over the reversed text
    gives the smallest period of every tail.
    """
    backwards = "".join(answer.split()).rstrip("\ufffd")[::-1]
    border = [0] * len(backwards)  # border[i]: longest proper prefix of backwards[: i + 1] that is also its suffix
    longest = 0
    for i, character in enumerate(backwards):
        length = border[i - 1] if i else 0
        while length and backwards[length] != character:
            length = border[length - 1]
        border[i] = length + (i > 0 and backwards[length] == character)
        if i + 1 >= repeats * (i + 1 - border[i]):
            longest = i + 1
    return longest


def is_loop(answer: str) -> bool:
    """Whether the answer is caught in a loop: its tail repeats one period 3 times or more over 30 characters or more.

    Three times, since people say a thing twice for emphasis. 30 characters (white space left out), so that "ha ha ha",
    "......" or the end of a table pass, while a short sentence must come round 3 times in English (12 characters) and
    4 times in Chinese (8). Characters, not words, serve both languages and catch "hahaha…" without spaces. A loop with
    a counter in it ("1. yes 2. yes 3. yes") has no exact period; `rep_n_share` shows that one. An empty answer is none.
    """
    return loop_characters(answer) >= LOOP_CHARACTERS


def loop_rate(answers: Sequence[str]) -> float:
    """Share of answers caught in a loop (复读机 rate), see `is_loop`."""
    return _mean([is_loop(answer) for answer in answers])


def prompt_echo(prompt: str, answer: str) -> float:
    """Length of the longest run of the prompt's words found in the answer, in words / words of the prompt.

    1 for an answer that copies the prompt whole, wherever it stands. 0 for an empty answer or prompt.
    """
    vocabulary: dict[str, int] = {}
    asked, answered = (
        np.array([vocabulary.setdefault(word, len(vocabulary)) for word in words(text)], dtype=np.int64)
        for text in (prompt, answer)
    )
    run = np.zeros(len(answered) + 1, dtype=np.int64)  # run[j + 1]: common run that ends at answered[j]
    longest = 0
    for word in asked:
        run[1:] = np.where(answered == word, run[:-1] + 1, 0)
        longest = max(longest, int(run.max()))
    return longest / len(asked) if len(asked) else 0.0


def prompt_echo_share(prompts: Sequence[str], answers: Sequence[str]) -> float:
    """Mean over answers of `prompt_echo`. Raises SFTError for lists of different lengths."""
    require_same_length(prompts=prompts, answers=answers)
    return _mean([prompt_echo(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)])


def answer_length_ratio(answers: Sequence[str], references: Sequence[str]) -> float:
    """Words of all answers / words of all references: 1 is as long as wanted, 3 rambles.

    Totals, as a mean of ratios would be ruled by the shortest references. Raises SFTError where the references have
    no words, or for lists of different lengths.
    """
    require_same_length(answers=answers, references=references)
    wanted = sum(len(words(reference)) for reference in references)
    if not wanted:
        raise SFTError("answer length against the reference needs references with words in them: all are empty")
    return sum(len(words(answer)) for answer in answers) / wanted


def require_items(items: Sequence[object]) -> None:
    """Raise SFTError for an empty list."""
    if not len(items):
        raise SFTError("no answers to score: give at least one prompt that was answered")


def require_same_length(**columns: Sequence[object]) -> None:
    """Raise SFTError, naming the lengths, unless all columns are equally long."""
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise SFTError(f"one of each is needed for every answer, got {told}")


def _ngrams(sequence: Sequence[Hashable], n: int) -> set[tuple[Hashable, ...]]:
    return {tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)}


def _share_of(items: Sequence[str], wanted: str) -> float:
    return _mean([item == wanted for item in items])


def _mean(values: Sequence[float]) -> float:
    require_items(values)
    return float(np.mean(values))
