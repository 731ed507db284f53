"""LoRA through `peft`: what is trained, what is saved, and that it goes on from there."""

import importlib.util
import json

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from sft_pipeline.config import parse
from sft_pipeline.errors import SFTError
from sft_pipeline.model.adapters import add_lora
from sft_pipeline.model.loading import load_model
from sft_pipeline.train import train

pytest.importorskip("peft", reason="the extra `lora` is not installed")
# peft 0.21 still asks transformers 5.23 under the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def config(model_folder, tmp_path):
    rows = [{"prompt": f"Say {n}.", "completion": ["one", "two", "three"][n % 3]} for n in range(24)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    keys = {
        "model_name_or_path": str(model_folder),
        "train_data": str(data),
        "held_out": 4,
        "template": "role",
        "lora": True,
        "lora_rank": 4,
        "lora_alpha": 8,
        "learning_rate": 0.05,
        "max_steps": 3,
        "num_answers": 2,
        "max_new_tokens": 4,
        "use_cpu": True,
        "disable_tqdm": True,
        "output_dir": str(tmp_path / "out"),
    }
    file = tmp_path / "lora.yaml"
    file.write_text(yaml.safe_dump(keys))
    return file


def run(config, *overrides):
    return train(*parse(str(config), list(overrides)), Console(quiet=True))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 9)[None]).logits


def test_only_the_adapters_are_trained_and_saved(config, model_folder, tmp_path):
    results = run(config)
    assert results["eval_loss"]["after"] < results["eval_loss"]["before"]
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert saved and all("lora_" in name for name in saved)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    adapted, base = load_model(str(tmp_path / "out")), load_model(str(model_folder))
    assert (logits(adapted) - logits(base)).abs().max() > 1e-3


def test_the_merged_model_computes_what_the_adapters_do(config, tmp_path):
    run(config)
    run(config, "--lora_merge", "true", "--output_dir", str(tmp_path / "merged"))
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    merged, adapted = load_model(str(tmp_path / "merged")), load_model(str(tmp_path / "out"))
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-5, rtol=1e-4)


def test_packed_and_padded_runs_agree(config, tmp_path):
    packed = run(config)
    padded = run(config, "--packing", "false", "--output_dir", str(tmp_path / "padded"))
    assert packed["eval_loss"]["after"] == pytest.approx(padded["eval_loss"]["after"], abs=1e-4)


def test_checkpointing_changes_nothing(config, tmp_path):
    plain = run(config)
    other = run(config, "--activation_checkpointing", "true", "--output_dir", str(tmp_path / "checkpointed"))
    assert other["eval_loss"] == pytest.approx(plain["eval_loss"], abs=1e-6)


def test_unknown_layers_are_named(tiny_model):
    with pytest.raises(SFTError, match=r"lora_target_modules \['nowhere'\]: .*not found"):
        add_lora(tiny_model, 4, 8, ["nowhere"])


def test_missing_peft_is_said(tiny_model, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SFTError, match="lora: true needs peft"):
        add_lora(tiny_model, 4, 8, ["all-linear"])
