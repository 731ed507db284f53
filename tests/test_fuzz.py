"""Some inputs of the fuzzer; tests/support/fuzz.py describes how to run many."""

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
def test_a_correct_result_or_an_error_of_one_line(target):
    fuzz.run_target(target, range(INPUTS[target]), seed=0)


def test_the_shares_cover_all_targets():
    assert fuzz.SHARES.keys() == INPUTS.keys() == fuzz.TARGETS.keys() and sum(fuzz.SHARES.values()) == pytest.approx(1)


def test_a_finding_is_raised_and_can_be_repeated(monkeypatch, capsys):
    """The fuzzer detects a lost row and an error that is not an SFTError."""
    read_rows = fuzz.read_rows
    monkeypatch.setattr(fuzz, "read_rows", lambda path, name: list(read_rows(path, name))[1:])
    with pytest.raises(AssertionError):
        fuzz.run_target("readers", range(50), seed=0)
    command = capsys.readouterr().out
    assert command.startswith("readers: A FINDING; --only readers --seed 0 --at ")
    number = int(command.split("--at ")[1].split(":")[0])
    with pytest.raises(AssertionError):
        fuzz.run_target("readers", range(number, number + 1), seed=0)
    monkeypatch.setattr(fuzz, "convert_row", lambda row, shape: row["no such column"])
    with pytest.raises((KeyError, TypeError)):
        fuzz.run_target("formats", range(50), seed=0)
