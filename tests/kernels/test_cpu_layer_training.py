"""A fused layer against its own modules: outputs, gradients, and the calls that it leaves to them."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from support.processes import call_in_process
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from sft_pipeline.inference.engine import generate
from sft_pipeline.inference.sampling import SamplingParams
from sft_pipeline.kernels import cpu_attention, cpu_layer_training
from sft_pipeline.kernels.cpu_attention import build_attention_tree
from sft_pipeline.kernels.cpu_layer_training import FusedTrainingForward, disable_fused_layers, use_fused_layers
from sft_pipeline.model.packed_attention import build_packed_arguments, use_packed_attention
from sft_pipeline.training.memory import set_malloc_options

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.2,
}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "llama with biases": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=12),
}


def make_pair(config):
    """The same model twice: with its own layers and with fused ones. No parameter is left at 0 or 1."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    use_packed_attention(plain)
    fused = copy.deepcopy(plain)
    assert use_fused_layers(fused) == config.num_hidden_layers
    return plain, fused


PAIRS = {name: make_pair(config) for name, config in FAMILIES.items()}


def build_tree(prefix, lengths):
    """Build the tree of rows that share a prefix."""
    ends = np.cumsum(lengths) + prefix
    return build_attention_tree(np.concatenate([np.full(prefix, ends[-1]), ends.repeat(lengths)]))


def run(model, prefix, lengths, seed=0):
    """Hidden states of a packed line under a random weighting, and every parameter's gradient of their sum."""
    model.zero_grad()
    random = torch.Generator().manual_seed(seed)
    tokens = prefix + sum(lengths)
    ids = torch.randint(3, SHAPE["vocab_size"], (1, tokens), generator=random)
    positions = torch.cat([torch.arange(prefix), *(torch.arange(prefix, prefix + n) for n in lengths)])[None]
    arguments = build_packed_arguments(build_tree(prefix, lengths), ids.device)
    states = model.base_model(input_ids=ids, position_ids=positions, use_cache=False, **arguments).last_hidden_state
    (states * torch.randn(states.shape, generator=random)).sum().backward()
    return states.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, expected):
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)
    assert actual[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert (actual[1][name] - grad).abs().max() <= 1e-4 * grad.abs().max().clamp_min(1e-4), name


@pytest.mark.parametrize("name", PAIRS)
@settings(deadline=None, max_examples=15)
@given(st.integers(0, 9), st.lists(st.integers(1, 14), min_size=1, max_size=4), st.integers(1, 9), st.integers(0, 99))
def test_states_and_gradients_are_those_of_the_modules(name, prefix, lengths, block, seed):
    plain, fused = PAIRS[name]
    expected = run(plain, prefix, lengths, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_layer_training, "BLOCK_TOKENS", block)
        patch.setattr(cpu_attention, "BLOCK_QUERIES", block)
        assert_same(run(fused, prefix, lengths, seed), expected)


def was_fused(model) -> list[bool]:
    """Which layers a packed call computes by the fused functions."""
    outputs = []
    handles = [layer.register_forward_hook(lambda m, i, out: outputs.append(out)) for layer in model.base_model.layers]
    tokens = torch.arange(3, 9)[None]
    arguments = build_packed_arguments(build_tree(0, [6]), tokens.device)
    model.base_model(input_ids=tokens, position_ids=tokens - 3, use_cache=False, **arguments)
    for handle in handles:
        handle.remove()
    # The last function of a fused layer is the MLP's.
    return ["_FusedMLP" in str(out.grad_fn) for out in outputs]


FROZEN = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "layernorm", "k_norm", "embed"]


@pytest.mark.parametrize("frozen", FROZEN)
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen):
    plain, fused = (copy.deepcopy(model) for model in PAIRS["qwen3"])
    for model in (plain, fused):
        for name, parameter in model.named_parameters():
            parameter.requires_grad = frozen not in name
    expected = run(plain, 3, [4, 6])
    assert not any(frozen in name for name in expected[1])
    assert_same(run(fused, 3, [4, 6]), expected)


def test_calls_that_are_not_packed_training_go_to_the_modules():
    plain, fused = PAIRS["llama"]
    ids = torch.arange(3, 11)[None]
    assert torch.equal(plain(input_ids=ids).logits, fused(input_ids=ids).logits)
    assert was_fused(fused) == [True, True]
    assert was_fused(plain) == [False, False]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert was_fused(fused) == [False, False]
    assert was_fused(copy.deepcopy(fused).double()) == [False, False]


def test_dropout_is_left_to_the_modules():
    fused = make_pair(LlamaConfig(**SHAPE, attention_dropout=0.5))[1]
    assert was_fused(fused.eval()) == [True, True]
    assert was_fused(fused.train()) == [False, False]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft
def test_adapters_put_in_later_are_not_passed_over():
    plain, fused = (copy.deepcopy(model) for model in PAIRS["llama"])
    results = []
    for model in (plain, fused):
        torch.manual_seed(1)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False))
        results.append(run(adapted.get_base_model(), 2, [3, 5]))
    assert any("lora" in name for name in results[0][1])
    assert_same(results[1], results[0])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft
def test_other_families_and_adapted_layers_are_not_taken():
    gpt2 = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)
    assert use_fused_layers(AutoModelForCausalLM.from_config(gpt2)) == 0
    adapted = get_peft_model(copy.deepcopy(PAIRS["llama"][0]), LoraConfig(r=2, target_modules="all-linear"))
    assert use_fused_layers(adapted) == 0


def test_checkpointed_layers_have_the_same_gradients():
    plain, fused = (copy.deepcopy(model).train() for model in PAIRS["llama"])
    fused.activation_checkpointing_enable({"use_reentrant": False})
    assert_same(run(fused, 2, [5, 3]), run(plain, 2, [5, 3]))


def test_a_checkpointed_layer_keeps_only_its_input():
    """The library checkpoints in the forward of the layer's class, which is not called here."""
    tokens, kept = 37, set()

    def record(tensor: torch.Tensor) -> torch.Tensor:
        if tokens in tensor.shape:
            kept.add((tensor.untyped_storage().data_ptr(), tuple(tensor.shape)))
        return tensor

    for is_checkpointed in (False, True):
        kept.clear()
        fused = copy.deepcopy(PAIRS["llama"][1]).train()
        if is_checkpointed:
            fused.activation_checkpointing_enable()
        states = torch.randn(1, tokens, 32, requires_grad=True)
        arguments = build_packed_arguments(build_tree(5, [20, 12]), torch.device("cpu"))
        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            fused.model.layers[0](
                states, position_embeddings=fused.model.rotary_emb(states, torch.arange(37)[None]), **arguments
            )
        assert {shape for _, shape in kept} == {(1, tokens, 32)} if is_checkpointed else len(kept) > 5


def test_generation_sets_the_layers_aside_and_puts_them_back():
    plain, fused = PAIRS["qwen3"]
    forwards = [vars(layer)["forward"] for layer in fused.base_model.layers]
    with disable_fused_layers(fused):
        assert not any("forward" in vars(module) for module in fused.modules())
    answers, expected = (
        generate(model, [[3, 4, 5], [6]], [2], SamplingParams(max_new_tokens=8)) for model in (fused, plain)
    )
    assert [answer.ids for answer in answers] == [answer.ids for answer in expected]
    assert [vars(layer)["forward"] for layer in fused.base_model.layers] == forwards
    assert all(isinstance(forward, FusedTrainingForward) for forward in forwards)


def measure_growth(keep: bool) -> int:
    """Bytes by which the process is larger after 400 MB were allocated and freed."""
    if keep:
        assert set_malloc_options()
    resident = read_resident_bytes()
    blocks = [torch.ones(10_000_000) for _ in range(10)]
    del blocks
    return read_resident_bytes() - resident


def read_resident_bytes() -> int:
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is an interface of glibc")
def test_freed_memory_is_kept():
    """400 MB that were used and freed are still the process's own; by default glibc has given them back."""
    assert call_in_process(measure_growth, True) > 390_000_000
    assert call_in_process(measure_growth, False) < 40_000_000
