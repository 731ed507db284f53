"""A whole training run of a config, and what a folder holds."""

import sys
from pathlib import Path

from rich.console import Console

from sft_pipeline import cli
from sft_pipeline.config import parse_config
from sft_pipeline.train import train

# Of a run on the CPU that evaluates and saves at every other step.
EVALUATED_RUN = {
    "template": "role",
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "use_cpu": True,
    "disable_tqdm": True,
}


def run_train(config: Path, *overrides: str) -> dict:
    return train(parse_config(str(config), list(overrides)), Console(quiet=True))


def list_imports_of_train(config: str) -> set[str]:
    """Run `sft-pipeline train`, in a process of its own; return the packages that it has imported then."""
    cli.main(["train", config])
    return {name.partition(".")[0] for name in sys.modules}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
