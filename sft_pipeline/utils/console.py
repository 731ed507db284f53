"""What the command line writes to: lines that fit a terminal, and a log file without control characters.

Bars are tqdm's, whoever makes them (transformers, datasets, huggingface_hub, progress.py): one that lasts a second
appears. Nothing heavy is imported here, and tqdm only after its settings, which it reads from the environment once.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from sft_pipeline.utils.sanitize import EscapingFormatter

LOG_SECONDS = 30.0  # between two lines of bars in a log
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")


def setup_console() -> None:
    """Our own lines and real warnings, nothing else; bars of the main process alone. Before libraries load."""
    main_process = os.environ.get("RANK", "0") == "0"
    os.environ.setdefault("TQDM_DELAY", "1")
    if not main_process:
        os.environ["TQDM_DISABLE"] = "1"
    # The Rust threads of the tokenizer would warn when worker processes are forked.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    handler = LineHandler()
    handler.setFormatter(EscapingFormatter("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("sft_pipeline").setLevel(logging.INFO if main_process else logging.WARNING)


def print_line(console: Console, text: str) -> None:
    """Print `text` as it is: no markup (a folder's name may hold brackets), no highlighting, unbroken in a file."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


class LineHandler(logging.Handler):
    """Messages on standard error: broken at words where a terminal ends, whole in a file; never within a bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        console = Console(stderr=True)
        with tqdm.external_write_mode(file=sys.stderr):
            console.print(Text(self.format(record)), soft_wrap=not console.is_terminal)


@contextmanager
def log_without_bars() -> Iterator[None]:
    """Standard error that is no terminal gets a line now and then where bars would redraw themselves."""
    if sys.stderr.isatty():
        yield
        return
    with redirect_stderr(LogStream(sys.stderr)):
        yield


class LogStream(io.TextIOBase):
    """A stream to write bars to that keeps of them a line every LOG_SECONDS, and no control characters of anything.

    What holds a carriage return is a bar; a bar's moves from line to line are blank.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._said = time.monotonic()
        self._in_line = False  # text was written that no line feed has ended yet

    def write(self, text: str) -> int:
        shown = CONTROL.sub("", text.rpartition("\r")[2])
        if "\r" in text:
            self._bar(shown.rstrip())
        elif shown.strip() or self._in_line:
            self._stream.write(shown)
            self._in_line = not shown.endswith("\n")
        return len(text)

    def _bar(self, shown: str) -> None:
        now = time.monotonic()
        if shown and now - self._said >= LOG_SECONDS:
            self._stream.write("\n" * self._in_line + shown + "\n")
            self._stream.flush()
            self._said, self._in_line = now, False

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a plain attribute there, which changes with the stream here
        return self._stream.encoding

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
