"""Some of the fuzzer's inputs with every run of the suite; tests/support/fuzz.py says how to run many."""

import datasets
import pytest
from support import fuzz

INPUTS = {"readers": 400, "formats": 1500, "sources": 15, "prompts": 200, "templates": 120, "config": 60, "answers": 60}


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    monkeypatch.setattr(fuzz, "WORK", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_a_right_result_or_one_line(target):
    fuzz.run(target, range(INPUTS[target]), seed=0)


def test_the_shares_are_all_of_it():
    assert fuzz.SHARES.keys() == INPUTS.keys() == fuzz.TARGETS.keys() and sum(fuzz.SHARES.values()) == pytest.approx(1)


def test_a_finding_is_raised_and_can_be_repeated(monkeypatch, capsys):
    """What the fuzzer is for: an error that is not ours, and a row that is lost."""
    whole = fuzz.read_rows
    monkeypatch.setattr(fuzz, "read_rows", lambda path, name: list(whole(path, name))[1:])
    with pytest.raises(AssertionError):
        fuzz.run("readers", range(50), seed=0)
    command = capsys.readouterr().out
    assert command.startswith("readers: A FINDING; --only readers --seed 0 --at ")
    number = int(command.split("--at ")[1].split(":")[0])
    with pytest.raises(AssertionError):
        fuzz.run("readers", range(number, number + 1), seed=0)
    monkeypatch.setattr(fuzz, "convert_to_messages", lambda row, shape: row["no such column"])
    with pytest.raises((KeyError, TypeError)):
        fuzz.run("formats", range(50), seed=0)
