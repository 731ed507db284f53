"""Checkable instructions: every prompt has an answer that passes and one that fails, and luck does not pay."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_pipeline.evaluation.metrics import instruction_following as checks
from sft_pipeline.evaluation.metrics.hf_metrics import compute_metrics
from sft_pipeline.evaluation.metrics.instruction_following import (
    CHECKS,
    get_instruction,
    is_followed,
    load_instructions,
    sample_instructions,
)
from sft_pipeline.evaluation.metrics.registry import METRICS
from sft_pipeline.utils.errors import SFTError

ALL = load_instructions()
quick = settings(deadline=None, max_examples=50)
words = st.text(alphabet="abcdefghij", min_size=1, max_size=8)
han = st.text(alphabet="天地玄黄宇宙洪荒", min_size=1, max_size=8)


def score(answers, instructions=ALL):
    return compute_metrics({"predictions": answers, "instruction_ids": [i.id for i in instructions]})


def test_there_are_at_least_64_prompts_half_english_half_chinese_in_four_categories():
    assert len(ALL) >= 64
    counts = Counter((i.language, i.category) for i in ALL)
    assert set(counts) == {(a, b) for a in ("en", "zh") for b in ("format", "count", "language", "keyword")}
    assert min(counts.values()) >= 8
    assert sum(i.language == "en" for i in ALL) * 2 == len(ALL)


def test_ids_and_prompts_are_unique_and_every_check_is_used():
    assert len({i.id for i in ALL}) == len({i.prompt for i in ALL}) == len(ALL)
    assert {i.check for i in ALL} == set(CHECKS)
    assert all(i.id.startswith(f"{i.language}_{i.category}_") for i in ALL)


@pytest.mark.parametrize("instruction", ALL, ids=lambda i: i.id)
def test_the_good_answer_passes_and_the_bad_empty_and_echoed_ones_fail(instruction):
    assert is_followed(instruction, instruction.good)
    assert is_followed(instruction, f"\n {instruction.good}\n")
    assert not is_followed(instruction, instruction.bad)
    assert not is_followed(instruction, " \n")
    assert not is_followed(instruction, instruction.prompt)


def test_an_answer_to_another_prompt_seldom_passes():
    """The level of luck: answers that are good, but for another prompt, follow under a fifth of the prompts."""
    verdicts = [is_followed(i, other.good) for i in ALL for other in ALL if other is not i]
    assert sum(verdicts) / len(verdicts) < 0.2


@pytest.mark.parametrize("stuck", ["I don't know.", "我不知道。", "the " * 100, "好" * 200, "The answer is 3.\n" * 30])
def test_a_constant_answer_follows_few(stuck):
    assert score([stuck] * len(ALL))["instructions_followed_rate"] < 0.25


def test_metrics_in_all_and_by_group():
    half = [i.good if i.language == "en" else i.bad for i in ALL]
    metrics = score(half)
    assert metrics["instructions_followed_rate"] == 0.5
    assert metrics["instructions_followed_rate_language_en"] == 1
    assert metrics["instructions_followed_rate_language_zh"] == 0
    assert metrics["instructions_followed_rate_category_keyword"] == 0.5
    assert len(metrics) == 1 + 4 + 2


def test_a_subset_by_id_gives_its_groups_alone():
    picked = [i for i in ALL if i.category == "format" and i.language == "zh"]
    answers = [picked[0].good] + [i.bad for i in picked[1:]]
    metrics = score(answers, picked)
    assert set(metrics.values()) == {1 / len(picked)}
    assert set(metrics) == {
        "instructions_followed_rate",
        "instructions_followed_rate_category_format",
        "instructions_followed_rate_language_zh",
    }
    columns = {"predictions": answers, "instruction_ids": [i.id for i in picked]}
    followed, ones = METRICS["instructions_followed_rate"].compute_rows(columns)
    assert followed.tolist() == [1] + [0] * (len(picked) - 1) and ones.tolist() == [1] * len(picked)


def test_instructions_are_sampled_evenly_from_languages_and_categories():
    instructions = sample_instructions(1000)
    assert sorted(item.id for item in instructions) == sorted(item.id for item in load_instructions())
    groups = {(item.language, item.category) for item in load_instructions()}
    for count in range(1, 3 * len(groups) + 1):
        sample = [(item.language, item.category) for item in sample_instructions(count)]
        assert len(sample) == count
        assert max(map(sample.count, groups)) - min(map(sample.count, groups)) <= 1


def test_errors():
    with pytest.raises(SFTError, match="unknown instruction id 'en_nothing_01': use an id of load_instructions()"):
        get_instruction("en_nothing_01")
    with pytest.raises(SFTError, match="no answers to score"):
        score([], [])
    with pytest.raises(SFTError, match=f"'predictions': 1, 'instruction_ids': {len(ALL)}"):
        score(["hi"])


@quick
@given(st.lists(st.one_of(words, han), min_size=1, max_size=7), st.integers(1, 8), st.sampled_from("-*•"))
def test_lists_are_counted(items, count, mark):
    right = len(items) == count
    assert checks.has_bullets("Here:\n" + "\n".join(f"{mark} {item}" for item in items), count) == right
    assert checks.has_numbered_lines("\n".join(f"{i}. {item}" for i, item in enumerate(items, 1)), count) == right
    assert checks.has_lines("\n\n".join(items), count) == right
    assert checks.has_paragraphs("\n\n".join(items), count) == right
    assert checks.is_separated("、".join(items), "、,", count) == right
    assert checks.is_json_list(json.dumps(items), count) == right


@quick
@given(st.lists(words, min_size=1, max_size=6), st.lists(han, min_size=1, max_size=6))
def test_words_characters_and_sentences_are_counted(english, chinese):
    assert checks.has_english_words(" ".join(english), len(english), len(english))
    assert not checks.has_english_words(" ".join(english), 0, len(english) - 1)
    characters = sum(map(len, chinese))
    assert checks.has_chinese_characters("，".join(chinese) + "。", characters, characters)
    assert not checks.has_chinese_characters("".join(chinese), characters + 1, 99)
    assert checks.has_sentences("! ".join(english) + "?", len(english))
    assert checks.has_sentences("。".join(chinese) + "？”", len(chinese))
    assert checks.has_sentences("。".join(chinese) + "。" + ". ".join(english) + ".", len(chinese) + len(english))


@quick
@given(st.dictionaries(words, st.integers()), words)
def test_a_json_object_has_exactly_the_keys(value, extra):
    text = json.dumps(value)
    assert checks.is_json_object(text, list(value))
    assert checks.is_json_object(f"```json\n{text}\n```", list(reversed(value)))
    assert checks.is_json_object(text, [*value, extra]) is False
    assert not checks.is_json_object("Sure: " + text, list(value))


@quick
@given(st.text(), st.one_of(words, han), st.integers(0, 3))
def test_keywords_are_counted(text, word, times):
    answer = " ".join([word.upper()] * times)
    assert checks.has_keyword_count(answer, word, times, times)
    assert checks.has_keywords(answer, include=[word]) == (times > 0) != checks.has_keywords(answer, exclude=[word])
    assert checks.has_keywords(text, include=[word]) != checks.has_keywords(text, exclude=[word])


@quick
@given(st.one_of(words, han), st.one_of(words, han))
def test_openings_and_endings_need_something_beside_them(phrase, other):
    assert checks.has_opening(f'"{phrase.upper()} {other}', phrase)
    assert checks.has_ending(f"{other} {phrase}.", phrase)
    assert not checks.has_opening(phrase, phrase) and not checks.has_ending(phrase, phrase)
    assert not checks.has_opening(f"#{phrase}", phrase) and not checks.has_ending(f"{phrase}#", phrase)


@quick
@given(st.text())
def test_scripts_exclude_each_other_and_no_text_breaks_a_check(text):
    assert sum(checks.has_script(text, only) for only in ("chinese", "latin", "digits")) <= 1
    for instruction in ALL:
        assert is_followed(instruction, text) in (True, False)


@pytest.mark.parametrize(
    ("check", "answer", "args", "expected"),
    [
        ("bullets", "**Fruits**\n- apple\n---\n•pear", {"count": 2}, True),
        ("numbered", "1. a\n3. b", {"count": 2}, False),
        ("numbered", "步骤：\n1、甲\n2）乙", {"count": 2}, True),
        ("sentences", "It costs 3.5 dollars... Really?! (Yes.)", {"count": 3}, True),
        ("sentences", "他说：“好。”我走了！", {"count": 2}, True),
        ("sentences", "I walk, and walk, and walk, and", {"count": 1}, False),
        ("sentences", "I walk. And I", {"count": 1}, False),
        ("english_words", "Don't use well-known 3 words", {"minimum": 4, "maximum": 4}, True),
        ("keywords", "A waterfall", {"include": ["water"]}, False),
        ("keywords", "喝water吧", {"include": ["water"]}, True),
        ("keywords", "喝开水", {"exclude": ["水"]}, False),
        ("one_of", "“是。”", {"options": ["是"]}, True),
        ("one_of", "不是", {"options": ["是"]}, False),
        ("wrapped", "《》", {"prefix": "《", "suffix": "》"}, False),
        ("letter_case", "123", {"upper": True}, False),
        ("json_list", "[" * 100_000, {"count": 1}, False),
        ("json_object", "[]", {"keys": []}, False),
        ("script", "12 + 30 = 42", {"only": "digits"}, False),
        ("script", "**42**.", {"only": "digits"}, True),
        ("script", "!?", {"only": "digits"}, False),
    ],
)
def test_corner_cases(check, answer, args, expected):
    assert CHECKS[check](answer, **args) is expected
