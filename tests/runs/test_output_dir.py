"""Output folders: which are taken, which are refused and left untouched."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.permissions import run_as_nobody
from support.training_runs import contents, run_train

from sft_pipeline.config import parse_config
from sft_pipeline.runs.output_dir import RESULTS_FILE, RUN_FILE, check_output_dir
from sft_pipeline.utils.errors import SFTError


@pytest.fixture(scope="module")
def config(write_config, tmp_path_factory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"), rows=8)


@pytest.mark.parametrize("inner", ["", "new/run"])
def test_an_output_folder_without_write_permission_is_refused(inner, public):
    (public / "taken").mkdir(mode=0o555)
    output = public / "taken" / inner
    parsed = parse_config(
        None, ["--model_name_or_path=m", "--train_data=d", "--use_cpu=true", f"--output_dir={output}"]
    )
    message = run_as_nobody(lambda: check_output_dir(parsed))
    assert (
        message == f"SFTError: output_dir {output}: no permission to write to {public / 'taken'}; choose another folder"
    )


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


@pytest.fixture
def held(tmp_path) -> Path:
    """A folder with an earlier run in it."""
    folder = tmp_path / "held"
    folder.mkdir()
    (folder / RUN_FILE).write_text("seed: 1\n")
    (folder / "model.safetensors").write_text("precious")
    return folder


def test_an_earlier_run_is_refused_and_untouched(held, config):
    previous = contents(held)
    for keys in ([], ["--resume_from_checkpoint", "false"]):
        with pytest.raises(SFTError, match=f"^output_dir {held}: already holds a run; add --overwrite_output_dir to"):
            run_train(config, "--output_dir", str(held), *keys)
    assert contents(held) == previous


def test_an_earlier_run_is_replaced_when_asked(held, config):
    (held / "left_over.txt").write_text("old")
    run_train(config, "--output_dir", str(held), "--overwrite_output_dir", "--max_steps", "1")
    assert not (held / "left_over.txt").exists()
    assert json.loads((held / RESULTS_FILE).read_text())["steps"] == 1
    load_file(held / "model.safetensors")


@pytest.mark.parametrize("keys", [["--train_data", "missing.json"], ["--model_name_or_path", "./missing"]])
def test_bad_input_costs_no_earlier_run(keys, held, config):
    previous = contents(held)
    with pytest.raises(SFTError, match="missing"):
        run_train(config, "--output_dir", str(held), "--overwrite_output_dir", *keys)
    assert contents(held) == previous


def test_bad_input_leaves_no_folder_that_would_be_refused_next_time(config, tmp_path):
    with pytest.raises(SFTError, match="missing"):
        run_train(config, "--output_dir", str(tmp_path / "out"), "--train_data", "missing.json")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keys", [[], ["--overwrite_output_dir"]])
def test_files_of_no_run_are_refused_and_untouched(keys, config, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    previous = contents(tmp_path)
    with pytest.raises(SFTError, match=f"^output_dir {tmp_path}: holds files that are not a run's; choose another"):
        run_train(config, "--output_dir", str(tmp_path), *keys)
    assert contents(tmp_path) == previous


def test_a_file_is_no_output_folder(config, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SFTError, match=f"^output_dir {tmp_path / 'out'}: is a file; choose another folder"):
        run_train(config, "--output_dir", str(tmp_path / "out"))


def test_an_empty_folder_is_taken(config, tmp_path):
    assert run_train(config, "--output_dir", str(tmp_path), "--max_steps", "1")["steps"] == 1
