"""Folders that only their owner can write to, and functions that run as another user."""

import os
from pathlib import Path

import pytest

from sft_pipeline.utils.errors import SFTError

NOBODY = 65534


def run_as_nobody(function) -> str:
    """Return the error of `function` in a fork of this process as user nobody (root may write anywhere)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            function()
        except SFTError as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with open(reader, "rb") as pipe:
        return pipe.read().decode()


@pytest.fixture
def public(tmp_path):
    """A folder that every user can enter, and only its owner can write to."""
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == os.getuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
    yield tmp_path
    tmp_path.chmod(0o755)
