"""Runs of several processes by torchrun, accelerate and launch.sh: weights, errors, exit status, kills."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from sft_pipeline.cli import _print_error_once
from sft_pipeline.commands.verify_resume import compare_checkpoints
from sft_pipeline.runs.output_dir import RESULTS_FILE
from sft_pipeline.training import launch

ROOT = Path(__file__).parents[2]
CONFIG_FILES = ROOT / "configs" / "accelerate"
TRL_FILES = ROOT / "tests" / "support" / "accelerate"
LAUNCHER = ["sft_pipeline.training.launch", "--nproc_per_node", "2"]
STEPS = 5


@pytest.mark.parametrize(
    ("exitcode", "status"), [(1, 1), (2, 2), (75, 75), (-signal.SIGKILL, 137), (-signal.SIGTERM, 143)]
)
def test_the_status_is_that_of_the_worker_that_failed_first(exitcode, status, capsys):
    assert launch._report_failure(1, exitcode) == status
    errors = capsys.readouterr().err
    assert errors == (
        "" if exitcode > 0 else f"sft-pipeline: process 1 was killed by {signal.Signals(-exitcode).name}\n"
    )


@pytest.mark.parametrize(
    ("code", "status"),
    [("sys.exit(75)", 75), ("sys.exit(2)", 2), ("sys.exit(0)", 0), ("os.kill(os.getpid(), signal.SIGKILL)", 137)],
)
def test_a_signal_is_forwarded_and_the_workers_are_waited_for(code, status, monkeypatch):
    handler = f"import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *a: [time.sleep(0.2), {code}])"
    command = [sys.executable, "-c", f"{handler}; print(flush=True); time.sleep(60)"]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    for worker in workers:
        worker.stdout.readline()
    children = [psutil.Process(worker.pid) for worker in workers]
    monkeypatch.setattr(psutil.Process, "children", lambda self: children)
    with pytest.raises(SystemExit) as exit:
        launch._forward_signal(signal.SIGTERM, None)
    assert exit.value.code == status and not any(child.is_running() for child in children)
    for worker in workers:
        worker.stdout.close()
        worker.wait()


def test_without_workers_a_signal_ends_the_launcher(monkeypatch):
    monkeypatch.setattr(psutil.Process, "children", lambda self: [])
    with pytest.raises(SystemExit) as exit:
        launch._forward_signal(signal.SIGTERM, None)
    assert exit.value.code == 143


def test_one_process_per_machine_and_attempt_prints_the_error(tmp_path, monkeypatch, capsys):
    for attempt, rank in ((0, 0), (0, 1), (1, 1), (1, 0), (1, 2)):
        (tmp_path / f"attempt_{attempt}" / str(rank)).mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / f"attempt_{attempt}" / str(rank) / "error.json"))
        _print_error_once(f"{attempt} {rank}")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "0" / "error.json"))
    _print_error_once("gone")
    for path in ("", os.devnull):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", path)
        _print_error_once("alone")
    assert capsys.readouterr().err.splitlines() == ["0 0", "1 1", "gone", "alone", "alone"]


# Complete runs in subprocesses.


@pytest.fixture(scope="module")
def config(write_config, tmp_path_factory) -> Path:
    keys = {"held_out": 3, "num_answers": 2, "num_instructions": 0, "max_new_tokens": 2, "seed": 3}
    keys |= {"learning_rate": 0.01, "logging_steps": 1}
    keys |= {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2}
    return write_config(tmp_path_factory.mktemp("config"), rows=17, **keys)


def start_run(words: list[str], config: Path, out: Path, *keys: str, **environment: str) -> subprocess.Popen:
    """Start a run with the launcher command `words`. keys: overrides of the config."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    command = [*words, "train", str(config), f"--output_dir={out}", *keys]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


def wait_for_end(run: subprocess.Popen, status: int) -> tuple[str, list[str]]:
    """Wait for the run and check its exit status; return its output and the lines of its errors."""
    output, errors = run.communicate(timeout=120)
    assert run.returncode == status, errors
    return output, errors.splitlines()


def load_weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def build_command(*options: str) -> list[str]:
    return [sys.executable, "-m", *LAUNCHER, *options, "-m", "sft_pipeline"]


@pytest.fixture(scope="module")
def single_process_weights(config, tmp_path_factory) -> dict[str, torch.Tensor]:
    """Weights trained by one process with as many rows per step as two."""
    out = tmp_path_factory.mktemp("one") / "out"
    wait_for_end(start_run([sys.executable, "-m", "sft_pipeline"], config, out, "--gradient_accumulation_steps=2"), 0)
    return load_weights(out)


def prepare_environment(folder: Path) -> dict[str, str]:
    """Return environment variables with which launch.sh finds everything installed."""
    (folder / ".sft_pipeline-lora,plot,judge").write_text(f"{ROOT}\n")
    return {"VIRTUAL_ENV": str(folder), "NUM_PROCESSES": "2"}


def build_accelerate_options(name: str) -> list[str]:
    """Return the options for two processes with a config file, on a free port."""
    folder = TRL_FILES if name.startswith("trl_") else CONFIG_FILES
    return [f"--config_file={folder / name}.yaml", "--num_processes=2", "--main_process_port=0"]


def build_accelerate_command(name: str) -> list[str]:
    return [sys.executable, "-m", "accelerate.commands.launch", *build_accelerate_options(name), "-m", "sft_pipeline"]


STARTERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "sft_pipeline"],
    "launch.sh": [str(ROOT / "launch.sh")],
    "launch.sh, multi_gpu": [str(ROOT / "launch.sh"), "--config_file", str(CONFIG_FILES / "multi_gpu.yaml")],
}


@pytest.mark.real
@pytest.mark.parametrize("name", STARTERS)
def test_two_processes_train_like_one(name, config, single_process_weights, tmp_path):
    environment = prepare_environment(tmp_path) if name.startswith("launch.sh") else {}
    output, errors = wait_for_end(start_run(STARTERS[name], config, tmp_path / "out", **environment), 0)
    assert output.count("saved in") == 1, "only one process prints"
    assert "2 processes (gloo), the whole model on each" in errors
    assert json.loads((tmp_path / "out" / RESULTS_FILE).read_text())["steps"] == STEPS
    for key, weight in load_weights(tmp_path / "out").items():
        torch.testing.assert_close(weight, single_process_weights[key], rtol=0, atol=1e-5)


@pytest.mark.real
def test_two_processes_with_a_sharded_model_train_like_one(config, single_process_weights, tmp_path):
    """With the command of docs/devices.md; then one process resumes."""
    out = tmp_path / "out"
    _, errors = wait_for_end(start_run(build_accelerate_command("fsdp2"), config, out), 0)
    assert "2 processes (gloo), the model sharded across them (FSDP2)" in errors
    assert "forward and backward are fused in 2 layers" in " ".join(errors)
    for key, weight in load_weights(out).items():
        torch.testing.assert_close(weight, single_process_weights[key], rtol=0, atol=1e-5)
    assert (out / "checkpoint-2" / "pytorch_model_fsdp_0").is_dir(), "each process saved its shard"
    resume = [f"--resume_from_checkpoint={out / 'checkpoint-2'}", "--gradient_accumulation_steps=2"]
    wait_for_end(start_run([sys.executable, "-m", "sft_pipeline"], config, tmp_path / "alone", *resume), 0)
    for key, weight in load_weights(tmp_path / "alone").items():
        torch.testing.assert_close(weight, single_process_weights[key], rtol=0, atol=1e-5)


@pytest.mark.real
def test_the_file_of_trl_for_fsdp_works(config, single_process_weights, tmp_path):
    """It loads on the first process, saves full checkpoints and trains in bf16."""
    out = tmp_path / "out"
    _, errors = wait_for_end(start_run(build_accelerate_command("trl_fsdp2"), config, out), 0)
    assert "2 processes (gloo), the model sharded across them (FSDP2)" in errors
    assert (out / "checkpoint-2" / "pytorch_model_fsdp.bin").is_file()
    results = json.loads((out / RESULTS_FILE).read_text())
    assert results["steps"] == STEPS and results["answers"] and not any(row["error"] for row in results["answers"])
    differences = [(weight - single_process_weights[key]).abs().max() for key, weight in load_weights(out).items()]
    assert 0 < max(differences) < 0.05, "bf16"


@pytest.mark.real
def test_an_error_is_printed_in_one_line(config, tmp_path):
    _, errors = wait_for_end(start_run(build_command(), config, tmp_path / "out", "--train_data=nowhere.json"), 2)
    assert len(errors) == 1 and errors[0].startswith("sft-pipeline: nowhere.json: "), errors


@pytest.mark.real
@pytest.mark.parametrize("options", [LAUNCHER[1:], build_accelerate_options("fsdp2")], ids=["torchrun", "accelerate"])
def test_sigterm_reaches_the_workers_and_the_run_resumes(options, config, tmp_path):
    out, auto = tmp_path / "out", "--resume_from_checkpoint=auto"
    command = [sys.executable, "-m", LAUNCHER[0], *options, "-m", "sft_pipeline"]
    run = start_run(command, config, out, auto, "--max_steps=100000", "--save_steps=1", "--save_total_limit=2")
    while run.poll() is None and not (out / "checkpoint-1").is_dir():
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    _, errors = wait_for_end(run, 75)
    matches = [re.fullmatch(r"sft-pipeline: SIGTERM: saved \S+-(\d+); .*", line) for line in errors]
    [saved] = [int(match[1]) for match in matches if match]
    assert "Traceback" not in "".join(errors)
    wait_for_end(start_run(command, config, out, auto, f"--max_steps={saved + 2}"), 0)
    assert json.loads((out / RESULTS_FILE).read_text())["steps"] == saved + 2


@pytest.mark.real
def test_a_killed_worker_is_restarted_and_resumes(config, tmp_path):
    """The last checkpoint equals that of an uninterrupted run."""
    keys = ["--resume_from_checkpoint=auto", "--max_steps=40", "--save_steps=20", "--eval_strategy=no"]
    keys += ["--eval_on_start=false", "--num_answers=0"]  # the number of intermediate questions depends on the clock
    wait_for_end(start_run(build_command(), config, tmp_path / "whole", *keys), 0)
    run = start_run(build_command("--max_restarts=1"), config, tmp_path / "out", *keys)
    while run.poll() is None and not (tmp_path / "out" / "checkpoint-20").is_dir():
        time.sleep(0.01)
    psutil.Process(run.pid).children()[1].kill()
    _, errors = wait_for_end(run, 0)
    assert [line for line in errors if line.startswith("resuming from")], errors
    num_compared, differences = compare_checkpoints(*(tmp_path / name / "checkpoint-40" for name in ("out", "whole")))
    assert differences == [] and num_compared > 100, "weights, optimizer, random states, what was logged"
    weights, expected = load_weights(tmp_path / "out"), load_weights(tmp_path / "whole")
    assert all(torch.equal(weights[key], weight) for key, weight in expected.items())
