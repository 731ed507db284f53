"""Estimate what a training step costs on many devices, and print the tables of docs/scaling.md.

    python benchmarks/scaling.py

Nothing is trained. Arithmetic and bytes are counted from the models' shapes, for full fine-tuning in bf16 autocast over
float32 weights with AdamW (`bf16: true`); docs/scaling.md has the formulas, the sources of the constants, and the
conclusions.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from report import Table

from sft_pipeline.training.memory_estimate import Shape, count_activation_bytes

GIB = 2**30
# One accelerator and its links: data sheets of NVIDIA's H100 SXM and DGX H100.
PEAK = 989e12  # FLOP/s in bf16, without sparsity
MEMORY = 0.9 * 80 * GIB  # bytes; a tenth is reserved for communication buffers and fragmentation
NVLINK = 450e9  # bytes/s each way
NICS = {"8 x 400 Gb/s": 8 * 50e9, "1 x 400 Gb/s": 50e9}  # bytes/s each way, of a whole node
PEAK_SHARE = 0.4  # reached: 38% to 43% in table 4 of "The Llama 3 Herd of Models"
# The rows of docs/speed.md, alpaca_en_demo.json.
ROW_LENGTH, TARGET_SHARE = 245, 0.71  # tokens, and the share of them that is supervised
LORA_RANK = 16


QWEN3 = Shape("Qwen3-0.6B", 28, 1024, 3072, 16, 8, 128, 151_936, tied=True, qk_norm=True)
LLAMA_8B = Shape("Llama-3.1-8B", 32, 4096, 14_336, 32, 8, 128, 128_256, tied=False)
LLAMA_70B = Shape("Llama-3.1-70B", 80, 8192, 28_672, 64, 8, 128, 128_256, tied=False)
DEVICES = {QWEN3: (1, 8), LLAMA_8B: (1, 8, 16, 64), LLAMA_70B: (8, 16, 32, 64, 256)}  # rows of the last table
SHAPES = tuple(DEVICES)
SMOLLM2 = Shape("SmolLM2-135M", 30, 576, 1536, 9, 3, 64, 49_152, tied=True)
QWEN3_FOUR_LAYERS = replace(QWEN3, name="Qwen3's shape, 4 layers", layers=4)


# Arithmetic, in FLOP per token, forward and backward.


def count_attention_flops(shape: Shape, row_length: int) -> float:
    """Count scores and values over the pairs of a query and a key that it may see: (row length + 1) / 2 per token."""
    return 12 * shape.layers * shape.query_size * (row_length + 1) / 2


def count_flops(shape: Shape, row_length: int = ROW_LENGTH, target_share: float = TARGET_SHARE) -> float:
    head = 6 * shape.head_parameters * target_share
    return 6 * shape.layer_parameters + count_attention_flops(shape, row_length) + head


def count_recompute_flops(shape: Shape, row_length: int = ROW_LENGTH) -> float:
    """Count the second forward pass through the layers that activation checkpointing needs."""
    return (6 * shape.layer_parameters + count_attention_flops(shape, row_length)) / 3


# Memory, in bytes.


def count_state_bytes(shape: Shape, devices: int) -> float:
    """Count weights, gradients and AdamW's two moments in float32, and the bf16 casts of the weights; with several
    devices also DDP's buckets, which hold the gradients a second time."""
    buckets = 4 if devices > 1 else 0
    return (16 + buckets) * shape.parameters + 2 * (shape.layer_parameters + shape.head_parameters)


def count_sharded_state_bytes(shape: Shape, devices: int) -> float:
    """Count the same under FSDP2: the float32 tensors sharded. Unsharded are two layers in bf16 (one in use, one being
    gathered), one layer's gradients (bf16, and float32 while they are reduced), and for the whole pass embeddings and
    head (weights and both gradients)."""
    layer = shape.layer_parameters / shape.layers
    return 16 * shape.parameters / devices + (2 * 2 + 2 + 4) * layer + (2 + 2 + 4) * shape.embedding_parameters


def count_lora_state_bytes(shape: Shape, devices: int) -> float:
    """Count frozen weights in float32, their bf16 casts, which the backward pass needs, and the adapters with gradients
    and optimizer state."""
    buckets = 4 if devices > 1 else 0
    casts = 2 * (shape.layer_parameters + shape.head_parameters)
    return 4 * shape.parameters + casts + (16 + buckets) * shape.count_adapter_parameters(LORA_RANK)


def count_sharded_lora_state_bytes(shape: Shape, devices: int) -> float:
    """Count as `count_sharded_state_bytes`, without gradients of the unsharded weights."""
    layer = shape.layer_parameters / shape.layers
    sharded = (4 * shape.parameters + 16 * shape.count_adapter_parameters(LORA_RANK)) / devices
    return sharded + 2 * 2 * layer + 2 * shape.embedding_parameters


# Memory of the machines, in bytes.


def count_loading_bytes(shape: Shape, loading_processes: int = 1) -> int:
    """Count float32 weights for each process of a machine that loads all of them."""
    return 4 * shape.parameters * loading_processes


def count_full_checkpoint_bytes(shape: Shape) -> int:
    """Count weights and AdamW's two moments, which the first process gathers for a checkpoint of FULL_STATE_DICT."""
    return 12 * shape.parameters


# Bytes that a device sends, and receives.


def count_ddp_bytes(shape: Shape, devices: int) -> float:
    """Count the all-reduce of float32 gradients, once per optimizer step."""
    return 2 * (devices - 1) / devices * 4 * shape.parameters


def count_fsdp_bytes(shape: Shape, devices: int) -> float:
    """Count two all-gathers in bf16 and a reduce-scatter in float32, once per micro-batch."""
    return (devices - 1) / devices * (2 + 2 + 4) * shape.parameters


def compute_seconds(shape: Shape, tokens: float) -> float:
    """Return the seconds of a device's arithmetic over so many tokens."""
    return tokens * count_flops(shape) / (PEAK_SHARE * PEAK)


# The tables.


def build_arithmetic_table() -> Table:
    rows = []
    for shape in SHAPES:
        parts = [6 * shape.layer_parameters, count_attention_flops(shape, ROW_LENGTH)]
        parts += [6 * shape.head_parameters * TARGET_SHARE, count_flops(shape), 6 * shape.parameters]
        hours = compute_seconds(shape, 1e6 * ROW_LENGTH) / 3600
        rows.append([shape.name, *(f"{part / 1e9:,.2f}" for part in parts), f"{hours:,.1f}"])
    header = ["GFLOP per token", "layers' matrices", "attention", "head", "total", "6N", "device hours, 1M rows"]
    return Table(header, rows)


def build_long_row_table() -> Table:
    lengths = (245, 1024, 8192, 32_768, 131_072)
    rows = []
    for shape in SHAPES:
        shares = [count_attention_flops(shape, length) / count_flops(shape, length) for length in lengths]
        rows.append([shape.name, *(f"{share:.0%}" for share in shares)])
    return Table(["attention's share by tokens per row", *(f"{length:,}" for length in lengths)], rows)


def build_check_table() -> Table:
    """Build the table of two runs of docs/speed.md: the rate of matrix products, the share of it that was reached,
    tokens/s by the formula and measured."""
    runs = [(SMOLLM2, 141, 0.79, "162 (174 with the common start shared)"), (QWEN3_FOUR_LAYERS, 161, 0.65, "100")]
    rows = [
        [shape.name, f"{rate} GFLOP/s", f"{share:.0%}", f"{rate * 1e9 * share / count_flops(shape):.0f}", measured]
        for shape, rate, share, measured in runs
    ]
    header = ["two CPU cores", "matrix-product rate", "share reached", "tokens/s by the formula", "tokens/s measured"]
    return Table(header, rows)


def build_memory_table() -> Table:
    numbers = (8, 16, 64, 256)
    rows = []
    for shape in SHAPES:
        states = [count_state_bytes(shape, 1), count_state_bytes(shape, 2)]
        states += [count_sharded_state_bytes(shape, number) for number in numbers]
        rows.append([shape.name, *(f"{state / GIB:,.1f}" for state in states)])
    return Table(["GiB per device", "one device", "DDP", *(f"FSDP, {number}" for number in numbers)], rows)


def build_loading_table() -> Table:
    rows = []
    for shape in SHAPES:
        sizes = [count_loading_bytes(shape), count_loading_bytes(shape, 8), count_loading_bytes(shape)]
        rows.append([shape.name, *(f"{size / 1e9:,.0f}" for size in [*sizes, count_full_checkpoint_bytes(shape)])])
    header = ["GB in a machine's memory", "one process loads", "each of eight loads", "saving the final model"]
    return Table([*header, "checkpoint, FULL_STATE_DICT"], rows)


def build_activation_table() -> Table:
    rows = []
    for shape in SHAPES:
        cells = []
        for checkpointing in (False, True):
            per_token = count_activation_bytes(shape, checkpointing)
            cells += [f"{per_token / 1e6:.2f}", f"{8192 * per_token / GIB:,.1f}"]
        rows.append([shape.name, *cells, f"{count_recompute_flops(shape) / count_flops(shape):.0%}"])
    header = ["", "MB per token", "GiB, 8,192 tokens", "checkpointed: MB", "GiB, 8,192 tokens", "more arithmetic"]
    return Table(header, rows)


def build_communication_table() -> Table:
    rows = []
    for shape in SHAPES:
        sent = count_ddp_bytes(shape, 64)
        assert sent == count_fsdp_bytes(shape, 64)
        seconds = [sent / rate for rate in (NVLINK, *NICS.values())]
        tokens = [duration / compute_seconds(shape, 1) for duration in seconds]
        cells = [*(f"{duration:.2f}" for duration in seconds), *(f"{number:,.0f}" for number in tokens)]
        rows.append([shape.name, f"{sent / 1e9:,.1f}", *cells])
    links = ["NVLink", *NICS]
    return Table(["", "GB", *(f"s, {link}" for link in links), *(f"tokens, {link}" for link in links)], rows)


def compute_max_tokens(shape: Shape, devices: int) -> dict[str, float]:
    """Return the most tokens of a micro-batch that fit on each device, by configuration; negative where not even the
    weights fit."""
    full, checkpointed = (count_activation_bytes(shape, checkpointing) for checkpointing in (False, True))
    free = MEMORY - count_state_bytes(shape, devices)
    tokens = {"DDP": free / full, "DDP, ckpt": free / checkpointed}
    tokens["LoRA, ckpt"] = (MEMORY - count_lora_state_bytes(shape, devices)) / checkpointed
    if devices > 1:
        free = MEMORY - count_sharded_state_bytes(shape, devices)
        tokens |= {"FSDP": free / full, "FSDP, ckpt": free / checkpointed}
        tokens["LoRA, FSDP, ckpt"] = (MEMORY - count_sharded_lora_state_bytes(shape, devices)) / checkpointed
    return tokens


def build_configuration_table() -> Table:
    columns = ["DDP", "DDP, ckpt", "FSDP", "FSDP, ckpt", "LoRA, ckpt", "LoRA, FSDP, ckpt"]
    rows = []
    for shape, numbers in DEVICES.items():
        for devices in numbers:
            tokens = compute_max_tokens(shape, devices)
            cells = [f"{tokens[name] // 256 * 256:,.0f}" if tokens.get(name, 0) >= 256 else "-" for name in columns]
            rows.append([f"{shape.name}, {devices}", *cells])
    return Table(["model, devices", *columns], rows)


TABLES = (
    build_arithmetic_table,
    build_long_row_table,
    build_check_table,
    build_memory_table,
    build_loading_table,
    build_activation_table,
    build_communication_table,
    build_configuration_table,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print("\n".join(build().format_markdown() for build in TABLES), end="")


if __name__ == "__main__":
    main()
