"""Each second of a run is counted to one part."""

import pytest

from sft_pipeline.utils import time_account
from sft_pipeline.utils.time_account import TimeAccount


@pytest.fixture
def clock(monkeypatch):
    """clock(seconds) lets time pass."""
    now = [100.0]
    monkeypatch.setattr(time_account.time, "perf_counter", lambda: now[0])

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    return pass_time


def test_the_time_of_an_inner_part_is_not_counted_twice(clock):
    times = TimeAccount()
    clock(50)  # in no part
    with times.measure("training"):
        clock(3)
        with times.measure("saving"):
            clock(1)
            with times.measure("training"):
                clock(0.5)
        clock(2)
        assert times.as_dict() == {"training": 5.5, "saving": 1}
    clock(50)
    with times.measure("saving"):
        clock(4)
    assert times.as_dict() == {"training": 5.5, "saving": 5}
    times.move(1.5, "training", "answering")
    assert times.as_dict() == {"training": 4, "saving": 5, "answering": 1.5}


def test_a_part_that_fails_is_counted(clock):
    times = TimeAccount()
    with pytest.raises(ValueError, match="no"), times.measure("reading rows"):
        clock(2)
        raise ValueError("no")
    clock(1)
    assert times.as_dict() == {"reading rows": 2}
