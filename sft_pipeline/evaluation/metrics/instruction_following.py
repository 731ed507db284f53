"""Checkable instructions: prompts whose answers are verified by code, in English and Chinese.

`instructions.jsonl` holds one instruction per line: id, language, category (format, count, language or keyword),
prompt, the name of its check in `CHECKS` with the arguments, an answer that passes (`good`) and one that fails (`bad`).
The idea is that of IFEval (Zhou et al. 2023, "Instruction-Following Evaluation for Large Language Models"); prompts and
checks are our own, short enough for a small model. An empty answer or a copy of the prompt passes no check.
"""

import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

from sft_pipeline.evaluation.metrics.words import HAN, count_han
from sft_pipeline.utils.errors import SFTError

_BULLET = re.compile(r"^[ \t]*(?:[-*][ \t]+|•[ \t]*)\S", re.MULTILINE)
_NUMBERED = re.compile(r"^[ \t]*(\d+)[ \t]*[.)）、．:：][ \t]*\S", re.MULTILINE)
_FENCE = re.compile(r"^```\w*\n(.*)\n```$", re.DOTALL)
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)|[。！？]+[”’」』）]*")
_ENGLISH_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_LATIN = re.compile(r"[A-Za-z]")
_QUOTES_AND_STOPS = " \t\n\"'“”‘’.!。！*"


@dataclass(frozen=True)
class Instruction:
    """A prompt and the check of its answer; `good` passes the check, `bad` does not."""

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
    """Return all instructions in the order of instructions.jsonl."""
    text = resources.files("sft_pipeline.evaluation.metrics").joinpath("instructions.jsonl").read_text(encoding="utf-8")
    return tuple(Instruction(**json.loads(line)) for line in text.splitlines())


def get_instruction(instruction_id: str) -> Instruction:
    """Return the instruction with this id. Raises SFTError for an unknown id."""
    instructions = load_instructions()
    instruction = next((item for item in instructions if item.id == instruction_id), None)
    if instruction is None:
        raise SFTError(
            f"unknown instruction id {instruction_id!r}: use an id of load_instructions(), as {instructions[0].id!r}"
        )
    return instruction


def sample_instructions(count: int) -> list[Instruction]:
    """Return `count` instructions, from each language and category in turn, so that every prefix is balanced."""
    groups: dict[tuple[str, str], list[Instruction]] = {}
    for instruction in load_instructions():
        groups.setdefault((instruction.language, instruction.category), []).append(instruction)
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*groups.values()))
    return [instruction for instruction in in_turn if instruction][:count]


def is_followed(instruction: Instruction, answer: str) -> bool:
    """Return whether the answer passes the instruction's check; a blank answer never does."""
    answer = answer.strip()
    return bool(answer) and CHECKS[instruction.check](answer, **instruction.args)


# Checks: pure functions of the stripped answer. `count` is exact, `minimum` and `maximum` are inclusive.


def has_bullets(answer: str, count: int) -> bool:
    """`count` lines start with -, * or •; other lines may precede or follow them."""
    return len(_BULLET.findall(answer)) == count


def has_numbered_lines(answer: str, count: int) -> bool:
    """`count` lines are numbered 1, 2, 3 … in order."""
    return [int(number) for number in _NUMBERED.findall(answer)] == list(range(1, count + 1))


def is_json_object(answer: str, keys: Sequence[str]) -> bool:
    """The answer is one JSON object with exactly these keys, in any order; it may be in a Markdown code fence."""
    value = _parse_json(answer)
    return isinstance(value, dict) and sorted(value) == sorted(keys)


def is_json_list(answer: str, count: int) -> bool:
    """The answer is one JSON array of `count` items; it may be in a Markdown code fence."""
    value = _parse_json(answer)
    return isinstance(value, list) and len(value) == count


def has_letter_case(answer: str, upper: bool) -> bool:
    """The answer has cased letters, and all of them are upper-case (or lower-case)."""
    return answer.isupper() if upper else answer.islower()


def is_wrapped(answer: str, prefix: str, suffix: str) -> bool:
    """The answer starts with `prefix`, ends with `suffix`, and has text between them."""
    return answer.startswith(prefix) and answer.endswith(suffix) and bool(answer[len(prefix) : -len(suffix)].strip())


def is_separated(answer: str, separators: str, count: int) -> bool:
    """The answer is one line of `count` non-empty parts, separated by any of the characters in `separators`."""
    parts = re.split(f"[{re.escape(separators)}]", answer)
    return len(parts) == count and all(part.strip() for part in parts) and "\n" not in answer


def has_lines(answer: str, count: int) -> bool:
    """`count` lines are not blank."""
    return sum(bool(line.strip()) for line in answer.splitlines()) == count


def has_paragraphs(answer: str, count: int) -> bool:
    """The answer has `count` paragraphs, separated by blank lines."""
    return len(re.split(r"\n\s*\n", answer)) == count


def has_sentences(answer: str, count: int) -> bool:
    """The answer has `count` sentences, each with a letter or digit and ended by . ! ? (before a space or the end) or
    by 。！？

    Text without such an end after the last sentence fails: a model that never stops has not answered in one sentence.
    """
    *sentences, remainder = _SENTENCE_END.split(answer)
    return not remainder.strip() and sum(any(c.isalnum() for c in sentence) for sentence in sentences) == count


def has_english_words(answer: str, minimum: int, maximum: int) -> bool:
    """The number of words is in the range; a hyphenated or contracted word is one."""
    return minimum <= len(_ENGLISH_WORD.findall(answer)) <= maximum


def has_chinese_characters(answer: str, minimum: int, maximum: int) -> bool:
    """The number of Chinese characters, without punctuation, is in the range."""
    return minimum <= count_han(answer) <= maximum


def has_script(answer: str, only: str) -> bool:
    """The answer uses one script: "chinese" means Chinese characters and no Latin letters, "latin" the reverse, and
    "digits" means a number."""
    if only == "digits":
        return answer.strip(_QUOTES_AND_STOPS).isdecimal()
    has_chinese, has_latin = count_han(answer) > 0, bool(_LATIN.search(answer))
    return (has_chinese, has_latin) == (only == "chinese", only == "latin")


def has_keywords(answer: str, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> bool:
    """All of `include` occur and none of `exclude`, in any letter case; English words as whole words."""
    return all(_count_word(answer, word) for word in include) and not any(_count_word(answer, word) for word in exclude)


def has_keyword_count(answer: str, word: str, minimum: int, maximum: int) -> bool:
    """The number of times `word` occurs is in the range."""
    return minimum <= _count_word(answer, word) <= maximum


def has_opening(answer: str, phrase: str) -> bool:
    """The answer starts with `phrase`, ignoring case and quotes before it, and continues after it."""
    text, phrase = answer.lstrip(_QUOTES_AND_STOPS).casefold(), phrase.casefold()
    return text.startswith(phrase) and bool(text[len(phrase) :].strip(_QUOTES_AND_STOPS))


def has_ending(answer: str, phrase: str) -> bool:
    """The answer ends with `phrase`, ignoring case, quotes and full stop after it, and has text before it."""
    text, phrase = answer.rstrip(_QUOTES_AND_STOPS).casefold(), phrase.rstrip(_QUOTES_AND_STOPS).casefold()
    return text.endswith(phrase) and bool(text[: -len(phrase)].strip(_QUOTES_AND_STOPS))


def is_option(answer: str, options: Sequence[str]) -> bool:
    """The answer is one of `options` and nothing else, ignoring case, quotes and full stop."""
    return answer.strip(_QUOTES_AND_STOPS).casefold() in [option.casefold() for option in options]


# Name of a check in instructions.jsonl -> its function.
CHECKS: dict[str, Callable[..., bool]] = {
    "bullets": has_bullets,
    "numbered": has_numbered_lines,
    "json_object": is_json_object,
    "json_list": is_json_list,
    "letter_case": has_letter_case,
    "wrapped": is_wrapped,
    "separated": is_separated,
    "lines": has_lines,
    "paragraphs": has_paragraphs,
    "sentences": has_sentences,
    "english_words": has_english_words,
    "chinese_characters": has_chinese_characters,
    "script": has_script,
    "keywords": has_keywords,
    "keyword_count": has_keyword_count,
    "starts_with": has_opening,
    "ends_with": has_ending,
    "one_of": is_option,
}


def _parse_json(answer: str) -> object:
    fenced = _FENCE.match(answer)
    try:
        return json.loads(fenced[1] if fenced else answer)
    except (json.JSONDecodeError, RecursionError):
        return None


def _count_word(answer: str, word: str) -> int:
    """Count the occurrences of `word`: Latin words between word boundaries, Chinese ones anywhere, as Chinese has no
    spaces."""
    pattern = re.escape(word)
    if not count_han(word):
        pattern = rf"(?<![^\W_{HAN}]){pattern}(?![^\W_{HAN}])"
    return len(re.findall(pattern, answer, re.IGNORECASE))
