"""The memory of a step, estimated from shapes: against what layers keep, and against peaks of real runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from sft_pipeline.arguments import SFTArguments
from sft_pipeline.config import SFTConfig, parse_config
from sft_pipeline.data.encode import EncodingStats
from sft_pipeline.kernels.cpu_attention import build_attention_tree
from sft_pipeline.kernels.cpu_layer_training import use_fused_layers
from sft_pipeline.model.lora import add_adapters
from sft_pipeline.model.packed_attention import build_packed_arguments, use_packed_attention
from sft_pipeline.model.peft_config import build_peft_config
from sft_pipeline.training import memory_estimate
from sft_pipeline.training.memory_estimate import (
    GIB,
    Shape,
    check_memory,
    count_activation_bytes,
    count_layer_activation_bytes,
    estimate_memory,
)
from sft_pipeline.training.sft_trainer import SFTTrainer
from sft_pipeline.utils.errors import SFTError

TOKENS, RANK = 96, 8
LARGE = {
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
}  # Llama-3.1-8B


def build(family: str = "llama", device: str = "cpu", **sizes: int) -> nn.Module:
    own = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4}
    own |= {"head_dim": 16, "vocab_size": 64, "tie_word_embeddings": False} | sizes
    with torch.device(device):
        if family == "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**own))
        return LlamaForCausalLM(LlamaConfig(**own))


def count_kept_bytes(family: str, kind: str, layers: int) -> int:
    """Count what a forward pass keeps for the backward pass, apart from weights."""
    model = build(family, num_hidden_layers=layers).to(torch.bfloat16 if kind == "bfloat16" else torch.float32)
    storages, arguments = {}, {}
    backbone = model.model
    if kind == "lora":
        add_adapters(model, build_peft_config(SFTArguments(lora_rank=RANK)))
    if kind == "fused":
        use_packed_attention(model)
        use_fused_layers(model)
        tree = build_attention_tree(torch.full((TOKENS,), TOKENS).numpy())
        arguments = build_packed_arguments(tree, torch.device("cpu"))

    def record(tensor: torch.Tensor) -> torch.Tensor:
        if TOKENS in tensor.shape:  # no weight, nor a weight's cast
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    states = torch.randn(1, TOKENS, 32, dtype=model.dtype, requires_grad=True)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast")
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor), autocast:
        backbone(inputs_embeds=states, use_cache=False, **arguments)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", ["autocast", "float32", "bfloat16", "fused"])
def test_activations_are_those_that_a_layer_keeps(kind, family):
    kept = [count_kept_bytes(family, kind, layers) for layers in (2, 3)]
    shape = Shape.from_model(build(family, num_hidden_layers=2))
    assert kept[1] - kept[0] == TOKENS * count_layer_activation_bytes(shape, kind)
    assert count_activation_bytes(shape, False, kind) == 2 * count_layer_activation_bytes(shape, kind)
    assert count_activation_bytes(shape, True, kind) < count_activation_bytes(shape, False, kind)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_activations_are_those_that_a_layer_with_adapters_keeps(family):
    pytest.importorskip("peft")
    kept = [count_kept_bytes(family, "lora", layers) for layers in (2, 3)]
    shape = Shape.from_model(build(family, num_hidden_layers=2))
    assert kept[1] - kept[0] == TOKENS * count_layer_activation_bytes(shape, "float32", RANK)


def test_a_shape_is_read_from_other_configs_too():
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

    with torch.device("meta"):
        gpt2 = Shape.from_model(GPT2LMHeadModel(GPT2Config(n_embd=64, n_head=4, n_layer=2, vocab_size=99)))
        sizes = {"moe_intermediate_size": 24, "num_experts_per_tok": 3, "num_experts": 8}
        experts = Shape.from_model(Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_hidden_layers=1, vocab_size=99)))
    assert (gpt2.hidden, gpt2.intermediate, gpt2.kv_heads, gpt2.head_size, gpt2.tied) == (64, 256, 4, 16, True)
    assert experts.intermediate == 72 and experts.qk_norm


STATS = EncodingStats(10, 10, 0, {}, 10, 0, 2000, 1000, 800, {"most": 500}, False)


class OnGpu(SFTConfig):
    """The keys of a run on a GPU, as far as the estimate asks."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda") if super().device else None


@pytest.fixture
def gpu(monkeypatch):
    """gpu(free, key=value, ...) are the keys of a run on a GPU with so many free GiB."""

    def build_args(free: float, **keys: object) -> SFTConfig:
        monkeypatch.setattr(memory_estimate, "measure_memory_gib", lambda device: (0.0, free))
        return OnGpu(use_cpu=True, **keys)

    return build_args


def test_a_run_that_cannot_fit_is_refused_before_its_weights_are_loaded(gpu):
    model = build(device="meta", **LARGE, head_dim=128)
    with pytest.raises(SFTError) as error:
        check_memory(model, gpu(79.2), STATS, budget=0, packed=True)
    message = str(error.value)
    assert message.startswith("a step of this run needs about 12") and "\n" not in message
    assert "(weights 29.9, gradients 29.9, optimizer 59.8, head " in message and "activations of 500 tokens" in message
    assert message.endswith(
        "on each device, where 79.2 GiB are free: use bf16: true, activation_checkpointing: true, lora: true, "
        "fsdp: true on several devices, or a smaller model"
    )
    keys = {"bf16": True, "activation_checkpointing": True, "lora": True}
    with pytest.raises(SFTError, match=": use load_in_4bit: true, fsdp: true on several devices, or a smaller"):
        check_memory(model, gpu(40.0, **keys), STATS, budget=0, packed=True)


def test_what_makes_a_run_need_less(gpu, monkeypatch):
    model = build(device="meta", **LARGE, head_dim=128)

    def estimate(tokens: int = 8192, **keys: object) -> float:
        return estimate_memory(model, gpu(79.2, **keys), tokens, packed=True).total / GIB

    assert estimate(bf16=True, activation_checkpointing=True) < estimate(bf16=True)
    assert estimate(dtype="bfloat16") < 0.7 * estimate()
    assert estimate(16_384) - estimate(8192) == pytest.approx(estimate(24_576) - estimate(16_384), rel=0.01)
    whole = estimate(bf16=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(OnGpu, "world_size", 8)
    assert estimate(bf16=True) < 0.6 * whole


def test_a_run_logs_its_estimate_before_the_model_is_loaded(write_config, tmp_path, caplog, monkeypatch):
    config = write_config(tmp_path, rows=8, output_dir=str(tmp_path / "out"))
    with caplog.at_level("INFO", logger="sft_pipeline"):
        SFTTrainer(args=parse_config(str(config)))
    [line] = [record.getMessage() for record in caplog.records if record.getMessage().startswith("a step needs about")]
    assert "0.0 GiB (weights 0.0, gradients 0.0, optimizer 0.0" in line and line.endswith("GiB are free")

    def refuse(*args):
        raise SFTError("too large")

    monkeypatch.setattr(memory_estimate, "measure_memory_gib", refuse)
    monkeypatch.setattr("sft_pipeline.training.model_setup.load_model", lambda *args: pytest.fail("loaded"))
    with pytest.raises(SFTError, match="^too large$"):
        SFTTrainer(args=parse_config(str(config)))


PEAK_SCRIPT = Path(__file__).parents[1] / "support" / "peak_memory.py"
KEYS = [{}, {"activation_checkpointing": True}, {"lora": True}]


@pytest.mark.real
@pytest.mark.parametrize("keys", KEYS, ids=lambda keys: next(iter(keys), "full"))
def test_the_estimate_is_within_a_tenth_of_the_peak_of_a_run(keys, tmp_path):
    """Resident memory of a process of its own, in which malloc returns what is freed; the best of three runs."""
    paths = f"{Path(__file__).parents[2]}{os.pathsep}{Path(__file__).parents[1]}"
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": paths}
    command = [sys.executable, str(PEAK_SCRIPT), json.dumps(keys), str(tmp_path)]
    results = []
    while len(results) < 3:
        output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        results.append(json.loads(output.splitlines()[-1]))
        if results[-1]["estimate"] == pytest.approx(results[-1]["peak"], rel=0.1):
            return
    pytest.fail(f"{results}")
