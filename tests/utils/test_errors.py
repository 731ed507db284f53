"""Errors: disk errors of any library as one line, others unchanged."""

import errno
import os
from pathlib import Path

import pytest
from support.permissions import run_as_nobody

from sft_pipeline import cli
from sft_pipeline.cli import main
from sft_pipeline.utils.errors import CHOOSE_WRITABLE_FOLDER, SFTError, convert_file_errors


def make_os_error(number: int, filename: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), filename)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            make_os_error(errno.ENOSPC),
            "the disk of output_dir or of a cache: No space left on device; free some space; what was saved is kept",
        ),
        (
            make_os_error(errno.EACCES, "/c/x"),
            f"/c/x: Permission denied; {CHOOSE_WRITABLE_FOLDER}; what was saved is kept",
        ),
        (
            make_os_error(errno.EFBIG, "/c/x"),
            "/c/x: File too large; raise the limit (ulimit -f); what was saved is kept",
        ),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_disk_errors_of_any_library_are_one_line(wrapped, error, line, monkeypatch, capsys):
    """datasets wraps the error."""

    def fail(*args):
        if wrapped:
            raise ValueError("An error occurred while generating the dataset") from error
        raise error

    monkeypatch.setitem(cli.COMMANDS, "train", fail)
    with pytest.raises(SystemExit) as exit:
        main(["train"])
    assert exit.value.code == 2 and capsys.readouterr().err == f"sft-pipeline: {line}\n"


@pytest.mark.parametrize("error", [make_os_error(errno.ENOENT), KeyError("a bug"), SFTError("one of ours")])
def test_other_errors_are_not_converted(error):
    with pytest.raises(type(error)) as error_info, convert_file_errors():
        raise error
    assert error_info.value is error


def test_a_cache_without_write_permission_is_named(public, monkeypatch):
    monkeypatch.setenv("SFT_PIPELINE_CACHE", str(public / "cache"))
    public.chmod(0o555)

    def fill_cache():
        with convert_file_errors():
            Path(os.environ["SFT_PIPELINE_CACHE"], "encoded").mkdir(parents=True)

    message = run_as_nobody(fill_cache)
    assert message.startswith(
        f"SFTError: {public / 'cache'}: Permission denied; choose a writable folder with output_dir,"
    )
