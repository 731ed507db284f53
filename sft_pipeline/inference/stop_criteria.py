"""When an answer ends, whatever its length: stop ids and stop strings."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class StopCriteria:
    """When an answer ends, whatever its length."""

    ids: frozenset[int]
    strings: tuple[str, ...]
    decode: Callable[[list[int]], str] | None

    def found(self, ids: list[int]) -> bool:
        """Whether the answer's last token completed a stop string. A token gives at least a byte of it, but may give
        none of it alone (a special token), hence the few tokens more that are decoded."""
        if not self.strings or self.decode is None:
            return False
        text = self.decode(ids[-max(len(s.encode()) for s in self.strings) - 8 :])
        return any(string in text for string in self.strings)

    def before(self, ids: list[int]) -> str | None:
        """The decoded answer up to the first stop string."""
        if self.decode is None:
            return None
        text = self.decode(ids)
        return text[: min([text.find(s) for s in self.strings if s in text], default=len(text))]
