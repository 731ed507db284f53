"""One forward and backward pass of the heaviest micro-batch before the first step: what does not fit fails at once.

Nothing is different afterwards: no weight, gradient, random state or state of the optimizer. What the optimizer will
keep from its first step on is set aside meanwhile. On a CPU a process that takes too much is killed by the kernel
without a word, so the line that is logged says what the rehearsal took and what is left.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer

from sft_pipeline.data.batches import StepBatches
from sft_pipeline.memory import GIB, enough_memory, peak_memory_gib, taken_and_free_gib

logger = logging.getLogger(__name__)

EPOCHS = 3  # the heaviest micro-batch is looked for in so many


def rehearse(
    trainer: Trainer, model: nn.Module, batches: StepBatches, step: Callable[..., Tensor], remedy: str
) -> None:
    """`step(model, inputs, targets)` with the same micro-batch in every process.

    Raises SFTError where memory runs out; `remedy` is what to do then.
    """
    if _steps_while_going_back(trainer):
        return
    rows = heaviest(batches, longest_together=trainer.args.train_sampling_strategy == "group_by_length")
    dataset: Any = trainer.train_dataset
    inputs = trainer.data_collator([dataset[row] for row in rows])
    what, device = f"{len(rows)} rows, {inputs['input_ids'].numel()} tokens", trainer.args.device
    targets, was_training = trainer._get_num_items_in_batch([inputs], device), model.training
    with enough_memory(f"the heaviest batch ({what})", remedy, trainer.args), same_randomness(device):
        kept = _optimizer_state(trainer)
        step(model, inputs, targets)
    model.zero_grad()
    model.train(was_training)
    _say(what, sum(map(_local_bytes, kept)) / GIB, device)


def heaviest(batches: StepBatches, longest_together: bool = False) -> list[int]:
    """The rows of the micro-batch with the most tokens, over all processes and the first epochs.

    Of packed rows, one of the step that has the most tokens a micro-batch, or the longest row.
    """
    lengths = batches.lengths
    if longest_together:
        return np.argsort(lengths, kind="stable")[-batches.rows :].tolist()
    found = [step for epoch in range(min(batches.epochs, EPOCHS)) for step in batches.steps(epoch)]
    found = found[: batches.max_steps] if batches.max_steps > 0 else found
    if batches.packed:
        found = [max(found, key=lambda step: max(lengths[step].sum() / batches._parts(step), lengths[step].max()))]
    divided = [rows for step in found for rows in batches.divided(step) if rows]
    return max(divided, key=lambda rows: lengths[rows].sum() if batches.packed else len(rows) * lengths[rows].max())


def _steps_while_going_back(trainer: Trainer) -> bool:
    """Whether a backward pass alone changes weights: DeepSpeed's engine, and optimizers that step layer by layer."""
    optimizer = str(trainer.args.optim)
    return trainer.is_deepspeed_enabled or "lomo" in optimizer or "layerwise" in optimizer


def _optimizer_state(trainer: Trainer) -> list[Tensor]:
    """As much as Adam will keep, two numbers a weight, if it has not yet; of other optimizers it is not known."""
    optimizer: Any = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    if optimizer.state or not isinstance(optimizer, torch.optim.Adam):
        return []
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return [torch.empty_like(weight) for weight in weights for _ in range(2)]


def _local_bytes(tensor: Tensor) -> int:
    """Of a tensor that is divided among processes, this one's part."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).nbytes


@contextmanager
def same_randomness(device: torch.device) -> Iterator[None]:
    """All random states are afterwards what they were."""
    generators: list[Any] = [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]
    before, of_numpy, states = random.getstate(), np.random.get_state(), [one.get_rng_state() for one in generators]
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(of_numpy)
        for one, state in zip(generators, states, strict=True):
            one.set_rng_state(state)


def _say(what: str, kept: float, device: torch.device) -> None:
    """kept: GiB of the optimizer to come. A GPU's peak holds them already; memory not yet written to is not taken."""
    peak = peak_memory_gib() + (0 if device.type == "cuda" else kept)
    taken, free = taken_and_free_gib(device)
    left = taken + free - peak
    if left < 0:
        logger.warning(
            "heaviest batch (%s): training needs %.2f GiB and %.2f are there; it may be killed",
            what,
            peak,
            taken + free,
        )
    else:
        logger.info("heaviest batch (%s): %.2f GiB at most, %.2f stay free", what, peak, left)
