"""Full disks and an interrupted end: one line, no lost data."""

import re
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from support.resuming import STEPS, Killed, assert_same_end, build, names
from support.trainers import CallBeforeStep

from sft_pipeline.config import parse_config
from sft_pipeline.runs.checkpoints import find_newest_checkpoint
from sft_pipeline.runs.output_dir import RESULTS_FILE
from sft_pipeline.train import train
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.files import find_damage


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = build(folder, save_steps=STEPS)
    trainer.train()
    trainer.save_model()
    return folder


# A full disk.


@pytest.fixture
def set_file_size_limit():
    """set_file_size_limit(n): writing a file beyond n bytes fails (EFBIG), until the end of the test or n = -1."""
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, previous[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, previous)


@pytest.mark.parametrize("fails", ["model.safetensors", "optimizer.pt"])
def test_a_checkpoint_that_cannot_be_written_leaves_older_ones_intact(fails, set_file_size_limit, whole, tmp_path):
    size = (whole / f"checkpoint-{STEPS}" / fails).stat().st_size
    with pytest.raises(SFTError) as error_info:
        build(tmp_path, [CallBeforeStep(2, lambda: set_file_size_limit(size - 1))], save_total_limit=1).train()
    set_file_size_limit(-1)
    path = re.escape(str(tmp_path / "checkpoint-3"))
    remedy = "older checkpoints are kept, resume with --resume_from_checkpoint auto"
    message = rf"{path}: could not be saved \(.+\); {remedy}"
    assert re.fullmatch(message, str(error_info.value)) and error_info.value.status == 2
    assert names(tmp_path / ".saving") == [], "the incomplete checkpoint takes no space"
    assert find_newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    build(tmp_path, save_total_limit=1, save_steps=STEPS).train(resume_from_checkpoint=find_newest_checkpoint(tmp_path))
    assert_same_end(whole, tmp_path)


def test_a_model_that_cannot_be_written_leaves_the_old_one_intact(set_file_size_limit, whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    previous = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    trainer = build(tmp_path)
    set_file_size_limit(1000)
    message = (
        rf"^{tmp_path / 'the trained model'}: could not be saved \(.*File too large.*\); older checkpoints are kept"
    )
    with pytest.raises(SFTError, match=message):
        trainer.save_model()
    set_file_size_limit(-1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == previous
    assert {"model.safetensors", "config.json"} <= previous.keys()


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(n): a folder on a disk of n bytes; called again, the disk is resized."""
    folder, mounted = tmp_path / "disk", []

    def mount(size: int) -> Path:
        folder.mkdir(exist_ok=True)
        options = f"{'remount,' if mounted else ''}size={size}"
        run = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
        )
        if run.returncode:
            pytest.skip("needs permission to mount a disk; a limit of the file size is tested above")
        mounted.append(folder)
        return folder

    yield mount
    if mounted:
        # Lazily, since weights mapped from it are still in use.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_run_on_a_full_disk_resumes_when_it_has_space(small_disk, whole):
    checkpoint = sum(path.stat().st_size for path in (whole / f"checkpoint-{STEPS}").iterdir())
    folder = small_disk(int(3.6 * checkpoint))
    with pytest.raises(
        SFTError, match=r"checkpoint-\d: could not be saved \(.+\); older checkpoints are kept"
    ) as error_info:
        build(folder).train()
    checkpoints = list(folder.glob("checkpoint-*"))
    assert checkpoints and [find_damage(path) for path in checkpoints] == [None] * len(checkpoints)
    assert find_newest_checkpoint(folder) not in str(error_info.value)
    small_disk(int(30 * checkpoint))
    build(folder, save_steps=STEPS).train(resume_from_checkpoint=find_newest_checkpoint(folder))
    assert_same_end(whole, folder)


# An interrupted end.


@pytest.fixture(scope="module")
def config(write_config, tmp_path_factory) -> Path:
    keys = {"save_steps": 2, "max_steps": 4, "resume_from_checkpoint": "auto"}
    return write_config(tmp_path_factory.mktemp("config"), rows=8, **keys)


def run_train(config: Path, output: Path) -> dict:
    return train(parse_config(str(config), [f"--output_dir={output}"]), Console(quiet=True))


def make_interrupted_publish(moved: int):
    """Return a `publish_files` that is killed after `moved` files."""

    def publish(aside: Path, folder: Path) -> None:
        for file in sorted(aside.iterdir())[:moved]:
            file.replace(folder / file.name)
        raise Killed

    return publish


@pytest.mark.parametrize(("saves", "moved"), [(True, 0), (True, 3), (False, 3)])
def test_an_interrupted_end_is_completed_by_the_same_command(saves, moved, config, tmp_path, monkeypatch):
    keys = yaml.safe_load(config.read_text()) | ({} if saves else {"save_strategy": "no"})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(keys))
    run_train(tmp_path / "config.yaml", tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("sft_pipeline.training.checkpointing.publish_files", make_interrupted_publish(moved))
        run_train(tmp_path / "config.yaml", tmp_path / "cut")
    assert not (tmp_path / "cut" / RESULTS_FILE).exists() and (tmp_path / "cut" / ".saving" / "model").is_dir()
    results = run_train(tmp_path / "config.yaml", tmp_path / "cut")
    assert results["steps"] == 4 and names(tmp_path / "whole") == names(tmp_path / "cut")
    expected, resumed = (tmp_path / name / "model.safetensors" for name in ("whole", "cut"))
    assert expected.read_bytes() == resumed.read_bytes()
