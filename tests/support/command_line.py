"""Runs of the command line: a command that must fail, and a Python subprocess."""

import subprocess
import sys

import pytest

from sft_pipeline.cli import main


def refusal(capsys, *arguments: str) -> str:
    """Run a command that fails; return its one line on standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(list(arguments))
    output = capsys.readouterr()
    assert exit.value.code == 2
    assert output.out == "" and output.err.startswith("sft-pipeline: ") and output.err.count("\n") == 1
    return output.err.removeprefix("sft-pipeline: ").strip()


def python(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **options)
