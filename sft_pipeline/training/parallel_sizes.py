"""Which processes get different rows: all of them, as a row is not divided and no layer is split among devices.

FSDP's own two sizes, `dp_replicate` and `dp_shard` (shards within groups of processes, replicas among the groups), are
of data parallelism: every process has rows of its own.
"""

from __future__ import annotations

import os
from typing import Any

from accelerate import Accelerator, ParallelismConfig
from transformers import TrainingArguments

from sft_pipeline.utils.errors import SFTError

SHARD_REMEDY = "shard the model with fsdp (configs/accelerate/fsdp2.yaml)"
SHORTEN_REMEDY = "for long rows use fsdp with its activation_checkpointing, or a lower max_length"
REMEDIES = {
    "tp_size": ("tensor parallelism", SHARD_REMEDY),
    "cp_size": ("context parallelism", SHORTEN_REMEDY),
    "sp_size": ("sequence parallelism", SHORTEN_REMEDY),
}


def check_parallel_sizes(args: TrainingArguments, model: Any = None) -> None:
    """Raise SFTError for sizes of tensor, context or sequence parallelism, and for a model loaded in parts.

    The processes of such a group have to get the same rows, and would get different ones here. The sizes are those of
    `parallelism_config`, of accelerate's config files (PARALLELISM_CONFIG_TP_SIZE, ...) and of DeepSpeed's config.
    """
    config = args.parallelism_config
    if config is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        config = ParallelismConfig()  # reads the variables
    sizes = {name: (getattr(config, name, None), f"parallelism_config_{name}") for name in REMEDIES}
    deepspeed: Any = getattr(getattr(args, "hf_deepspeed_config", None), "config", {})
    sizes |= {
        name: (size, f"deepspeed: {key}")
        for name, key, size in (
            ("tp_size", "autotp_size", deepspeed.get("tensor_parallel", {}).get("autotp_size")),
            ("sp_size", "sequence_parallel_size", deepspeed.get("sequence_parallel_size")),
        )
        if size
    }
    for name, (size, source) in sizes.items():
        if (size or 1) > 1:
            kind, remedy = REMEDIES[name]
            raise SFTError(f"{source} is {size}: {kind} is not supported; set it to 1 and {remedy}")
    if any((getattr(model, name, None) or 1) > 1 for name in ("tp_size", "fsdp_size")):
        raise SFTError(
            f"{type(model).__name__} was loaded with a tp_plan or distributed_config, in parts; load it whole, and "
            f"{SHARD_REMEDY}"
        )


def get_data_ranks(accelerator: Accelerator) -> tuple[int, int]:
    """Return the number of processes that get different rows, and the position of this one among them."""
    mesh = accelerator.torch_device_mesh
    if mesh is None:
        return accelerator.num_processes, accelerator.process_index
    return mesh["dp"].size(), mesh["dp"].get_local_rank()
