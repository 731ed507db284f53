"""Preemption: SIGTERM saves the step in every process, and the same command resumes."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from accelerate import skip_first_batches
from accelerate.data_loader import DataLoaderShard
from support.processes import CONTEXT, Command, run_ranks
from support.resuming import HELD_OUT, STEPS, assert_same_end, build, names
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from sft_pipeline.config import parse_config
from sft_pipeline.runs.checkpoints import (
    find_newest_checkpoint,
    needs_evaluation,
)
from sft_pipeline.runs.output_dir import RESULTS_FILE
from sft_pipeline.training.preemption import SigtermHandler, _start_worker, guard_workers
from sft_pipeline.training.sft_trainer import SFTTrainer
from sft_pipeline.utils.errors import RunPreempted
from sft_pipeline.utils.files import find_damage

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config(write_config, tmp_path_factory) -> Path:
    keys = {"held_out": 2, "num_answers": 1, "num_instructions": 0, "max_new_tokens": 2}
    return write_config(tmp_path_factory.mktemp("config"), rows=8, **keys)


class Terminate(TrainerCallback):
    """SIGTERM to this process within a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("save_steps", [1, 100])
def test_sigterm_saves_the_step_and_a_resumed_run_is_the_same(save_steps, whole, tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    checkpoint = tmp_path / "checkpoint-3"
    with pytest.raises(
        RunPreempted, match=f"^SIGTERM: saved {checkpoint}; resume with --resume_from_checkpoint auto$"
    ) as preempted:
        build(tmp_path, [Terminate(3)], save_steps=save_steps).train()
    assert preempted.value.status == 75 == os.EX_TEMPFAIL
    assert signal.getsignal(signal.SIGTERM) is handler
    assert find_newest_checkpoint(tmp_path) == str(checkpoint)
    build(tmp_path, save_steps=STEPS).train(resume_from_checkpoint=str(checkpoint))
    assert_same_end(whole, tmp_path)


@pytest.mark.parametrize("best", [False, True])
def test_sigterm_leaves_an_evaluation_to_the_resumed_run_unless_it_selects_the_best_model(best, tmp_path):
    keys = {"held_out": HELD_OUT, "eval_strategy": "steps", "eval_steps": 3, "save_steps": 3}
    with pytest.raises(RunPreempted):
        build(tmp_path, [Terminate(3)], load_best_model_at_end=best, **keys).train()
    checkpoint = tmp_path / "checkpoint-3"
    entries = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert any("eval_loss" in entry for entry in entries) == best
    assert needs_evaluation(str(checkpoint), build(tmp_path / "other", **keys).args) != best


def test_in_another_thread_signals_are_left_alone():
    handler, handlers = signal.getsignal(signal.SIGTERM), []

    def enter():
        with SigtermHandler():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert handlers == [handler]


@pytest.mark.parametrize(
    ("context", "wrap"),
    [
        ("fork", lambda loader: guard_workers(loader)),
        (CONTEXT, lambda loader: guard_workers(loader)),
        ("fork", lambda loader: guard_workers(DataLoaderShard(loader.dataset, num_workers=1))),  # of evaluations
        ("fork", lambda loader: skip_first_batches(guard_workers(loader), 0)),  # of a resumed run
    ],
)
def test_only_its_own_process_ends_a_worker(context, wrap):
    loader = wrap(DataLoader(range(20), num_workers=1, multiprocessing_context=context))
    others = multiprocessing.active_children()
    batches = iter(loader)
    first = next(batches)
    [worker] = [process for process in multiprocessing.active_children() if process not in others]
    for _ in range(2):
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    assert [int(batch) for batch in (first, *batches)] == list(range(20))
    assert worker.exitcode == 0


def wait_as_worker(started) -> None:
    _start_worker(None, 0)
    started.set()
    time.sleep(100)


@pytest.mark.parametrize("context", [multiprocessing.get_context("fork"), CONTEXT], ids=["fork", "forkserver"])
def test_its_own_process_ends_a_worker(context):
    started = context.Event()
    worker = context.Process(target=wait_as_worker, args=(started,), daemon=True)
    worker.start()
    assert started.wait(60)
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL


class TerminateGroup(TrainerCallback):
    """SIGTERM to this process and its workers within a step, from outside, as torchrun and Slurm send it."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            workers = [process.pid for process in multiprocessing.active_children()]
            assert workers
            subprocess.run(["kill", "-TERM", *map(str, [os.getpid(), *workers])], check=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_with_a_worker_saves_the_step_too(streaming, config, tmp_path):
    keys = ["--dataloader_num_workers=1", f"--streaming={str(streaming).lower()}", "--max_steps=5", "--held_out=0"]
    args = parse_config(str(config), [*keys, f"--output_dir={tmp_path / 'out'}", "--save_steps=100"])
    with pytest.raises(RunPreempted, match="SIGTERM: saved .*/checkpoint-3; "):
        SFTTrainer(args=args, callbacks=[TerminateGroup()]).train()
    assert find_damage(tmp_path / "out" / "checkpoint-3") is None


def train_in_process(process: int, folder: str) -> None:
    """Train as one of two processes, of which only the second gets SIGTERM."""
    callbacks = [Terminate(3)] if process == 1 else []
    try:
        build(Path(folder), callbacks, gradient_accumulation_steps=1, save_steps=100, ddp_backend="gloo").train()
    except RunPreempted as told:
        (Path(folder) / f"told_{process}").write_text(str(told))
    torch.distributed.destroy_process_group()


def test_all_processes_stop_at_the_same_step(tmp_path):
    run_ranks(train_in_process, 2, str(tmp_path))
    checkpoint = tmp_path / "checkpoint-3"
    assert names(tmp_path) == ["checkpoint-3", "told_0", "told_1"]
    assert (tmp_path / "told_0").read_text() == (tmp_path / "told_1").read_text()
    assert find_damage(checkpoint) is None
    expected = {"rng_state_0.pth", "rng_state_1.pth", "running_loss.json"}
    assert expected <= set(names(checkpoint))


def test_sigterm_exits_with_status_75_and_auto_resumes(config, tmp_path):
    keys = [
        f"--output_dir={tmp_path / 'out'}",
        "--save_steps=1",
        "--save_total_limit=2",
        "--resume_from_checkpoint=auto",
    ]
    started = ["train", config, *keys, "--max_steps=100000", "--eval_strategy=steps", "--eval_steps=100000"]
    run = Command(started, ROOT, tmp_path)
    while run.is_running() and not (tmp_path / "out" / "checkpoint-1").is_dir():
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    status, _, errors = run.wait(60)
    assert status == 75, errors
    last = errors.splitlines()[-1]
    match = re.fullmatch(r"sft-pipeline: SIGTERM: saved (\S+-(\d+)); resume with --resume_from_checkpoint auto", last)
    assert match and find_newest_checkpoint(tmp_path / "out") == match[1] and "Traceback" not in errors
    status, _, errors = Command(["train", config, *keys, f"--max_steps={int(match[2]) + 2}"], ROOT, tmp_path).wait()
    assert status == 0, errors
    results = json.loads((tmp_path / "out" / RESULTS_FILE).read_text())
    assert results["steps"] == int(match[2]) + 2
    assert results["eval_loss"]["before"] > 0, "what the first start found is known"
