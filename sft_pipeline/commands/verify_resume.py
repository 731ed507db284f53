"""Whether a run of this config that is killed and goes on ends with the bits of one that was never stopped.

    sft-pipeline verify-resume configs/quickstart.yaml --steps 4

Trains 2 x N steps; then again, killed (SIGKILL) once the checkpoint of step N is there, and resumed. The last
checkpoints are compared: weights, optimizer, scheduler, random states, and the logged losses and norms of every step,
which tell the order of the rows. Both runs stay in a folder beside output_dir, whose name ends in -verify-resume.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from transformers.trainer_pt_utils import safe_globals

from sft_pipeline.config import build_config_record, get_output_dir, parse_config
from sft_pipeline.utils.errors import SFTError

logger = logging.getLogger(__name__)

LISTED = 10  # differences that are named
NOT_COMPARED = ("SHA256SUMS",)  # of the other files
# What the clock and the machine decide.
MEASURED = ("tokens_per_second", "peak_memory_gib", "runtime", "per_second", "answer_seconds", "model_checkpoint")


def verify_resume(config: str, steps: int, overrides: list[str]) -> list[str]:
    """What differs between the runs, which is said too; empty if nothing does."""
    sft, training = parse_config(config, overrides)
    folder = Path(f"{get_output_dir(training)}-verify-resume")
    whole, stopped = folder / "whole", folder / "stopped"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    file = folder / "config.yaml"
    file.write_text(
        yaml.safe_dump(build_config_record(sft, training), allow_unicode=True, sort_keys=False), encoding="utf-8"
    )
    command = _build_command(file, steps)
    _wait_for_success(subprocess.Popen([*command, f"--output_dir={whole}"]))
    _wait_and_kill(subprocess.Popen([*command, f"--output_dir={stopped}"]), stopped / f"checkpoint-{steps}")
    _wait_for_success(subprocess.Popen([*command, f"--output_dir={stopped}", "--resume_from_checkpoint=true"]))
    compared, found = compare_checkpoints(*(one / f"checkpoint-{2 * steps}" for one in (whole, stopped)))
    for line in found[:LISTED]:
        logger.info("differs: %s", line)
    logger.info(
        "%s steps, and %s, killed, and %s: %s values compared, %s differ",
        *(2 * steps, steps, steps, compared, len(found)),
    )
    return found


def _build_command(config: Path, steps: int) -> list[str]:
    """The verb `train` without answers, which training does not depend on, saving at steps N and 2 x N."""
    plan = {"max_steps": 2 * steps, "save_strategy": "steps", "save_steps": steps, "logging_steps": 1}
    plan |= {"save_total_limit": 0, "save_only_model": "false", "load_best_model_at_end": "false"}
    plan |= {"early_stopping_patience": 0, "eval_strategy": "no", "eval_on_start": "false", "report_to": "none"}
    plan |= {"num_answers": 0, "num_instructions": 0}
    words = [f"--{key}={value}" for key, value in plan.items()]
    return [sys.executable, "-m", "sft_pipeline", "train", str(config), *words]


def _wait_for_success(run: subprocess.Popen) -> None:
    if run.wait():
        raise SFTError(f"verify-resume: training ended with status {run.returncode}, see above")


def _wait_and_kill(run: subprocess.Popen, checkpoint: Path) -> None:
    """SIGKILL when the checkpoint is there; raises SFTError for a run that had ended by then."""
    while run.poll() is None and not checkpoint.is_dir():
        time.sleep(0.01)
    run.kill()
    if run.wait() >= 0:
        _wait_for_success(run)
        raise SFTError("verify-resume: the run ended before it could be killed; give more --steps")


def compare_checkpoints(one: Path, other: Path) -> tuple[int, list[str]]:
    """How many values (tensors, numbers, texts) two checkpoints have, and the names of those that differ."""
    first, second = (dict(_read_values(folder)) for folder in (one, other))
    names = sorted(first.keys() | second.keys())
    return len(names), [name for name in names if not _is_same(first.get(name), second.get(name))]


def _read_values(folder: Path) -> Iterator[tuple[str, Any]]:
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in NOT_COMPARED):
        yield from _flatten(str(file.relative_to(folder)), _read(file))


def _read(file: Path) -> Any:
    if file.suffix == ".safetensors":
        return load_file(file)
    if file.suffix in (".pt", ".pth", ".bin"):
        with safe_globals():
            return torch.load(file, map_location="cpu", weights_only=True)
    return json.loads(file.read_text(encoding="utf-8")) if file.suffix == ".json" else file.read_bytes()


def _flatten(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of dictionaries and lists, by name; without what was measured."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else None
    if items is None:
        yield name, value
        return
    for key, part in items:
        if not str(key).endswith(MEASURED):
            yield from _flatten(f"{name}: {key}", part)


def _is_same(one: Any, other: Any) -> bool:
    """Bit by bit; a NaN is itself."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same_kind = one.dtype == other.dtype and one.shape == other.shape
        return same_kind and torch.equal(*(part.reshape(-1).contiguous().view(torch.uint8) for part in (one, other)))
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and one.tobytes() == other.tobytes()
    return type(one) is type(other) and (one == other or repr(one) == repr(other))
