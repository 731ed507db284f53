"""Progress bars: the elapsed time of a block."""

import time

from sft_pipeline.utils import progress
from sft_pipeline.utils.progress import show_elapsed_time


def test_elapsed_time_is_shown(capsys, monkeypatch):
    monkeypatch.setattr(progress, "UPDATE_SECONDS", 0.01)
    with show_elapsed_time("saving"):
        time.sleep(0.3)
    assert "saving: 00:00" in capsys.readouterr().err
    with show_elapsed_time("saving", disable=True):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""
