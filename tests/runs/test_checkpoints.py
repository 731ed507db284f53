"""Checkpoints: complete or absent wherever a save is interrupted, found by `auto`; a resumed run has the same bits."""

import errno
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from support.processes import Command, run_ranks
from support.resuming import HELD_OUT, ROWS, STEPS, Killed, assert_same_end, build, cut_off, names
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState

from sft_pipeline.commands.verify_resume import _wait_and_kill, compare_checkpoints, verify_resume
from sft_pipeline.config import parse_config
from sft_pipeline.runs.checkpoints import (
    clear_leftovers,
    find_newest_checkpoint,
    move_aside,
    needs_evaluation,
    publish_checkpoint,
    rotate_checkpoints,
)
from sft_pipeline.runs.output_dir import RESULTS_FILE, RUN_FILE, check_output_dir
from sft_pipeline.training.divergence import describe_divergence, detect_divergence
from sft_pipeline.training.preemption import SigtermHandler
from sft_pipeline.training.trackers import TRACKERS_FILE
from sft_pipeline.utils.errors import RunPreempted, SFTError
from sft_pipeline.utils.files import find_damage

ROOT = Path(__file__).parents[2]


def write_checkpoint(folder: Path, step: int, text: str = "weights") -> Path:
    """A folder as `publish_checkpoint` takes it: two files, and a folder with another."""
    staging = folder / ".saving" / f"checkpoint-{step}"
    (staging / "shards").mkdir(parents=True)
    (staging / "model.safetensors").write_text(text)
    (staging / "trainer_state.json").write_text("{}")
    (staging / "shards" / "optimizer.pt").write_text(text)
    return staging


def save_checkpoint(folder: Path, step: int, limit: int | None = None, text: str = "weights") -> Path:
    """As the trainer does it."""
    checkpoint = folder / f"checkpoint-{step}"
    publish_checkpoint(write_checkpoint(folder, step, text), checkpoint)
    rotate_checkpoints(checkpoint, limit, None)
    clear_leftovers(folder)
    return checkpoint


# Complete or absent.


def calls_of_a_save(folder: Path) -> list[str]:
    save_checkpoint(folder, 1)
    with pytest.MonkeyPatch.context() as patch:
        calls = cut_off(patch, 10**9)
        save_checkpoint(folder, 2, limit=1)
    return calls


def test_a_save_interrupted_anywhere_leaves_a_complete_checkpoint(tmp_path):
    calls = calls_of_a_save(tmp_path / "counted")
    assert {"fsync", "rename", "write_text"} <= set(calls) and len(calls) > 12
    newest = set()
    for index in range(len(calls)):
        folder = tmp_path / str(index)
        save_checkpoint(folder, 1)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            cut_off(patch, index)
            save_checkpoint(folder, 2, limit=1)
        seen = [path for path in folder.iterdir() if path.name.startswith("checkpoint-")]
        assert seen and [find_damage(path) for path in seen] == [None] * len(seen), index
        newest.add(Path(find_newest_checkpoint(folder)).name)
        clear_leftovers(folder)
        assert names(folder) == sorted(path.name for path in seen)
    assert newest == {"checkpoint-1", "checkpoint-2"}


def test_older_checkpoints_are_removed_after_the_new_one_is_synced(tmp_path):
    """The names of its files and its own name are synced before an older one is renamed."""
    calls = calls_of_a_save(tmp_path)
    first_rename = calls.index("rename")
    assert calls[:first_rename].count("fsync") == 3 + 1 + 1 + 1, "files, checksums, the inner folder, the folder"
    assert calls[first_rename + 1 : first_rename + 3] == ["fsync", "rename"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    save_checkpoint(tmp_path, 3, text="old")
    checkpoint = save_checkpoint(tmp_path, 3, text="new")
    assert (checkpoint / "model.safetensors").read_text() == "new" and find_damage(checkpoint) is None
    assert names(tmp_path) == ["checkpoint-3"]


def test_sha256sum_reads_the_checksums(tmp_path):
    checkpoint = save_checkpoint(tmp_path, 3)
    run = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=checkpoint, capture_output=True, text=True, check=True)
    assert run.stdout == "model.safetensors: OK\nshards/optimizer.pt: OK\ntrainer_state.json: OK\n"


DAMAGES = {
    "model.safetensors differs from SHA256SUMS": lambda folder: (folder / "model.safetensors").write_text("weighty"),
    "shards/optimizer.pt is missing": lambda folder: shutil.rmtree(folder / "shards"),
    "SHA256SUMS is missing or empty": lambda folder: (folder / "SHA256SUMS").write_text(""),
    "\0 is missing": lambda folder: (folder / "SHA256SUMS").write_bytes(b"\xff  \0\n"),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_damaged_checkpoint_is_logged_and_skipped(reason, tmp_path, caplog):
    save_checkpoint(tmp_path, 9)
    DAMAGES[reason](save_checkpoint(tmp_path, 10))
    with caplog.at_level(logging.WARNING):
        assert find_newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    assert caplog.messages == [f"{tmp_path / 'checkpoint-10'}: damaged ({reason}); skipped"]
    DAMAGES[reason](tmp_path / "checkpoint-9")
    with pytest.raises(
        SFTError, match=f"^output_dir {tmp_path}: all its checkpoints are damaged; delete them to start"
    ):
        find_newest_checkpoint(tmp_path)


def test_no_checkpoint_is_none(tmp_path):
    assert find_newest_checkpoint(tmp_path) is None and find_newest_checkpoint(tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("steps", "saved", "limit", "best", "remaining"),
    [
        ([2, 4, 10], 10, None, None, [2, 4, 10]),
        ([2, 4, 10], 10, 0, None, [2, 4, 10]),
        ([2, 4, 10], 10, 5, None, [2, 4, 10]),
        ([2, 4, 10], 10, 2, None, [4, 10]),
        ([2, 4, 10], 10, 2, 2, [2, 10]),
        ([2, 4, 10], 10, 1, 2, [2, 10]),
        ([2, 4, 10], 10, 1, 10, [10]),
        ([2, 4, 5, 10], 5, 2, None, [4, 5]),
        ([2, 4, 5, 10], 5, 1, 10, [5, 10]),
    ],
)
def test_rotation(steps, saved, limit, best, remaining, tmp_path):
    for step in steps:
        save_checkpoint(tmp_path, step)
    rotate_checkpoints(tmp_path / f"checkpoint-{saved}", limit, best and str(tmp_path / f"checkpoint-{best}"))
    clear_leftovers(tmp_path)
    assert names(tmp_path) == sorted(f"checkpoint-{step}" for step in remaining)


def test_a_checkpoint_moved_aside_is_not_found(tmp_path):
    move_aside(save_checkpoint(tmp_path, 3))
    assert find_newest_checkpoint(tmp_path) is None


# The trainer's.


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run that was never stopped, with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("whole")
    build(folder).train()
    return folder


def test_the_trainers_checkpoints_are_complete(whole):
    assert names(whole) == [f"checkpoint-{step}" for step in range(1, STEPS + 1)]
    assert [find_damage(checkpoint) for checkpoint in whole.iterdir()] == [None] * STEPS
    listed = (whole / "checkpoint-2" / "SHA256SUMS").read_text()
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        assert name in listed


@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_run_resumed_at_any_step_equals_the_uninterrupted_run(step, whole, tmp_path):
    """Between two logs, at an epoch's end and within one: weights, optimizer, random states and all that was logged."""
    build(tmp_path, save_steps=STEPS).train(resume_from_checkpoint=str(whole / f"checkpoint-{step}"))
    assert_same_end(whole, tmp_path)


def test_train_loss_is_of_the_steps_that_were_trained(whole, tmp_path):
    every = build(tmp_path / "every", logging_steps=1, save_strategy="no")
    every.train()
    losses = [entry["loss"] for entry in every.state.log_history if "loss" in entry]
    resumed = build(tmp_path / "resumed").train(resume_from_checkpoint=str(whole / "checkpoint-3"))
    assert resumed.training_loss == pytest.approx(sum(losses[3:]) / (STEPS - 3), rel=1e-5)


def test_the_best_checkpoint_has_its_final_name(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 1}
    trainer = build(tmp_path, held_out=HELD_OUT, learning_rate=0.05, **best)
    trainer.train()
    best_checkpoint = tmp_path / f"checkpoint-{trainer.state.best_global_step}"
    assert trainer.state.best_model_checkpoint == str(best_checkpoint) and find_damage(best_checkpoint) is None
    state = json.loads((best_checkpoint / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best_checkpoint)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


def test_early_stopping_patience_is_resumed(tmp_path):
    keys = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0}
    keys |= {"held_out": HELD_OUT, "restore_callback_states_from_checkpoint": True}
    build(tmp_path, [EarlyStoppingCallback(3)], max_steps=3, **keys).train()
    resumed = build(tmp_path, [EarlyStoppingCallback(3)], **keys)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 4, "the first was the best, three more were waited for"


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def failed_write(*args, **kwargs):
    raise RuntimeError("PytorchStreamWriter failed writing file data/0:\n file write failed")


FAILURES = {
    "fsync": ("sft_pipeline.utils.files.os.fsync", full_disk, r"\[Errno 28\] No space left on device"),
    "rename": ("pathlib.Path.rename", full_disk, r"\[Errno 28\] No space left on device"),
    "torch.save": ("torch.save", failed_write, "PytorchStreamWriter failed writing file data/0: file write failed"),
}


class FailAt(TrainerCallback):
    def __init__(self, patch, target, function):
        self.patch = lambda: patch.setattr(target, function)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.patch()


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_save_is_one_line_and_removes_no_older_checkpoint(failure, whole, tmp_path):
    target, function, why = FAILURES[failure]
    checkpoint = tmp_path / "checkpoint-3"
    with pytest.MonkeyPatch.context() as patch:
        remedy = "older checkpoints are kept, resume with --resume_from_checkpoint auto"
        message = rf"^{checkpoint}: could not be saved \({why}\); {remedy}"
        with pytest.raises(SFTError, match=message):
            build(tmp_path, [FailAt(patch, target, function)], save_total_limit=1).train()
    assert find_newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2") and not checkpoint.exists()
    build(tmp_path, save_total_limit=1, save_steps=STEPS).train(resume_from_checkpoint=find_newest_checkpoint(tmp_path))
    assert_same_end(whole, tmp_path)
    assert names(tmp_path) == [f"checkpoint-{STEPS}"]


# SIGTERM.


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


@pytest.mark.parametrize(
    ("step", "epoch", "evaluated", "arguments", "lacks"),
    [
        (4, 1.0, [], {"eval_strategy": "epoch"}, True),
        (4, 1.0, [4], {"eval_strategy": "epoch"}, False),
        (4, 1.0, [], {"eval_strategy": "epoch", "eval_delay": 2}, False),
        (4, 1.25, [2], {"eval_strategy": "epoch"}, False),
        (4, 1.25, [2], {"eval_strategy": "steps"}, True),
        (5, 1.25, [4], {"eval_strategy": "steps"}, False),
        (4, 1.25, [], {"eval_strategy": "steps", "eval_delay": 5}, False),
        (4, 1.0, [], {"eval_strategy": "no"}, False),
    ],
)
def test_a_missing_evaluation_is_due(step, epoch, evaluated, arguments, lacks, tmp_path):
    history = [{"eval_loss": 1.0, "step": eval_step} for eval_step in evaluated] + [{"loss": 1.0, "step": step}]
    state = TrainerState(epoch=epoch, global_step=step, eval_steps=2, log_history=history)
    state.save_to_json(str(tmp_path / "trainer_state.json"))
    training = build(tmp_path / "out", held_out=HELD_OUT, eval_steps=2, **arguments).args
    assert needs_evaluation(str(tmp_path), training) is lacks


def test_in_another_thread_signals_are_left_alone():
    handler, handlers = signal.getsignal(signal.SIGTERM), []

    def enter():
        with SigtermHandler():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert handlers == [handler]


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


# Divergence.


class Poison(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 4:
            next(model.parameters()).data[3:] = float("nan")


@pytest.mark.parametrize("saved", [True, False])
def test_a_nan_loss_stops_the_run_names_its_rows_and_keeps_the_last_checkpoint(saved, tmp_path):
    trainer = build(tmp_path, [Poison()], save_strategy="steps" if saved else "no", save_total_limit=1)
    rows = trainer.build_batch_sampler().split_epoch(1)[1].tolist()
    numbers = ", ".join(map(str, rows))
    last_checkpoint = f"the last checkpoint is {tmp_path / 'checkpoint-4'}" if saved else "no checkpoint was saved"
    with pytest.raises(SFTError) as raised:
        trainer.train()
    assert raised.value.status == 2
    assert str(raised.value) == (
        f"step 5: the loss is nan, in training rows {numbers} (see {tmp_path / 'diverged.jsonl'}); {last_checkpoint}; "
        "lower learning_rate or max_grad_norm, or check these rows"
    )
    lines = [json.loads(line) for line in (tmp_path / "diverged.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == rows
    assert [line["input_ids"] for line in lines] == [ROWS[row]["input_ids"] for row in rows]
    assert find_newest_checkpoint(tmp_path) == (str(tmp_path / "checkpoint-4") if saved else None)


def test_an_exploding_loss_stops_the_run_and_is_not_saved(tmp_path):
    class Explode(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.lm_head.weight.data *= 1e3

    message = r"^step 3: the loss exploded: \d+\.\d nats per token, a uniform guess has 4\.6, in training rows \d+, "
    with pytest.raises(SFTError, match=message):
        build(tmp_path, [Explode()]).train()
    assert (
        find_newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2") and (tmp_path / "diverged.jsonl").is_file()
    )


def test_a_gradient_that_is_nan_is_not_saved(tmp_path):
    class Hook(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                next(model.parameters()).register_hook(lambda gradient: gradient * float("nan"))

    message = r"^step 2: the loss is \d+\.\d{3}, but the gradient norm is nan, in training rows"
    with pytest.raises(SFTError, match=message):
        build(tmp_path, [Hook()]).train()
    assert find_newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def test_what_is_divergence():
    assert detect_divergence(9.0, 1e9, vocab_size=100) is None
    assert detect_divergence(float("inf"), 1.0, 100) == "the loss is inf"
    assert detect_divergence(1.0, float("inf"), 100) == "the loss is 1.000, but the gradient norm is inf"
    assert detect_divergence(9.3, 1.0, 100) == "the loss exploded: 9.3 nats per token, a uniform guess has 4.6"


def test_many_rows_are_not_all_named(tmp_path):
    assert ", 18, 19 and 5 more (see " in describe_divergence(tmp_path, 1, "the loss is nan", list(range(25)))
    assert "the loss is nan, in unknown training rows; no" in describe_divergence(tmp_path, 1, "the loss is nan", [])


# The checkpoint to resume from.


@pytest.fixture
def check(tmp_path):
    """check("auto") is the checkpoint that a run in tmp_path/out resumes from."""

    def get_checkpoint(key: str, *keys: str):
        words = ["--model_name_or_path=m", "--train_data=d", "--use_cpu=true", f"--output_dir={tmp_path / 'out'}"]
        sft, training = parse_config(None, [*words, f"--resume_from_checkpoint={key}", *keys])
        checkpoint = check_output_dir(sft, training)
        assert (training.resume_from_checkpoint is None) == (checkpoint is None)
        return checkpoint

    return get_checkpoint


@pytest.mark.parametrize("key", ["true", "last", "auto"])
def test_the_newest_undamaged_checkpoint_is_resumed(key, check, tmp_path):
    save_checkpoint(tmp_path / "out", 9)
    save_checkpoint(tmp_path / "out", 10)
    assert check(key) == str(tmp_path / "out" / "checkpoint-10")
    (tmp_path / "out" / "checkpoint-10" / "model.safetensors").write_text("torn")
    assert check(key) == str(tmp_path / "out" / "checkpoint-9")


def test_auto_starts_from_the_beginning_without_a_checkpoint(check, tmp_path):
    assert check("auto") is None
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / RUN_FILE).write_text("seed: 1\n")
    assert check("auto") is None
    (tmp_path / "out" / RESULTS_FILE).write_text("{}")
    with pytest.raises(SFTError, match="already holds a run"):
        check("auto")
    assert check("auto", "--overwrite_output_dir") is None
    (tmp_path / "out" / RUN_FILE).unlink()
    with pytest.raises(SFTError, match="holds files that are not a run's"):
        check("auto")


def test_a_named_checkpoint_is_checked(check, tmp_path):
    checkpoint = save_checkpoint(tmp_path, 4)
    assert check(str(checkpoint)) == str(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    message = rf"^resume_from_checkpoint {checkpoint}: damaged \(model.safetensors is missing\); "
    message += "give an older one, or true$"
    with pytest.raises(SFTError, match=message):
        check(str(checkpoint))
    (checkpoint / "SHA256SUMS").unlink()
    assert check(str(checkpoint)) == str(checkpoint), "another trainer's has no checksums"
    (checkpoint / "trainer_state.json").unlink()
    with pytest.raises(SFTError, match=rf"{checkpoint}: has no trainer_state.json; give a checkpoint-N folder$"):
        check(str(checkpoint))


# Whole runs in processes of their own.


@pytest.fixture(scope="module")
def config(write_config, tmp_path_factory) -> Path:
    keys = {"held_out": 2, "num_answers": 1, "num_instructions": 0, "max_new_tokens": 2}
    return write_config(tmp_path_factory.mktemp("config"), rows=8, **keys)


def command(*words) -> list[str]:
    return [sys.executable, "-m", "sft_pipeline", *map(str, words)]


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


@pytest.mark.real
def test_verify_resume_finds_no_difference(config, tmp_path, caplog):
    """With a config that names trackers, which get nothing."""
    with caplog.at_level(logging.INFO, logger="sft_pipeline"):
        assert (
            verify_resume(str(config), 4, [f"--output_dir={tmp_path / 'out'}", "--report_to", "wandb", "trackio"]) == []
        )
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
