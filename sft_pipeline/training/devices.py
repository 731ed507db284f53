"""GPUs that no process would use: a warning, and under Slurm, where they are allocated to the job, an error."""

from __future__ import annotations

import logging
import os

import torch
from transformers import TrainingArguments

from sft_pipeline.utils.errors import SFTError

logger = logging.getLogger(__name__)


def check_devices(args: TrainingArguments) -> None:
    """Compare the GPUs that this process sees with the processes on its machine, each of which uses one.

    Raises SFTError in a Slurm job that leaves some of them unused.
    """
    processes = count_local_processes(args)
    if args.device.type != "cuda" or processes is None or torch.cuda.device_count() <= processes:
        return
    gpus = torch.cuda.device_count()
    problem = f"{gpus} GPUs are visible and {processes} would be used, as a process uses one"
    if "SLURM_JOB_ID" in os.environ:
        raise SFTError(
            f"{problem}; give sbatch --ntasks-per-node {gpus} (with --config_file: raise NUM_PROCESSES or the file's "
            "num_processes), or hide the others with CUDA_VISIBLE_DEVICES"
        )
    logger.warning(
        "%s: start a process for each with `accelerate launch` or launch.sh, or hide the others with "
        "CUDA_VISIBLE_DEVICES",
        problem,
    )


def count_local_processes(args: TrainingArguments) -> int | None:
    """Return the number of processes of this run on this machine; None if the launcher does not tell."""
    if args.world_size == 1:
        return 1
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun, accelerate launch
        return int(os.environ["LOCAL_WORLD_SIZE"])
    if "SLURM_STEP_TASKS_PER_NODE" in os.environ:  # a task of srun
        return _expand_counts(os.environ["SLURM_STEP_TASKS_PER_NODE"])[int(os.environ["SLURM_NODEID"])]
    return None


def _expand_counts(text: str) -> list[int]:
    """Expand Slurm's numbers of tasks per node: "8(x2),4" is [8, 8, 4]."""
    counts = []
    for part in text.split(","):
        count, _, repeats = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(repeats or 1)
    return counts
