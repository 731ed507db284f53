"""Load a model on the first process alone, and let FSDP2 send the others their shards (`cpu_ram_efficient_loading`).

The other processes build the model without weights: parameters on torch's meta device, buffers with their values. What
needs weights (the checks of the head and of packed rows) is done by the first process, and its verdict is sent to the
others (`share_verdict` in utils/distributed.py). accelerate then shards the empty parameters and fills them.

    if loads_on_main_process(args):
        model = load_on_main_process(args, build_whole, build_empty)
        with use_verdicts_of_main_process(args):
            model, collator = prepare_model(model, ...)
        align_with_main_process(args, model)

A model that the caller has loaded is whole on every process, and needs none of this.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, TrainingArguments

from sft_pipeline.utils.distributed import run_on_all_processes, run_on_main_process
from sft_pipeline.utils.errors import SFTError


def uses_fsdp() -> bool:
    """Return whether accelerate shards with FSDP: it sets this when it creates the plugin, `accelerate launch` too."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def loads_on_main_process(args: TrainingArguments) -> bool:
    """Return whether only the first process is to load the weights: `cpu_ram_efficient_loading` of FSDP.

    It is a key of `fsdp_config`; without `fsdp: true`, `accelerate launch` passes it on from a config file.
    """
    if args.world_size == 1:
        return False
    if args.fsdp_plugin_args is not None:
        return bool(args.fsdp_plugin_args["cpu_ram_efficient_loading"])
    return uses_fsdp() and os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true"


def load_on_main_process(
    args: TrainingArguments, build_whole: Callable[[], PreTrainedModel], build_empty: Callable[[], PreTrainedModel]
) -> PreTrainedModel:
    """Return `build_whole()` on the first process of all, and then `build_empty()` on the others.

    An error of one of them is raised on all.
    """
    models: list[PreTrainedModel] = []
    run_on_main_process(args, lambda: models.append(build_whole()))
    run_on_all_processes(args, lambda: None if models else models.append(build_empty()))
    return models[0]


def align_with_main_process(args: TrainingArguments, model: nn.Module) -> None:
    """Take over what the first process has beside the weights: types, buffers and random states.

    Random states are those that all processes would have had after loading and changing the whole model. Raises
    SFTError if the parameters of the processes differ in their names or shapes, which would end in a deadlock.
    """
    parameters = dict(model.named_parameters())
    expected, buffers, random_states = run_on_main_process(
        args, lambda: (_describe_parameters(parameters), dict(model.named_buffers()), _get_random_states())
    )
    run_on_all_processes(args, lambda: _check_parameters(_describe_parameters(parameters), expected))
    if args.process_index == 0:
        return
    for name, (_, dtype, _) in expected.items():
        parameters[name].data = parameters[name].data.to(dtype)
    for name, buffer in model.named_buffers():
        buffer.data = buffers[name]
    _set_random_states(random_states)


def _describe_parameters(parameters: dict[str, nn.Parameter]) -> dict[str, tuple[tuple[int, ...], torch.dtype, bool]]:
    return {name: (tuple(weight.shape), weight.dtype, weight.requires_grad) for name, weight in parameters.items()}


def _check_parameters(own: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise SFTError if names, order, shapes or frozen parameters differ; types may."""
    if list(own) == list(expected) and all(own[name][::2] == expected[name][::2] for name in own):
        return
    names = [*expected, *(name for name in own if name not in expected)]
    different = next((n for n in names if own.get(n, ())[::2] != expected.get(n, ())[::2]), names[0])
    raise SFTError(
        f"fsdp_config: cpu_ram_efficient_loading: the first process loaded another {different} than the model's config "
        "describes; set it to false"
    )


def _get_random_states() -> tuple[Any, Any, torch.Tensor]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_random_states(states: tuple[Any, Any, torch.Tensor]) -> None:
    """Set those of Python, NumPy and torch on the CPU; no device has drawn a number while the model is prepared."""
    python_state, numpy_state, torch_state = states
    random.setstate(python_state)
    np.random.set_state(numpy_state)
    torch.set_rng_state(torch_state)


@contextmanager
def repair_sharding(objects: tuple[Any, ...]) -> Iterator[None]:
    """Repair, when the block ends, what accelerate 1.15 breaks in the block while it shards an empty model.

    objects: what `Accelerator.prepare` gets; without a model that is not sharded yet nothing is done. accelerate finds
    the new parameters of the optimizer by the addresses of the old ones, which are all 0 on the meta device: the
    optimizer would get the same one again and again. It takes every entry of the state dict for a sharded parameter: a
    buffer that is saved is an error, so within the block no buffer is.
    """
    models = [value for value in objects if isinstance(value, nn.Module) and not isinstance(value, FSDPModule)]
    optimizers = [value for value in objects if isinstance(value, torch.optim.Optimizer)]
    groups = [_list_group_names(optimizer, models[0]) for optimizer in optimizers] if models else []
    saved_buffers = [_list_saved_buffers(model) for model in models]
    for model, names in zip(models, saved_buffers):
        _register_buffers(model, names, persistent=False)
    yield
    for model, names in zip(models, saved_buffers):
        _register_buffers(model, names, persistent=True)
    for optimizer, names_of_groups in zip(optimizers, groups):
        parameters = fsdp2_canonicalize_names(dict(models[0].named_parameters()))
        for group, names in zip(optimizer.param_groups, names_of_groups, strict=True):
            group["params"] = [parameters[name] for name in names]


def _list_group_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    """Return the names of the parameters in each group of the optimizer."""
    names = {parameter: name for name, parameter in fsdp2_canonicalize_names(dict(model.named_parameters())).items()}
    return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]


def _list_saved_buffers(model: nn.Module) -> list[str]:
    saved = model.state_dict().keys()
    return [name for name, _ in model.named_buffers() if name in saved]


def _register_buffers(model: nn.Module, names: list[str], persistent: bool) -> None:
    for name in names:
        module_name, _, leaf = name.rpartition(".")
        module = model.get_submodule(module_name)
        module.register_buffer(leaf, module.get_buffer(leaf), persistent=persistent)
