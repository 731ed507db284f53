"""Work that one process does for all, and errors of one that all raise."""

import json
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from support.processes import run_ranks
from transformers import TrainingArguments

from sft_pipeline.utils.distributed import (
    main_process_first,
    run_on_all_processes,
    run_on_main_process,
    share_verdict,
    use_verdicts_of_main_process,
)
from sft_pipeline.utils.errors import SFTError


class Unpicklable(Exception):
    """It cannot be sent: its constructor takes more than the message."""

    def __init__(self, a, b):
        super().__init__(f"{a}\n{b}")


def fail(error):
    raise error


def catch(function) -> list[str]:
    with pytest.raises(Exception) as error_info:
        function()
    return [type(error_info.value).__name__, str(error_info.value)]


@share_verdict
def inner(value):
    return value


@share_verdict
def outer(value):
    """Calls another check, which must not communicate once more."""
    if value < 0:
        raise SFTError(f"negative: {value}")
    return inner(value) + 1


def run_worker(process: int, folder: str) -> None:
    args = TrainingArguments(folder, use_cpu=True, ddp_backend="gloo")
    report = {"result": run_on_main_process(args, lambda: ["of", process])}
    report["results"] = run_on_all_processes(args, lambda: process * 10)
    report["main fails"] = catch(lambda: run_on_main_process(args, lambda: fail(SFTError("bad"))))
    report["cannot be sent"] = catch(lambda: run_on_main_process(args, lambda: fail(Unpicklable("a", "b"))))
    report["second fails"] = catch(lambda: run_on_all_processes(args, lambda: process and fail(OSError(28, "full"))))
    report["both fail"] = catch(lambda: run_on_all_processes(args, lambda: fail(SFTError(f"in {process}"))))
    assert outer(process) == process + 1
    with use_verdicts_of_main_process(args):
        report["verdict"] = outer(5 if process == 0 else -1)
        report["refusal"] = catch(lambda: outer(-2 if process == 0 else 1))
    assert outer(process) == process + 1
    (Path(folder) / f"{process}.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()


def run_slow_worker(process: int, folder: str) -> None:
    """Each time, the first process works longer than any collective waits."""
    # Not by ddp_timeout, which the library ignores with use_cpu.
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=2))
    args = TrainingArguments(folder, use_cpu=True, ddp_backend="gloo")
    encoded = Path(folder) / "encoded"
    with main_process_first(args):
        if process == 0:
            time.sleep(4)
            encoded.write_text("rows")
        rows = encoded.read_text()
    with pytest.raises(SFTError, match="bad rows"), main_process_first(args):
        raise SFTError("bad rows")
    result = run_on_main_process(args, lambda: time.sleep(4) or "done")
    (Path(folder) / f"{process}.json").write_text(json.dumps([rows, result]))
    torch.distributed.destroy_process_group()


def test_no_process_gives_up_while_the_first_one_encodes(tmp_path):
    """Tokenizing for longer than ddp_timeout ended runs (https://github.com/hiyouga/LLaMA-Factory/issues/2424)."""
    run_ranks(run_slow_worker, 2, str(tmp_path))
    for process in range(2):
        assert json.loads((tmp_path / f"{process}.json").read_text()) == ["rows", "done"]


def test_two_processes_get_the_same_results_and_errors(tmp_path):
    run_ranks(run_worker, 2, str(tmp_path))
    first, second = (json.loads((tmp_path / f"{process}.json").read_text()) for process in range(2))
    assert first.pop("cannot be sent") == ["Unpicklable", "a\nb"]
    assert second.pop("cannot be sent") == ["RuntimeError", "Unpicklable: a b"]
    assert first == second
    assert first == {
        "result": ["of", 0],
        "results": [0, 10],
        "main fails": ["SFTError", "bad"],
        "second fails": ["OSError", "[Errno 28] full"],
        "both fail": ["SFTError", "in 0"],
        "verdict": 6,
        "refusal": ["SFTError", "negative: -2"],
    }


def test_one_process_calls_the_function_itself(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    error = Unpicklable("a", "b")
    assert run_on_main_process(args, lambda: 1) == 1 and run_on_all_processes(args, lambda: 2) == [2]
    for run in (run_on_main_process, run_on_all_processes):
        with pytest.raises(Unpicklable) as error_info:
            run(args, lambda: fail(error))
        assert error_info.value is error
