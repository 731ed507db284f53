"""The head and its loss: this project's, Liger's fused linear cross-entropy, and all logits with torch's.

Each gets the same hidden states in bf16 and the same float32 weight under bf16 autocast, as in a training step; the
errors are those of loss and gradients against float64. Milliseconds are of forward and backward; memory is the peak
beyond inputs and their gradients.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from report import Run, Table
from torch import Tensor, nn

from gpu_parts.measuring import GIB, Setting, build_table, get_peak_gib, record_errors, reset_peak, time_call
from sft_pipeline.model.linear_cross_entropy import linear_cross_entropy

SIZES = ((151_936, 1024), (128_256, 4096))  # outputs and hidden size: Qwen3-0.6B, Llama-3.1-8B
TARGETS = (1300, 10_000)
REFERENCE_CHUNK = 1024  # positions whose logits are in float64 at a time
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def compute_plain_loss(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(nn.functional.linear(states, weight).float(), targets)


def compute_our_loss(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(states, targets, weight, num_items=len(targets))


def build_losses(device: torch.device) -> dict[str, Loss]:
    losses: dict[str, Loss] = {"this project": compute_our_loss}
    if device.type == "cuda" and find_spec("liger_kernel"):
        fused: Any = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
        losses["Liger"] = lambda states, weight, targets: fused(weight, states, targets)
    losses["all logits"] = compute_plain_loss
    return losses


def compute_reference(states: Tensor, weight: Tensor, targets: Tensor) -> tuple[float, Tensor, Tensor]:
    """Return loss and gradients of states and weight in float64, without a tensor of all logits."""
    exact_weight = weight.detach().double()
    grad_states = torch.empty_like(states, dtype=torch.float64)
    grad_weight, total = torch.zeros_like(exact_weight), 0.0
    for start in range(0, len(targets), REFERENCE_CHUNK):
        chunk = slice(start, start + REFERENCE_CHUNK)
        exact_states, index = states.detach()[chunk].double(), targets[chunk, None]
        log_probs = torch.log_softmax(exact_states @ exact_weight.T, -1)
        total -= log_probs.gather(1, index).sum().item()
        grad_logits = log_probs.exp_()
        grad_logits.scatter_add_(1, index, grad_logits.new_full((), -1.0).expand_as(index))
        grad_states[chunk] = grad_logits @ exact_weight / len(targets)
        grad_weight += grad_logits.T @ exact_states / len(targets)
    return total / len(targets), grad_states, grad_weight


def compute_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def measure(setting: Setting) -> Run:
    device = setting.device
    results: Run = {"measurements": []}
    for outputs, hidden in setting.choose(SIZES, ((300, 32),)):
        for count in setting.choose(TARGETS, (40,)):
            torch.manual_seed(0)
            states = torch.randn(count, hidden, device=device).to(setting.dtype).requires_grad_()
            weight = (0.02 * torch.randn(outputs, hidden, device=device)).requires_grad_()
            targets = torch.randint(outputs, (count,), device=device)
            reference = compute_reference(states, weight, targets)
            for name, compute in build_losses(device).items():
                run: Run = {"outputs": outputs, "hidden": hidden, "targets": count, "name": name}
                with record_errors(run):
                    run |= measure_loss(compute, states, weight, targets, reference, setting)
                results["measurements"].append(run)
                setting.save(results)
    return results


def measure_loss(
    compute: Loss,
    states: Tensor,
    weight: Tensor,
    targets: Tensor,
    reference: tuple[float, Tensor, Tensor],
    setting: Setting,
) -> Run:
    """Return milliseconds, memory and errors of one loss."""
    device = setting.device

    def run() -> float | Tensor:
        states.grad = weight.grad = None
        with torch.autocast(device.type, torch.bfloat16, enabled=states.dtype == torch.bfloat16):
            loss = compute(states, weight, targets)
        loss.backward()
        return loss.detach()

    loss = float(run())
    grad_states, grad_weight = states.grad, weight.grad
    assert grad_states is not None and grad_weight is not None
    errors = {
        "loss_error": abs(loss / reference[0] - 1),
        "states_error": compute_error(grad_states, reference[1]),
        "weight_error": compute_error(grad_weight, reference[2]),
    }
    del grad_states, grad_weight
    states.grad = weight.grad = None
    reset_peak(device)
    held = torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else 0.0
    grads = (states.nbytes + weight.nbytes) / GIB
    milliseconds = time_call(run, device, repeat=setting.choose(10, 2), warm_up=setting.choose(3, 1))
    return {"ms": milliseconds, "gib": get_peak_gib(device) - held - grads, **errors}


def build_tables(results: Run) -> list[Table]:
    header = ["error against float64", "ms", "GiB", "loss", "states", "weight"]
    title = "{outputs:,} x {hidden:,}, {targets:,} targets, {name}"
    return [build_table(header, results["measurements"], title, format_cells)]


def format_cells(run: Run) -> list[str]:
    errors = [f"{run[key]:.1e}" for key in ("loss_error", "states_error", "weight_error")]
    return [f"{run['ms']:.2f}", f"{run['gib']:.2f}", *errors]
