"""Compiled decoder layers: steps of the plain ones, few compilations, all of them early.

torch warns of a tensor inside the model whose gradient it looks at while it compiles: a warning about torch itself.
"""

import copy

import pytest
import torch
from support.causal_models import tiny
from support.compiling import CountingBackend
from support.trees import build_row
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import flex_attention
from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config

from sft_pipeline.data.packing import pack_rows
from sft_pipeline.data.padding import PaddingCollator
from sft_pipeline.inference.engine import generate
from sft_pipeline.inference.sampling import SamplingParams
from sft_pipeline.kernels import cuda_attention
from sft_pipeline.kernels.cpu_layer_training import use_fused_layers
from sft_pipeline.kernels.cuda_attention import attend_flex
from sft_pipeline.model import packed_attention
from sft_pipeline.model.compiled_layers import compile_layers
from sft_pipeline.model.lora import add_adapters
from sft_pipeline.model.loss_forward import patch_loss_forward
from sft_pipeline.model.packed_attention import _attend_sdpa, use_packed_attention

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),  # by inductor
]

KINDS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 7}


@pytest.fixture
def backend():
    torch.compiler.reset()
    yield CountingBackend()
    torch.compiler.reset()


def build_batches(collate=pack_rows):
    """A dozen batches: rows alone, side by side, and with prefixes shared at several depths; the fourth is empty."""
    random = torch.Generator().manual_seed(0)

    def draw(least, most):
        return torch.randint(3, 64, (int(torch.randint(least, most, (), generator=random)),), generator=random).tolist()

    batches = []
    for count in (3, 1, 4, 0, 2, 5, 1, 3, 2, 4, 1, 2):
        trunk = draw(4, 12)
        sequences = [trunk[: 1 + index] + draw(3, 20) for index in range(count)]
        batches.append(collate([build_row((ids, [True] * len(ids))) for ids in sequences]))
    return batches


def build_pair(config, **extra):
    """The same model twice, patched for packed batches."""
    plain = tiny(config, **{"num_hidden_layers": 4, "initializer_range": 0.2, **extra})
    compiled = copy.deepcopy(plain)
    for model in (plain, compiled):
        patch_loss_forward(model)
        use_packed_attention(model)
    return plain, compiled


def run(model, batch):
    """Return the loss of a batch and the gradients of every parameter that has one."""
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=9).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_steps(plain, compiled, batches):
    for batch in batches:
        loss, grads = run(compiled, batch)
        expected_loss, expected_grads = run(plain, batch)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
        assert grads.keys() == expected_grads.keys()
        for name, grad in expected_grads.items():
            assert (grads[name] - grad).abs().max() <= 1e-4 * grad.abs().max().clamp_min(1e-3), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_dozen_layouts_are_compiled_in_the_first_steps(checkpointing, backend):
    plain, compiled = build_pair(LlamaConfig)
    assert compile_layers(compiled, backend=backend) == 4
    if checkpointing:
        for model in (plain, compiled):
            model.activation_checkpointing_enable({"use_reentrant": False})
    batches = build_batches()
    assert_same_steps(plain, compiled, batches[:2])
    num_graphs = backend.num_graphs
    assert_same_steps(plain, compiled, batches[2:])
    assert 3 <= num_graphs == backend.num_graphs < 8


def test_sliding_and_full_layers_are_compiled_once_each(backend):
    plain, compiled = build_pair(Gemma3TextConfig, **KINDS)
    compile_layers(compiled, backend=backend)
    batches = build_batches()
    assert_same_steps(plain, compiled, batches[:2])
    num_graphs = backend.num_graphs
    assert_same_steps(plain, compiled, batches[2:])
    assert num_graphs == backend.num_graphs < 8


def test_the_attention_of_cuda_is_compiled_once_beside_the_layers(backend, monkeypatch):
    """Its forward pass; on the CPU FlexAttention has no other.

    A batch of one block has another function, and rows side by side have a third: nothing is compiled for the others.
    """
    functions = []

    def attend_rows(query, key, value, tree, scaling, window):
        functions.append("varlen")
        output = _attend_sdpa(query, key, value, tree, scaling, window)
        return output[0].contiguous()[None]  # torch's function has no dimension of a batch

    def attend_tree(*arguments):
        functions.append("flex")
        return attend_flex(*arguments)

    monkeypatch.setattr(packed_attention, "attend_varlen", attend_rows)
    monkeypatch.setattr(packed_attention, "attend_flex", attend_tree)
    monkeypatch.setattr(
        packed_attention, "can_use_varlen", lambda q, k, v, tree: not any(s.ancestors for s in tree.segments)
    )
    monkeypatch.setattr(packed_attention, "runs_on_cuda", lambda device: True)
    for module in (packed_attention, cuda_attention):
        monkeypatch.setattr(module, "FLEX_BLOCK", 4)  # as many batches have several blocks as on CUDA
    flex = torch.compile(flex_attention, dynamic=True, backend=backend)
    monkeypatch.setattr(cuda_attention, "compile_flex_attention", lambda: flex)
    plain, compiled = build_pair(LlamaConfig, num_hidden_layers=2)
    compile_layers(compiled, backend=backend)
    counts, batches = [], build_batches()
    with torch.no_grad():
        for batch, padded in zip(batches, build_batches(PaddingCollator(0))):
            expected = compute_sums(plain, padded)
            torch.testing.assert_close(compute_sums(compiled, batch), expected, rtol=1e-5, atol=1e-5)
            counts.append(backend.num_graphs)
    assert counts[0] == counts[-1] == 5 and len(batches[3]["prefix_tree"].depths) < 4
    assert functions[:4] == ["flex", "flex", "varlen", "varlen"]  # two layers


def compute_sums(model, batch):
    """Return the summed loss and the number of targets of each row."""
    return model(**batch, return_row_losses=True).logits[:, :2]


def test_an_evaluation_and_answers_of_a_compiled_model(backend):
    plain, compiled = (model.eval() for model in build_pair(Qwen3Config, num_hidden_layers=2))
    compile_layers(compiled, backend=backend)
    for batch in build_batches()[:4]:
        with torch.no_grad():
            torch.testing.assert_close(compute_sums(compiled, batch), compute_sums(plain, batch), rtol=1e-5, atol=1e-5)
    num_graphs, params = backend.num_graphs, SamplingParams(max_new_tokens=5)
    answers, expected = (generate(model, [[5, 6, 7], [9]], [2], params) for model in (compiled, plain))
    assert [answer.ids for answer in answers] == [answer.ids for answer in expected]
    assert num_graphs == backend.num_graphs, "decoding compiles nothing"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # by peft
def test_adapters_and_autocast(backend):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    models = []
    for model in build_pair(LlamaConfig, num_hidden_layers=1):
        torch.manual_seed(1)
        models.append(add_adapters(model, config))
    assert compile_layers(models[1], backend=backend) == 1
    batches = build_batches()[:2]
    assert_same_steps(*models, batches)
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            (loss, grads), (expected, expected_grads) = (run(model, batch) for model in reversed(models))
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
        assert grads.keys() == expected_grads.keys() and all("lora_" in name for name in grads)


def test_fused_layers_are_left_alone():
    model = build_pair(LlamaConfig)[0]
    assert use_fused_layers(model) == 4 and compile_layers(model) == 0


@pytest.mark.real
def test_inductor_compiles_a_dozen_layouts_in_the_first_steps(backend):
    """The backend of a run, which generates code: here C++, with g++. Forward and backward are compiled apart."""
    counters.clear()
    plain, compiled = build_pair(LlamaConfig, num_hidden_layers=2)
    compile_layers(compiled)
    batches = build_batches()
    assert_same_steps(plain, compiled, batches[:2])
    num_compilations = count_compilations()
    assert_same_steps(plain, compiled, batches[2:])
    assert 3 <= num_compilations == count_compilations() <= 8


def count_compilations() -> int:
    return sum(counters["inductor"][f"fxgraph_cache_{kind}"] for kind in ("hit", "miss", "bypass"))
