"""The model split into backbone and head: the full model's gradients, peft models, refusals."""

import pytest
import torch
import torch.nn.functional as F
from support.causal_models import tiny
from support.tensors import close
from transformers import CohereConfig, Gemma2Config, GPT2Config, GraniteConfig, LlamaConfig, Qwen3Config

from sft_pipeline.model.lm_head import split_head
from sft_pipeline.utils.constants import IGNORED
from sft_pipeline.utils.errors import SFTError

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
            states, is_target = head.backbone(input_ids=ids).last_hidden_state, labels.ne(IGNORED)
            loss = head.compute_loss(states[is_target], labels[is_target], 8)
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


# The warning is of peft itself, which reads a name that transformers has renamed.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_peft_models():
    peft = pytest.importorskip("peft")
    lora = peft.get_peft_model(tiny(LlamaConfig), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    head = split_head(lora)
    states = head.backbone(input_ids=torch.tensor([[3, 4, 5]])).last_hidden_state[0]
    loss = head.compute_loss(states, torch.tensor([4, 5, 6]), 3)
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
