"""`sbatch launch.sh train` on a real Slurm: two nodes train like one process, and interrupted jobs are requeued."""

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
from support.slurm import NODES, ROOT, Slurm, get_missing_requirements, start_cluster, wait_for

from sft_pipeline.commands.verify_resume import compare_checkpoints

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(bool(get_missing_requirements()), reason=f"no Slurm here: {get_missing_requirements()}"),
]
STEPS, SAVE_STEPS = 120, 30
ROWS_PER_STEP = 8


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    with start_cluster(tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm


@pytest.fixture(scope="module")
def submit(slurm, model_folder, tmp_path_factory):
    """submit("name", nodes) starts a training job, and returns its id and the folder of its log and its run `out`."""
    path = tmp_path_factory.mktemp("jobs")
    rows = [{"instruction": f"Say {n}.", "output": "text " * (1 + n % 9)} for n in range(41)]
    (path / "rows.json").write_text(json.dumps(rows))
    keys = {"model_name_or_path": str(model_folder), "train_data": str(path / "rows.json"), "template": "role"}
    keys |= {"max_steps": STEPS, "save_steps": SAVE_STEPS, "learning_rate": 1e-3, "num_proc": 1, "use_cpu": True}
    keys |= {"disable_tqdm": True, "report_to": "none"}
    (path / "tiny.yaml").write_text(yaml.safe_dump(keys))
    # launch.sh finds everything installed: the marker file, and the Python that runs the tests.
    (path / ".sft_pipeline-lora,plot,judge").write_text(f"{ROOT}\n")
    environment = {"VIRTUAL_ENV": str(path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment |= {"OMP_NUM_THREADS": "1"}

    def submit_job(name: str, nodes: int, *overrides: str, options: tuple[str, ...] = ()) -> tuple[str, Path]:
        """options: those of launch.sh itself, before `train`."""
        folder = path / name
        folder.mkdir()
        keys = [f"--output_dir={folder / 'out'}", f"--per_device_train_batch_size={ROWS_PER_STEP // nodes}", *overrides]
        sbatch = ["sbatch", "--parsable", f"--nodes={nodes}", f"--output={folder / 'log'}"]
        return slurm.run(*sbatch, "launch.sh", *options, "train", path / "tiny.yaml", *keys, **environment), folder

    return submit_job


@pytest.fixture(scope="module")
def uninterrupted(slurm, submit) -> dict[int, Path]:
    """Folders of uninterrupted jobs, by number of nodes."""
    jobs = {nodes: submit(f"{nodes} nodes", nodes) for nodes in (1, 2)}
    for job, folder in jobs.values():
        wait_for_end(slurm, job, folder)
    return {nodes: folder for nodes, (_, folder) in jobs.items()}


def wait_for_end(slurm: Slurm, job: str, folder: Path) -> None:
    wait_for(lambda: slurm.get_state(job) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"))
    assert slurm.get_state(job) == "COMPLETED", (folder / "log").read_text()


def assert_same_end(expected: Path, folder: Path) -> None:
    """Compare bit by bit: weights, optimizer, scheduler, random states, what was logged."""
    checkpoints = [path / "out" / f"checkpoint-{STEPS}" for path in (expected, folder)]
    num_compared, differences = compare_checkpoints(*checkpoints)
    assert differences == [] and num_compared > 100


def wait_for_checkpoint(folder: Path) -> None:
    """Wait for the first checkpoint, at a quarter of the run."""
    wait_for((folder / "out" / f"checkpoint-{SAVE_STEPS}").is_dir)


def test_two_nodes_train_like_one_process(uninterrupted):
    single, double = (load_file(uninterrupted[nodes] / "out" / "model.safetensors") for nodes in (1, 2))
    assert single.keys() == double.keys()
    for name, weights in single.items():
        torch.testing.assert_close(double[name], weights, rtol=0, atol=1e-5)
    assert (uninterrupted[2] / "out" / f"checkpoint-{STEPS}" / "rng_state_1.pth").is_file(), "two processes"
    results = json.loads((uninterrupted[2] / "out" / "results.json").read_text())
    losses = [entry["loss"] for entry in results["loss_curve"]]
    assert losses[-1] < losses[0] - 1, "otherwise equal weights would prove little"


INTERRUPTIONS = {
    # As two minutes before the time limit, by the options of launch.sh: SIGTERM to the batch script only.
    "by the time limit": lambda slurm, job: slurm.run("scancel", "--signal=TERM", "--batch", job),
    # SIGTERM to every process; SIGKILL and requeue after GraceTime, or as soon as the job has ended.
    "by a job that preempts it": lambda slurm, job: slurm.run(
        "sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"
    ),
    # SIGTERM to every process and to the batch script, and requeue; SIGKILL after KillWait.
    "by its operator": lambda slurm, job: slurm.run("scontrol", "requeue", job),
}


@pytest.mark.parametrize("interruption", INTERRUPTIONS)
def test_an_interrupted_job_is_requeued_and_ends_like_an_uninterrupted_one(interruption, slurm, submit, uninterrupted):
    """One of them with a launcher of accelerate on each node, which starts the process and passes signals on."""
    launchers = ("--config_file", "configs/accelerate/cpu.yaml") if interruption == "by its operator" else ()
    job, folder = submit(interruption, 2, options=launchers)
    wait_for_checkpoint(folder)
    INTERRUPTIONS[interruption](slurm, job)
    wait_for_end(slurm, job, folder)
    assert slurm.get_field(job, "Restarts") == "1"
    log = (folder / "log").read_text()
    [(path, step)] = re.findall(r"SIGTERM: saved (.+-(\d+)); resume with --resume_from_checkpoint auto", log)
    assert path == str(folder / "out" / f"checkpoint-{step}") and SAVE_STEPS <= int(step) < STEPS
    assert_same_end(uninterrupted[2], folder)


def test_a_job_that_loses_a_node_is_requeued_and_ends_like_an_uninterrupted_one(slurm, submit, uninterrupted):
    """Slurm marks the node as down until its daemon responds again."""
    job, folder = submit("lost", 2)
    wait_for_checkpoint(folder)
    slurm.run("scontrol", "update", f"NodeName={NODES[1]}", "State=DOWN", "Reason=test")
    wait_for_end(slurm, job, folder)
    assert slurm.get_field(job, "Restarts") == "1"
    assert_same_end(uninterrupted[2], folder)


def test_a_cancelled_job_saves_and_is_not_requeued(slurm, submit):
    job, folder = submit("cancelled", 2)
    wait_for_checkpoint(folder)
    slurm.run("scancel", job)
    wait_for(lambda: not slurm.run("squeue", "--noheader", f"--jobs={job}"))
    assert slurm.get_state(job) == "CANCELLED" and slurm.get_field(job, "Restarts") == "0"
    assert "SIGTERM: saved" in (folder / "log").read_text()


def test_a_job_with_a_bad_config_fails_with_the_status_of_the_run(slurm, submit):
    job, folder = submit("wrong", 2, "--max_length=0")
    wait_for(lambda: slurm.get_state(job) == "FAILED")
    assert slurm.get_field(job, "ExitCode") == "2:0" and slurm.get_field(job, "Restarts") == "0"
    lines = (folder / "log").read_text().splitlines()
    assert lines.count("sft-pipeline: max_length is 0; it has to be 1 or more") == 1, "one line from two processes"


def test_a_job_submitted_from_another_folder_prints_that_folder(slurm, tmp_path):
    job = slurm.run("sbatch", "--parsable", "--output=log", ROOT / "launch.sh", "train", folder=tmp_path)
    wait_for(lambda: slurm.get_state(job) == "FAILED")
    expected = f"launch.sh: {tmp_path} is not the project folder; cd to the folder of launch.sh, "
    expected += "then run sbatch launch.sh\n"
    assert (tmp_path / "log").read_text() == expected
