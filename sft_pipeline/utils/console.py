"""Console output of the command line: messages that fit a terminal, and logs without control characters.

All progress bars are tqdm's (those of transformers, datasets, huggingface_hub and `progress.py`); a bar appears after
one second. No slow import is made here. tqdm reads its settings from the environment when it is imported, so it is
imported after they are set.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from sft_pipeline.utils.sanitize import EscapingFormatter

BAR_LOG_SECONDS = 30.0  # between two lines written for progress bars in a log
CONTROL_CHARACTERS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")


def setup_console() -> None:
    """Configure logging and progress bars; call it before the libraries are imported.

    Messages of this package are shown from level INFO, those of libraries from WARNING. Only the main process shows
    progress bars and INFO messages.
    """
    main_process = os.environ.get("RANK", "0") == "0"
    os.environ.setdefault("TQDM_DELAY", "1")
    if not main_process:
        os.environ["TQDM_DISABLE"] = "1"
    # Otherwise the tokenizers library warns when worker processes are forked after its threads were used.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # peft 0.21 reads it; two lines about a file of transformers tell a user nothing.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    handler = LineHandler()
    handler.setFormatter(EscapingFormatter("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("sft_pipeline").setLevel(logging.INFO if main_process else logging.WARNING)


def print_line(console: Console, text: str) -> None:
    """Print `text` verbatim: without markup (a folder's name may contain brackets), highlighting or line breaks."""
    console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)


class LineHandler(logging.Handler):
    """Logging handler that writes to standard error without breaking into a progress bar.

    Messages are wrapped at words to a terminal's width; in a file each is one line.
    """

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        console = Console(stderr=True)
        with tqdm.external_write_mode(file=sys.stderr):
            console.print(Text(self.format(record)), soft_wrap=not console.is_terminal)


@contextmanager
def log_without_bars() -> Iterator[None]:
    """Context in which progress bars are logged as occasional lines if standard error is not a terminal."""
    if sys.stderr.isatty():
        yield
        return
    with redirect_stderr(LogStream(sys.stderr)):
        yield


class LogStream(io.TextIOBase):
    """Text stream that removes control characters and writes a progress bar at most every BAR_LOG_SECONDS.

    Text with a carriage return is a state of a progress bar. Blank text between lines is dropped: it comes from the
    cursor movements of nested bars.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last_bar_time = time.monotonic()
        self._in_line = False  # the text written last does not end with a line feed

    def write(self, text: str) -> int:
        """Write `text` after filtering; return its length, as a stream that writes everything would."""
        printable = CONTROL_CHARACTERS.sub("", text.rpartition("\r")[2])
        if "\r" in text:
            self._write_bar(printable.rstrip())
        elif printable.strip() or self._in_line:
            self._stream.write(printable)
            self._in_line = not printable.endswith("\n")
        return len(text)

    def _write_bar(self, bar: str) -> None:
        now = time.monotonic()
        if bar and now - self._last_bar_time >= BAR_LOG_SECONDS:
            self._stream.write("\n" * self._in_line + bar + "\n")
            self._stream.flush()
            self._last_bar_time, self._in_line = now, False

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a plain attribute in the base class
        return self._stream.encoding

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
