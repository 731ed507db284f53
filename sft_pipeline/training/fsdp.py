"""Shard a model with torch's FSDP2 (`fsdp: true`) where accelerate and `Trainer` do not, or not correctly.

- accelerate shards on accelerators only; on CPUs it would silently train a full replica. torch shards there over gloo.
- The final model is saved unsharded, also when checkpoints are sharded (`state_dict_type: SHARDED_STATE_DICT`).
- A run without FSDP, such as one in a single process, can resume from a checkpoint saved with FSDP.
- In 16 bits, gradients are reduced in float32, and the outputs of the model (a loss, loss sums) are not cast down.
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
    """`Trainer` that shards on CPUs, saves the model unsharded and resumes from FSDP checkpoints without FSDP."""

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, enable FSDP on CPUs and fix the plugin's settings.

        Overridden because accelerate leaves a model unsharded on CPUs, and rounds sums of gradients in 16 bits.
        """
        super().create_accelerator_and_postprocess()
        # Set by accelerate when it creates the plugin, or by `accelerate launch`.
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
            return
        if self.args.world_size == 1:
            raise SFTError("fsdp needs two or more processes and this run has one: start more, or turn fsdp off")
        if self.accelerator.distributed_type == DistributedType.MULTI_CPU:
            self._enable_cpu_sharding()
        plugin = self.accelerator.state.fsdp_plugin
        _check_plugin(plugin)
        if policy := plugin.mixed_precision_policy:
            plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)

    def _enable_cpu_sharding(self) -> None:
        """Do what accelerate does for several GPUs (accelerate/state.py, AcceleratorState.__init__)."""
        plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args or {})
        if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
            raise SFTError("fsdp_config: cpu_offload needs an accelerator and this run is on CPUs; set it to false")
        if self.accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(self.accelerator.mixed_precision)
        state = self.accelerator.state
        state.fsdp_plugin, state.distributed_type = plugin, DistributedType.FSDP
        PartialState().distributed_type = DistributedType.FSDP  # all instances share their attributes
        self.is_fsdp_enabled = True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model unsharded, unless it is called for a checkpoint.

        Overridden because with SHARDED_STATE_DICT the library writes no model file outside checkpoints.
        """
        if self.is_fsdp_enabled and self._state_dict_type == SHARDED and not _internal_call:
            plugin = self.accelerator.state.fsdp_plugin
            plugin.set_state_dict_type(FULL)
            try:
                super().save_model(output_dir, _internal_call=True)
            finally:
                plugin.set_state_dict_type(SHARDED)
        # As for a checkpoint: else the library pushes the whole output folder to the hub.
        super().save_model(output_dir, _internal_call=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights of a checkpoint, also one saved with FSDP into a model without.

        Overridden because the library loads an FSDP checkpoint only with FSDP. Raises SFTError for another
        state_dict_type than the run's, and for adapters of an FSDP run without FSDP.
        """
        checkpoint = Path(resume_from_checkpoint)
        state_dict_type = detect_state_dict_type(checkpoint)
        if self.is_fsdp_enabled and state_dict_type != self._state_dict_type:
            reason = f"has state_dict_type {state_dict_type}" if state_dict_type else "was saved without fsdp"
            remedy = "use the one it was saved with"
            raise SFTError(f"{checkpoint}: {reason} and this run has {self._state_dict_type}; {remedy}")
        if self.is_fsdp_enabled or state_dict_type is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif hasattr(self.model, "peft_config"):
            raise SFTError(f"{checkpoint}: adapters saved with fsdp are loaded with fsdp only; start more processes")
        else:
            unsharded_model: Any = self.model
            load_unsharded_model(unsharded_model, checkpoint, state_dict_type)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the optimizer and scheduler states, also from an FSDP checkpoint without FSDP.

        Overridden because the library loads an FSDP optimizer state only with FSDP.
        """
        state_dict_type = None
        if checkpoint is not None and not self.is_fsdp_enabled:
            state_dict_type = detect_state_dict_type(Path(checkpoint))
        if checkpoint is None or state_dict_type is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        model: Any = self.model
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        load_unsharded_optimizer(model, optimizer, Path(checkpoint), state_dict_type)
        scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    @property
    def _state_dict_type(self) -> str:
        return self.accelerator.state.fsdp_plugin.state_dict_type.name


def _check_plugin(plugin: FullyShardedDataParallelPlugin) -> None:
    """Raise SFTError for unsupported settings in `fsdp_config`."""
    if plugin.fsdp_version != 2:
        raise SFTError("fsdp_config: version 1 is not supported; set version to 2")
    if plugin.cpu_ram_efficient_loading:
        raise SFTError(
            "fsdp_config: cpu_ram_efficient_loading leaves all processes but one without weights, "
            "which the checks of the head and of packing need in each; set it to false"
        )


def gather_weights(model: nn.Module) -> AbstractContextManager:
    """Gather, inside the context, weights that DeepSpeed's ZeRO-3 sharded while it loaded them."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    zero: Any = importlib.import_module("deepspeed.zero")
    return zero.GatheredParameters(list(model.parameters()))


def detect_state_dict_type(checkpoint: Path) -> str | None:
    """Return the state_dict_type of a checkpoint saved with FSDP, or None for any other checkpoint."""
    if (checkpoint / f"{FSDP_MODEL_NAME}.bin").is_file():
        return FULL
    return SHARDED if (checkpoint / f"{FSDP_MODEL_NAME}_0").is_dir() else None


def load_unsharded_model(model: nn.Module, checkpoint: Path, state_dict_type: str) -> None:
    """Load the weights of an FSDP checkpoint, saved by any number of processes, into an unsharded model."""
    if state_dict_type == FULL:
        state = torch.load(checkpoint / f"{FSDP_MODEL_NAME}.bin", map_location="cpu", weights_only=True)
    else:
        state = _load_shards(checkpoint / f"{FSDP_MODEL_NAME}_0", "model", get_model_state_dict(model))
    set_model_state_dict(model, state)


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
