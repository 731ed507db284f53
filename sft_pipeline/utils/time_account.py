"""Where the time of a run goes: seconds by part, each second in one part."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class TimeAccount:
    """Seconds spent in each part, in the order in which the parts began.

    Parts may be nested: the time of an inner part does not count in the outer one.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._parts: list[str] = []  # those that have begun, the inner ones last
        self._since = 0.0

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Count the time of this block to `part`."""
        self._count()
        self._parts.append(part)
        self._seconds[part] += 0.0  # in the order of beginnings
        try:
            yield
        finally:
            self._count()
            self._parts.pop()

    def move(self, seconds: float, source: str, target: str) -> None:
        """Count seconds to `target` that were counted to `source`."""
        self._seconds[source] -= seconds
        self._seconds[target] += seconds

    def as_dict(self) -> dict[str, float]:
        """Return the seconds of each part so far, to 0.01 s."""
        self._count()
        return {part: round(seconds, 2) for part, seconds in self._seconds.items()}

    def _count(self) -> None:
        """Count the time since the last call to the innermost part."""
        now = time.perf_counter()
        if self._parts:
            self._seconds[self._parts[-1]] += now - self._since
        self._since = now
