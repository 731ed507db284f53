"""DeepSpeed's ZeRO-3 with two processes over gloo: it trains like one process, answers prompts and resumes."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sft_pipeline.runs.output_dir import RESULTS_FILE

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "support" / "deepspeed_worker.py"
SETTINGS = {
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
}

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed is not installed"),
]


@pytest.fixture(scope="module")
def config(write_config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    keys = {"held_out": 3, "num_answers": 2, "num_instructions": 2, "max_new_tokens": 4, "learning_rate": 0.01}
    keys |= {"logging_steps": 1, "max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    return write_config(folder, rows=17, **keys)


def run(command: list[str], config: Path, out: Path, *keys: str) -> tuple[dict, list[dict], dict[str, torch.Tensor]]:
    """Return the results, the log and the weights of a run."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, *command, "train", str(config), f"--output_dir={out}", *keys]
    ended = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    results = json.loads((out / RESULTS_FILE).read_text())
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return {**results, "errors": ended.stderr}, log, load_file(next(out.glob("*model.safetensors")))


def build_command(answers: str) -> list[str]:
    return ["-m", "sft_pipeline.training.launch", "--nproc_per_node", "2", str(WORKER), answers]


def read_losses(log: list[dict]) -> list[float]:
    return [entry[key] for entry in log for key in ("loss", "eval_loss") if key in entry]


@pytest.mark.parametrize("keys", [[], ["--lora=true"]], ids=["full", "lora"])
def test_zero3_trains_answers_and_resumes_like_one_process(keys, config, tmp_path):
    settings = tmp_path / "zero3.json"
    settings.write_text(json.dumps(SETTINGS))
    sharded = [*keys, "--use_cpu=false", f"--deepspeed={settings}"]
    alone = [*keys, "--gradient_accumulation_steps=2"]
    one, log, weights = run(["-m", "sft_pipeline"], config, tmp_path / "one", *alone)
    resume = f"--resume_from_checkpoint={tmp_path / 'gathered' / 'checkpoint-2'}"
    for name, more in {"gathered": [], "in_step": [], "resumed": [resume]}.items():
        command = build_command("in_step" if name == "in_step" else "gathered")
        results, own_log, own_weights = run(command, config, tmp_path / name, *sharded, *more)
        assert "2 processes (gloo), the model sharded across them (ZeRO-3)" in results["errors"]
        way = "all processes answer the same ones" if name == "in_step" else "the weights are gathered on every process"
        assert f"held-out prompts: {way}" in " ".join(results["errors"].split())
        assert read_losses(own_log) == pytest.approx(read_losses(log), rel=1e-4)
        assert results["answers"] == one["answers"]
        for key, weight in own_weights.items():
            torch.testing.assert_close(weight, weights[key], rtol=0, atol=1e-4)
