"""A few of the fuzzer's inputs with every run of the suite; tests/fuzz.py says how to run many."""

import datasets
import fuzz
import pytest

INPUTS = {"readers": 300, "formats": 300, "sources": 12, "prompts": 100, "templates": 80, "config": 60, "answers": 80}


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    monkeypatch.setattr(fuzz, "WORK", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_a_right_result_or_one_line(target):
    assert fuzz.run(target, INPUTS[target], number=5) >= INPUTS[target] // 2


def test_the_shares_are_all_of_it():
    assert fuzz.SHARES.keys() == INPUTS.keys() == fuzz.TARGETS.keys() and sum(fuzz.SHARES.values()) == pytest.approx(1)


def test_a_finding_is_raised(monkeypatch):
    """What the fuzzer is for: an error that is not ours, and a row that is lost."""
    monkeypatch.setattr(fuzz, "to_messages", lambda row, shape: row["no such column"])
    with pytest.raises((KeyError, TypeError, ExceptionGroup)):
        fuzz.run("formats", 50, number=1)
    monkeypatch.setattr(fuzz, "read_rows", lambda path, name: iter([]))
    with pytest.raises(AssertionError):
        fuzz.run("readers", 100, number=1)
