"""The one error class of the package.

Raise it for whatever a user can mend: its message is one line that names the file, row or key and the remedy.
The command line prints that line without a traceback and exits with status 2.
"""


class SFTError(ValueError):
    """Bad input: the message says where it is and what to do about it."""
