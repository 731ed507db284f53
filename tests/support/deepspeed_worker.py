"""`sft-pipeline train ...` for DeepSpeed on CPUs: deepspeed_worker.py in_step|gathered train CONFIG ...

accelerate starts DeepSpeed on accelerators only, so it is made to take the CPUs for some.
in_step: as if no device had room for the gathered weights.
"""

import os
import sys

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from sft_pipeline import config
from sft_pipeline.cli import main
from sft_pipeline.training.sharded_answers import ShardedAnswerer

os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
PartialState._prepare_backend = lambda self, cpu, *others: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
config._use_cpu_without_accelerator = lambda: None
if sys.argv.pop(1) == "in_step":
    ShardedAnswerer.fits = lambda self: False
main()
