"""The trainer's checkpoints: complete, resumed with the same bits, kept when a save fails."""

import errno
import json
from pathlib import Path

import pytest
import torch
from support.processes import run_ranks
from support.resuming import HELD_OUT, STEPS, assert_same_end, build, names
from transformers import EarlyStoppingCallback, TrainerCallback

from sft_pipeline.runs.checkpoints import find_checkpoint_to_resume, find_newest_checkpoint
from sft_pipeline.utils import files
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.files import find_damage


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


# Several processes.


def run_saving_worker(process: int, folder: str) -> None:
    """Save sharded checkpoints; each process notes which files it hashes. Then the second fails to hash one."""
    out, hashed = Path(folder), []
    hash_file = files.hash_file
    fsdp = {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}, "ddp_backend": "gloo"}

    def note(file):
        hashed.append(file.relative_to(next(path for path in file.parents if "checkpoint-" in path.name)).as_posix())
        return hash_file(file)

    def fail(file):
        raise OSError(errno.EIO, "Input/output error")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "hash_file", note)
        build(out, max_steps=1, **fsdp).train()
        saved = sorted(hashed)
        hashed.clear()
        trainer = build(out, max_steps=2, **fsdp)
        trainer.args.resume_from_checkpoint = "auto"
        checkpoint = find_checkpoint_to_resume(trainer.args, out)
        read = sorted(hashed)
        if process == 1:
            patch.setattr(files, "hash_file", fail)
        with pytest.raises(SFTError) as error_info:
            trainer.train(resume_from_checkpoint=checkpoint)
    report = {"saved": saved, "read": read, "checkpoint": checkpoint, "error": str(error_info.value)}
    (out / f"{process}.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()


def test_each_process_hashes_and_checks_what_it_wrote(tmp_path):
    run_ranks(run_saving_worker, 2, str(tmp_path))
    first, second = (json.loads((tmp_path / f"{process}.json").read_text()) for process in range(2))
    checkpoint = tmp_path / "checkpoint-1"
    listed = [line.partition("  ")[2] for line in (checkpoint / "SHA256SUMS").read_text().splitlines()]
    assert listed == sorted(first["saved"] + second["saved"]), "each file once, by one of them"
    assert find_damage(checkpoint) is None
    for process, report in enumerate((first, second)):
        own = [f"{folder}/__{process}_0.distcp" for folder in ("optimizer_0", "pytorch_model_fsdp_0")]
        assert {*own, f"rng_state_{process}.pth"} <= set(report["saved"])
        assert not any(f"__{1 - process}_" in name for name in report["saved"])
        assert report["read"] == report["saved"] and report["checkpoint"] == str(checkpoint)
    # A process that fails ends all with the same line, and leaves no checkpoint.
    assert first["error"] == second["error"]
    reason = "[Errno 5] Input/output error"
    assert first["error"].startswith(f"{tmp_path / 'checkpoint-2'}: could not be saved ({reason}); older checkpoints")
    assert not (tmp_path / "checkpoint-2").exists()
