"""A whole training run of a config, and what a folder holds."""

from pathlib import Path

from rich.console import Console

from sft_pipeline.config import parse_config
from sft_pipeline.train import train


def run_train(config: Path, *overrides: str) -> dict:
    return train(parse_config(str(config), list(overrides)), Console(quiet=True))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
