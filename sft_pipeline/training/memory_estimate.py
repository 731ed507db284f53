"""Estimate the memory of a training step from the model's shape, before its weights are loaded.

The bytes of a step are those of weights, gradients and the optimizer's state, counted from the parameters, and those
that the layers keep for the backward pass, counted from their shape as Llama, Qwen and Mistral have it. For other
architectures the latter are an approximation. benchmarks/scaling.py makes the tables of docs/scaling.md of the same
formulas.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from sft_pipeline.config import SFTConfig, shards_model
from sft_pipeline.data.encode import EncodingStats
from sft_pipeline.kernels.cpu_layer_inference import LAYER_CLASSES
from sft_pipeline.model.linear_cross_entropy import CHUNK_BYTES, CUDA_CHUNK_BYTES
from sft_pipeline.model.module_utils import unwrap_peft
from sft_pipeline.training.memory import GIB, measure_memory_gib
from sft_pipeline.training.optimizers import LOW_RANK, get_optimizer_name
from sft_pipeline.training.precision import should_round_frozen_layers
from sft_pipeline.utils.errors import SFTError

logger = logging.getLogger(__name__)

# How layers compute: those of the library under bf16 autocast, in float32 and in bfloat16, or ours on the CPU.
Kind = Literal["autocast", "float32", "bfloat16", "fused"]
# Of a weight, by `load_in_4bit`: 4 bits, 8 per block of 64 weights and 32 per 256 blocks; or 8 bits.
QUANTIZED_BYTES = {True: 0.5 + 1 / 64 + 4 / (64 * 256), False: 1.0}
STATE_VALUES = {
    "grokadamw": 3,
    "adamw": 2,
    "ademamix": 3,
    "lion": 1,
    "rmsprop": 1,
}  # per weight, of optimizers of this kind
CERTAIN_SHARE = 0.9  # of an estimate: a run that needs more than what is there by this much is not started


@dataclass(frozen=True)
class Shape:
    """The shape of a decoder with Llama's architecture."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    qk_norm: bool = False  # Qwen3's

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> Shape:
        """Read the shape of `model`, also on the meta device; of experts, those that a token uses."""
        config: PreTrainedConfig = model.config.get_text_config()
        heads = config.num_attention_heads
        experts = getattr(config, "num_experts_per_tok", None)
        expert_size = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None)
        return cls(
            name=type(model).__name__,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=(expert_size or 4 * config.hidden_size) * (experts or 1),
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
            qk_norm=any(name.endswith(".q_norm") for name, _ in model.named_modules()),
        )

    @property
    def query_size(self) -> int:
        return self.heads * self.head_size

    @property
    def key_size(self) -> int:
        return self.kv_heads * self.head_size

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Input and output sizes of a layer's matrices: query, key, value, output, gate, up, down."""
        h, i = self.hidden, self.intermediate
        query, key = self.query_size, self.key_size
        return [(h, query), (h, key), (h, key), (query, h), (h, i), (h, i), (i, h)]

    @property
    def layer_parameters(self) -> int:
        """Parameters of all layers' matrices, by which every token is multiplied."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.matrices)

    @property
    def head_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embeddings and the head."""
        return self.head_parameters if self.tied else 2 * self.head_parameters

    @property
    def parameters(self) -> int:
        norms = 2 * self.hidden + 2 * self.head_size * self.qk_norm
        return self.layer_parameters + self.embedding_parameters + self.layers * norms + self.hidden

    def count_adapter_parameters(self, rank: int) -> int:
        """Count the parameters of LoRA on all matrices of the layers."""
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in self.matrices)


# Activations, in bytes per token.


def count_layer_activation_bytes(shape: Shape, kind: Kind = "autocast", lora_rank: int = 0) -> int:
    """Count what a layer keeps per token for the backward pass; docs/scaling.md lists the tensors of "autocast".

    lora_rank: of adapters on all matrices, or 0; under autocast their few bytes are not counted.
    """
    h, q, k, i = shape.hidden, shape.query_size, shape.key_size, shape.intermediate
    if kind == "fused":  # the inputs of its matrix products
        return 4 * (2 * (h + 1) + (q + 2 * k) + q + 2 * i)
    size = 4 if kind == "float32" else 2
    # Of a norm: its input and the normalized one, a scale, and its output, which autocast casts for each matrix.
    norms = 2 * (4 * h + (2 if kind == "bfloat16" else 4) * h + 4)
    outputs = (3 + 2) * 2 * h if kind == "autocast" else 2 * size * h
    scores = size * (q + 2 * k) + size * q + 4 * shape.heads
    kept_by_qk_norm = {"autocast": 4 + 2, "float32": 4 + 4, "bfloat16": 4 + 2}[kind]
    qk_norms = shape.qk_norm * (kept_by_qk_norm * (q + k) + 4 * (shape.heads + shape.kv_heads))
    if lora_rank and kind == "float32":
        norms += 4 * 7 * lora_rank - 2 * 4 * h  # the inputs of the second factors; frozen norms keep their inputs alone
        qk_norms -= shape.qk_norm * 4 * (q + k)
    return norms + outputs + scores + qk_norms + 4 * size * i


def count_activation_bytes(shape: Shape, checkpointing: bool, kind: Kind = "autocast", lora_rank: int = 0) -> int:
    """Count them per token for all layers; checkpointing keeps each layer's input and all of one layer."""
    if checkpointing:
        size = 2 if kind == "bfloat16" else 4
        return shape.layers * size * shape.hidden + count_layer_activation_bytes(shape, kind, lora_rank)
    return shape.layers * count_layer_activation_bytes(shape, kind, lora_rank)


# The memory of a step.


@dataclass(frozen=True)
class MemoryEstimate:
    """The bytes that a training step needs on each device, at its peak."""

    weights: float  # with the copies that autocast makes
    grads: float
    optimizer: float
    activations: float  # of one micro-batch
    tokens: int  # of this micro-batch
    head: float  # the head's gradient, and what the loss and then a layer's backward pass compute with
    accumulates: bool  # whether a step has several micro-batches, so that the gradients of one stay for the next

    @property
    def total(self) -> float:
        """The peak: activations shrink while gradients grow, unless gradients of another micro-batch are there."""
        held, computed = self.weights + self.optimizer, self.activations + self.head
        return held + (self.grads + computed if self.accumulates else max(self.grads, computed))

    def __str__(self) -> str:
        parts = {"weights": self.weights, "gradients": self.grads, "optimizer": self.optimizer, "head": self.head}
        parts[f"activations of {self.tokens:,} tokens"] = self.activations
        return f"{self.total / GIB:.1f} GiB ({', '.join(f'{name} {size / GIB:.1f}' for name, size in parts.items())})"


def estimate_memory(
    model: PreTrainedModel,
    args: SFTConfig,
    tokens: int,
    *,
    packed: bool,
    accumulates: bool = False,
    supervised_share: float = 1.0,
) -> MemoryEstimate:
    """Estimate the memory of a step with micro-batches of so many tokens; only the shapes of `model` are read.

    Its parameters that require gradients are those that will be trained. supervised_share: of the tokens.
    """
    causal_lm = unwrap_peft(model)
    shape, has_adapters = Shape.from_model(causal_lm), causal_lm is not model
    rounded = should_round_frozen_layers(model, args)
    size = 2 if args.dtype == "bfloat16" else 4
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    frozen = sum(weight.numel() for weight in model.parameters() if not weight.requires_grad)
    adapter_size = 4 if has_adapters else size
    quantized = _list_quantized_sizes(causal_lm, args)
    frozen_bytes = sum(quantized) * QUANTIZED_BYTES[args.load_in_4bit] + (frozen - sum(quantized)) * size
    weights = (frozen_bytes if quantized or not rounded else 2 * frozen) + trained * adapter_size
    grads = trained * adapter_size
    optimizer = trained * count_optimizer_bytes(get_optimizer_name(args), adapter_size)
    is_autocast = args.mixed_precision in ("bf16", "fp16")
    matrices = shape.layer_parameters + shape.head_parameters
    compute_size = 2 if is_autocast or size == 2 else 4
    if shards_model(args):
        layer_weights = (trained + frozen - shape.embedding_parameters) / shape.layers
        weights, grads, optimizer = (part / args.world_size for part in (weights, grads, optimizer))
        gathered = 2 * layer_weights + shape.embedding_parameters  # one layer in use, one on its way
        weights += compute_size * gathered
        if not has_adapters:
            grads += (compute_size + 4) * (layer_weights + shape.embedding_parameters)
    else:
        weights += 2 * (matrices - sum(quantized)) if is_autocast and size == 4 and not rounded else 0
        weights += size * max(quantized, default=0)  # of the layer that computes, dequantized
        weights += 4 * trained if args.world_size > 1 else 0  # DDP's buckets
    kind = _choose_kind(model, args, packed, is_autocast)
    step_size = {"autocast": 2, "bfloat16": 2}.get(kind, 4)
    rank = max((getattr(config, "r", 0) for config in getattr(model, "peft_config", {}).values()), default=0)
    is_checkpointed = bool(args.activation_checkpointing)
    activations = tokens * count_activation_bytes(shape, is_checkpointed, kind, rank)
    # First the last norm, the states at the targets and the logits of a chunk of the loss; then what the backward pass
    # of a layer computes. What a checkpointed layer keeps is there for the latter alone.
    chunk = CUDA_CHUNK_BYTES if args.device.type == "cuda" else CHUNK_BYTES
    logits = (2 if compute_size == 4 else 3) * min(chunk, 4 * shape.vocabulary * tokens * supervised_share)
    states = tokens * 5 * 4 * shape.hidden
    layer_grads = tokens * step_size * (3 * shape.intermediate + 4 * shape.hidden)
    layer = tokens * count_layer_activation_bytes(shape, kind, rank)
    work = max(states + logits - layer, layer_grads) if is_checkpointed else states + max(logits, layer_grads)
    head_grad = 0 if has_adapters or not causal_lm.get_output_embeddings().weight.requires_grad else 4
    head = head_grad * shape.head_parameters + work
    return MemoryEstimate(weights, grads, optimizer, activations, tokens, head, accumulates)


def _list_quantized_sizes(causal_lm: PreTrainedModel, args: SFTConfig) -> list[int]:
    """Return the number of weights of each layer that is quantized: linear ones but the head, without adapters."""
    if args.quantization_key is None:
        return []
    head = causal_lm.get_output_embeddings()
    layers = [module for module in causal_lm.modules() if type(module) is nn.Linear and module is not head]
    return [layer.weight.numel() for layer in layers if not layer.weight.requires_grad]


def count_optimizer_bytes(name: str, size: int) -> float:
    """Count the bytes of an optimizer's state per weight of `size` bytes, from its name; 0 if it is not known."""
    values = next((count for kind, count in STATE_VALUES.items() if kind in name), 0)
    if name.startswith(LOW_RANK):
        return 0  # it depends on the rank
    return values * (0.5 if "4bit" in name else 1 if "8bit" in name else size)


def _choose_kind(model: nn.Module, args: SFTConfig, packed: bool, is_autocast: bool) -> Kind:
    if is_autocast:
        return "autocast"
    if args.dtype == "bfloat16":
        return "bfloat16"
    is_fused = packed and args.device.type == "cpu" and not hasattr(model, "peft_config")
    classes = {type(module).__name__ for module in model.modules()}
    return "fused" if is_fused and classes & set(LAYER_CLASSES) else "float32"


def check_memory(model: PreTrainedModel, args: SFTConfig, stats: EncodingStats, budget: int, packed: bool) -> None:
    """Log what a step needs on each device, and what is there.

    model: without weights is enough. budget: the tokens of a micro-batch, or 0 for per_device_train_batch_size rows.
    Raises SFTError if not even the longest row alone can be trained on a GPU.
    """
    longest, shared = stats.length_quantiles["most"], stats.computed_tokens if packed else stats.tokens
    row_tokens = shared / max(stats.kept, 1) if packed else longest  # a padded row is as long as the longest
    micro_batch = args.per_device_train_batch_size * row_tokens
    step = micro_batch * args.gradient_accumulation_steps
    tokens = max(longest, int(min(step, budget) if budget else micro_batch))
    share = stats.supervised_tokens / max(shared if packed else stats.tokens, 1)
    estimate, least = (
        estimate_memory(model, args, count, packed=packed, accumulates=step > count, supervised_share=min(share, 1))
        for count in (tokens, longest)
    )
    free = measure_memory_gib(args.device)[1]
    if args.device.type == "cuda" and CERTAIN_SHARE * least.total > free * GIB:
        raise SFTError(
            f"a step of this run needs about {least} on each device, where {free:.1f} GiB are free: "
            f"{describe_remedies(args)}"
        )
    logger.info("a step needs about %s on each device; %.1f GiB are free", estimate, free)


def describe_remedies(args: SFTConfig) -> str:
    """Return what makes a run need less memory, of what it does not do yet."""
    is_quantized = args.quantization_key is not None
    remedies = {
        "bf16: true": args.mixed_precision == "no" and args.dtype == "float32",
        "activation_checkpointing: true": not args.activation_checkpointing,
        "lora: true": not args.has_adapters,
        "load_in_4bit: true": args.has_adapters and not args.load_in_4bit and not shards_model(args),
        "fsdp: true on several devices": not is_quantized and not shards_model(args),
        "more devices": shards_model(args),
    }
    names = [name for name, helps in remedies.items() if helps]
    return f"use {', '.join(names)}, or a smaller model" if names else "use a smaller model"
