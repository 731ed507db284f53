"""A forward that was replaced after the trainer prepared the model is refused before anything is computed."""

import types

import pytest
import torch
from support.trainers import UNEVEN, make_model, make_trainer
from torch import nn

from sft_pipeline.kernels.cpu_layer_training import use_fused_layers
from sft_pipeline.utils.errors import SFTError


def replacement(self, input_ids=None, labels=None, **kwargs):
    """As those of Liger: takes every argument, and knows nothing of packed rows."""
    raise AssertionError("it must not be called")


def replace_forward(model: nn.Module) -> None:
    model.forward = types.MethodType(replacement, model)


def refuse(trainer, message: str) -> None:
    weights = [parameter.clone() for parameter in trainer.model.parameters()]
    for call in (trainer.train, trainer.evaluate):
        with pytest.raises(SFTError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert all(map(torch.equal, weights, trainer.model.parameters())) and trainer.state.global_step == 0


@pytest.mark.parametrize("collator", ["padded", "packed"])
def test_the_forward_of_the_model(collator, tmp_path):
    trainer = make_trainer(tmp_path, collator, held_out=UNEVEN)
    replace_forward(trainer.model)
    refuse(trainer, r"^the forward of LlamaForCausalLM was replaced by .*test_replaced_forwards\.replacement after")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # by peft
def test_the_forward_of_the_model_inside_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trainer = make_trainer(tmp_path, "packed", held_out=UNEVEN, model=model)
    replace_forward(model.get_base_model())
    refuse(trainer, "the forward of LlamaForCausalLM was replaced")


def test_a_class_that_was_replaced_does_not_reach_a_prepared_model(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, "packed")
    monkeypatch.setattr(type(trainer.model), "forward", replacement)
    trainer.train()
    assert trainer.state.global_step == 1


def test_the_attention(tmp_path):
    trainer = make_trainer(tmp_path, "packed", held_out=UNEVEN)
    trainer.model.set_attn_implementation("eager")
    refuse(trainer, "the attention of LlamaForCausalLM was set to eager after .* would mix packed rows; set packing")
    padded = make_trainer(tmp_path, "padded")
    padded.model.set_attn_implementation("eager")
    padded.train()


def test_a_module_that_a_fused_layer_would_not_call(tmp_path):
    model = make_model()
    assert use_fused_layers(model) == 2
    trainer = make_trainer(tmp_path, "packed", held_out=UNEVEN, model=model)
    replace_forward(model.model.layers[1].mlp)
    refuse(trainer, r"^the forward of model\.layers\.1\.mlp was replaced")


def test_mixed_precision_is_no_replacement(tmp_path):
    trainer = make_trainer(tmp_path, "packed", held_out=UNEVEN, eval_strategy="steps", eval_steps=1, bf16=True)
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_compiled_model(tmp_path):
    trainer = make_trainer(tmp_path, "packed")
    model, trainer.model = trainer.model, torch.compile(trainer.model, backend="eager")
    trainer.check_forwards()
    replace_forward(model)
    with pytest.raises(SFTError, match="the forward of LlamaForCausalLM was replaced"):
        trainer.check_forwards()
