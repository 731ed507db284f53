"""Files of the command `generate`: prompts to write, and how its output is read and compared."""

import json
from pathlib import Path

import pytest

from sft_pipeline.inference.sampling import SamplingParams

LINES = [f"What is {'the answer ' * (n % 4)}to {n}?" for n in range(9)]
DRAWN = SamplingParams(max_new_tokens=8, do_sample=True, temperature=1.5, seed=3)


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def partial_of(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def errors_of(output: Path) -> Path:
    return output.with_name(output.name + ".errors")


def are_same(rows: list[dict], expected: list[dict]) -> bool:
    """Equal, but for the rounding of the log-probabilities, which a batch's other rows may change."""
    logprobs = [[row.get("logprob", 0) for row in part] for part in (rows, expected)]
    bare = [[{k: v for k, v in row.items() if k != "logprob"} for row in part] for part in (rows, expected)]
    return bare[0] == bare[1] and logprobs[0] == pytest.approx(logprobs[1], abs=2e-3)
