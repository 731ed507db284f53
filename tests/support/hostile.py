"""Hostile pickles and texts, and the check of an error's one line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sft_pipeline.utils.errors import SFTError

# Clears the screen, by 7 bits and by 8, and renames the window; then a line of somebody else's.
ESCAPES = "\x1b[2J\x9b2J\x1b]0;owned\x07\r"
SEEN = "\u241b[2J\\x9b2J\u241b]0;owned\u2407\u240d"


def refusal(call, *parts: str) -> str:
    with pytest.raises(SFTError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and all(part in message for part in parts), message
    return message


class Malice:
    """A pickle that leaves `file` behind when it is loaded as one."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@contextmanager
def set_trap(file: Path) -> Iterator[Malice]:
    """Yield a pickle; assert at the end of the block that it was not run."""
    trap = Malice(file)
    yield trap
    assert not trap.file.exists(), "the pickle was run"
