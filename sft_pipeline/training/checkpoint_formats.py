"""Load checkpoints across formats: saved with FSDP into a model without it, and the other way round.

A checkpoint is plain (safetensors, optimizer.pt), or saved with FSDP as FULL_STATE_DICT (one file each for model and
optimizer) or SHARDED_STATE_DICT (a folder each, with a file for every process), by any number of processes.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME
from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainingArguments
from transformers.trainer import OPTIMIZER_NAME as PLAIN_OPTIMIZER_NAME
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from sft_pipeline.utils.distributed import run_on_main_process
from sft_pipeline.utils.errors import SFTError

FULL, SHARDED = "FULL_STATE_DICT", "SHARDED_STATE_DICT"


def detect_state_dict_type(checkpoint: Path) -> str | None:
    """Return the state_dict_type of a checkpoint saved with FSDP, or None for any other checkpoint."""
    if (checkpoint / f"{FSDP_MODEL_NAME}.bin").is_file():
        return FULL
    return SHARDED if (checkpoint / f"{FSDP_MODEL_NAME}_0").is_dir() else None


# FSDP to plain


def load_unsharded_model(model: nn.Module, checkpoint: Path, state_dict_type: str) -> None:
    """Load the weights of an FSDP checkpoint, saved by any number of processes, into an unsharded model.

    Of a model with adapters these alone are saved.
    """
    has_adapters = hasattr(model, "peft_config")
    if state_dict_type == FULL:
        state = torch.load(checkpoint / f"{FSDP_MODEL_NAME}.bin", map_location="cpu", weights_only=True)
        set_model_state_dict(model, state, options=StateDictOptions(strict=not has_adapters))
        return
    folder = checkpoint / f"{FSDP_MODEL_NAME}_0"
    if has_adapters:
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, _load_shards(folder, "model", _get_saved_weights(model)))
    else:
        set_model_state_dict(model, _load_shards(folder, "model", get_model_state_dict(model)))


def load_unsharded_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path, state_dict_type: str
) -> None:
    """Load the optimizer state of an FSDP checkpoint, which is keyed by parameter names and not by indices."""
    if state_dict_type == FULL:
        state = torch.load(checkpoint / f"{OPTIMIZER_NAME}.bin", map_location="cpu", weights_only=True)
    else:
        folder = checkpoint / f"{OPTIMIZER_NAME}_0"
        state = _load_shards(folder, "optimizer", get_optimizer_state_dict(model, optimizer))
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))


def _load_shards(folder: Path, key: str, state: dict[str, Any]) -> dict[str, Any]:
    """Fill the tensors of `state` from the shards in `folder` and return it. Each process reads on its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # by no_dist
        dcp.load({key: state}, checkpoint_id=folder, no_dist=True)
    return state


# Plain to FSDP


def load_plain_model(args: TrainingArguments, model: nn.Module, checkpoint: Path) -> None:
    """Load the weights of a checkpoint saved without FSDP into a sharded model; called by every process.

    The first process reads one tensor at a time and sends each process its shard. Raises SFTError if the checkpoint
    lacks a tensor that is not tied to another.
    """
    targets = _get_saved_weights(model)
    files = run_on_main_process(args, lambda: _find_tensors(checkpoint))
    names = [name for name in targets if name in files]
    if missing := _find_missing(model, targets, names):
        raise SFTError(f"{checkpoint}: has no weights of {missing}; resume with the model that was saved")
    reader = _read_tensors(checkpoint, {name: files[name] for name in names}) if args.process_index == 0 else None
    for name in names:
        target = targets[name]
        if reader:
            value = next(reader).to(args.device, target.dtype)
        else:
            value = torch.empty(target.shape, dtype=target.dtype, device=args.device)
        if isinstance(target, DTensor):
            value = distribute_tensor(value, target.device_mesh, target.placements)
        else:
            torch.distributed.broadcast(value, src=0)
        target.copy_(value)


def _get_saved_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the model under the names that a plain checkpoint has; of adapters, these alone."""
    if not hasattr(model, "peft_config"):
        return fsdp2_canonicalize_names(model.state_dict())
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model)


def _find_missing(model: nn.Module, targets: dict[str, Tensor], names: list[str]) -> str | None:
    """Return the first name in `targets` but not in `names` that is not tied to one of these."""
    if hasattr(model, "peft_config"):
        return next((name for name in targets if name not in names), None)
    parameters = fsdp2_canonicalize_names(dict(model.named_parameters(remove_duplicate=False)))
    saved = {parameters[name] for name in names if name in parameters}
    return next((name for name in targets if name not in names and parameters.get(name) not in saved), None)


def _find_tensors(checkpoint: Path) -> dict[str, str]:
    """Return the file of each tensor in a plain checkpoint, by the tensor's name."""
    index = checkpoint / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        return json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    for file in (ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_NAME):
        if (checkpoint / file).is_file():
            with safe_open(checkpoint / file, "pt") as tensors:
                return dict.fromkeys(tensors.keys(), file)
    raise SFTError(f"{checkpoint}: has no *.safetensors; resume from a checkpoint of this project")


def _read_tensors(checkpoint: Path, files: dict[str, str]) -> Iterator[Tensor]:
    """Yield the tensors in the order of `files`, the file of each tensor's name."""
    for name, file in files.items():
        with safe_open(checkpoint / file, "pt") as tensors:
            yield tensors.get_tensor(name)


def load_plain_optimizer(
    args: TrainingArguments, model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path
) -> None:
    """Load the optimizer state of a checkpoint saved without FSDP, which is keyed by indices; called by every process.

    The first process reads it and sends each process its shard. Raises SFTError if it is of other parameters.
    """
    names = {p: name for name, p in fsdp2_canonicalize_names(dict(model.named_parameters())).items()}
    groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    states: list[dict[str, Any]] = []
    run_on_main_process(args, lambda: states.append(_read_plain_optimizer(checkpoint, groups)))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(model, optimizer, states[0] if states else {}, options=options)


def _read_plain_optimizer(checkpoint: Path, groups: list[list[str]]) -> dict[str, Any]:
    """Read the optimizer state and key it by parameter names. groups: the names in each group of the optimizer."""
    saved = torch.load(checkpoint / PLAIN_OPTIMIZER_NAME, map_location="cpu", weights_only=True)
    if [len(group["params"]) for group in saved["param_groups"]] != [len(group) for group in groups]:
        raise SFTError(f"{checkpoint / PLAIN_OPTIMIZER_NAME}: is of other parameters; train those of the saved run")
    pairs = zip(saved["param_groups"], groups)
    named = {index: name for group, names in pairs for index, name in zip(group["params"], names)}
    return {
        "state": {named[index]: values for index, values in saved["state"].items()},
        "param_groups": [group | {"params": names} for group, names in zip(saved["param_groups"], groups)],
    }
