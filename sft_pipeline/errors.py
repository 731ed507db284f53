"""The error classes of the package.

Raise SFTError for whatever a user can mend: its message is one line that names the file, row or key and the remedy.
The command line prints that line without a traceback and exits with the error's status.
"""

from sft_pipeline.visible import one_line


class SFTError(ValueError):
    """Bad input: the message says where it is and what to do about it. To try again would fail again."""

    status = 2

    def __init__(self, message: object) -> None:
        super().__init__(one_line(str(message)))


class Requeue(SFTError):
    """The run was told to end and has saved what it had: the same command, started again, goes on with it."""

    status = 75  # EX_TEMPFAIL of sysexits.h
