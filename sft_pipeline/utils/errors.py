"""The error classes of the package.

Raise SFTError for errors that a user can fix: its message is one line that names the file, row or key and the remedy.
The command line prints that line without a traceback and exits with the error's status.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from sft_pipeline.utils.sanitize import format_line

FREE_SPACE = "free some space"
CHOOSE_WRITABLE_FOLDER = "choose a writable folder with output_dir, SFT_PIPELINE_CACHE or HF_HOME"
REMEDIES = {
    errno.ENOSPC: FREE_SPACE,
    errno.EDQUOT: FREE_SPACE,
    errno.EFBIG: "raise the limit (ulimit -f)",
    errno.EACCES: CHOOSE_WRITABLE_FOLDER,
    errno.EPERM: CHOOSE_WRITABLE_FOLDER,
    errno.EROFS: CHOOSE_WRITABLE_FOLDER,
}


class SFTError(ValueError):
    """An error that the user has to fix, such as bad input; a retry without changes fails again.

    The message is made a single line without control characters.
    """

    status = 2

    def __init__(self, message: object) -> None:
        super().__init__(format_line(str(message)))


def format_error(error: BaseException, limit: int = 200) -> str:
    """Return a library's error message as one line of at most `limit` characters, or the class name if it is empty."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def format_first_line(error: BaseException) -> str:
    """Return the first line of a library's error message, or the class name if it is empty.

    For messages whose other lines are details of the library.
    """
    return str(error).strip().partition("\n")[0] or type(error).__name__


class RunPreempted(SFTError):
    """The run was asked to stop and has saved a checkpoint; the same command resumes it."""

    status = 75  # EX_TEMPFAIL of sysexits.h


@contextmanager
def convert_file_errors() -> Iterator[None]:
    """Convert errors of a full disk or a folder without write permission to SFTError.

    The OSError may be the exception itself or a cause of the exception that a library raised.
    """
    try:
        yield
    except SFTError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause and not isinstance(cause, OSError):
            cause = cause.__cause__
        if not isinstance(cause, OSError) or cause.errno not in REMEDIES:
            raise
        path, reason = cause.filename or "the disk of output_dir or of a cache", os.strerror(cause.errno)
        raise SFTError(f"{path}: {reason}; {REMEDIES[cause.errno]}; what was saved is kept") from error
