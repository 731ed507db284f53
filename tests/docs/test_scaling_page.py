"""docs/scaling.md has the tables that benchmarks/scaling.py prints, and their counts are those of real models."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from gpu_parts.inputs import build_config
from transformers import LlamaForCausalLM, PreTrainedModel, Qwen3ForCausalLM

from sft_pipeline.data.packing import pack_rows
from sft_pipeline.training.memory_estimate import count_layer_activation_bytes
from sft_pipeline.utils.constants import IGNORED

ROOT = Path(__file__).parents[2]
ROW_LENGTH = 8


@pytest.fixture(scope="module", autouse=True)
def benchmarks() -> Iterator[None]:
    """The scripts can be imported."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def scaling(benchmarks) -> ModuleType:
    return importlib.import_module("scaling")


def build_model(shape, device: str = "cpu") -> PreTrainedModel:
    with torch.device(device):
        return (Qwen3ForCausalLM if shape.qk_norm else LlamaForCausalLM)(build_config(shape))


@pytest.fixture(params=[False, True], ids=["llama", "qwen3"])
def small(request, scaling):
    """Two layers, as many key-value heads as heads."""
    return scaling.Shape("small", 2, 32, 48, 4, 4, 16, 64, tied=False, qk_norm=request.param)


def test_the_document_has_the_tables_that_the_script_prints(scaling):
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for table in scaling.TABLES:
        assert table().format_markdown() in text, f"{table.__name__}: put in what benchmarks/scaling.py prints"
    assert text.count("| --- |") == len(scaling.TABLES), "a table that the script does not print"


def test_parameter_counts_are_those_of_the_models(scaling):
    for shape in (*scaling.SHAPES, scaling.SMOLLM2, scaling.QWEN3_FOUR_LAYERS):
        assert shape.parameters == build_model(shape, "meta").num_parameters(), shape.name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapter_counts_are_those_of_peft(scaling, small):
    from sft_pipeline.arguments import SFTArguments
    from sft_pipeline.model.lora import add_adapters
    from sft_pipeline.model.peft_config import build_peft_config

    model = add_adapters(build_model(small), build_peft_config(SFTArguments(lora_rank=scaling.LORA_RANK)))
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert small.count_adapter_parameters(scaling.LORA_RANK) == trained


def test_arithmetic_is_that_of_the_measured_benchmark(scaling, small):
    """benchmarks/products.py counts it from a model and a packed batch."""
    products = importlib.import_module("products")
    rows = [ROW_LENGTH] * 3
    ids = np.arange(ROW_LENGTH)
    labels = np.where(ids % 2 == 0, ids, IGNORED)
    batch = pack_rows([{"input_ids": ids + 10_000 * row, "labels": labels} for row in range(len(rows))])
    counted = sum(products.count_required_flops(build_model(small), batch).values())
    assert scaling.count_flops(small, ROW_LENGTH, target_share=0.5) * sum(rows) == counted


def count_saved_bytes(model: PreTrainedModel, shape, tokens: int) -> int:
    """Count what a forward pass through the library's layers keeps for the backward pass, apart from weights."""
    storages: dict[int, torch.UntypedStorage] = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        if tokens in tensor.shape:  # no weight, nor a weight's cast
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model(inputs_embeds=torch.randn(1, tokens, shape.hidden, requires_grad=True), use_cache=False)
    return sum(storage.nbytes() for storage in storages.values())


def test_activations_are_those_that_the_librarys_layers_keep(scaling, small):
    tokens = 96
    more = scaling.replace(small, layers=3)
    sizes = [count_saved_bytes(build_model(shape).model, shape, tokens) for shape in (small, more)]
    assert sizes[1] - sizes[0] == tokens * count_layer_activation_bytes(small)


def test_communication_and_memory_depend_on_the_number_of_devices(scaling):
    shape = scaling.LLAMA_8B
    assert scaling.count_ddp_bytes(shape, 1) == scaling.count_fsdp_bytes(shape, 1) == 0
    assert scaling.count_ddp_bytes(shape, 2) == 4 * shape.parameters, (
        "half of the gradients to the other device, and sums back"
    )
    sharded = [scaling.count_sharded_state_bytes(shape, devices) for devices in (2, 8, 64)]
    assert sharded == sorted(sharded, reverse=True)
    assert sharded[0] - sharded[1] == pytest.approx(16 * shape.parameters * (1 / 2 - 1 / 8))
    assert scaling.count_activation_bytes(shape, True) < scaling.count_activation_bytes(shape, False) / 8
