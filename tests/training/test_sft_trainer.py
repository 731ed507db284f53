"""The trainer of a config: which collator it gets."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from support.training_runs import run_train

from sft_pipeline.config import SFTConfig
from sft_pipeline.training.sft_trainer import SFTTrainer, log_devices
from sft_pipeline.utils.errors import SFTError


@pytest.fixture(scope="module")
def config(write_config, tmp_path_factory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"), rows=8, max_length=128)


def test_a_budget_of_tokens_needs_a_model_that_can_be_packed(config, tmp_path, monkeypatch):
    monkeypatch.setattr("sft_pipeline.data.packing.find_packing_obstacle", lambda model, longest: "it is a teapot")
    message = r"^tokens_per_batch: 128 needs packing, which is off \(it is a teapot\); set it to 0$"
    with pytest.raises(SFTError, match=message):
        run_train(config, "--output_dir", str(tmp_path / "out"), "--tokens_per_batch", "128")


@pytest.mark.parametrize(("ddp_timeout", "use_cpu"), [(60, True), (60, False), (1800, True)])
def test_a_timeout_that_the_library_ignores_is_said(ddp_timeout, use_cpu, caplog):
    state = SimpleNamespace(backend="gloo")
    args = SimpleNamespace(world_size=2, distributed_state=state, use_cpu=use_cpu, ddp_timeout=ddp_timeout)
    log_devices(SimpleNamespace(args=args, is_fsdp_enabled=False))
    warnings = ["ddp_timeout: not used by transformers with use_cpu, collectives wait 1800 s"]
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == warnings * (use_cpu and ddp_timeout == 60)


def test_a_model_may_be_a_path(model_folder, tmp_path):
    """As for from_pretrained."""
    rows = [{"prompt": "Hi", "completion": "Hello"}] * 2
    args = SFTConfig(str(tmp_path / "out"), template="role", use_cpu=True, num_proc=1)
    trainer = SFTTrainer(model_folder, args, train_dataset=rows)
    assert trainer.config_record["model_name_or_path"] == str(model_folder)
    assert trainer.model.name_or_path == str(model_folder)
