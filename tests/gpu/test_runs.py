"""Runs of SFTTrainer: packed and padded, adapters, resuming, compiled layers, Liger, synchronizations."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from gpu_parts import recompile
from gpu_parts.inputs import SMALL_SHAPES, build_conversations, build_model, build_rows
from gpu_parts.measuring import Setting
from gpu_parts.ours import build_our_trainer

from sft_pipeline import SFTTrainer

SHAPE = SMALL_SHAPES["qwen3"]
# On CUDA the batches have several blocks of FlexAttention's mask.
SCALES = {"cpu": 0.1, "cuda": 1.0}
ROWS = {
    name: [
        *build_rows(9, SHAPE.vocabulary, shared=round(30 * scale), scale=scale),
        *build_conversations(3, SHAPE.vocabulary, scale=scale),
    ]
    for name, scale in SCALES.items()
}
STEPS = 6  # of two rows each
# Not Adam: its first steps are as large for a gradient that is all rounding.
EXACT = {"bf16": False, "optim": "sgd", "learning_rate": 0.3}


def build(folder: Path, device: torch.device, **keys) -> SFTTrainer:
    """A trainer that logs each step; in float32 with EXACT."""
    keys = {"logging_strategy": "steps", "logging_steps": 1, "per_device_train_batch_size": 2, **keys}
    if keys.get("bf16") is False and device.type == "cuda":
        keys["tf32"] = False
    keys = {"learning_rate": 1e-3, "max_grad_norm": 1.0, **keys}
    return build_our_trainer(build_model(SHAPE, device), ROWS[device.type], str(folder), device.type, **keys)


def run(folder: Path, device: torch.device, **keys) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return the losses of the steps and the weights at the end."""
    trainer = build(folder, device, **keys)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    return losses, {name: weight.detach().cpu().clone() for name, weight in trainer.model.named_parameters()}


def assert_same_run(actual, expected) -> None:
    """Equal but for the rounding of float32, in losses of which each is another."""
    assert actual[0] == pytest.approx(expected[0], rel=1e-5) and len(set(expected[0])) == STEPS
    for name, weight in expected[1].items():
        torch.testing.assert_close(actual[1][name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("keys", [{}, {"lora": True}, {"activation_checkpointing": True}], ids=["full", "lora", "ckpt"])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # by peft
def test_packed_and_padded_runs_are_the_same_run(keys, device, tmp_path):
    packed, padded = (run(tmp_path / str(on), device, packing=on, **EXACT, **keys) for on in (True, False))
    assert_same_run(packed, padded)


def test_a_resumed_run_ends_with_the_same_bits(device, tmp_path):
    """In the precision of the device: bf16 on CUDA."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    losses, weights = run(tmp_path / "whole", device, **saving)
    resumed = build(tmp_path / "whole", device, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert [entry["loss"] for entry in resumed.state.log_history if "loss" in entry] == losses
    for name, weight in resumed.model.named_parameters():
        assert torch.equal(weight.detach().cpu(), weights[name]), name


def test_compiled_layers_train_the_same_run(cuda, tmp_path):
    plain, compiled = (run(tmp_path / str(on), cuda, torch_compile=on, **EXACT) for on in (False, True))
    assert_same_run(compiled, plain)


@pytest.mark.skipif(not find_spec("liger_kernel"), reason="liger-kernel is not installed")
def test_liger_trains_the_same_run(cuda, tmp_path):
    plain, liger = (run(tmp_path / str(on), cuda, use_liger_kernel=on, **EXACT) for on in (False, True))
    assert_same_run(liger, plain)


@pytest.mark.parametrize("case", recompile.CASES)
def test_a_dozen_layouts_compile_few_graphs_early_and_wait_once_a_step(case, cuda):
    result = recompile.measure_run(Setting(cuda), recompile.CASES[case])
    assert result["steps"] == 12
    assert result["compilations"] <= recompile.MAX_COMPILATIONS and result["late_compilations"] == 0, result
    assert result["synchronizations"] <= recompile.MAX_SYNCHRONIZATIONS, result
