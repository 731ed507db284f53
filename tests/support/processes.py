"""Processes that start with torch and transformers loaded: forked from a server that imports them once.

A new Python takes about eight seconds of processor time to import them, a fork of the server takes none. Tests of what
depends on the start itself (the terminal, the environment that libraries read once) start `python -m sft_pipeline`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch.multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["sft_pipeline.train"])


def find_free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_ranks(work: Callable[..., None], count: int, *arguments: Any, join: bool = True) -> Any:
    """Run `work(rank, *arguments)` in `count` processes with the environment of torchrun's workers."""
    entered = (work, count, find_free_port(), arguments)
    return torch.multiprocessing.start_processes(_enter, entered, count, join=join, start_method="forkserver")


def _enter(rank: int, work: Callable[..., None], count: int, port: int, arguments: tuple[Any, ...]) -> None:
    set_rank(rank, count, port)
    work(rank, *arguments)


def set_rank(rank: int, count: int, port: int) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"})


def call_in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `function(*arguments)` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        return pool.submit(function, *arguments).result()


class Command:
    """`sft-pipeline ARGUMENTS` in a process of its own; standard output and error go to files in `logs`."""

    def __init__(self, arguments: list[Any], folder: Path, logs: Path, **environment: str) -> None:
        self._files = [logs / f"{os.urandom(4).hex()}.{end}" for end in ("out", "err")]
        words = [str(word) for word in arguments]
        self._process = CONTEXT.Process(target=_run_command, args=(words, folder, self._files, environment))
        self._process.start()

    def is_running(self) -> bool:
        return self._process.is_alive()

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    def wait(self, timeout: float = 200) -> tuple[int, str, str]:
        """The exit status (minus the number of the signal that killed it), standard output and standard error."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"still running after {timeout} s"
        output, errors = (file.read_text() if file.exists() else "" for file in self._files)
        return self._process.exitcode, output, errors


def _run_command(arguments: list[str], folder: Path, files: list[Path], environment: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    for stream, file in zip((sys.stdout, sys.stderr), files):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream.fileno())
    from sft_pipeline.cli import main

    sys.argv = ["sft-pipeline", *arguments]
    main(arguments)
