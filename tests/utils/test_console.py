"""What a log and a terminal get: lines now and then, nothing that moves a cursor, nothing wider than the terminal."""

import contextlib
import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from tqdm import tqdm

from sft_pipeline.utils import console, progress
from sft_pipeline.utils.console import LogStream
from sft_pipeline.utils.progress import show_elapsed_time

ROOT = Path(__file__).parents[2]
MOVES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    monkeypatch.setattr(console.time, "monotonic", clock := Clock())
    return clock


def test_a_bar_is_a_line_every_thirty_seconds(clock):
    stream = io.StringIO()
    bars = LogStream(stream)
    bar = tqdm(total=100, file=bars, desc="training", mininterval=0, miniters=1, bar_format="{desc} {n_fmt}")
    for clock.now in range(1, 101):
        bar.update()
    bar.close()
    assert stream.getvalue().splitlines() == ["training 30", "training 60", "training 90"]


def test_a_bar_below_another_leaves_no_blank_line(clock):
    stream = io.StringIO()
    bars = LogStream(stream)
    with tqdm(total=9, file=bars, mininterval=0, miniters=1) as outer:
        print("a line", file=bars)
        for clock.now in range(0, 300, 100):
            with tqdm(total=3, file=bars, mininterval=0, miniters=1, leave=False, bar_format="inner {n}") as inner:
                inner.update()
            outer.update()
    lines = stream.getvalue().split("\n")
    assert lines[0] == "a line" and lines[-1] == "" and all(lines[:-1])
    assert any(line.startswith("inner") for line in lines) and len(lines) < 6


@given(st.lists(st.text(st.sampled_from("ab \n\r\t\x1b[1Am\x07")), max_size=20))
def test_no_control_character_gets_through_and_lines_stay_whole(writes):
    stream = io.StringIO()
    log = LogStream(stream)
    for text in writes:
        assert log.write(text) == len(text)
    assert not set(stream.getvalue()) & {"\r", "\x1b", "\x07"}
    plain = [text for text in writes if not set(text) & {"\r", "\x1b", "\x07"} and text.strip()]
    assert all(text in stream.getvalue() for text in plain)


def test_standard_error_is_as_it_was_afterwards(capsys):
    before = sys.stderr
    with console.log_without_bars():
        print("\x1b[1mbold\x1b[0m", file=sys.stderr)
        assert sys.stderr is not before and sys.stderr.fileno and not sys.stderr.isatty()
    assert sys.stderr is before
    assert capsys.readouterr().err == "bold\n"


def test_waiting_says_how_long_already(capsys, monkeypatch):
    monkeypatch.setattr(progress, "TICK", 0.01)
    with show_elapsed_time("saving"):
        time.sleep(0.3)
    shown = capsys.readouterr().err
    assert "saving: 00:00" in shown
    with show_elapsed_time("saving", disable=True):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("wide", "lines"), [(False, 1), (True, 3)])
def test_messages_are_broken_in_a_terminal_alone(wide, lines, capsys, monkeypatch):
    # Not through os.environ: rich keeps the first one, and datasets' map with processes puts a copy in its place.
    monkeypatch.setattr("rich.console.Console._environ", {"COLUMNS": "40", "TERM": "xterm"})
    monkeypatch.setattr(sys.stderr, "isatty", lambda: wide)
    message = "[bold] words of a message " * 4 + "/a/path"
    console.LineHandler().emit(logging.LogRecord("sft_pipeline", 20, "", 1, message, None, None))
    shown = MOVES.sub("", capsys.readouterr().err)
    assert shown.count("\n") == lines and " ".join(shown.split()) == message


@pytest.fixture(scope="module")
def config(model_folder, tmp_path_factory) -> Path:
    """A run with every kind of bar: rows to read and encode, evaluations with answers, checkpoints."""
    folder = tmp_path_factory.mktemp("terminal")
    rows = [{"instruction": f"Say {n}.", "input": "", "output": "复读机 " * (n % 9 + 1)} for n in range(60)]
    (folder / "rows.json").write_text(json.dumps(rows))
    keys = {
        "model_name_or_path": str(model_folder),
        "train_data": "rows.json",
        "held_out": 8,
        "num_answers": 4,
        "num_instructions": 2,
        "max_new_tokens": 12,
        "max_steps": 6,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_steps": 3,
        "use_cpu": True,
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(keys))
    return folder / "tiny.yaml"


def command(config: Path, output: str) -> list[str]:
    return [sys.executable, "-m", "sft_pipeline", "train", config.name, "--output_dir", output]


def environment(**more: str) -> dict[str, str]:
    # Bars appear at once, for a tiny run is over before they would.
    return {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DELAY": "0", "TERM": "xterm-256color", **more}


def test_a_log_file_has_few_lines_and_no_control_characters(config):
    log = config.parent / "log"
    with log.open("wb") as stream:
        run = command(config, "logged"), {"cwd": config.parent, "env": environment(), "stdout": subprocess.PIPE}
        done = subprocess.run(run[0], **run[1], stderr=stream, stdin=subprocess.DEVNULL, check=True)
    for text in (log.read_text(encoding="utf-8"), done.stdout.decode()):
        assert "held-out" in text and not set(text) & {"\r", "\x1b"}
    assert len(log.read_text(encoding="utf-8").splitlines()) < 15


def test_no_line_is_wider_than_the_terminal(config):
    """Bars, messages, preview and results, in a terminal of 80 columns that has colours unless NO_COLOR is set."""
    shown = in_a_terminal(command(config, "shown"), config.parent, environment(NO_COLOR="1"))
    assert "training: 100%" in shown and "answers:" in shown and "held-out loss:" in shown
    lines = re.split(r"[\r\n]+", MOVES.sub("", shown))
    assert max(map(cell_len, lines)) <= 80
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", shown), "a colour, with NO_COLOR set"


def in_a_terminal(arguments: list[str], folder: Path, environment: dict[str, str]) -> str:
    """What the command writes to a terminal of 80 columns and 24 rows."""
    import fcntl
    import struct
    import termios

    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {name: value for name, value in environment.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(arguments, cwd=folder, env=environment, stdin=its, stdout=its, stderr=its)
    os.close(its)
    shown = bytearray()
    with contextlib.suppress(OSError):  # the terminal's end, on Linux
        while part := os.read(ours, 65536):
            shown += part
    os.close(ours)
    assert process.wait() == 0, shown.decode(errors="replace")
    return shown.decode()
