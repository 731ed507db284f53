"""verify-resume: differences of two checkpoints by name, its messages and its status."""

import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from support.resuming import build, names

from sft_pipeline.commands.verify_resume import _wait_and_kill, compare_checkpoints, verify_resume
from sft_pipeline.training.trackers import TRACKERS_FILE
from sft_pipeline.utils.errors import SFTError


@pytest.fixture(scope="module")
def config(write_config, tmp_path_factory) -> Path:
    keys = {"held_out": 2, "num_answers": 1, "num_instructions": 0, "max_new_tokens": 2}
    return write_config(tmp_path_factory.mktemp("config"), rows=8, **keys)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run that was never stopped, with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("whole")
    build(folder).train()
    return folder


@pytest.mark.real
def test_verify_resume_finds_no_difference(config, tmp_path, caplog):
    """With a config that names trackers and the hub, which get nothing."""
    overrides = [f"--output_dir={tmp_path / 'out'}", "--report_to", "wandb", "trackio"]
    overrides += ["--push_to_hub=true", "--hub_strategy=end", "--push_evaluation=true"]
    with caplog.at_level(logging.INFO, logger="sft_pipeline"):
        assert verify_resume(str(config), 4, overrides) == []
    message = r"8 steps, compared with 4, a kill, and 4 more: \d+ values compared, 0 differ"
    assert re.fullmatch(message, caplog.messages[-1])
    assert names(tmp_path) == ["out-verify-resume"]
    folder = tmp_path / "out-verify-resume"
    assert names(folder) == ["config.yaml", "stopped", "whole"]
    assert "report_to:\n- wandb\n- trackio\n" in (folder / "config.yaml").read_text()
    assert not (folder / "stopped" / TRACKERS_FILE).exists()


def test_differences_are_named(whole, tmp_path):
    first, second = whole / "checkpoint-2", tmp_path / "checkpoint-2"
    shutil.copytree(first, second)
    assert compare_checkpoints(first, second)[1] == []
    state = torch.load(second / "optimizer.pt")
    state["state"][1]["exp_avg"][0] += 1e-7
    torch.save(state, second / "optimizer.pt")
    (second / "scheduler.pt").unlink()
    differences = compare_checkpoints(first, second)[1]
    assert differences[0] == "optimizer.pt: state: 1: exp_avg"
    assert all("scheduler.pt" in name for name in differences[1:])


def test_verify_resume_says_when_the_kill_came_too_late_or_training_failed(tmp_path):
    messages = {0: "could be killed; give more --steps$", 3: "training failed with status 3, see above$"}
    for status, message in messages.items():
        run = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({status})"])
        with pytest.raises(SFTError, match=message):
            _wait_and_kill(run, tmp_path / "never")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "verify-resume: name a config first, such as configs/quickstart.yaml"),
        (["x.yaml", "--steps", "0"], "steps is 0; it has to be 1 or more"),
    ],
)
def test_errors_of_verify_resume(words, message, capsys):
    from sft_pipeline.cli import main

    with pytest.raises(SystemExit) as exit:
        main(["verify-resume", *words])
    assert exit.value.code == 2 and capsys.readouterr().err == f"sft-pipeline: {message}\n"


@pytest.mark.parametrize(("differences", "status"), [([], None), (["optimizer.pt"], 1)])
def test_the_status_of_verify_resume(differences, status, monkeypatch):
    from sft_pipeline.cli import main

    target = "sft_pipeline.commands.verify_resume.verify_resume"
    monkeypatch.setattr(target, lambda config, steps, overrides: differences)
    if status is None:
        main(["verify-resume", "x.yaml"])
        return
    with pytest.raises(SystemExit) as exit:
        main(["verify-resume", "x.yaml", "--steps", "2"])
    assert exit.value.code == status
