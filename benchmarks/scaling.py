"""What a training step costs against the number of devices, on paper: prints the tables of docs/scaling.md.

    python benchmarks/scaling.py

Nothing is run. Arithmetic and bytes are counted from the models' shapes, for full fine-tuning in bf16 autocast over
float32 weights with AdamW (`bf16: true`); docs/scaling.md has the formulas, the constants' sources, and what follows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from report import Table

GIB = 2**30
# One accelerator and its links: data sheets of NVIDIA's H100 SXM and DGX H100.
PEAK = 989e12  # FLOP/s in bf16, without sparsity
MEMORY = 0.9 * 80 * GIB  # bytes; a tenth is left to communication buffers and what the allocator can't use
NVLINK = 450e9  # bytes/s each way
NODE = 8  # devices
NICS = {"8 x 400 Gb/s": 8 * 50e9, "1 x 400 Gb/s": 50e9}  # bytes/s each way of a whole node
SHARE = 0.4  # of PEAK: 38% to 43% in table 4 of "The Llama 3 Herd of Models"
# The rows of docs/speed.md, alpaca_en_demo.json.
ROW, TARGETS = 245, 0.71  # tokens, and the share of them that is supervised
LORA_RANK = 16


@dataclass(frozen=True)
class Shape:
    """A decoder of Llama's kind."""

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

    @property
    def query(self) -> int:
        return self.heads * self.head_size

    @property
    def key(self) -> int:
        return self.kv_heads * self.head_size

    @property
    def linears(self) -> list[tuple[int, int]]:
        """Inputs and outputs of a layer's matrices: query, key, value, output, gate, up, down."""
        h, i = self.hidden, self.intermediate
        return [(h, self.query), (h, self.key), (h, self.key), (self.query, h), (h, i), (h, i), (i, h)]

    @property
    def linear(self) -> int:
        """Parameters of all layers' matrices, which every token goes through."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears)

    @property
    def head(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def outside(self) -> int:
        """Parameters of the embeddings and the head."""
        return self.head if self.tied else 2 * self.head

    @property
    def parameters(self) -> int:
        norms = 2 * self.hidden + 2 * self.head_size * self.qk_norm
        return self.linear + self.outside + self.layers * norms + self.hidden

    @property
    def adapters(self) -> int:
        """Parameters of LoRA on all matrices of the layers."""
        return self.layers * LORA_RANK * sum(inputs + outputs for inputs, outputs in self.linears)


QWEN3 = Shape("Qwen3-0.6B", 28, 1024, 3072, 16, 8, 128, 151_936, tied=True, qk_norm=True)
LLAMA_8B = Shape("Llama-3.1-8B", 32, 4096, 14_336, 32, 8, 128, 128_256, tied=False)
LLAMA_70B = Shape("Llama-3.1-70B", 80, 8192, 28_672, 64, 8, 128, 128_256, tied=False)
DEVICES = {QWEN3: (1, 8), LLAMA_8B: (1, 8, 16, 64), LLAMA_70B: (8, 16, 32, 64, 256)}  # of the last table
SHAPES = tuple(DEVICES)
SMOLLM2 = Shape("SmolLM2-135M", 30, 576, 1536, 9, 3, 64, 49_152, tied=True)
QWEN3_FOUR_LAYERS = replace(QWEN3, name="Qwen3's shape, 4 layers", layers=4)


# Arithmetic, in FLOP a token, forward and backward.


def attention(shape: Shape, row: int) -> float:
    """Scores and values over the pairs of a query and a key it may see: (row + 1) / 2 a token."""
    return 12 * shape.layers * shape.query * (row + 1) / 2


def flops(shape: Shape, row: int = ROW, targets: float = TARGETS) -> float:
    return 6 * shape.linear + attention(shape, row) + 6 * shape.head * targets


def again(shape: Shape, row: int = ROW) -> float:
    """The second forward pass through the layers that activation checkpointing costs."""
    return (6 * shape.linear + attention(shape, row)) / 3


# Memory, in bytes.


def layer_activations(shape: Shape) -> int:
    """What a layer of the library keeps of a token for the backward pass; docs/scaling.md lists the tensors."""
    norms, casts = 2 * ((4 + 4) * shape.hidden + 4), (3 + 2) * 2 * shape.hidden
    scores = 2 * (shape.query + 2 * shape.key) + 2 * shape.query + 4 * shape.heads
    qk_norms = shape.qk_norm * ((4 + 2) * (shape.query + shape.key) + 4 * (shape.heads + shape.kv_heads))
    return norms + casts + scores + qk_norms + 4 * 2 * shape.intermediate


def activations(shape: Shape, checkpointing: bool) -> int:
    """Of a token, in all layers; checkpointing keeps each layer's input and one layer whole."""
    if checkpointing:
        return shape.layers * 4 * shape.hidden + layer_activations(shape)
    return shape.layers * layer_activations(shape)


def states(shape: Shape, devices: int) -> float:
    """Weights, gradients and AdamW's two moments in float32, the weights' bf16 casts; DDP's buckets hold the gradients
    a second time."""
    buckets = 4 if devices > 1 else 0
    return (16 + buckets) * shape.parameters + 2 * (shape.linear + shape.head)


def sharded_states(shape: Shape, devices: int) -> float:
    """Those of FSDP2: float32 in parts. Whole are two layers in bf16 (one used, one on its way), one layer's gradients
    (bf16, and float32 on their way), and for the whole pass embeddings and head (weights and both gradients)."""
    layer = shape.linear / shape.layers
    return 16 * shape.parameters / devices + (2 * 2 + 2 + 4) * layer + (2 + 2 + 4) * shape.outside


def lora_states(shape: Shape, devices: int) -> float:
    """Frozen weights in float32, their bf16 casts, which the backward pass needs, adapters with all that is theirs."""
    buckets = 4 if devices > 1 else 0
    return 4 * shape.parameters + 2 * (shape.linear + shape.head) + (16 + buckets) * shape.adapters


def sharded_lora_states(shape: Shape, devices: int) -> float:
    """As `sharded_states`, without gradients of what is whole."""
    layer = shape.linear / shape.layers
    return (4 * shape.parameters + 16 * shape.adapters) / devices + 2 * 2 * layer + 2 * shape.outside


# Bytes that a device sends, and receives.


def ddp_bytes(shape: Shape, devices: int) -> float:
    """All-reduce of float32 gradients, once an optimizer step."""
    return 2 * (devices - 1) / devices * 4 * shape.parameters


def fsdp_bytes(shape: Shape, devices: int) -> float:
    """Two all-gathers in bf16 and a reduce-scatter in float32, every micro-batch."""
    return (devices - 1) / devices * (2 + 2 + 4) * shape.parameters


def seconds(shape: Shape, tokens: float) -> float:
    """Of a device's arithmetic over so many tokens."""
    return tokens * flops(shape) / (SHARE * PEAK)


# The tables.


def arithmetic() -> Table:
    rows = []
    for shape in SHAPES:
        parts = [6 * shape.linear, attention(shape, ROW), 6 * shape.head * TARGETS, flops(shape), 6 * shape.parameters]
        hours = seconds(shape, 1e6 * ROW) / 3600
        rows.append([shape.name, *(f"{part / 1e9:,.2f}" for part in parts), f"{hours:,.1f}"])
    header = ["GFLOP a token", "layers' matrices", "attention", "head", "together", "6N", "device hours, 1M rows"]
    return Table(header, rows)


def long_rows() -> Table:
    lengths = (245, 1024, 8192, 32_768, 131_072)
    shares = {shape.name: [attention(shape, row) / flops(shape, row) for row in lengths] for shape in SHAPES}
    rows = [[name, *(f"{share:.0%}" for share in of_lengths)] for name, of_lengths in shares.items()]
    return Table(["attention's share, tokens a row", *(f"{row:,}" for row in lengths)], rows)


def check() -> Table:
    """Two runs of docs/speed.md: the rate of matrix products, its share, tokens/s as counted here and as measured."""
    runs = [(SMOLLM2, 141, 0.79, "162 (174 with the common start shared)"), (QWEN3_FOUR_LAYERS, 161, 0.65, "100")]
    rows = [
        [shape.name, f"{rate} GFLOP/s", f"{share:.0%}", f"{rate * 1e9 * share / flops(shape):.0f}", measured]
        for shape, rate, share, measured in runs
    ]
    return Table(["two CPU cores", "products alone", "share reached", "tokens/s by the formula", "measured"], rows)


def memory() -> Table:
    numbers = (8, 16, 64, 256)
    rows = []
    for shape in SHAPES:
        parts = [states(shape, 1), states(shape, 2), *(sharded_states(shape, number) for number in numbers)]
        rows.append([shape.name, *(f"{part / GIB:,.1f}" for part in parts)])
    return Table(["GiB a device", "one", "DDP", *(f"FSDP, {number}" for number in numbers)], rows)


def activation_memory() -> Table:
    rows = []
    for shape in SHAPES:
        whole, kept = (activations(shape, checkpointing) for checkpointing in (False, True))
        more = again(shape) / flops(shape)
        gib = [f"{8192 * each / GIB:,.1f}" for each in (whole, kept)]
        rows.append([shape.name, f"{whole / 1e6:.2f}", gib[0], f"{kept / 1e6:.2f}", gib[1], f"{more:.0%}"])
    header = ["", "MB a token", "GiB, 8,192 tokens", "checkpointed: MB", "GiB, 8,192 tokens", "more arithmetic"]
    return Table(header, rows)


def communication() -> Table:
    rows = []
    for shape in SHAPES:
        sent = ddp_bytes(shape, 64)
        assert sent == fsdp_bytes(shape, 64)
        spent = [sent / rate for rate in (NVLINK, *NICS.values())]
        needed = [one / seconds(shape, 1) for one in spent]
        rows.append(
            [shape.name, f"{sent / 1e9:,.1f}", *(f"{one:.2f}" for one in spent), *(f"{n:,.0f}" for n in needed)]
        )
    ways = ["NVLink", *NICS]
    return Table(["", "GB", *(f"s, {way}" for way in ways), *(f"tokens, {way}" for way in ways)], rows)


def room(shape: Shape, devices: int) -> dict[str, float]:
    """Most tokens of a micro-batch on each device, by configuration; below 0 where not even the weights fit."""
    whole, kept = (activations(shape, checkpointing) for checkpointing in (False, True))
    left = MEMORY - states(shape, devices)
    found = {"DDP": left / whole, "DDP, ckpt": left / kept, "LoRA, ckpt": (MEMORY - lora_states(shape, devices)) / kept}
    if devices > 1:
        left = MEMORY - sharded_states(shape, devices)
        found |= {"FSDP": left / whole, "FSDP, ckpt": left / kept}
        found |= {"LoRA, FSDP, ckpt": (MEMORY - sharded_lora_states(shape, devices)) / kept}
    return found


def configurations() -> Table:
    columns = ["DDP", "DDP, ckpt", "FSDP", "FSDP, ckpt", "LoRA, ckpt", "LoRA, FSDP, ckpt"]
    rows = []
    for shape, numbers in DEVICES.items():
        for devices in numbers:
            found = room(shape, devices)
            fits = [f"{found[name] // 256 * 256:,.0f}" if found.get(name, 0) >= 256 else "-" for name in columns]
            rows.append([f"{shape.name}, {devices}", *fits])
    return Table(["model, devices", *columns], rows)


TABLES = (arithmetic, long_rows, check, memory, activation_memory, communication, configurations)

if __name__ == "__main__":
    print("\n".join(table().markdown() for table in TABLES), end="")
