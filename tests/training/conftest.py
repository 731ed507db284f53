"""What the tests of training share."""

from pathlib import Path

import pytest
from support.resuming import build


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run that was never stopped, with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("whole")
    build(folder).train()
    return folder
