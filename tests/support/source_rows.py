"""Rows of sources: Alpaca rows with their conversations, messages, texts, and checks of the errors."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from sft_pipeline.utils.errors import SFTError

QUICK = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
ROWS = [
    {"instruction": "Name a colour.", "input": "", "output": "Blue."},
    {"instruction": "Translate to German.", "input": "cat", "output": "Katze."},
    {"instruction": "2 + 2?", "input": "", "output": "4"},
]
EXPECTED = [
    {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    for question, answer in (("Name a colour.", "Blue."), ("Translate to German.\ncat", "Katze."), ("2 + 2?", "4"))
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)


def talk(user="Hi", answer="Hello", system=None):
    start = [{"role": "system", "content": system}] if system else []
    return [*start, {"role": "user", "content": user}, {"role": "assistant", "content": answer}]


def fails(call, *parts):
    """The call raises SFTError, in one line that has all the parts."""
    with pytest.raises(SFTError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
