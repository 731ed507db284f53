"""Checkable instructions: prompts whose answers code can judge, in English and Chinese.

`instructions.jsonl` holds one instruction a line: id, language, category (format, count, language or keyword), prompt,
the name of a check below, its arguments, and an answer that follows it (`good`) and one that does not (`bad`). The idea
is that of IFEval (Zhou et al. 2023, "Instruction-Following Evaluation for Large Language Models"); prompts and checks
are our own, short enough for a small model. No prompt is followed by an empty answer or by repeating the prompt.
"""

import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

import numpy as np

from sft_pipeline.evaluation.metrics.degeneration import require_items, require_same_length
from sft_pipeline.evaluation.metrics.words import HAN, count_han
from sft_pipeline.utils.errors import SFTError

_BULLET = re.compile(r"^[ \t]*(?:[-*][ \t]+|•[ \t]*)\S", re.MULTILINE)
_NUMBERED = re.compile(r"^[ \t]*(\d+)[ \t]*[.)）、．:：][ \t]*\S", re.MULTILINE)
_FENCE = re.compile(r"^```\w*\n(.*)\n```$", re.DOTALL)
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)|[。！？]+[”’」』）]*")
_ENGLISH_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_LATIN = re.compile(r"[A-Za-z]")
_LOOSE_ENDS = " \t\n\"'“”‘’.!。！*"


@dataclass(frozen=True)
class Instruction:
    """One prompt and what its answer must satisfy; `good` follows it, `bad` does not."""

    id: str
    language: str
    category: str
    prompt: str
    check: str
    args: dict[str, object] = field(hash=False)
    good: str
    bad: str


@cache
def load_instructions() -> tuple[Instruction, ...]:
    """All instructions, in the order of the file shipped with the package."""
    text = resources.files("sft_pipeline.evaluation.metrics").joinpath("instructions.jsonl").read_text(encoding="utf-8")
    return tuple(Instruction(**json.loads(line)) for line in text.splitlines())


def sample_instructions(count: int) -> list[Instruction]:
    """`count` of all, taken from each language and category in turn, so that every beginning is a fair sample."""
    groups: dict[tuple[str, str], list[Instruction]] = {}
    for instruction in load_instructions():
        groups.setdefault((instruction.language, instruction.category), []).append(instruction)
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*groups.values()))
    return [instruction for instruction in in_turn if instruction][:count]


def follows(instruction: Instruction, answer: str) -> bool:
    """Whether `answer` does what the instruction asks; a blank answer never does."""
    answer = answer.strip()
    return bool(answer) and CHECKS[instruction.check](answer, **instruction.args)


def followed(answers: Sequence[str], ids: Sequence[str] | None = None) -> list[bool]:
    """One verdict an answer. `ids` names the instruction of each answer; by default all of them, in order.

    Raises SFTError for an unknown id, for no answers, or where answers and instructions differ in number.
    """
    known = {instruction.id: instruction for instruction in load_instructions()}
    ids = list(known) if ids is None else ids
    require_items(answers)
    require_same_length(answers=answers, instructions=ids)
    for name in ids:
        if name not in known:
            raise SFTError(f"unknown instruction id {name!r}: use ids of load_instructions(), as {next(iter(known))!r}")
    return [follows(known[name], answer) for name, answer in zip(ids, answers, strict=True)]


def instruction_figures(answers: Sequence[str], ids: Sequence[str] | None = None) -> dict[str, float]:
    """Share of instructions followed, in all and for each category and language there is. Raises as `followed` does."""
    verdicts = followed(answers, ids)
    known = {instruction.id: instruction for instruction in load_instructions()}
    groups: dict[str, list[bool]] = {}
    for name, verdict in zip(known if ids is None else ids, verdicts, strict=True):
        for group in ("all", f"category_{known[name].category}", f"language_{known[name].language}"):
            groups.setdefault(group, []).append(verdict)
    return {
        "instructions_followed_rate" + ("" if group == "all" else f"_{group}"): float(np.mean(groups[group]))
        for group in sorted(groups)
    }


# Checks: pure functions of the stripped answer; `count` is exact, `minimum` and `maximum` are inclusive.


def bullets(answer: str, count: int) -> bool:
    """`count` lines that start with -, * or •; other lines may stand around them."""
    return len(_BULLET.findall(answer)) == count


def numbered(answer: str, count: int) -> bool:
    """`count` lines numbered 1, 2, 3 … in order."""
    return [int(number) for number in _NUMBERED.findall(answer)] == list(range(1, count + 1))


def json_object(answer: str, keys: Sequence[str]) -> bool:
    """The answer is one JSON object with exactly these keys, in any order; a Markdown code fence around it is fine."""
    value = _parse_json(answer)
    return isinstance(value, dict) and sorted(value) == sorted(keys)


def json_list(answer: str, count: int) -> bool:
    """The answer is one JSON array of `count` items; a Markdown code fence around it is fine."""
    value = _parse_json(answer)
    return isinstance(value, list) and len(value) == count


def letter_case(answer: str, upper: bool) -> bool:
    """Every cased letter is upper-case (or lower-case), and there is one."""
    return answer.isupper() if upper else answer.islower()


def wrapped(answer: str, left: str, right: str) -> bool:
    """Starts with `left`, ends with `right`, with something between them."""
    return answer.startswith(left) and answer.endswith(right) and bool(answer[len(left) : -len(right)].strip())


def separated(answer: str, separators: str, count: int) -> bool:
    """One line of `count` non-empty parts divided by any one of the characters in `separators`."""
    parts = re.split(f"[{re.escape(separators)}]", answer)
    return len(parts) == count and all(part.strip() for part in parts) and "\n" not in answer


def lines(answer: str, count: int) -> bool:
    """`count` lines that are not blank."""
    return sum(bool(line.strip()) for line in answer.splitlines()) == count


def paragraphs(answer: str, count: int) -> bool:
    """`count` paragraphs, divided by blank lines."""
    return len(re.split(r"\n\s*\n", answer)) == count


def sentences(answer: str, count: int) -> bool:
    """`count` sentences, each with a letter or digit and ended by . ! ? (before a space or the end) or 。！？

    A last one without its end is none: a model that never stops has not answered in one sentence.
    """
    *ended, rest = _SENTENCE_END.split(answer)
    return not rest.strip() and sum(any(c.isalnum() for c in part) for part in ended) == count


def english_words(answer: str, minimum: int, maximum: int) -> bool:
    """The number of words; a hyphenated or contracted word is one."""
    return minimum <= len(_ENGLISH_WORD.findall(answer)) <= maximum


def chinese_characters(answer: str, minimum: int, maximum: int) -> bool:
    """The number of Chinese characters, without punctuation."""
    return minimum <= count_han(answer) <= maximum


def script(answer: str, only: str) -> bool:
    """One script: "chinese" has Chinese characters and no Latin letters, "latin" the reverse, "digits" is a number."""
    if only == "digits":
        return answer.strip(_LOOSE_ENDS).isdecimal()
    has_chinese, has_latin = count_han(answer) > 0, bool(_LATIN.search(answer))
    return (has_chinese, has_latin) == (only == "chinese", only == "latin")


def keywords(answer: str, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> bool:
    """All of `include` occur and none of `exclude`, whatever their case; English words as whole words."""
    found = {word: _occurrences(answer, word) > 0 for word in [*include, *exclude]}
    return all(found[word] for word in include) and not any(found[word] for word in exclude)


def keyword_count(answer: str, word: str, minimum: int, maximum: int) -> bool:
    """The number of times `word` occurs."""
    return minimum <= _occurrences(answer, word) <= maximum


def starts_with(answer: str, phrase: str) -> bool:
    """Opens with `phrase`, whatever the case and quotes before it, and goes on after it."""
    opening, phrase = answer.lstrip(_LOOSE_ENDS).casefold(), phrase.casefold()
    return opening.startswith(phrase) and bool(opening[len(phrase) :].strip(_LOOSE_ENDS))


def ends_with(answer: str, phrase: str) -> bool:
    """Closes with `phrase`, whatever the case, full stop and quotes after it, and has something before it."""
    closing, phrase = answer.rstrip(_LOOSE_ENDS).casefold(), phrase.rstrip(_LOOSE_ENDS).casefold()
    return closing.endswith(phrase) and bool(closing[: -len(phrase)].strip(_LOOSE_ENDS))


def one_of(answer: str, options: Sequence[str]) -> bool:
    """Nothing but one of `options`, whatever the case, quotes and full stop."""
    return answer.strip(_LOOSE_ENDS).casefold() in [option.casefold() for option in options]


CHECKS: dict[str, Callable[..., bool]] = {
    check.__name__: check
    for check in (
        bullets, numbered, json_object, json_list, letter_case, wrapped, separated, lines, paragraphs, sentences,
        english_words, chinese_characters, script, keywords, keyword_count, starts_with, ends_with, one_of,
    )
}  # fmt: skip


def _parse_json(answer: str) -> object:
    fenced = _FENCE.match(answer)
    try:
        return json.loads(fenced[1] if fenced else answer)
    except (json.JSONDecodeError, RecursionError):
        return None


def _occurrences(answer: str, word: str) -> int:
    """Occurrences of `word`; Latin words between boundaries, Chinese ones anywhere, as Chinese has no spaces."""
    pattern = re.escape(word)
    if not count_han(word):
        pattern = rf"(?<![^\W_{HAN}]){pattern}(?![^\W_{HAN}])"
    return len(re.findall(pattern, answer, re.IGNORECASE))
