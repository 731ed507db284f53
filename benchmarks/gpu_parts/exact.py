"""Loss and gradients of padded, packed and tree batches, also with compiled layers, against the plain computation.

The reference is the model's own forward with sdpa over a padded batch in float32 without TF32, with torch's
cross-entropy of all logits. In float32 the largest error of a gradient, relative to its largest element, must be at
most 1e-4. In bf16 (autocast over float32 weights) the error of all gradients (the norm of the difference over the norm)
must be at most 1.5 times the one of the reference's own computation in bf16, and likewise that of the loss of single
batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from report import Run, Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from gpu_parts.inputs import Row, build_conversations, build_model, build_rows
from gpu_parts.measuring import Setting, build_table, record_errors, reset_peak
from sft_pipeline.data.packing import PackingCollator
from sft_pipeline.data.padding import PaddingCollator
from sft_pipeline.model.compiled_layers import compile_layers
from sft_pipeline.model.loss_forward import patch_loss_forward
from sft_pipeline.utils.constants import IGNORED

FLOAT32_LIMIT, BF16_RATIO = 1e-4, 1.5
LOSS_FLOOR = 1e-4  # smaller errors of a loss in bf16 say nothing: they may be 0 by chance
INITIAL_RANGE = 0.05  # of the weights: scores of attention then vary by about 2, so that its errors show
Compute = Callable[[Sequence[Row]], Tensor]
Gradients = dict[str, Tensor]


def compute_plain_loss(model: PreTrainedModel, rows: Sequence[Row], device: torch.device) -> Tensor:
    """Compute the mean cross-entropy of the targets in the plain way: padded rows, all logits."""
    batch = {name: tensor.to(device) for name, tensor in PaddingCollator(0)(list(rows)).items()}
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    labels = batch["shift_labels"].flatten()
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels, ignore_index=IGNORED)


def compute_loss(model: Any, collator: Any, rows: Sequence[Row], device: torch.device) -> Tensor:
    """Compute the loss as a training step of this project does."""
    batch = move(collator(list(rows)), device)
    return model(**batch, num_items_in_batch=batch["labels"].ne(IGNORED).sum()).loss


def move(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move the tensors of a batch; what is no tensor stays on the host, as under `Trainer`."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def build_computations(shape: Any, device: torch.device, **keys: Any) -> dict[str, tuple[nn.Module, Compute]]:
    """Build the same model once for each computation: its parameters, and the loss of rows."""
    plain = build_model(shape, device, initializer_range=INITIAL_RANGE, **keys)
    # Compiling takes too long on a CPU.
    packed_names = ("packed", "tree", *["compiled tree"] * (device.type == "cuda"))
    models = {name: deepcopy(plain) for name in ("padded", *packed_names)}
    patch_loss_forward(models["padded"])
    collators: dict[str, Any] = {"padded": PaddingCollator(0)}
    for name in packed_names:
        collators[name] = PackingCollator(models[name], share_prefixes=name != "packed")
        if name == "compiled tree":
            compile_layers(models[name])

    def bind(name: str) -> Compute:
        return lambda rows: compute_loss(models[name], collators[name], rows, device)

    return {
        "sdpa": (plain, lambda rows: compute_plain_loss(plain, rows, device)),
        **{name: (model, bind(name)) for name, model in models.items()},
    }


def run_backward(model: nn.Module, compute: Compute, batches: Sequence[Sequence[Row]]) -> tuple[list[float], Gradients]:
    """Return the loss of each batch and the gradients of their sum, in float32."""
    model.train()
    model.zero_grad()
    losses = []
    for rows in batches:
        loss = compute(rows)
        loss.backward()
        losses.append(loss.item())
    return losses, {name: weight.grad.float() for name, weight in model.named_parameters() if weight.grad is not None}


def compute_largest_error(grads: Gradients, reference: Gradients) -> float:
    """Return the largest error of an element, relative to the largest element of its gradient."""
    if grads.keys() != reference.keys():
        return math.inf
    errors = [(grads[name] - grad).abs().max() / grad.abs().max().clamp_min(1e-30) for name, grad in reference.items()]
    return max(error.item() for error in errors)


def compute_norm_error(grads: Gradients, reference: Gradients) -> float:
    """Return the norm of the difference of all gradients, relative to the norm of the reference."""
    if grads.keys() != reference.keys():
        return math.inf
    squares = [((grads[name] - grad).square().sum(), grad.square().sum()) for name, grad in reference.items()]
    return math.sqrt(sum(error.item() for error, _ in squares) / sum(size.item() for _, size in squares))


def compute_loss_error(losses: Sequence[float], reference: Sequence[float]) -> float:
    """Return the root of the mean square of the batches' relative errors."""
    return math.sqrt(sum((loss / expected - 1) ** 2 for loss, expected in zip(losses, reference)) / len(losses))


def build_batches(vocabulary: int, scale: float, rows: int) -> dict[str, list[list[Row]]]:
    """Build batches of rows without and with a shared start, and of conversations, by what they are."""
    return {
        "rows": [build_rows(rows, vocabulary, seed=seed, scale=scale) for seed in (1, 2)],
        "shared start": [build_rows(rows, vocabulary, shared=round(300 * scale), seed=3, scale=scale)],
        "conversations": [build_conversations(1, vocabulary, seed=4, scale=scale)],
    }


def measure(setting: Setting) -> Run:
    device, shape = setting.device, setting.shape
    torch.set_float32_matmul_precision("highest")
    results: Run = {"shape": shape.name, "measurements": []}
    for data, batches in build_batches(shape.vocabulary, setting.scale, setting.choose(6, 3)).items():
        reset_peak(device)
        computations = build_computations(shape, device)
        losses, reference = run_backward(*computations["sdpa"], batches)
        for precision in ("float32", "bf16"):
            baseline: Run = {}
            for name, computation in computations.items():
                if (precision, name) == ("float32", "sdpa"):
                    continue
                measurement: Run = {"data": data, "precision": precision, "name": name}
                with record_errors(measurement):
                    errors = compare(*computation, batches, losses, reference, precision, device)
                    baseline = baseline or errors
                    measurement |= errors | judge(errors, baseline, precision)
                results["measurements"].append(measurement)
                setting.save(results)
    return results


def compare(
    model: nn.Module,
    compute: Compute,
    batches: Sequence[Sequence[Row]],
    losses: Sequence[float],
    reference: Gradients,
    precision: str,
    device: torch.device,
) -> Run:
    """Return the errors of the losses and gradients of one computation in one precision."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        own_losses, grads = run_backward(model, compute, batches)
    errors = {
        "loss_error": compute_loss_error(own_losses, losses),
        "grad_error": compute_norm_error(grads, reference),
        "largest_grad_error": compute_largest_error(grads, reference),
    }
    model.zero_grad()
    return errors


def judge(errors: Run, baseline: Run, precision: str) -> Run:
    """Return whether the errors are within the bounds. baseline: the errors of sdpa in bf16."""
    if precision == "float32":
        is_exact = errors["largest_grad_error"] <= FLOAT32_LIMIT and errors["loss_error"] <= FLOAT32_LIMIT
        return {"is_exact": is_exact}
    ratio = errors["grad_error"] / baseline["grad_error"]
    loss_limit = BF16_RATIO * max(baseline["loss_error"], LOSS_FLOOR)
    return {"ratio": ratio, "is_exact": ratio <= BF16_RATIO and errors["loss_error"] <= loss_limit}


def build_tables(results: Run) -> list[Table]:
    header = [results["shape"], "loss", "gradients", "largest", "of sdpa's in bf16", "within bounds"]
    return [build_table(header, results["measurements"], "{data}, {precision}, {name}", format_cells)]


def format_cells(run: Run) -> list[str]:
    errors = [f"{run[key]:.1e}" for key in ("loss_error", "grad_error", "largest_grad_error")]
    return [*errors, f"{run['ratio']:.2f}x" if "ratio" in run else "", "yes" if run["is_exact"] else "NO"]
