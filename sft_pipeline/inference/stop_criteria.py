"""Stop token ids and stop strings that end an answer before its token limit."""

from collections.abc import Callable
from dataclasses import dataclass

# Decoded beside the longest stop string, as some tokens (special tokens) decode to no text.
EXTRA_TOKENS = 8


@dataclass(frozen=True)
class StopCriteria:
    """The stop ids and stop strings of a call; `decode` turns ids into text and is required by stop strings."""

    ids: frozenset[int]
    strings: tuple[str, ...]
    decode: Callable[[list[int]], str] | None

    def has_stop_string(self, ids: list[int]) -> bool:
        """Return whether the last tokens of an answer contain a stop string.

        Only as many tokens are decoded as a stop string can span: a token that decodes to text gives at least one of
        its bytes.
        """
        if not self.strings or self.decode is None:
            return False
        text = self.decode(ids[-max(len(s.encode()) for s in self.strings) - EXTRA_TOKENS :])
        return any(string in text for string in self.strings)

    def decode_answer(self, ids: list[int]) -> str | None:
        """Decode an answer and cut it before its first stop string; None without `decode`."""
        if self.decode is None:
            return None
        text = self.decode(ids)
        return text[: min([text.find(s) for s in self.strings if s in text], default=len(text))]
