"""SIGTERM while training: the step is ended and saved before the process ends."""

from __future__ import annotations

import signal
import threading
from typing import Any


class SigtermHandler:
    """While it is entered, SIGTERM is `received` instead of obeyed, so that the step can be ended and saved.

    Signals reach the main thread alone: in another one nothing changes.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: Any = None

    def __enter__(self) -> None:
        self.received = False
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._receive)

    def __exit__(self, *raised: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def _receive(self, *signal_and_frame: object) -> None:
        self.received = True
