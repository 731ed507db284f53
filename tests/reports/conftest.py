"""The output folder of a tiny run, copies to change, and a second run to compare with."""

import json
import logging
import shutil
from pathlib import Path

import datasets
import pytest
import yaml
from rich.console import Console
from support.reports import edit

from sft_pipeline.config import parse_config
from sft_pipeline.train import train


@pytest.fixture(scope="module", autouse=True)
def with_charts(draw_charts) -> None:
    """The reports of these runs have their charts."""


@pytest.fixture(scope="module")
def config(model_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    words = ["text", "答", "answer"]
    rows = [
        {"instruction": f"Say {w} {n} times.", "output": " ".join([w] * n) + "."} for n in range(1, 9) for w in words
    ]
    long_row = {"instruction": "Go on.", "output": "text " * 400, "<id>": 18}
    (folder / "rows.json").write_text(json.dumps([*rows[:18], long_row]))
    (folder / "held.json").write_text(json.dumps(rows[18:]))
    keys = {
        "model_name_or_path": str(model_folder),
        "train_data": str(folder / "rows.json"),
        "eval_data": str(folder / "held.json"),
        "template": "role",
        "max_length": 128,
        "num_answers": 3,
        "num_instructions": 2,
        "max_new_tokens": 6,
        "max_steps": 4,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(keys))
    return file


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory) -> tuple[Path, str]:
    """The output folder of a run with its page, and what was printed; read only."""
    folder = tmp_path_factory.mktemp("run") / "out"
    shown = tmp_path_factory.mktemp("shown") / "text"
    with shown.open("w") as file:
        train(parse_config(str(config), ["--output_dir", str(folder)]), Console(file=file, width=100))
    return folder, shown.read_text()


@pytest.fixture(autouse=True)
def as_it_was():
    """main() quietens the libraries for the whole process."""
    level = logging.getLogger("sft_pipeline").level
    yield
    logging.getLogger("sft_pipeline").setLevel(level)
    datasets.enable_progress_bars()


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """A copy to change, less the weights."""
    return shutil.copytree(trained[0], tmp_path / "out", ignore=shutil.ignore_patterns("*.safetensors", "report.html"))


@pytest.fixture
def other(folder) -> Path:
    """The run with other metrics, as another one."""
    other = shutil.copytree(folder, folder.parent / "other")

    def change(results):
        results["steps"], results["config"]["learning_rate"] = 7, 0.5
        for entry in results["loss_curve"]:
            entry |= {"loss": entry["loss"] + 1} if "loss" in entry else {}

    edit(other / "results.json", change)
    last = other / "evaluation" / "step_000004.json"
    edit(last, lambda one: one["held_out"].update(nll_nats=[x / 2 for x in one["held_out"]["nll_nats"]]))
    edit(last, lambda one: [row.update(answer="other", stopped=True) for row in one["table"]])
    return other
