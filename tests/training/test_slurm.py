"""`sbatch launch.sh train` on a real Slurm: two nodes are one process, and a job that is told to end comes back."""

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.slurm import NODES, ROOT, Slurm, cluster, wait_for, why_no_slurm

from sft_pipeline.commands.verify_resume import compare_checkpoints

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(bool(why_no_slurm()), reason=f"no Slurm here: {why_no_slurm()}"),
]
STEPS, SAVED = 120, 30
ROWS_A_STEP = 8


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    with cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found


@pytest.fixture(scope="module")
def submit(slurm, model_folder, tmp_path_factory):
    """submit("name", nodes) is the number of a job that trains, and the folder with its log and its run `out`."""
    place = tmp_path_factory.mktemp("jobs")
    rows = [{"instruction": f"Say {n}.", "output": "text " * (1 + n % 9)} for n in range(41)]
    (place / "rows.json").write_text(json.dumps(rows))
    keys = {"model_name_or_path": str(model_folder), "train_data": str(place / "rows.json"), "template": "role"}
    keys |= {"max_steps": STEPS, "save_steps": SAVED, "learning_rate": 1e-3, "num_proc": 1, "use_cpu": True}
    keys |= {"disable_tqdm": True, "report_to": "none"}
    (place / "tiny.yaml").write_text(yaml.safe_dump(keys))
    # An environment that launch.sh finds installed: its mark, and the Python that runs the tests.
    (place / ".sft_pipeline-lora,plot,judge").write_text(f"{ROOT}\n")
    environment = {"VIRTUAL_ENV": str(place), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment |= {"OMP_NUM_THREADS": "1"}

    def submitted(name: str, nodes: int, *overrides: str) -> tuple[str, Path]:
        folder = place / name
        folder.mkdir()
        keys = [f"--output_dir={folder / 'out'}", f"--per_device_train_batch_size={ROWS_A_STEP // nodes}", *overrides]
        sbatch = ["sbatch", "--parsable", f"--nodes={nodes}", f"--output={folder / 'log'}"]
        return slurm.run(*sbatch, "launch.sh", "train", place / "tiny.yaml", *keys, **environment), folder

    return submitted


@pytest.fixture(scope="module")
def undisturbed(slurm, submit) -> dict[int, Path]:
    """Nodes to the folder of a job that nothing happened to."""
    jobs = {nodes: submit(f"{nodes} nodes", nodes) for nodes in (1, 2)}
    for job, folder in jobs.values():
        wait_for_end(slurm, job, folder)
    return {nodes: folder for nodes, (_, folder) in jobs.items()}


def wait_for_end(slurm: Slurm, job: str, folder: Path) -> None:
    wait_for(lambda: slurm.state(job) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"))
    assert slurm.state(job) == "COMPLETED", (folder / "log").read_text()


def assert_same_end(one: Path, other: Path) -> None:
    """Bit by bit: weights, optimizer, scheduler, random states, what was logged."""
    compared, differ = compare_checkpoints(*(folder / "out" / f"checkpoint-{STEPS}" for folder in (one, other)))
    assert differ == [] and compared > 100


def wait_for_checkpoint(folder: Path) -> None:
    """The first one; three quarters of the run are left then."""
    wait_for((folder / "out" / f"checkpoint-{SAVED}").is_dir)


def test_two_nodes_are_one_process(undisturbed):
    one, two = (load_file(undisturbed[nodes] / "out" / "model.safetensors") for nodes in (1, 2))
    assert one.keys() == two.keys()
    for name, weights in one.items():
        torch.testing.assert_close(two[name], weights, rtol=0, atol=1e-5)
    assert (undisturbed[2] / "out" / f"checkpoint-{STEPS}" / "rng_state_1.pth").is_file(), "two processes"
    results = json.loads((undisturbed[2] / "out" / "results.json").read_text())
    losses = [entry["loss"] for entry in results["loss_curve"]]
    assert losses[-1] < losses[0] - 1, "else equal weights would say little"


TOLD = {
    # What Slurm does two minutes before the time limit, as launch.sh asks: SIGTERM to the script alone.
    "by the time limit": lambda slurm, job: slurm.run("scancel", "--signal=TERM", "--batch", job),
    # SIGTERM to every process; SIGKILL and requeued after GraceTime, which is not waited for if the job ends before.
    "by a job that preempts it": lambda slurm, job: slurm.run(
        "sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"
    ),
    # SIGTERM to every process and to the script, and requeued; SIGKILL after KillWait.
    "by its operator": lambda slurm, job: slurm.run("scontrol", "requeue", job),
}


@pytest.mark.parametrize("how", TOLD)
def test_a_job_that_is_told_to_end_comes_back_and_is_the_one_that_was_not(how, slurm, submit, undisturbed):
    job, folder = submit(how, 2)
    wait_for_checkpoint(folder)
    TOLD[how](slurm, job)
    wait_for_end(slurm, job, folder)
    assert slurm.field(job, "Restarts") == "1"
    log = (folder / "log").read_text()
    [(place, step)] = re.findall(r"SIGTERM: saved (.+-(\d+)); --resume_from_checkpoint auto goes", log)
    assert place == str(folder / "out" / f"checkpoint-{step}") and SAVED <= int(step) < STEPS
    assert_same_end(undisturbed[2], folder)


def test_a_job_that_loses_a_node_comes_back_and_is_the_one_that_did_not(slurm, submit, undisturbed):
    """Slurm counts the node as down, until its daemon is heard of again."""
    job, folder = submit("lost", 2)
    wait_for_checkpoint(folder)
    slurm.run("scontrol", "update", f"NodeName={NODES[1]}", "State=DOWN", "Reason=test")
    wait_for_end(slurm, job, folder)
    assert slurm.field(job, "Restarts") == "1"
    assert_same_end(undisturbed[2], folder)


def test_a_job_that_is_cancelled_saves_and_does_not_come_back(slurm, submit):
    job, folder = submit("cancelled", 2)
    wait_for_checkpoint(folder)
    slurm.run("scancel", job)
    wait_for(lambda: not slurm.run("squeue", "--noheader", f"--jobs={job}"))
    assert slurm.state(job) == "CANCELLED" and slurm.field(job, "Restarts") == "0"
    assert "SIGTERM: saved" in (folder / "log").read_text()


def test_a_job_whose_config_is_wrong_ends_with_the_runs_status(slurm, submit):
    job, folder = submit("wrong", 2, "--max_length=0")
    wait_for(lambda: slurm.state(job) == "FAILED")
    assert slurm.field(job, "ExitCode") == "2:0" and slurm.field(job, "Restarts") == "0"
    lines = (folder / "log").read_text().splitlines()
    assert lines.count("sft-pipeline: max_length is 0; it has to be 1 or more") == 1, "of two processes"


def test_submitted_from_elsewhere_it_says_from_where(slurm, tmp_path):
    job = slurm.run("sbatch", "--parsable", "--output=log", ROOT / "launch.sh", "train", folder=tmp_path)
    wait_for(lambda: slurm.state(job) == "FAILED")
    said = f"launch.sh: {tmp_path} is not the project folder; cd to the folder of launch.sh, "
    said += "then run sbatch launch.sh\n"
    assert (tmp_path / "log").read_text() == said
