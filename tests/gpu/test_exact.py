"""Padded, packed and tree batches against the plain computation, in float32 and under bf16 autocast."""

import math

import pytest
import torch
from gpu_parts import exact
from gpu_parts.inputs import SMALL_SHAPES

from sft_pipeline.model.linear_cross_entropy import _accepts_float32_output

BATCHES = ("rows", "shared start", "conversations")


@pytest.mark.parametrize("shape", SMALL_SHAPES)
@pytest.mark.parametrize("data", BATCHES)
def test_losses_and_gradients_are_those_of_the_plain_computation(data, shape, device):
    """In float32 to 1e-4; in bf16 the errors are at most 1.5 times those of the plain computation in bf16."""
    torch.set_float32_matmul_precision("highest")
    small = SMALL_SHAPES[shape]
    # On CUDA the batches have several blocks of FlexAttention's mask.
    scale, rows = (1.0, 6) if device.type == "cuda" else (0.05, 3)
    batches = exact.build_batches(small.vocabulary, scale, rows)[data]
    computations = exact.build_computations(small, device)
    losses, reference = exact.run_backward(*computations["sdpa"], batches)
    baseline = exact.compare(*computations["sdpa"], batches, losses, reference, "bf16", device)
    for name in [name for name in computations if name != "sdpa"]:
        for precision in ("float32", "bf16"):
            errors = exact.compare(*computations[name], batches, losses, reference, precision, device)
            assert exact.judge(errors, baseline, precision)["is_exact"], (name, precision, errors, baseline)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_products_of_the_head_are_summed_in_float32(dtype, cuda):
    """Otherwise its gradient is right but for rounding, and slower: each chunk's product is a tensor of its own."""
    assert _accepts_float32_output(cuda, dtype)


def test_errors_are_seen():
    """The check above would pass on anything if it saw no difference."""
    reference = {"a": torch.tensor([2.0, -4.0]), "b": torch.tensor([1.0])}
    changed = {"a": torch.tensor([2.0, -4.0]), "b": torch.tensor([1.1])}
    assert exact.compute_largest_error(changed, reference) == pytest.approx(0.1)
    assert exact.compute_norm_error(changed, reference) == pytest.approx(0.1 / math.sqrt(21))
    assert exact.compute_norm_error({"a": reference["a"]}, reference) == math.inf, "a gradient is missing"
    assert exact.compute_largest_error({"a": reference["a"]}, reference) == math.inf
    assert exact.compute_loss_error([1.0, 2.2], [1.0, 2.0]) == pytest.approx(0.1 / math.sqrt(2))
    errors = {"loss_error": 0.0, "grad_error": 0.01, "largest_grad_error": 2e-4}
    assert not exact.judge(errors, errors, "float32")["is_exact"] and exact.judge(errors, errors, "bf16")["is_exact"]
    assert not exact.judge(errors | {"grad_error": 0.016}, errors, "bf16")["is_exact"]
    assert not exact.judge(errors | {"loss_error": 2e-4}, errors, "bf16")["is_exact"]
