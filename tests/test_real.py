"""The real SmolLM2-135M, fetched by the package itself: a short run lowers the held-out loss and can be talked to."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedModel

from sft_pipeline.commands.chat import chat
from sft_pipeline.config import parse_config
from sft_pipeline.inference.engine import generate
from sft_pipeline.inference.sampling import SamplingParams
from sft_pipeline.runs.trained_model import load_trained
from sft_pipeline.train import train

ROOT = Path(__file__).parent.parent


@pytest.mark.real
def test_quickstart_in_small(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("SFT_PIPELINE_CACHE")  # the converted model is kept for the next run
    monkeypatch.chdir(ROOT)
    rows = Path("configs/data/quickstart.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:48]
    (tmp_path / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    keys = {
        "train_data": tmp_path / "rows.jsonl",
        "held_out": 8,
        "num_answers": 2,
        "max_new_tokens": 16,
        "max_steps": 12,
        "warmup_steps": 1,
        "logging_steps": 1,
        "output_dir": tmp_path / "out",
        "use_cpu": "true",
    }
    overrides = [f"--{key}={value}" for key, value in keys.items()]
    results = train(parse_config("configs/quickstart.yaml", overrides), Console())

    loss = results["eval_loss"]
    assert loss["after"] < 0.9 * loss["before"], loss
    assert results["steps"] == 12 and results["rows"]["train"]["kept"] == 40
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["answers"]) == 2
    assert all(one["prompt"] and one["before"] and one["after"] for one in results["answers"])

    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("What is the capital of France?\nAnd of Italy?\n"))
    chat(str(tmp_path / "out"), 16)
    output = capsys.readouterr()
    assert len([line for line in output.out.splitlines() if line.strip()]) >= 2 and "no answer" not in output.err


@pytest.mark.real
def test_two_processes_of_accelerate_train_the_quickstart_like_one(tmp_path, monkeypatch):
    """The config as it is, without `use_cpu`: on a machine without accelerators the processes join over gloo.

    Other ways to start processes are tried on a tiny model in test_launch.py.
    """
    monkeypatch.delenv("SFT_PIPELINE_CACHE")
    keys = {"max_steps": 2, "logging_steps": 1, "held_out": 4, "num_answers": 0, "num_instructions": 0}
    words = ["-m", "sft_pipeline", "train", "configs/quickstart.yaml", *(f"--{key}={keys[key]}" for key in keys)]
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port=0"]
    launchers = {
        "one": [sys.executable],
        "multi_gpu": [*accelerate, "--multi_gpu", "--num_processes=2"],
    }
    losses = {}
    for name, launcher in launchers.items():
        rows = 4 if name == "one" else 2
        options = [f"--per_device_train_batch_size={rows}", f"--output_dir={tmp_path / name}"]
        subprocess.run([*launcher, *words, *options], cwd=ROOT, check=True)
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        losses[name] = [entry.get("loss", entry.get("eval_loss")) for entry in history]
        losses[name] = [loss for loss in losses[name] if loss is not None]
    assert len(losses["one"]) == 4  # two steps, held out before and after
    assert losses["multi_gpu"] == pytest.approx(losses["one"], rel=1e-5)


@pytest.mark.real
def test_greedy_answers_are_those_of_transformers_one_at_a_time(monkeypatch):
    """Twelve prompts in a batch that is refilled; `benchmarks/generate.py --check 200` does the same for more."""
    monkeypatch.delenv("SFT_PIPELINE_CACHE")
    model, template, _ = load_trained("smollm2-135m")
    rows = [
        json.loads(line) for line in (ROOT / "configs/data/quickstart.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    conversations = [[{"role": "user", "content": row["instruction"]}] for row in rows[:12]]
    prompts = [template.encode_prompt({"messages": messages}) for messages in conversations]
    stop, new = template.stop_token_id, 32
    for prompt, done in zip(
        prompts, generate(model, prompts, [stop], SamplingParams(max_new_tokens=new), batch_size=5)
    ):
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": new, "eos_token_id": stop, "pad_token_id": stop}
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
        expected = output[:-1] if output[-1] == stop else output
        assert done.ids == expected or tied(model, prompt, done.ids, expected)


def tied(model: PreTrainedModel, prompt: list[int], ours: list[int], theirs: list[int]) -> bool:
    """Whether two answers part where their tokens' logits lie within 1e-5, so that rounding chooses."""
    at = next((at for at, (a, b) in enumerate(zip(ours, theirs)) if a != b), None)
    if at is None:
        return False
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ours[:at]])).logits[0, -1]
    return bool((logits[ours[at]] - logits[theirs[at]]).abs() < 1e-5)
