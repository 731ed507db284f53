"""Parameters divided among processes by torch's FSDP2 (`fsdp: true`), where accelerate and `Trainer` leave gaps.

- accelerate divides on accelerators alone; on CPUs it would train undivided without a word. torch does it over gloo.
- A finished model is saved whole, also where checkpoints are divided (`state_dict_type: SHARDED_STATE_DICT`).
- A run without FSDP, as one in a single process, goes on from a checkpoint of one with it.
- In 16 bits gradients are summed in float32, and what the model returns (a loss, sums of losses) is not rounded.
"""

from __future__ import annotations

import importlib
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import SCHEDULER_NAME

from sft_pipeline.utils.errors import SFTError

FULL, SHARDED = "FULL_STATE_DICT", "SHARDED_STATE_DICT"


class ShardedTrainer(Trainer):
    """`Trainer` with the gaps above filled."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # What accelerate sets, or has been started with.
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
            return
        if self.args.world_size == 1:
            raise SFTError("fsdp divides a model among processes and this is one: start more, or leave fsdp out")
        if self.accelerator.distributed_type == DistributedType.MULTI_CPU:
            self._divide_on_cpus()
        plugin = self.accelerator.state.fsdp_plugin
        _check(plugin)
        if policy := plugin.mixed_precision_policy:
            plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)

    def _divide_on_cpus(self) -> None:
        """What accelerate does for several GPUs (accelerate/state.py, AcceleratorState.__init__)."""
        plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args or {})
        if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
            raise SFTError(
                "fsdp_config: cpu_offload moves weights from an accelerator to the CPU, and this run is on CPUs"
            )
        if self.accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(self.accelerator.mixed_precision)
        state = self.accelerator.state
        state.fsdp_plugin, state.distributed_type = plugin, DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.is_fsdp_enabled = True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.is_fsdp_enabled and self._state_dict_type == SHARDED and not _internal_call:
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoint = Path(resume_from_checkpoint)
        saved = detect_state_dict_type(checkpoint)
        if self.is_fsdp_enabled and saved != self._state_dict_type:
            has = f"has state_dict_type {saved}" if saved else "was saved without fsdp"
            remedy = "use the one it was saved with"
            raise SFTError(f"{checkpoint}: {has} and this run has {self._state_dict_type}; {remedy}")
        if self.is_fsdp_enabled or saved is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif hasattr(self.model, "peft_config"):
            raise SFTError(f"{checkpoint}: adapters saved with fsdp go on with it alone; start more processes")
        else:
            own: Any = self.model
            load_whole_model(own, checkpoint, saved)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        saved = None if self.is_fsdp_enabled or checkpoint is None else detect_state_dict_type(Path(checkpoint))
        if checkpoint is None or saved is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        model: Any = self.model
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        load_whole_optimizer(model, optimizer, Path(checkpoint), saved)
        scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    @property
    def _state_dict_type(self) -> str:
        return self.accelerator.state.fsdp_plugin.state_dict_type.name


def _check(plugin: FullyShardedDataParallelPlugin) -> None:
    """Raise SFTError for what is not served."""
    if plugin.fsdp_version != 2:
        raise SFTError("fsdp_config: version 1 is not served; set version to 2")
    if plugin.cpu_ram_efficient_loading:
        raise SFTError(
            "fsdp_config: cpu_ram_efficient_loading leaves all processes but one without weights, "
            "and each tests the head and packed rows with its own; set it to false"
        )


def gather_weights(model: nn.Module) -> AbstractContextManager:
    """Inside, the weights are whole that DeepSpeed's ZeRO-3 has divided while they were loaded."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    zero: Any = importlib.import_module("deepspeed.zero")
    return zero.GatheredParameters(list(model.parameters()))


def detect_state_dict_type(checkpoint: Path) -> str | None:
    """The state_dict_type of a checkpoint that was saved with FSDP; None for any other."""
    if (checkpoint / f"{FSDP_MODEL_NAME}.bin").is_file():
        return FULL
    return SHARDED if (checkpoint / f"{FSDP_MODEL_NAME}_0").is_dir() else None


def load_whole_model(model: nn.Module, checkpoint: Path, saved: str) -> None:
    """The weights of all processes that saved `checkpoint`, into one model."""
    if saved == FULL:
        state = torch.load(checkpoint / f"{FSDP_MODEL_NAME}.bin", map_location="cpu", weights_only=True)
    else:
        state = _joined(checkpoint / f"{FSDP_MODEL_NAME}_0", "model", get_model_state_dict(model))
    set_model_state_dict(model, state)


def load_whole_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path, saved: str) -> None:
    """The optimizer's state likewise; FSDP's has the names of parameters where others have numbers."""
    if saved == FULL:
        state = torch.load(checkpoint / f"{OPTIMIZER_NAME}.bin", map_location="cpu", weights_only=True)
    else:
        state = _joined(checkpoint / f"{OPTIMIZER_NAME}_0", "optimizer", get_optimizer_state_dict(model, optimizer))
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))


def _joined(folder: Path, key: str, state: dict[str, Any]) -> dict[str, Any]:
    """`state` with its tensors filled from the shards in `folder`. Each process reads by itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which was asked for
        dcp.load({key: state}, checkpoint_id=folder, no_dist=True)
    return state
