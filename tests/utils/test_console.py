"""Console output: occasional lines in a log, no control characters, no line wider than the terminal."""

import contextlib
import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from tqdm import tqdm

from sft_pipeline.utils import console
from sft_pipeline.utils.console import LogStream

ROOT = Path(__file__).parents[2]
MOVES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def test_a_warning_that_peft_gives_for_every_adapter_is_not_shown():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        console.setup_console()
        warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed", FutureWarning, stacklevel=1)
        with pytest.raises(FutureWarning, match="another"):
            warnings.warn("another", FutureWarning, stacklevel=1)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    monkeypatch.setattr(console.time, "monotonic", clock := Clock())
    return clock


def test_a_line_is_printed_verbatim():
    text = "runs/[bold]/:x:/" + "long " * 40
    stream = io.StringIO()
    console.print_line(Console(file=stream, width=40), text)
    assert stream.getvalue() == text + "\n"


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


def test_standard_error_is_restored(capsys):
    stderr = sys.stderr
    with console.log_without_bars():
        print("\x1b[1mbold\x1b[0m", file=sys.stderr)
        assert sys.stderr is not stderr and sys.stderr.fileno and not sys.stderr.isatty()
    assert sys.stderr is stderr
    assert capsys.readouterr().err == "bold\n"


@pytest.mark.parametrize(("is_terminal", "lines"), [(False, 1), (True, 3)])
def test_messages_are_wrapped_only_in_a_terminal(is_terminal, lines, capsys, monkeypatch):
    # Not through os.environ: rich keeps a reference to it, and datasets' map with processes replaces it by a copy.
    monkeypatch.setattr("rich.console.Console._environ", {"COLUMNS": "40", "TERM": "xterm"})
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    message = "[bold] words of a message " * 4 + "/a/path"
    console.LineHandler().emit(logging.LogRecord("sft_pipeline", 20, "", 1, message, None, None))
    output = MOVES.sub("", capsys.readouterr().err)
    assert output.count("\n") == lines and " ".join(output.split()) == message


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


def build_command(config: Path, output: str) -> list[str]:
    return [sys.executable, "-m", "sft_pipeline", "train", config.name, "--output_dir", output]


def build_environment(**variables: str) -> dict[str, str]:
    # Bars appear at once, as a tiny run ends before their default delay.
    return {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DELAY": "0", "TERM": "xterm-256color", **variables}


def test_a_log_file_has_few_lines_and_no_control_characters(config):
    log = config.parent / "log"
    with log.open("wb") as stream:
        process = subprocess.run(
            build_command(config, "logged"), cwd=config.parent, env=build_environment(),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stream, check=True,
        )  # fmt: skip
    for text in (log.read_text(encoding="utf-8"), process.stdout.decode()):
        assert "held-out" in text and not set(text) & {"\r", "\x1b"}
    assert len(log.read_text(encoding="utf-8").splitlines()) < 15


def test_no_line_is_wider_than_the_terminal(config):
    """Bars, messages, preview and results, in a terminal of 80 columns that has colors unless NO_COLOR is set."""
    output = run_in_terminal(build_command(config, "shown"), config.parent, build_environment(NO_COLOR="1"))
    assert "training: 100%" in output and "answers:" in output and "held-out loss:" in output
    lines = re.split(r"[\r\n]+", MOVES.sub("", output))
    assert max(map(cell_len, lines)) <= 80
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", output), "a color, with NO_COLOR set"


def run_in_terminal(arguments: list[str], folder: Path, environment: dict[str, str]) -> str:
    """Run the command and return its output to a terminal of 80 columns and 24 rows."""
    import fcntl
    import struct
    import termios

    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {name: value for name, value in environment.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(arguments, cwd=folder, env=environment, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    output = bytearray()
    with contextlib.suppress(OSError):  # at the end of the output, on Linux
        while chunk := os.read(master, 65536):
            output += chunk
    os.close(master)
    assert process.wait() == 0, output.decode(errors="replace")
    return output.decode()
