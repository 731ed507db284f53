"""The copy of a sharded model that answers prompts, in one process; answers of two: test_sharded_loading.py."""

import logging
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from support.trainers import make_model, make_trainer

from sft_pipeline.arguments import SFTArguments
from sft_pipeline.kernels.cpu_layer_training import use_fused_layers
from sft_pipeline.model.lora import add_adapters
from sft_pipeline.model.peft_config import build_peft_config
from sft_pipeline.training import sharded_answers
from sft_pipeline.training.memory import GIB
from sft_pipeline.training.sharded_answers import ShardedAnswerer

IDS = torch.tensor([[1, 2, 3, 4, 5, 6]])


@pytest.fixture(params=["full", "lora"])
def trainer(request, tmp_path):
    model = make_model()
    if request.param == "lora":
        model = add_adapters(model, build_peft_config(SFTArguments(lora_rank=4, lora_alpha=8)))
    use_fused_layers(model)
    return make_trainer(tmp_path, "packed", model=model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_copy_has_the_weights_within_the_block_only(trainer):
    answerer, model = ShardedAnswerer(trainer), trainer.model
    assert sum(weight.numel() for weight in answerer._copy.parameters()) == 0
    trainer.train()  # it gets the weights of the moment
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with answerer.gather(model) as whole, torch.no_grad():
        assert torch.equal(whole(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)
        assert not any("forward" in vars(module) for module in whole.modules())
        embeddings = whole.get_input_embeddings().weight
        assert whole.get_output_embeddings().weight is not embeddings and not embeddings.requires_grad
    assert sum(weight.numel() for weight in answerer._copy.parameters()) == 0
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_tied_weights_are_tied_in_the_copy(tmp_path):
    trainer = make_trainer(tmp_path, model=make_model(tie_word_embeddings=True))
    with ShardedAnswerer(trainer).gather(trainer.model) as whole:
        assert whole.lm_head.weight is whole.model.embed_tokens.weight and whole.lm_head.weight.numel()


def test_the_copy_of_a_run_in_bf16_is_in_bf16_with_exact_positions(tmp_path):
    trainer = make_trainer(tmp_path, bf16=True)
    answerer = ShardedAnswerer(trainer)
    weights, buffers = list(trainer.model.parameters()), dict(trainer.model.named_buffers())
    assert answerer._num_bytes == 2 * sum(weight.numel() for weight in weights)
    with answerer.gather(trainer.model) as whole:
        for weight, own in zip(whole.parameters(), weights):
            assert weight.dtype == torch.bfloat16 and torch.equal(weight, own.bfloat16())
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in whole.named_buffers())


@pytest.mark.parametrize("free_share", [0.9, 1.1])
def test_the_weights_are_gathered_where_they_fit(free_share, tmp_path, monkeypatch, caplog):
    """On a CPU generation needs them twice, and Adam's state is still to come."""
    trainer = make_trainer(tmp_path, optim="adamw_torch")
    trainer.create_optimizer()
    size = 4 * sum(weight.numel() for weight in trainer.model.parameters())
    needed = 2 * sharded_answers.MEMORY_MARGIN * size + 2 * size
    monkeypatch.setattr(sharded_answers, "measure_memory_gib", lambda device: (0.0, free_share * needed / GIB))
    answerer = ShardedAnswerer(trainer)
    with caplog.at_level(logging.INFO):
        answerer.log_choice()
    assert answerer.fits() == (free_share > 1)
    text = (
        "held-out prompts: the weights are gathered on every process for them (0.0 GiB)"
        if free_share > 1
        else "held-out prompts: all processes answer the same ones, layer by layer, as the gathered weights (0.0 GiB) "
        "do not fit on every device; num_answers: 0 and num_instructions: 0 turn them off"
    )
    assert caplog.messages == [text]


def test_weights_sharded_by_zero3_are_gathered_one_by_one(tmp_path, monkeypatch):
    """With a stand-in for deepspeed, which need not be installed; with it: test_deepspeed.py."""
    trainer, gathered = make_trainer(tmp_path), []
    zero = SimpleNamespace(GatheredParameters=lambda weights: gathered.append(weights) or nullcontext())
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero))
    monkeypatch.setattr("sft_pipeline.training.fsdp.is_deepspeed_zero3_enabled", lambda: True)
    weights = list(trainer.model.parameters())
    weights[0].ds_numel = 1000  # the size of the whole weight
    answerer = ShardedAnswerer(trainer)
    assert answerer._num_bytes == 4 * (1000 + sum(weight.numel() for weight in weights[1:]))
    with answerer.gather(trainer.model) as whole:
        copies = list(whole.parameters())
    assert [[id(weight) for weight in group] for group in gathered] == [[id(weight)] for weight in weights]
    assert len(copies) == len(weights)
