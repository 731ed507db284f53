"""The model set up for generation: what it was is put back, whatever happens in between."""

import gc
import weakref

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from support.generation import GREEDY, LLAMA, PROMPTS, make_model
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sft_pipeline.inference.engine import generate
from sft_pipeline.inference.eval_mode import use_bf16_weights
from sft_pipeline.inference.sampling import SamplingParams
from sft_pipeline.model.loss_forward import patch_loss_forward


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_model_is_left_as_it_was(name):
    model = make_model(name).train()
    frozen = next(m for m in model.modules() if isinstance(m, nn.Embedding)).eval()
    state = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    config, random_state = model.config.to_dict(), torch.get_rng_state()
    attributes = [set(vars(module)) for module in model.modules()]
    generate(model, PROMPTS, [1], SamplingParams(max_new_tokens=5, do_sample=True), batch_size=3)
    assert all(module.training != (module is frozen) for module in model.modules())
    assert model.config.to_dict() == config and model.config._attn_implementation == "sdpa"
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert "sft_generation" not in ALL_ATTENTION_FUNCTIONS
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_training_after_generation_is_bitwise_the_same():
    def gradients(generating: bool) -> list[torch.Tensor]:
        model = make_model("llama").train()
        if generating:
            generate(model, PROMPTS, [], GREEDY)
        ids = torch.tensor([PROMPTS[3]])
        model(ids, labels=ids).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False)))


def test_the_model_is_restored_after_an_error():
    model = make_model("llama").train()
    attributes = [set(vars(module)) for module in model.modules()]

    def interrupt(row: int, token: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPTS, [], GREEDY, on_token=interrupt)
    assert model.training and model.config._attn_implementation == "sdpa" and torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert [set(vars(module)) for module in model.modules()] == attributes


def test_gradient_checkpointing_does_not_matter():
    model = make_model("llama").train()
    model.activation_checkpointing_enable()
    assert [c.ids for c in generate(model, PROMPTS, [], GREEDY)] == [
        c.ids for c in generate(LLAMA, PROMPTS, [], GREEDY)
    ]
    assert model.is_activation_checkpointing


def test_a_model_class_without_source_can_generate():
    """Such as a class defined in a notebook: transformers reads the source before it sets an attention function."""
    model = make_model("gpt2")  # whose layers are not fused
    completions = generate(model, PROMPTS, [], GREEDY)
    namespace = {"__module__": "notebook", "_can_set_attn_implementation_cached_value": None}
    model.__class__ = type("NotebookModel", (type(model),), namespace)
    assert generate(model, PROMPTS, [], GREEDY) == completions


def test_bf16_copies_of_the_weights_decode_without_autocast_and_are_freed():
    model = make_model("llama").train()
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)  # as accelerate wraps it
    wrapped, weights = model.forward, {name: weight.data for name, weight in model.named_parameters()}
    bits = {name: weight.clone() for name, weight in weights.items()}
    is_autocast = []
    hook = model.lm_head.register_forward_hook(lambda *call: is_autocast.append(torch.is_autocast_enabled("cpu")))
    with pytest.raises(KeyboardInterrupt), use_bf16_weights(model):
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        copies = [weakref.ref(weight.data.untyped_storage()) for weight in model.parameters()]
        assert len(generate(model, PROMPTS, [], GREEDY)) == len(PROMPTS)
        raise KeyboardInterrupt
    hook.remove()
    assert is_autocast and not any(is_autocast)
    assert model.forward is wrapped and all(weight.requires_grad for weight in model.parameters())
    for name, weight in model.named_parameters():
        assert weight.data_ptr() == weights[name].data_ptr() and torch.equal(weight, bits[name])
    gc.collect()
    assert not any(copy() for copy in copies)
    model(torch.tensor([PROMPTS[3]]), labels=torch.tensor([PROMPTS[3]])).loss.backward()


def test_bf16_copies_keep_the_patched_forward_below_autocast():
    """accelerate wraps it so in `prepare_model`; the class' own forward would take no losses."""
    model = make_model("llama")
    patch_loss_forward(model)
    patched = model.forward
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", dtype=torch.bfloat16)(patched))
    with use_bf16_weights(model):
        assert model.forward is patched
    assert model.forward is not patched and model.forward.__wrapped__
