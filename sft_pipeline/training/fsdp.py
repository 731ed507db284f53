"""Shard a model with torch's FSDP2 (`fsdp: true`) where accelerate and `Trainer` do not, or not correctly.

- accelerate shards on accelerators only; on CPUs it would silently train a full replica. torch shards there over gloo.
- With `cpu_ram_efficient_loading` the first process alone loads the model (sharded_loading.py).
- The final model is saved unsharded, also when checkpoints are sharded (`state_dict_type: SHARDED_STATE_DICT`).
- A run resumes from a checkpoint saved with or without FSDP, with any `state_dict_type` (checkpoint_formats.py).
- Gradients are reduced, and so sharded, after each micro-batch. In 16 bits they are reduced in float32, and the outputs
  of the model (a loss, loss sums) are not cast down.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import SCHEDULER_NAME

from sft_pipeline.training.checkpoint_formats import (
    FULL,
    SHARDED,
    detect_state_dict_type,
    load_plain_model,
    load_plain_optimizer,
    load_unsharded_model,
    load_unsharded_optimizer,
)
from sft_pipeline.training.optimizers import use_evaluated_weights
from sft_pipeline.training.parallel_sizes import check_parallel_sizes, get_data_ranks
from sft_pipeline.training.sharded_loading import repair_sharding, uses_fsdp
from sft_pipeline.utils.errors import SFTError


class ShardedTrainer(Trainer):
    """`Trainer` that shards on CPUs, saves the model unsharded and resumes from checkpoints with and without FSDP.

    data_ranks: the number of processes that get different rows, and the position of this one among them.
    """

    data_ranks: tuple[int, int]

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, enable FSDP on CPUs and fix the plugin's settings.

        Overridden because accelerate leaves a model unsharded on CPUs, keeps whole gradients while they accumulate,
        rounds their sums in 16 bits, and gives optimizers of models without weights wrong parameters.
        """
        check_parallel_sizes(self.args, getattr(self, "model", None))
        super().create_accelerator_and_postprocess()
        self.data_ranks = get_data_ranks(self.accelerator)
        if not uses_fsdp():
            return
        if self.args.world_size == 1:
            raise SFTError("fsdp needs two or more processes and this run has one: start more, or turn fsdp off")
        if self.accelerator.distributed_type == DistributedType.MULTI_CPU:
            self._enable_cpu_sharding()
        plugin = self.accelerator.state.fsdp_plugin
        _check_plugin(plugin)
        if policy := plugin.mixed_precision_policy:
            plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)
        accelerator_config: Any = self.args.accelerator_config
        if "sync_each_batch" not in (accelerator_config.gradient_accumulation_kwargs or {}):
            # Else gradients stay whole on every process until the last micro-batch of a step.
            self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
        prepare = self.accelerator.prepare

        def prepare_and_repair(*objects: Any, **options: Any) -> Any:
            if len(objects) == 1 and isinstance(objects[0], nn.Module):  # accelerate wants the optimizer as well
                raise SFTError("evaluate: fsdp shards the model when training starts; call train first")
            with repair_sharding(objects) if plugin.cpu_ram_efficient_loading else nullcontext():
                return prepare(*objects, **options)

        self.accelerator.prepare = prepare_and_repair

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
            with use_state_dict_type(self.accelerator.state.fsdp_plugin, FULL):
                super().save_model(output_dir, _internal_call=True)
        # As for a checkpoint: else the library pushes the whole output folder to the hub.
        super().save_model(output_dir, _internal_call=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights of a checkpoint, whether it and this run are with FSDP or without.

        Overridden because the library loads an FSDP checkpoint only with FSDP, and only with its own state_dict_type.
        """
        checkpoint = Path(resume_from_checkpoint)
        state_dict_type = detect_state_dict_type(checkpoint)
        own_model: Any = self.model if model is None else model
        if self.is_fsdp_enabled and state_dict_type:
            with use_state_dict_type(self.accelerator.state.fsdp_plugin, state_dict_type):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif self.is_fsdp_enabled:
            load_plain_model(self.args, own_model, checkpoint)
        elif state_dict_type:
            load_unsharded_model(own_model, checkpoint, state_dict_type)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Load the best checkpoint, which another start of this run may have saved with FSDP or without.

        Overridden as `_load_from_checkpoint` is, and so that the optimizer does not change the loaded weights again.
        """
        use_evaluated_weights(self.optimizer)
        best: Any = self.state.best_model_checkpoint
        state_dict_type = detect_state_dict_type(Path(best))
        if state_dict_type == (self._state_dict_type if self.is_fsdp_enabled else None):
            super()._load_best_model()
        else:
            self._load_from_checkpoint(best)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the optimizer and scheduler states, whether the checkpoint and this run are with FSDP or without.

        Overridden as `_load_from_checkpoint` is.
        """
        state_dict_type = None if checkpoint is None else detect_state_dict_type(Path(checkpoint))
        if checkpoint is None or (not self.is_fsdp_enabled and state_dict_type is None):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if self.is_fsdp_enabled and state_dict_type:
            with use_state_dict_type(self.accelerator.state.fsdp_plugin, state_dict_type):
                super()._load_optimizer_and_scheduler(checkpoint)
            return
        model: Any = self.model
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        if state_dict_type:
            load_unsharded_optimizer(model, optimizer, Path(checkpoint), state_dict_type)
        else:
            load_plain_optimizer(self.args, model, optimizer, Path(checkpoint))
        scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    @property
    def _state_dict_type(self) -> str:
        return self.accelerator.state.fsdp_plugin.state_dict_type.name


def _check_plugin(plugin: FullyShardedDataParallelPlugin) -> None:
    """Raise SFTError for unsupported settings in `fsdp_config`."""
    if plugin.fsdp_version != 2:
        raise SFTError("fsdp_config: version 1 is not supported; set version to 2")


@contextmanager
def use_state_dict_type(plugin: FullyShardedDataParallelPlugin, name: str) -> Iterator[None]:
    """Within this block, checkpoints are saved and loaded with the state_dict_type `name`."""
    settings = ("state_dict_type", "state_dict_config", "optim_state_dict_config")
    previous = {setting: getattr(plugin, setting) for setting in settings}
    plugin.state_dict_config = plugin.optim_state_dict_config = None  # set to those of the type
    plugin.set_state_dict_type(name)
    try:
        yield
    finally:
        vars(plugin).update(previous)


def gather_weights(source: nn.Module | nn.Parameter) -> AbstractContextManager:
    """Gather, inside the context, the weights of a model, or one, that DeepSpeed's ZeRO-3 sharded while it loaded
    them."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    zero: Any = importlib.import_module("deepspeed").zero  # an attribute, not a module
    return zero.GatheredParameters([source] if isinstance(source, nn.Parameter) else list(source.parameters()))
