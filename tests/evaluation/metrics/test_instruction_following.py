"""Checkable instructions: every prompt has an answer that passes and one that fails, and luck does not pay."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_pipeline.evaluation.metrics import instruction_following
from sft_pipeline.evaluation.metrics.instruction_following import (
    CHECKS,
    followed,
    follows,
    instruction_figures,
    load_instructions,
)
from sft_pipeline.utils.errors import SFTError

ALL = load_instructions()
quick = settings(deadline=None, max_examples=50)
words = st.text(alphabet="abcdefghij", min_size=1, max_size=8)
han = st.text(alphabet="天地玄黄宇宙洪荒", min_size=1, max_size=8)


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
    assert follows(instruction, instruction.good)
    assert follows(instruction, f"\n {instruction.good}\n")
    assert not follows(instruction, instruction.bad)
    assert not follows(instruction, " \n")
    assert not follows(instruction, instruction.prompt)


def test_an_answer_to_another_prompt_seldom_passes():
    """The level of luck: answers that are good, but for another prompt, follow under a fifth of the prompts."""
    verdicts = [follows(i, other.good) for i in ALL for other in ALL if other is not i]
    assert sum(verdicts) / len(verdicts) < 0.2


@pytest.mark.parametrize("stuck", ["I don't know.", "我不知道。", "the " * 100, "好" * 200, "The answer is 3.\n" * 30])
def test_a_constant_answer_follows_few(stuck):
    assert instruction_figures([stuck] * len(ALL))["instructions_followed_rate"] < 0.25


def test_figures_in_all_and_by_group():
    half = [i.good if i.language == "en" else i.bad for i in ALL]
    metrics = instruction_figures(half)
    assert metrics["instructions_followed_rate"] == 0.5
    assert metrics["instructions_followed_rate_language_en"] == 1
    assert metrics["instructions_followed_rate_language_zh"] == 0
    assert metrics["instructions_followed_rate_category_keyword"] == 0.5
    assert len(metrics) == 1 + 4 + 2


def test_a_subset_by_id_gives_its_groups_alone():
    picked = [i for i in ALL if i.category == "format" and i.language == "zh"]
    answers = [picked[0].good] + [i.bad for i in picked[1:]]
    metrics = instruction_figures(answers, [i.id for i in picked])
    assert set(metrics.values()) == {1 / len(picked)}
    assert set(metrics) == {
        "instructions_followed_rate",
        "instructions_followed_rate_category_format",
        "instructions_followed_rate_language_zh",
    }
    assert followed(answers, [i.id for i in picked]) == [True] + [False] * (len(picked) - 1)


def test_errors():
    with pytest.raises(SFTError, match="unknown instruction id 'en_nothing_01': use ids of load_instructions()"):
        followed(["hi"], ["en_nothing_01"])
    with pytest.raises(SFTError, match="no answers to score"):
        followed([], [])
    with pytest.raises(SFTError, match=f"got 1 answers, {len(ALL)} instructions"):
        instruction_figures(["hi"])


@quick
@given(st.lists(st.one_of(words, han), min_size=1, max_size=7), st.integers(1, 8), st.sampled_from("-*•"))
def test_lists_are_counted(items, count, mark):
    right = len(items) == count
    assert instruction_following.bullets("Here:\n" + "\n".join(f"{mark} {item}" for item in items), count) == right
    assert instruction_following.numbered("\n".join(f"{i}. {item}" for i, item in enumerate(items, 1)), count) == right
    assert instruction_following.lines("\n\n".join(items), count) == right
    assert instruction_following.paragraphs("\n\n".join(items), count) == right
    assert instruction_following.separated("、".join(items), "、,", count) == right
    assert instruction_following.json_list(json.dumps(items), count) == right


@quick
@given(st.lists(words, min_size=1, max_size=6), st.lists(han, min_size=1, max_size=6))
def test_words_characters_and_sentences_are_counted(english, chinese):
    assert instruction_following.english_words(" ".join(english), len(english), len(english))
    assert not instruction_following.english_words(" ".join(english), 0, len(english) - 1)
    characters = sum(map(len, chinese))
    assert instruction_following.chinese_characters("，".join(chinese) + "。", characters, characters)
    assert not instruction_following.chinese_characters("".join(chinese), characters + 1, 99)
    assert instruction_following.sentences("! ".join(english) + "?", len(english))
    assert instruction_following.sentences("。".join(chinese) + "？”", len(chinese))
    assert instruction_following.sentences(
        "。".join(chinese) + "。" + ". ".join(english) + ".", len(chinese) + len(english)
    )


@quick
@given(st.dictionaries(words, st.integers()), words)
def test_a_json_object_has_exactly_the_keys(value, extra):
    text = json.dumps(value)
    assert instruction_following.json_object(text, list(value))
    assert instruction_following.json_object(f"```json\n{text}\n```", list(reversed(value)))
    assert instruction_following.json_object(text, [*value, extra]) is False
    assert not instruction_following.json_object("Sure: " + text, list(value))


@quick
@given(st.text(), st.one_of(words, han), st.integers(0, 3))
def test_keywords_are_counted(text, word, times):
    answer = " ".join([word.upper()] * times)
    assert instruction_following.keyword_count(answer, word, times, times)
    assert (
        instruction_following.keywords(answer, include=[word])
        == (times > 0)
        != instruction_following.keywords(answer, exclude=[word])
    )
    assert instruction_following.keywords(text, include=[word]) != instruction_following.keywords(text, exclude=[word])


@quick
@given(st.one_of(words, han), st.one_of(words, han))
def test_openings_and_endings_need_something_beside_them(phrase, other):
    assert instruction_following.starts_with(f'"{phrase.upper()} {other}', phrase)
    assert instruction_following.ends_with(f"{other} {phrase}.", phrase)
    assert not instruction_following.starts_with(phrase, phrase) and not instruction_following.ends_with(phrase, phrase)
    assert not instruction_following.starts_with(f"#{phrase}", phrase) and not instruction_following.ends_with(
        f"{phrase}#", phrase
    )


@quick
@given(st.text())
def test_scripts_exclude_each_other_and_no_text_breaks_a_check(text):
    assert sum(instruction_following.script(text, only) for only in ("chinese", "latin", "digits")) <= 1
    for instruction in ALL:
        assert follows(instruction, text) in (True, False)


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
        ("wrapped", "《》", {"left": "《", "right": "》"}, False),
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
