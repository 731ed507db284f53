"""Cross-entropy at the supervised positions: no tensor of rows x length x vocabulary, nothing computed twice.

Three savings, all exact: hidden states are gathered where there is a target before the head is applied; the head and
the cross-entropy run in chunks of positions; the gradients of the hidden states and of the head are taken while a
chunk's probabilities are at hand, in the forward pass, so that the backward pass only scales them.

    head = split_head(model)                                    # once, before the model is wrapped for many devices
    hidden = head.backbone(input_ids=..., position_ids=...).last_hidden_state
    loss = head.loss(hidden, labels, num_items=num_items_in_batch)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sft_pipeline.errors import SFTError
from sft_pipeline.labels import IGNORED

CHUNK_BYTES = 2**26  # of one chunk's float32 logits: large enough for full-rate products, small beside a model
CLOSE = {torch.float32: 1e-4, torch.float64: 1e-6}  # the largest difference of logits split_head accepts, relative


def supervised_loss(
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    num_items: float | Tensor,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Sum of the cross-entropies of `labels`, in nats, over `num_items`: a scalar in float32.

    hidden: (..., hidden size); labels: (...), already shifted, -100 where there is no target; weight: (vocabulary,
    hidden size); bias: (vocabulary). The logits are `softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`.
    num_items: the targets of the whole optimizer step, so that parts of a step add up. chunk: positions at a time.
    Without any target the loss is a zero that depends on `hidden`, so that every process can run backward.
    """
    where = labels.reshape(-1).ne(IGNORED).nonzero()[:, 0]
    states = hidden.reshape(-1, hidden.shape[-1]).index_select(0, where)
    targets = labels.reshape(-1).index_select(0, where)
    rows = chunk or max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    options = _Options(num_items, scale, softcap, rows, _compute_dtype(weight), torch.is_grad_enabled())
    return _ChunkedCrossEntropy.apply(states, targets, weight, bias, options)


@dataclass(frozen=True)
class _Options:
    num_items: float | Tensor
    scale: float
    softcap: float | None
    rows: int
    dtype: torch.dtype
    grad: bool


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """The type of the products: autocast's where it is on, as for a linear layer."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one pass; `backward` multiplies what `forward` has kept by the loss's gradient."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, options: _Options
    ) -> Tensor:
        needs = [options.grad and t is not None and t.requires_grad for t in (states, weight, bias)]
        with torch.autocast(states.device.type, enabled=False):
            loss, grads = _loss_and_grads(states, targets, weight, bias, options, needs)
        ctx.grads = [g if n else None for g, n in zip(grads, needs)]
        ctx.save_for_backward()
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # On CPU reading the factor is free and saves a pass over the head's gradient; elsewhere it would synchronize.
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("the loss's gradients were used up by an earlier backward pass")
        if grad.device.type != "cpu" or grad.item() != 1.0:
            grads = [g if g is None else g.mul_(grad) for g in grads]
        states, weight, bias = grads
        return states, None, weight, bias, None


def _loss_and_grads(
    states: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, options: _Options, needs: list[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """The scalar loss and the gradients of states, weight and bias (those that are needed)."""
    matrix, total = weight.to(options.dtype), states.new_zeros((), dtype=torch.float32)
    grads: list[Tensor | None] = [
        torch.empty_like(states) if needs[0] else None,
        # Chunks are summed in float32 even for a head of 16 bits.
        torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None,
        torch.zeros_like(weight[:, 0], dtype=torch.float32) if needs[2] else None,
    ]
    for at in range(0, len(states), options.rows):
        part = slice(at, at + options.rows)
        chunk = states[part].to(options.dtype)
        losses, slope = _chunk(chunk, targets[part], matrix, bias, options, any(needs))
        total += losses.sum()
        if slope is not None:
            _add_grads(grads, part, chunk, slope, matrix)
    factor = 1.0 / options.num_items
    for grad in grads:
        if grad is not None:
            grad.mul_(factor)
    return total * factor, [grads[0], *(g if g is None else g.to(weight.dtype) for g in grads[1:])]


def _chunk(
    states: Tensor, targets: Tensor, matrix: Tensor, bias: Tensor | None, options: _Options, slopes: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses (positions) and, if asked, the slope of their sum by the head's raw outputs (positions, vocabulary)."""
    outputs = states @ matrix.T
    if bias is not None:
        outputs += bias.to(outputs.dtype)
    logits = outputs.float()
    if options.scale != 1.0:
        logits = logits * options.scale
    curve = None
    if options.softcap is not None:
        curve = torch.tanh(logits / options.softcap)
        logits = options.softcap * curve
    at = targets[:, None]
    logarithms = torch.log_softmax(logits, dim=-1)
    losses = -logarithms.gather(1, at)[:, 0]
    if not slopes:
        return losses, None
    slope = logarithms.exp_()
    slope.scatter_add_(1, at, slope.new_full((), -1.0).expand_as(at))
    if curve is not None:
        slope *= 1 - curve.square()
    if options.scale != 1.0:
        slope *= options.scale
    return losses, slope.to(states.dtype)


def _add_grads(grads: list[Tensor | None], part: slice, states: Tensor, slope: Tensor, matrix: Tensor) -> None:
    """Add one chunk's share to the gradients of states, weight and bias, in place."""
    if grads[0] is not None:
        grads[0][part] = slope @ matrix
    if grads[1] is not None:
        if slope.dtype == torch.float32:
            grads[1].addmm_(slope.T, states)
        else:
            grads[1] += slope.T @ states
    if grads[2] is not None:
        grads[2] += slope.float().sum(0)


@dataclass(frozen=True)
class Head:
    """A causal language model cut in two: the backbone, which gives hidden states, and the head over them."""

    backbone: PreTrainedModel
    linear: nn.Linear
    scale: float
    softcap: float | None

    def hidden(self, **inputs: Any) -> Tensor:
        """The backbone's last hidden states (lines, length, hidden size).

        The gradient of a tied embedding is its rows that occurred, added to the head's gradient: a dense one would be
        a second matrix of vocabulary x hidden size to clear, fill and add.
        """
        embedding: Any = self.backbone.get_input_embeddings()
        tied = type(embedding) is nn.Embedding and embedding.weight is self.linear.weight
        with _replaced(embedding, "sparse", True) if tied else nullcontext():
            return self.backbone(use_cache=False, **inputs).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """All logits (..., vocabulary) of few positions, as the model itself gives them."""
        logits = torch.nn.functional.linear(hidden, self.linear.weight, self.linear.bias) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def loss(self, hidden: Tensor, labels: Tensor, num_items: float | Tensor) -> Tensor:
        """See `supervised_loss`."""
        linear = self.linear
        options: dict[str, Any] = {"num_items": num_items, "scale": self.scale, "softcap": self.softcap}
        return self.call(lambda states: supervised_loss(states, labels, linear.weight, linear.bias, **options), hidden)

    def call(self, function: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """`function(hidden)` in the place of the head's own forward pass.

        Where weights are divided among processes (FSDP, ZeRO-3), they are whole within their module's call alone.
        """
        with _replaced(self.linear, "forward", function):
            return self.linear(hidden)


def split_head(model: nn.Module) -> Head:
    """Cut `model` (a transformers causal LM, or one with LoRA from `peft`) into backbone and head.

    What the family does to its logits is read from the config and then checked against the model's own logits on a
    few tokens, so a family with another rule is refused (SFTError), never wrong. Call it before the model is wrapped
    or sharded. `peft`: LoRA layers sit inside the backbone and need nothing; a head in `modules_to_save` is trained
    as its copy; a head with LoRA on it, and prompt learning, which changes the inputs, are refused.
    """
    model = without_adapter_shell(model)
    linear = _plain_linear(model.get_output_embeddings())
    if linear is None:
        raise SFTError(f"{type(model).__name__} has no plain linear head; set `packing: false` and use the full logits")
    config = model.config.get_text_config()
    backbone: Any = model.base_model
    head = Head(backbone, linear, _scale(config), getattr(config, "final_logit_softcapping", None))
    if (difference := _difference(model, head)) > CLOSE.get(linear.weight.dtype, 5e-2):
        raise SFTError(
            f"{type(model).__name__} changes its logits after the head in an unknown way "
            f"(they differ by {difference:.1g}); use the full logits for it"
        )
    return head


def without_adapter_shell(model: Any) -> PreTrainedModel:
    """The causal LM inside a `peft` model."""
    if not hasattr(model, "peft_config"):
        return model
    if any(getattr(c, "is_prompt_learning", False) for c in model.peft_config.values()):
        raise SFTError("prompt learning changes the inputs of the model; use `lora: true` instead")
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _plain_linear(layer: Any) -> nn.Linear | None:
    """The linear layer that gives the logits; None if the head is something else (a LoRA layer, two layers)."""
    if hasattr(layer, "modules_to_save"):
        layer = layer.modules_to_save[layer.active_adapters[0]]
    return layer if type(layer) is nn.Linear else None


def _scale(config: Any) -> float:
    """What the logits are multiplied by: Cohere and Falcon-H1 name a factor, Granite a divisor."""
    factor = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    return factor / (getattr(config, "logits_scaling", None) or 1.0)


def _difference(model: nn.Module, head: Head) -> float:
    """The largest difference between the model's logits and the head's on a few tokens, over the largest logit."""
    ids = torch.arange(4, device=head.linear.weight.device)[None] % head.linear.weight.shape[0]
    with evaluating(model):
        expected = model(input_ids=ids, use_cache=False).logits.float()
        hidden = getattr(head.backbone(input_ids=ids, use_cache=False), "last_hidden_state", None)
        if hidden is None:
            return float("inf")
        found = head.logits(hidden).float()
    return ((expected - found).abs().max() / expected.abs().max().clamp_min(1e-9)).item()


@contextmanager
def _replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Inside, the module's own attribute `name` is `value`."""
    before = vars(module).get(name)
    vars(module)[name] = value
    try:
        yield
    finally:
        del vars(module)[name]
        if before is not None:
            vars(module)[name] = before


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; every module's mode is put back."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in training.items():
            module.training = flag
