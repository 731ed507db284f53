"""Checkpoints: complete or absent wherever a save is interrupted, found by `auto`."""

import logging
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import save_checkpoint
from support.resuming import HELD_OUT, Killed, build, cut_off, names
from transformers import TrainerState

from sft_pipeline.runs.checkpoints import (
    clear_leftovers,
    find_newest_checkpoint,
    move_aside,
    needs_evaluation,
    publish_files,
    rotate_checkpoints,
)
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.files import divide_files, find_damage

# The process that writes a file, by its name.
OWNERS = {
    "pytorch_model_fsdp_0/__0_0.distcp": 0,
    "optimizer_0/__2_1.distcp": 2,
    "rng_state_1.pth": 1,
    "global_step5/bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt": 3,
}
FILE_NAMES = [*OWNERS, "model.safetensors", "optimizer.pt", "rng_state.pth", "pytorch_model_fsdp_0/.metadata"]

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


def test_an_interrupted_publish_leaves_each_file_old_or_new(tmp_path):
    calls = None
    for num_calls in range(20):
        aside, folder = tmp_path / str(num_calls) / ".saving" / "model", tmp_path / str(num_calls)
        (aside / "inner").mkdir(parents=True)
        for name in ("model.safetensors", "inner/config.json"):
            (aside / name).write_bytes(b"new")
        (folder / "model.safetensors").write_bytes(b"old")
        with pytest.MonkeyPatch.context() as patch:
            calls = cut_off(patch, num_calls, (Path, "replace"))
            try:
                publish_files(aside, folder)
                break
            except Killed:
                config_file = folder / "inner" / "config.json"
                assert not config_file.exists() or config_file.read_bytes() == b"new"
                assert (folder / "model.safetensors").read_bytes() in (b"old", b"new")
    assert calls == ["fsync", "fsync", "replace", "replace", "fsync"], "synced to disk before they are renamed"
    assert (folder / "model.safetensors").read_bytes() == b"new"


# The checkpoint to resume from.


@pytest.mark.parametrize("key", ["true", "last", "auto"])
def test_the_newest_undamaged_checkpoint_is_resumed(key, check, tmp_path):
    save_checkpoint(tmp_path / "out", 9)
    save_checkpoint(tmp_path / "out", 10)
    assert check(key) == str(tmp_path / "out" / "checkpoint-10")
    (tmp_path / "out" / "checkpoint-10" / "model.safetensors").write_text("torn")
    assert check(key) == str(tmp_path / "out" / "checkpoint-9")


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


# Read by several processes.


@given(st.dictionaries(st.sampled_from(FILE_NAMES), st.integers(0, 10**12)), st.integers(1, 9))
def test_each_file_is_of_one_process_and_shards_are_of_the_process_that_wrote_them(sizes, count):
    shares = divide_files(sizes, count)
    assert sorted(name for share in shares for name in share) == sorted(sizes) and len(shares) == count
    for process, share in enumerate(shares):
        for name in share:
            owner = OWNERS.get(name, count)
            assert owner >= count or owner == process


def test_files_of_no_process_are_divided_by_size():
    sizes = {"a": 7, "b": 5, "c": 4, "d": 1, "pytorch_model_fsdp_0/__1_0.distcp": 6}
    assert divide_files(sizes, 2) == [["a", "c", "d"], ["pytorch_model_fsdp_0/__1_0.distcp", "b"]]
    assert divide_files(sizes, 3, local=1) == [["a", "b", "c", "d"], ["pytorch_model_fsdp_0/__1_0.distcp"], []]


def test_every_damage_is_found_by_one_of_the_processes(tmp_path):
    checkpoint = save_checkpoint(tmp_path, 1)
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != "SHA256SUMS"]
    for file in files:
        content = file.read_text()
        file.write_text(content + "!")
        found = [find_damage(checkpoint, process, 2) for process in range(2)]
        name = file.relative_to(checkpoint).as_posix()
        assert sorted(found, key=str) == sorted([None, f"{name} differs from SHA256SUMS"], key=str)
        file.write_text(content)
    assert [find_damage(checkpoint, process, 5) for process in range(5)] == [None] * 5
    files[0].unlink()
    assert len({find_damage(checkpoint, process, 2) for process in range(2)}) == 1, "every process sees what is missing"
