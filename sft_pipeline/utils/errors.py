"""The error classes of the package.

Raise SFTError for whatever a user can mend: its message is one line that names the file, row or key and the remedy.
The command line prints that line without a traceback and exits with the error's status.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from sft_pipeline.utils.sanitize import format_line

FREE, ALLOWED = "free some space", "name one that may be written to: output_dir, SFT_PIPELINE_CACHE or HF_HOME"
REMEDIES = {
    errno.ENOSPC: FREE,
    errno.EDQUOT: FREE,
    errno.EFBIG: "raise the limit (ulimit -f)",
    errno.EACCES: ALLOWED,
    errno.EPERM: ALLOWED,
    errno.EROFS: ALLOWED,
}


class SFTError(ValueError):
    """Bad input: the message says where it is and what to do about it. To try again would fail again."""

    status = 2

    def __init__(self, message: object) -> None:
        super().__init__(format_line(str(message)))


def format_error(error: BaseException, limit: int = 200) -> str:
    """The error message of a library in one line of at most `limit` characters; the class name if it is empty."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def format_first_line(error: BaseException) -> str:
    """The first line of a library's error message, where what follows are its internals; the class name if empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class RunPreempted(SFTError):
    """The run was told to end and has saved what it had: the same command, started again, goes on with it."""

    status = 75  # EX_TEMPFAIL of sysexits.h


@contextmanager
def convert_file_errors() -> Iterator[None]:
    """Raises SFTError for a disk that is full and a folder that is not ours, whatever library met it."""
    try:
        yield
    except SFTError:
        raise
    except Exception as error:
        failure: BaseException | None = error
        while failure and not isinstance(failure, OSError):
            failure = failure.__cause__
        if not isinstance(failure, OSError) or failure.errno not in REMEDIES:
            raise
        where, why = failure.filename or "the disk of output_dir or of a cache", os.strerror(failure.errno)
        raise SFTError(f"{where}: {why}; {REMEDIES[failure.errno]}; what was saved is kept") from error
