"""Metrics as `evaluate.Metric`: alone, combined, in batches and several processes; no network, no file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest

from sft_pipeline.evaluation.metrics.hf_metrics import RegisteredMetric, compute_metrics
from sft_pipeline.evaluation.metrics.instruction_following import load_instructions
from sft_pipeline.evaluation.metrics.registry import METRICS
from sft_pipeline.utils.errors import SFTError

COLUMNS = {
    "predictions": ["我喜欢看书。", "The sun is a star. The sun is a star.", ""],
    "references": ["我很喜欢看书。", "The sun is a star.", "No."],
    "prompts": ["你喜欢什么？", "What is the sun?", "Really?"],
    "finish_reasons": ["stop", "length", "stop"],
    "nll_nats": [3.5, 2.0, 1.0],
    "tokens": [4, 2, 1],
    "correct": [2, 1, 0],
    "utf8_bytes": [18, 37, 3],
    "calls_match": [1, 0, 0],
}
NAMES = [name for name in METRICS if name != "instructions_followed_rate"]
EXPECTED = {name: METRICS[name].compute(COLUMNS) for name in NAMES}

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def combined(cache):
    return evaluate.combine([RegisteredMetric(name) for name in NAMES])


def test_combined_they_give_all_metrics(combined):
    assert combined.compute(**COLUMNS) == EXPECTED
    assert list(compute_metrics(COLUMNS).items()) == list(EXPECTED.items())


def test_batches_add_up_to_the_same(combined):
    for part in (slice(0, 1), slice(1, 3)):
        combined.add_batch(**{name: column[part] for name, column in COLUMNS.items()})
    assert combined.compute() == EXPECTED


def test_a_metric_alone_names_and_describes_itself():
    metric = RegisteredMetric("prompt_echo_share")
    assert metric.name == "prompt_echo_share"
    assert "prompt words in the answer" in metric.description and "prompts, predictions" in metric.inputs_description
    assert metric.compute(predictions=["a"], prompts=["a b"]) == {"prompt_echo_share": 0.5}


def test_instructions_followed():
    some = load_instructions()[::5]
    answers = [i.good if n % 2 else i.bad for n, i in enumerate(some)]
    columns = {"predictions": answers, "instruction_ids": [i.id for i in some]}
    values = RegisteredMetric("instructions_followed_rate").compute(**columns)
    assert values == compute_metrics(columns)
    assert values["instructions_followed_rate"] == (len(some) // 2) / len(some) and len(values) == 1 + 4 + 2
    with pytest.raises(SFTError, match="unknown instruction id 'x'"):
        compute_metrics({"predictions": ["a"], "instruction_ids": ["x"]})


def test_numpy_random_state_is_left_alone(combined):
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    combined.compute(**COLUMNS)
    assert (np.random.get_state()[1] == before).all()


SCRIPT = """
import json, socket
def refuse(*args, **kwargs): raise AssertionError("the network was used")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from sft_pipeline.evaluation.metrics.hf_metrics import compute_metrics
for _ in range(3):
    values = compute_metrics({"predictions": ["你好"], "references": ["你好"]})
print(json.dumps(values))
"""


def test_processes_at_once_use_no_network_and_write_no_file(tmp_path):
    """Fresh processes, offline, where opening a socket is an error and every warning is one too."""
    home = tmp_path / "home"
    (home / "tmp").mkdir(parents=True)
    hidden = ("HF_HOME", "HF_DATASETS_CACHE", "HF_METRICS_CACHE", "HF_EVALUATE_CACHE", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"HOME": str(home), "TMPDIR": str(home / "tmp"), "SFT_PIPELINE_CACHE": str(tmp_path / "cache")}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "error", "-c", SCRIPT]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert json.loads(output)["rouge_l_f1"] == 1
    assert list_files(home) == [] and list_files(tmp_path / "cache") == []
    assert (tmp_path / "cache" / "metrics").is_dir()


def list_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
