"""The loss at supervised positions against the full logits: values, gradients, families, refusals."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tensors import close

from sft_pipeline.model import linear_cross_entropy as linear_cross_entropy_module
from sft_pipeline.model.linear_cross_entropy import choose_chunk_size, linear_cross_entropy
from sft_pipeline.utils.constants import IGNORED


def reference(hidden, labels, weight, bias, num_items, scale, softcap):
    logits = F.linear(hidden, weight, bias) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum") / num_items


def compute_loss(hidden, labels, weight, bias=None, **options):
    """Our loss of hidden states (..., hidden size) at the labels (...) that are not IGNORED."""
    is_target = labels.ne(IGNORED)
    return linear_cross_entropy(hidden[is_target], labels[is_target], weight, bias, **options)


def leaves(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


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
    loss = compute_loss(ours[0], labels, ours[1], ours[2] if biased else None, chunk_size=chunk, **options)
    expected = reference(theirs[0], labels, theirs[1], theirs[2] if biased else None, **options)
    (loss * factor).backward()
    (expected * factor).backward()
    assert abs(loss - expected) < 1e-5 * max(1.0, expected.item())
    for tensor, expected_tensor in zip(ours[: 2 + biased], theirs):
        assert close(tensor.grad, expected_tensor.grad, 1e-4)


def test_nothing_supervised_is_a_zero_on_the_graph():
    hidden, weight = leaves(torch.randn(1, 3, 8), torch.randn(10, 8))
    loss = compute_loss(hidden, torch.full((1, 3), IGNORED), weight, num_items=5)
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any() and not weight.grad.any()


def test_a_frozen_head_gets_no_gradient_and_the_states_still_do():
    hidden, weight = torch.randn(1, 3, 8).requires_grad_(), torch.randn(10, 8)
    compute_loss(hidden, torch.tensor([[1, 2, IGNORED]]), weight, num_items=2).backward()
    assert weight.grad is None and hidden.grad[0, :2].any() and not hidden.grad[0, 2].any()


def test_without_gradients_only_the_loss_is_computed():
    hidden, weight = leaves(torch.randn(1, 3, 8), torch.randn(10, 8))
    labels = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        loss = compute_loss(hidden, labels, weight, num_items=3)
    assert not loss.requires_grad
    assert torch.allclose(loss, reference(hidden, labels, weight, None, 3, 1.0, None))


def test_parts_of_a_step_add_up():
    hidden, weight = leaves(torch.randn(2, 5, 8), torch.randn(10, 8))
    labels = torch.randint(10, (2, 5))
    parts = [compute_loss(hidden[i : i + 1], labels[i : i + 1], weight, num_items=10) for i in range(2)]
    sum(parts).backward()
    whole = leaves(hidden.detach(), weight.detach())
    compute_loss(whole[0], labels, whole[1], num_items=torch.tensor(10)).backward()
    assert close(hidden.grad, whole[0].grad, 1e-5) and close(weight.grad, whole[1].grad, 1e-5)


def test_a_second_backward_pass_is_an_error():
    hidden, weight = leaves(torch.randn(1, 3, 8), torch.randn(10, 8))
    loss = compute_loss(hidden, torch.tensor([[1, 2, 3]]), weight, num_items=3)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="consumed by an earlier backward pass; compute it again"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sixteen_bits_keep_their_types_and_a_float32_loss(dtype):
    """float32 leaves under autocast, and a model that is bfloat16 as a whole."""
    hidden, weight = leaves(torch.randn(1, 40, 16).to(dtype), torch.randn(50, 16).to(dtype))
    labels = torch.randint(50, (1, 40))
    with torch.autocast("cpu", torch.bfloat16):
        loss = compute_loss(hidden, labels, weight, num_items=40, chunk_size=16)
    loss.backward()
    exact = leaves(hidden.detach().float(), weight.detach().float())
    expected = reference(exact[0], labels, exact[1], None, 40, 1.0, None)
    expected.backward()
    assert loss.dtype == torch.float32 and hidden.grad.dtype == weight.grad.dtype == dtype
    assert torch.allclose(loss, expected, rtol=2e-2)
    assert close(weight.grad.float(), exact[1].grad, 3e-2) and close(hidden.grad.float(), exact[0].grad, 3e-2)


def test_products_of_sixteen_bits_are_added_in_float32(monkeypatch):
    """As torch.addmm(out_dtype=) does on CUDA: however many chunks there are, only their logits are rounded."""

    def add_product(total, left, right, *, out_dtype, out):
        assert total is out and total.dtype == out_dtype == torch.float32 and left.dtype == torch.bfloat16
        return out.add_(left.float() @ right.float())

    hidden, weight, labels = torch.randn(64, 16), torch.randn(50, 16), torch.randint(50, (64,))
    grads = []
    for patched in (True, False):
        if not patched:
            monkeypatch.undo()
        else:
            monkeypatch.setattr(linear_cross_entropy_module, "_accepts_float32_output", lambda device, dtype: True)
            monkeypatch.setattr(torch, "addmm", add_product)
        for chunk_size in (64, 1):
            [leaf] = leaves(weight)
            with torch.autocast("cpu", torch.bfloat16):
                compute_loss(hidden, labels, leaf, num_items=64, chunk_size=chunk_size).backward()
            grads.append(leaf.grad)
    assert close(grads[0], grads[1], 1e-6), "one product and the sum of 64"
    assert not close(grads[2], grads[3], 1e-4), "on the CPU each is rounded"


def test_a_chunk_on_cuda_has_whole_tiles():
    assert choose_chunk_size(torch.empty(151_936, 1)) == 2**26 // (4 * 151_936) == 110
    cuda_head = SimpleNamespace(device=torch.device("cuda"), shape=(151_936, 8))
    assert choose_chunk_size(cuda_head) == 13 * 128
    assert choose_chunk_size(SimpleNamespace(device=torch.device("cuda"), shape=(2**30, 8))) == 128
