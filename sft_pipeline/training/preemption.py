"""Handle SIGTERM during training: finish the step and save before the process exits."""

from __future__ import annotations

import signal
import threading
from typing import Any


class SigtermHandler:
    """Context manager that sets `received` on SIGTERM instead of ending the process.

    Only the main thread can handle signals; in any other thread this does nothing.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous_handler: Any = None

    def __enter__(self) -> None:
        self.received = False
        if threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGTERM, self._receive)

    def __exit__(self, *exc_info: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._previous_handler or signal.SIG_DFL)

    def _receive(self, *signal_and_frame: object) -> None:
        self.received = True
