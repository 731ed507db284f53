"""The files in configs/: each begins with its wish and its command, is a valid config, and names data that is there."""

import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from sft_pipeline.arguments import SourceEntry
from sft_pipeline.config import parse_config
from sft_pipeline.train import train

# peft 0.21 still asks transformers 5.23 under the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CONFIGS = sorted(path for path in Path("configs").glob("*.yaml") if not path.name.startswith("study_"))
OWN_DATA = "data/alpaca_en_demo.json"  # in place of which a user gives a file


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_ready_config_is_valid(path):
    config = parse_config(str(path))
    assert config.output_dir == f"outputs/{path.stem}" and config.model_name_or_path
    for entry in map(SourceEntry.parse, config.train_data):
        assert Path(entry.path).exists() or entry.path in (OWN_DATA, "tatsu-lab/alpaca")


@pytest.mark.parametrize("name", ["lora", "qlora", "continued_pretraining", "fsdp2_qwen3_8b"])
def test_a_ready_config_begins_with_its_command(name):
    first, second, third, fourth = Path(f"configs/{name}.yaml").read_text().splitlines()[:4]
    assert all(line.startswith("# ") for line in (first, second, third)) and not fourth.startswith("#")
    assert f" train configs/{name}.yaml" in second


@pytest.mark.parametrize("name", ["lora", "qlora", "continued_pretraining"])
def test_a_ready_config_trains(name, model_folder, tmp_path):
    """With the tiny model in place of the real one."""
    keys = yaml.safe_load(Path(f"configs/{name}.yaml").read_text())
    words = ["--model_name_or_path", str(model_folder), "--max_steps", "2", "--output_dir", str(tmp_path / "out")]
    words += ["--use_cpu", "true", "--disable_tqdm", "true", "--max_new_tokens", "2"]
    results = train(parse_config(f"configs/{name}.yaml", words), Console(quiet=True))
    assert results["steps"] == 2 and results["rows"]["held_out"]["kept"] == keys["held_out"]
    if name == "continued_pretraining":  # all tokens are trained: this tokenizer adds no bos token
        counts = results["rows"]["train"]
        texts = [json.loads(line)["text"] for line in Path(keys["train_data"]).read_text().splitlines()]
        assert counts["rows"] == len(texts) - 2 and counts["supervised_tokens"] == counts["tokens"] - counts["kept"]
