"""Generate answers with a model that FSDP2 or DeepSpeed's ZeRO-3 shards among the processes.

    answerer = ShardedAnswerer(trainer)      # before the model is sharded
    with answerer.gather(model) as whole:    # a plain model on each process: each answers a share of the prompts
        ...
    with answerer.keep_in_step(model):       # the sharded model: all processes answer the same prompts
        ...

The model that trains is only read. `gather` fills a copy of it that has no weights of its own, tensor by tensor, in
bfloat16 if the run is in bfloat16, and frees it afterwards. Where it does not fit, the sharded model itself is called:
a forward pass gathers the weights layer by layer, for which all processes have to run the same passes.
"""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled

from sft_pipeline.training.devices import count_local_processes
from sft_pipeline.training.fsdp import gather_weights
from sft_pipeline.training.memory import GIB, measure_memory_gib
from sft_pipeline.utils.distributed import run_on_all_processes

logger = logging.getLogger(__name__)

# Beside the copy: the keys and values of eight answers, and one weight while it is gathered.
MEMORY_MARGIN = 1.2


def is_sharded(trainer: Trainer) -> bool:
    """Return whether FSDP or ZeRO-3 shards the model of `trainer`."""
    return trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()


class ShardedAnswerer:
    """Makes the sharded model of `trainer` answer prompts; see above.

    It is created before the model is sharded, when the model can still be copied.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        model: Any = trainer.model
        empty = {
            id(weight): nn.Parameter(torch.empty(0, dtype=weight.dtype), requires_grad=False)
            for weight in model.parameters()
        }
        self._copy: PreTrainedModel = copy.deepcopy(model, empty)
        for module in self._copy.modules():
            vars(module).pop("forward", None)  # it would call the original; generation needs that of the class
        self._num_bytes = sum(map(self._count_bytes, model.parameters()))
        self._fits: bool | None = None

    @property
    def dtype(self) -> torch.dtype | None:
        """The type of the weights to generate with; None for their own."""
        return torch.bfloat16 if self.trainer.accelerator.mixed_precision == "bf16" else None

    def fits(self) -> bool:
        """Return whether every process has room for the whole model; decided at the first call, by all together."""
        if self._fits is None:
            args: Any = self.trainer.args
            free = measure_memory_gib(args.device)[1] * GIB - self._count_optimizer_bytes()
            copies = 1
            if args.device.type == "cpu":
                # The processes of a machine share it, and generation rearranges each weight (eval_mode.py).
                copies = 2 * (count_local_processes(args) or args.world_size)
            self._fits = min(run_on_all_processes(args, lambda: free >= MEMORY_MARGIN * copies * self._num_bytes))
        return self._fits

    def log_choice(self) -> None:
        """Log how prompts will be answered."""
        size = f"{self._num_bytes / GIB:,.1f} GiB"
        if self.fits():
            logger.info("held-out prompts: the weights are gathered on every process for them (%s)", size)
        else:
            logger.info(
                "held-out prompts: all processes answer the same ones, layer by layer, as the gathered weights (%s) do "
                "not fit on every device; num_answers: 0 and num_instructions: 0 turn them off",
                size,
            )

    @contextmanager
    def gather(self, model: nn.Module) -> Iterator[PreTrainedModel]:
        """Within this block there is a plain model with the weights of `model` on every process."""
        device: Any = self.trainer.args.device
        try:
            self._copy.to(device).eval()
            self._fill_copy(model, device)
            yield self._copy
        finally:
            for weight in self._copy.parameters():
                weight.data = torch.empty(0, dtype=weight.dtype, device=device)
            gc.collect()  # layers that were rearranged for generation refer to themselves
            if device.type != "cpu":
                torch.get_device_module(device).empty_cache()

    @torch.no_grad()
    def _fill_copy(self, model: nn.Module, device: torch.device) -> None:
        weights = fsdp2_canonicalize_names(dict(model.named_parameters(remove_duplicate=False)))
        for name, weight in self._copy.named_parameters():
            with gather_weights(weights[name]):
                value = weights[name].detach().to(device, self.dtype if weights[name].is_floating_point() else None)
                # A weight that ZeRO-3 gathered is freed when the block ends; those of FSDP are new tensors.
                weight.data = value.full_tensor() if isinstance(value, DTensor) else value.clone()
        buffers = fsdp2_canonicalize_names(dict(model.named_buffers()))
        for name, buffer in self._copy.named_buffers():
            buffer.copy_(buffers[name])

    @contextmanager
    def keep_in_step(self, model: nn.Module) -> Iterator[nn.Module]:
        """Within this block, the logits of `model` are the first process' on every process.

        So all choose the same tokens, and run the same forward passes.
        """

        def share_logits(module: nn.Module, args: Any, output: Any) -> None:
            output.logits = output.logits.contiguous()
            dist.broadcast(output.logits, src=0)

        hook = model.register_forward_hook(share_logits)
        try:
            yield model
        finally:
            hook.remove()

    def _count_bytes(self, weight: Any) -> int:
        """Return the bytes of a weight in the copy; `ds_numel` is the full size of one sharded by ZeRO-3."""
        size = (self.dtype or weight.dtype).itemsize if weight.is_floating_point() else weight.dtype.itemsize
        return getattr(weight, "ds_numel", weight.numel()) * size

    def _count_optimizer_bytes(self) -> int:
        """Return the bytes of Adam's state that a step will allocate; 0 after the first step."""
        optimizer: Any = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
        if not isinstance(optimizer, torch.optim.Adam) or optimizer.state:
            return 0
        weights: list[Tensor] = [weight for group in optimizer.param_groups for weight in group["params"]]
        return sum(2 * (weight.to_local() if isinstance(weight, DTensor) else weight).nbytes for weight in weights)
