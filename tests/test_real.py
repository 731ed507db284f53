"""The real SmolLM2-135M, fetched by the package itself: a short run lowers the held-out loss and can be talked to."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from sft_pipeline.chat import chat
from sft_pipeline.config import parse
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
        "max_steps": 6,
        "warmup_steps": 1,
        "logging_steps": 1,
        "output_dir": tmp_path / "out",
        "use_cpu": "true",
    }
    overrides = [f"--{key}={value}" for key, value in keys.items()]
    results = train(*parse("configs/quickstart.yaml", overrides), Console())

    loss = results["eval_loss"]
    assert loss["after"] < 0.9 * loss["before"], loss
    assert results["steps"] == 6 and results["rows"]["train"]["kept"] == 40
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["answers"]) == 2
    assert all(one["prompt"] and one["before"] and one["after"] for one in results["answers"])

    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("What is the capital of France?\nAnd of Italy?\n"))
    chat(str(tmp_path / "out"), 16)
    output = capsys.readouterr()
    assert len([line for line in output.out.splitlines() if line.strip()]) >= 2 and "no answer" not in output.err
