"""Verify that a run that is killed and resumed ends with the same bits as an uninterrupted one.

    sft-pipeline verify-resume configs/quickstart.yaml --steps 4

Trains the config for 2 x N steps; then again, killed with SIGKILL once the checkpoint of step N exists, and resumed.
The last checkpoints are compared: weights, optimizer, scheduler, random states, and the logged losses and gradient
norms of every step, which would differ if the order of the rows did. Both runs stay in a folder beside output_dir,
whose name ends in -verify-resume.
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
from sft_pipeline.training.optimizers import check_optimizer
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.files import CHECKSUMS_FILE

logger = logging.getLogger(__name__)

MAX_LISTED = 10  # differences that are logged
# Endings of keys whose values depend on the clock, the machine or the output folder.
MEASURED = ("tokens_per_second", "peak_memory_gib", "runtime", "per_second", "answer_seconds", "model_checkpoint")


def verify_resume(config: str, steps: int, overrides: list[str]) -> list[str]:
    """Run the comparison and log its result; return the names of the values that differ.

    steps: N, the steps before the kill and after it.
    """
    args = parse_config(config, overrides)
    check_optimizer(args)
    folder = Path(f"{get_output_dir(args)}-verify-resume")
    uninterrupted, resumed = folder / "whole", folder / "stopped"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config_file = folder / "config.yaml"
    text = yaml.safe_dump(build_config_record(args), allow_unicode=True, sort_keys=False)
    config_file.write_text(text, encoding="utf-8")
    command = _build_command(config_file, steps)
    _wait_for_success(subprocess.Popen([*command, f"--output_dir={uninterrupted}"]))
    _wait_and_kill(subprocess.Popen([*command, f"--output_dir={resumed}"]), resumed / f"checkpoint-{steps}")
    _wait_for_success(subprocess.Popen([*command, f"--output_dir={resumed}", "--resume_from_checkpoint=true"]))
    last = f"checkpoint-{2 * steps}"
    count, differences = compare_checkpoints(uninterrupted / last, resumed / last)
    for name in differences[:MAX_LISTED]:
        logger.info("differs: %s", name)
    logger.info(
        "%s steps, compared with %s, a kill, and %s more: %s values compared, %s differ",
        *(2 * steps, steps, steps, count, len(differences)),
    )
    return differences


def _build_command(config_file: Path, steps: int) -> list[str]:
    """Build a `train` command of 2 x `steps` steps that saves at steps N and 2 x N.

    It evaluates nothing, as training does not depend on that, and logs to no tracker.
    """
    keys = {"max_steps": 2 * steps, "save_strategy": "steps", "save_steps": steps, "logging_steps": 1}
    keys |= {"save_total_limit": 0, "save_only_model": "false", "load_best_model_at_end": "false"}
    keys |= {"early_stopping_patience": 0, "eval_strategy": "no", "eval_on_start": "false", "report_to": "none"}
    keys |= {"push_to_hub": "false", "push_evaluation": "false"}
    keys |= {"num_answers": 0, "num_instructions": 0}
    overrides = [f"--{key}={value}" for key, value in keys.items()]
    return [sys.executable, "-m", "sft_pipeline", "train", str(config_file), *overrides]


def _wait_for_success(run: subprocess.Popen) -> None:
    if run.wait():
        raise SFTError(f"verify-resume: training failed with status {run.returncode}, see above")


def _wait_and_kill(run: subprocess.Popen, checkpoint: Path) -> None:
    """Send SIGKILL to the run when the checkpoint exists; raises SFTError if the run ended before that."""
    while run.poll() is None and not checkpoint.is_dir():
        time.sleep(0.01)
    run.kill()
    if run.wait() >= 0:
        _wait_for_success(run)
        raise SFTError("verify-resume: the run ended before it could be killed; give more --steps")


def compare_checkpoints(first: Path, second: Path) -> tuple[int, list[str]]:
    """Return how many values (tensors, numbers, texts) two checkpoints have, and the names of those that differ."""
    first_values, second_values = (dict(_read_values(folder)) for folder in (first, second))
    names = sorted(first_values.keys() | second_values.keys())
    return len(names), [name for name in names if not _is_same(first_values.get(name), second_values.get(name))]


def _read_values(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) for all files but CHECKSUMS_FILE, which would only repeat that a file differs."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS_FILE):
        yield from _flatten_values(str(file.relative_to(folder)), _read_file(file))


def _read_file(file: Path) -> Any:
    if file.suffix == ".safetensors":
        return load_file(file)
    if file.suffix in (".pt", ".pth", ".bin"):
        with safe_globals():
            return torch.load(file, map_location="cpu", weights_only=True)
    return json.loads(file.read_text(encoding="utf-8")) if file.suffix == ".json" else file.read_bytes()


def _flatten_values(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dictionaries and lists with their names, without those under a key of MEASURED."""
    if hasattr(value, "ortho_matrix"):  # a projector in the state of GaLore or APOLLO
        value = vars(value)
    if hasattr(value, "__tensor_flatten__"):  # a tensor of several, in the state of torchao's optimizers
        value = {part: getattr(value, part) for part in value.__tensor_flatten__()[0]}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else None
    if items is None:
        yield name, value
        return
    for key, item in items:
        if not str(key).endswith(MEASURED):
            yield from _flatten_values(f"{name}: {key}", item)


def _is_same(first: Any, second: Any) -> bool:
    """Return whether two values are equal bit by bit; a NaN equals itself."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        if first.dtype != second.dtype or first.shape != second.shape:
            return False
        first_bytes, second_bytes = (tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (first, second))
        return torch.equal(first_bytes, second_bytes)
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return first.dtype == second.dtype and first.tobytes() == second.tobytes()
    return type(first) is type(second) and (first == second or repr(first) == repr(second))
