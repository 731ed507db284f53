"""GPUs that no process would use. Their number and Slurm's variables are set by the tests: none are used here."""

import logging
import os
import re
from types import SimpleNamespace

import pytest
import torch

from sft_pipeline.config import SFTConfig
from sft_pipeline.training import sft_trainer
from sft_pipeline.training.devices import check_devices
from sft_pipeline.utils.errors import SFTError

TWO_NODES = {"SLURM_JOB_ID": "7", "SLURM_STEP_TASKS_PER_NODE": "8,4", "SLURM_NODEID": "0"}


@pytest.fixture(autouse=True)
def eight_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for name in [name for name in os.environ if name.startswith("SLURM_") or name == "LOCAL_WORLD_SIZE"]:
        monkeypatch.delenv(name)


@pytest.fixture
def check(monkeypatch):
    def run(processes: int, device: str = "cuda", **variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        check_devices(SimpleNamespace(world_size=processes, device=torch.device(device)))

    return run


@pytest.mark.parametrize(
    ("processes", "used", "variables"),
    [
        (1, 1, {"SLURM_JOB_ID": "7"}),
        # launch.sh's default with --nodes 2 --gpus-per-node 8: one task per node
        (2, 1, {**TWO_NODES, "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NODEID": "1"}),
        (20, 4, {**TWO_NODES, "SLURM_STEP_TASKS_PER_NODE": "8(x2),4", "SLURM_NODEID": "2"}),
        (4, 2, {**TWO_NODES, "LOCAL_WORLD_SIZE": "2"}),
    ],
)
def test_a_slurm_task_that_leaves_gpus_unused_is_refused(processes, used, variables, check):
    with pytest.raises(SFTError) as refused:
        check(processes, **variables)
    assert str(refused.value).startswith(f"8 GPUs are visible and {used} would be used, as a process uses one; give ")
    assert re.search("--ntasks-per-node 8 .*NUM_PROCESSES.* CUDA_VISIBLE_DEVICES$", str(refused.value))


def test_elsewhere_it_is_a_warning(check, caplog):
    check(1)
    check(4, LOCAL_WORLD_SIZE="4")
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "8 GPUs are visible and 4 would be used" in caplog.text and "launch.sh" in caplog.text


@pytest.mark.parametrize(
    ("processes", "device", "variables"),
    [
        (12, "cuda", TWO_NODES),
        (8, "cuda", {**TWO_NODES, "LOCAL_WORLD_SIZE": "8"}),
        (16, "cuda", {"SLURM_JOB_ID": "7"}),  # started by something that does not tell
        (1, "cpu", {"SLURM_JOB_ID": "7"}),
    ],
)
def test_nothing_is_said_where_all_are_used(processes, device, variables, check, caplog):
    check(processes, device, **variables)
    assert not caplog.records


def test_a_trainer_is_refused_before_it_reads_rows(monkeypatch, model_folder, tmp_path):
    args = SFTConfig(str(tmp_path), report_to="none", use_cpu=True)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(SFTConfig, "device", torch.device("cuda"))
    with pytest.raises(SFTError, match="8 GPUs are visible and 1 would be used"):
        sft_trainer.SFTTrainer(str(model_folder), args, train_dataset="no-such-rows.jsonl")
