"""Check once more that packing and the head change nothing: on the run's device and in its precision.

The checks of the model when it is loaded run on the CPU without autocast, and so not through the kernels that train.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from sft_pipeline.model.compiled_layers import run_layers_eagerly
from sft_pipeline.model.module_utils import unwrap_peft, use_eval_mode
from sft_pipeline.model.packed_attention import compute_check_states
from sft_pipeline.training.sharded_answers import is_sharded
from sft_pipeline.utils.constants import IGNORED
from sft_pipeline.utils.errors import SFTError

ERROR_RATIO = 1.5  # the largest error of packed rows, in multiples of that of single rows
# The largest relative differences where there is no exact reference, and below which none is looked at: of products in
# 16 bits, in TF32 and in float32.
TOLERANCES = {"16 bits": 5e-2, "TF32": 5e-3, "float32": 1e-4}


def check_on_device(trainer: Trainer, packed: bool) -> None:
    """Raise SFTError if packed rows or the head give other results than the model itself, up to rounding.

    The reference are single rows through the model's own forward. Where the weights are float32, both are compared with
    that forward without autocast: packing may add half of the error that the precision makes anyway. A sharded model
    casts its weights whenever it gathers them, so it has no such reference. Not in float32 on the CPU, where this was
    checked when the model was loaded.
    """
    args: Any = trainer.args
    whole: Any = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    model: Any = unwrap_peft(whole)
    is_float32 = all(weight.dtype == torch.float32 for weight in model.parameters())
    is_autocast = trainer.accelerator.mixed_precision != "no"
    is_checked = args.device.type == "cpu" and is_float32 and not is_autocast
    if is_checked:
        return
    precision = "16 bits" if is_autocast or not is_float32 else "TF32" if args.tf32 else "float32"
    where = f"on {args.device.type} in {precision}"
    name = type(model).__name__.removeprefix("FSDP")  # FSDP2 makes the class of a sharded model
    autocast = trainer.accelerator.autocast
    shards = is_sharded(trainer)
    has_exact_states = is_float32 and is_autocast and not shards
    run = partial(_run_backbone, whole, model.base_model) if shards else None
    compute_states = partial(compute_check_states, model.base_model, run=run)
    with use_eval_mode(whole):
        if packed:
            with run_layers_eagerly():  # nothing is compiled for the reference
                exact = compute_states(packed=False) if has_exact_states else None
                with autocast():
                    rows = compute_states(packed=False)
            for share in (True, False):  # on CUDA in 16 bits, rows that share nothing have a kernel of their own
                with autocast():
                    states = compute_states(packed=True, share=share)
                _check_states(rows, states, exact, where, TOLERANCES[precision], name)
        with autocast(), run_layers_eagerly():
            _check_loss(whole, args.device, where, TOLERANCES[precision], name)


def _run_backbone(whole: nn.Module, backbone: nn.Module, **inputs: Any) -> Any:
    """Return the output of the backbone in a call of the whole model, which gathers the weights of a sharded one."""
    outputs: list[Any] = []
    hook = backbone.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        whole(**inputs)
    finally:
        hook.remove()
    return outputs[0]


def _check_states(rows: Tensor, packed: Tensor, exact: Tensor | None, where: str, tolerance: float, name: str) -> None:
    """Compare the hidden states of packed rows with those of single rows, by root mean squares."""
    reference = rows if exact is None else exact
    error = _measure_error(packed, reference)
    allowed = tolerance if exact is None else max(ERROR_RATIO * _measure_error(rows, exact), TOLERANCES["TF32"])
    if not error <= allowed:
        raise SFTError(
            f"packing changes what {name} computes {where}: its hidden states have an error of {error:.1g}, at most "
            f"{allowed:.1g} is due to rounding; set packing: false"
        )


def _check_loss(model: Any, device: torch.device, where: str, tolerance: float, name: str) -> None:
    """Compare the loss of the patched forward on a short row with the cross-entropy of the model's own logits."""
    input_ids = torch.arange(8, device=device)[None] % unwrap_peft(model).config.get_text_config().vocab_size
    labels = torch.cat([input_ids[:, 1:], torch.full_like(input_ids[:, :1], IGNORED)], 1)
    mask = torch.ones_like(input_ids)
    loss = model(input_ids=input_ids, attention_mask=mask, shift_labels=labels, num_items_in_batch=7).loss
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits[0, :-1].float(), input_ids[0, 1:])
    difference = (loss - expected).abs().item() / expected.clamp(min=1).item()
    if not difference <= tolerance:
        raise SFTError(
            f"the loss {where} is not the cross-entropy of the logits of {name} (they differ by "
            f"{difference:.1g}); this is an error of this package: please report it with the model's name"
        )


def _measure_error(states: Tensor, reference: Tensor) -> float:
    return ((states - reference).square().mean().sqrt() / reference.square().mean().sqrt().clamp(min=1e-9)).item()
