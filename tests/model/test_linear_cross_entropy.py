"""The loss at supervised positions against the full logits: values, gradients, families, refusals."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    Qwen3Config,
)

from sft_pipeline.model.linear_cross_entropy import linear_cross_entropy
from sft_pipeline.model.lm_head import split_head
from sft_pipeline.model.module_utils import use_eval_mode
from sft_pipeline.utils.constants import IGNORED
from sft_pipeline.utils.errors import SFTError

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tiny(config_class, **extra):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_class(**{**SHAPE, **extra})).float()


def reference(hidden, labels, weight, bias, num_items, scale, softcap):
    logits = F.linear(hidden, weight, bias) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum") / num_items


def leaves(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


def close(actual, expected, relative):
    return (actual - expected).abs().max() <= relative * expected.abs().max().clamp_min(1e-12)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 9), st.integers(1, 12), st.floats(0.0, 1.0),
    st.booleans(), st.sampled_from([1.0, 0.25]), st.sampled_from([None, 2.0]), st.sampled_from([1.0, 0.5]),
)  # fmt: skip
def test_loss_and_gradients_are_those_of_the_full_logits(seed, rows, length, chunk, share, biased, scale, cap, factor):
    draw = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(*s, generator=draw) for s in ((rows, length, 16), (40, 16), (40,)))
    labels = torch.randint(40, (rows, length), generator=draw)
    labels[torch.rand(rows, length, generator=draw) > share] = IGNORED
    ours, theirs = leaves(hidden, weight, bias), leaves(hidden, weight, bias)
    options = {"num_items": 7, "scale": scale, "softcap": cap}
    loss = linear_cross_entropy(ours[0], labels, ours[1], ours[2] if biased else None, chunk_size=chunk, **options)
    expected = reference(theirs[0], labels, theirs[1], theirs[2] if biased else None, **options)
    (loss * factor).backward()
    (expected * factor).backward()
    assert abs(loss - expected) < 1e-5 * max(1.0, expected.item())
    for tensor, expected_tensor in zip(ours[: 2 + biased], theirs):
        assert close(tensor.grad, expected_tensor.grad, 1e-4)


def test_nothing_supervised_is_a_zero_on_the_graph():
    hidden, weight = leaves(torch.randn(1, 3, 8), torch.randn(10, 8))
    loss = linear_cross_entropy(hidden, torch.full((1, 3), IGNORED), weight, num_items=5)
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any() and not weight.grad.any()


def test_a_frozen_head_gets_no_gradient_and_the_states_still_do():
    hidden, weight = torch.randn(1, 3, 8).requires_grad_(), torch.randn(10, 8)
    linear_cross_entropy(hidden, torch.tensor([[1, 2, IGNORED]]), weight, num_items=2).backward()
    assert weight.grad is None and hidden.grad[0, :2].any() and not hidden.grad[0, 2].any()


def test_without_gradients_only_the_loss_is_computed():
    hidden, weight = leaves(torch.randn(1, 3, 8), torch.randn(10, 8))
    labels = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, labels, weight, num_items=3)
    assert not loss.requires_grad
    assert torch.allclose(loss, reference(hidden, labels, weight, None, 3, 1.0, None))


def test_parts_of_a_step_add_up():
    hidden, weight = leaves(torch.randn(2, 5, 8), torch.randn(10, 8))
    labels = torch.randint(10, (2, 5))
    parts = [linear_cross_entropy(hidden[i : i + 1], labels[i : i + 1], weight, num_items=10) for i in range(2)]
    sum(parts).backward()
    whole = leaves(hidden.detach(), weight.detach())
    linear_cross_entropy(whole[0], labels, whole[1], num_items=torch.tensor(10)).backward()
    assert close(hidden.grad, whole[0].grad, 1e-5) and close(weight.grad, whole[1].grad, 1e-5)


def test_a_second_backward_pass_is_an_error():
    hidden, weight = leaves(torch.randn(1, 3, 8), torch.randn(10, 8))
    loss = linear_cross_entropy(hidden, torch.tensor([[1, 2, 3]]), weight, num_items=3)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="consumed by an earlier backward pass; compute it again"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sixteen_bits_keep_their_types_and_a_float32_loss(dtype):
    """float32 leaves under autocast, and a model that is bfloat16 as a whole."""
    hidden, weight = leaves(torch.randn(1, 40, 16).to(dtype), torch.randn(50, 16).to(dtype))
    labels = torch.randint(50, (1, 40))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, labels, weight, num_items=40, chunk_size=16)
    loss.backward()
    exact = leaves(hidden.detach().float(), weight.detach().float())
    expected = reference(exact[0], labels, exact[1], None, 40, 1.0, None)
    expected.backward()
    assert loss.dtype == torch.float32 and hidden.grad.dtype == weight.grad.dtype == dtype
    assert torch.allclose(loss, expected, rtol=2e-2)
    assert close(weight.grad.float(), exact[1].grad, 3e-2) and close(hidden.grad.float(), exact[0].grad, 3e-2)


FAMILIES = [
    (LlamaConfig, {"tie_word_embeddings": False}),
    (Qwen3Config, {"tie_word_embeddings": True}),
    (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    (GraniteConfig, {"logits_scaling": 4.0}),
    (CohereConfig, {}),
    (Gemma2Config, {}),
]


@pytest.mark.parametrize(("config", "extra"), FAMILIES)
def test_every_parameter_gets_the_gradient_of_the_full_logits(config, extra):
    model = tiny(config, **extra).eval()
    head = split_head(model)
    ids, labels = torch.randint(3, 64, (2, 7)), torch.randint(3, 64, (2, 7))
    labels[:, :3] = IGNORED
    grads = []
    for ours in (True, False):
        model.zero_grad()
        if ours:
            loss = head.compute_loss(head.backbone(input_ids=ids).last_hidden_state, labels, 8)
        else:
            logits = model(input_ids=ids).logits
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / 8
        loss.backward()
        grads.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    assert abs(grads[0][0] - grads[1][0]) < 1e-5
    assert all(close(a, b, 1e-4) for a, b in zip(grads[0][1], grads[1][1], strict=True))


def test_a_family_with_an_unknown_rule_is_refused():
    model = tiny(LlamaConfig)
    forward = model.forward
    model.forward = lambda **kwargs: type("Output", (), {"logits": forward(**kwargs).logits * 1.5})
    with pytest.raises(SFTError, match="changes its logits after the head in an unknown way"):
        split_head(model)
    assert model.training, "the check puts the mode back"


def test_a_backbone_without_hidden_states_is_refused():
    model = tiny(LlamaConfig)
    model.model.forward = lambda **kwargs: None
    model.forward = lambda **kwargs: type("Output", (), {"logits": torch.zeros(1, 4, 64)})
    with pytest.raises(SFTError, match="unknown way"):
        split_head(model)


def test_the_mode_is_put_back_after_an_error():
    model = tiny(LlamaConfig)
    model.model.norm.eval()
    with pytest.raises(KeyError), use_eval_mode(model):
        raise KeyError
    assert model.training and not model.model.norm.training


# The warning is of peft itself, which reads a name that transformers has renamed.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_peft_models():
    peft = pytest.importorskip("peft")
    lora = peft.get_peft_model(tiny(LlamaConfig), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    head = split_head(lora)
    loss = head.compute_loss(
        head.backbone(input_ids=torch.tensor([[3, 4, 5]])).last_hidden_state, torch.tensor([[4, 5, 6]]), 3
    )
    loss.backward()
    trained = {name for name, p in lora.named_parameters() if p.grad is not None}
    assert trained and all("lora_" in name for name in trained)

    copied = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    lora = peft.get_peft_model(tiny(LlamaConfig, tie_word_embeddings=False), copied)
    assert split_head(lora).linear.weight.requires_grad

    on_head = peft.LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(SFTError, match="no plain linear head"):
        split_head(peft.get_peft_model(tiny(LlamaConfig, tie_word_embeddings=False), on_head))

    prompts = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(SFTError, match="prompt learning changes the inputs"):
        split_head(peft.get_peft_model(tiny(LlamaConfig), prompts))
