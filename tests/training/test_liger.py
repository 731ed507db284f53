"""`use_liger_kernel` with a stub in place of Liger, whose kernels do not run on a CPU.

What it is called with, and that a model whose norms, activations and rotary positions were replaced trains the same
steps.
"""

import sys
import types

import pytest
import torch
from test_api import ROWS, make_args
from torch import nn
from transformers.models.llama import modeling_llama

from sft_pipeline import SFTTrainer
from sft_pipeline.kernels.cpu_layer_training import FusedTrainingForward
from sft_pipeline.training import model_setup
from sft_pipeline.utils.errors import SFTError

own_rotary = modeling_llama.apply_rotary_pos_emb


class Liger(types.ModuleType):
    """Replaces what liger-kernel 0.8.5 replaces in a Llama, by functions that compute the same."""

    def __init__(self) -> None:
        super().__init__("liger_kernel.transformers")
        self.calls: list[dict[str, bool]] = []
        self.used: set[str] = set()

    def _apply_liger_kernel_to_instance(self, model: nn.Module, **kernels: bool) -> None:
        self.calls.append(kernels)
        if kernels.get("fused_linear_cross_entropy", True):  # its default
            model.forward = types.MethodType(lambda model, **kwargs: pytest.fail("the loss is ours"), model)
        if kernels.get("rope", True):
            modeling_llama.apply_rotary_pos_emb = self.rotate
        for layer in model.model.layers:
            if kernels.get("swiglu", True):
                layer.mlp.forward = types.MethodType(self.compute_swiglu, layer.mlp)
            if kernels.get("rms_norm", True):
                for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                    norm.forward = types.MethodType(self.compute_norm, norm)

    def rotate(self, *args, **kwargs):
        self.used.add("rope")
        return own_rotary(*args, **kwargs)

    def compute_swiglu(self, mlp, x):
        self.used.add("swiglu")
        return mlp.down_proj(nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))

    def compute_norm(self, norm, x):
        self.used.add("rms_norm")
        return nn.functional.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


@pytest.fixture
def liger(monkeypatch) -> Liger:
    stub = Liger()
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", stub)
    for module in (model_setup, sys.modules["transformers.integrations.liger"]):
        monkeypatch.setattr(module, "is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(model_setup, "LIGER_DEVICES", ("cpu",))
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", own_rotary)  # restored after the test
    return stub


def train(folder, model_folder, **keys) -> SFTTrainer:
    args = make_args(folder, eval_strategy="no", **keys)
    trainer = SFTTrainer(str(model_folder), args, train_dataset=ROWS, eval_dataset=ROWS[:2])
    trainer.train()
    return trainer


LOSSES_OFF = {"cross_entropy": False, "fused_linear_cross_entropy": False}


@pytest.mark.parametrize("packing", [True, False])
def test_a_model_with_its_kernels_trains_the_same_steps(packing, liger, model_folder, tmp_path):
    plain = train(tmp_path / "plain", model_folder, packing=packing)
    ours = train(tmp_path / "liger", model_folder, packing=packing, use_liger_kernel=True)
    assert liger.calls == [LOSSES_OFF] and liger.used == {"rope", "swiglu", "rms_norm"}
    assert not any(isinstance(vars(m).get("forward"), FusedTrainingForward) for m in ours.model.modules())
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (plain, ours)]
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], abs=1e-5)
    for name, weight in plain.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # by peft
def test_some_of_its_kernels_and_adapters(liger, model_folder, tmp_path):
    kernels = {"rope": False, "cross_entropy": False, "swiglu": True}
    args = {"use_liger_kernel": True, "liger_kernel_config": kernels, "lora": True}
    trainer = train(tmp_path / "out", model_folder, **args)
    assert liger.calls == [kernels | LOSSES_OFF] and liger.used == {"swiglu", "rms_norm"}
    assert trainer.config_record["liger_kernel_config"] == kernels, "run.yaml has what the user asked for"


def refuse(message: str, folder, model_folder, **keys) -> None:
    args = make_args(folder, use_liger_kernel=True, **keys)
    with pytest.raises(SFTError, match=message) as caught:
        SFTTrainer(str(model_folder), args, train_dataset=ROWS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", LOSSES_OFF)
def test_its_losses_are_refused(name, liger, model_folder, tmp_path):
    refuse(f"^liger_kernel_config: {name} would replace our loss; set", tmp_path, model_folder,
           liger_kernel_config={name: True})  # fmt: skip
    assert not liger.calls


def test_a_device_that_it_does_not_run_on_is_refused(liger, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(model_setup, "LIGER_DEVICES", ("cuda",))
    refuse("^use_liger_kernel: its kernels do not run on the device cpu; remove the key$", tmp_path, model_folder)


def test_without_liger_the_error_says_what_to_install(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(model_setup, "is_liger_kernel_available", lambda: False)
    refuse("^use_liger_kernel: liger-kernel is not installed; `pip install liger-kernel`", tmp_path, model_folder)
