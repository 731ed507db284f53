"""How much of the machine's matrix-product rate training reaches, and where the rest of a step goes.

    python benchmarks/products.py smollm2-135m alpaca_en_demo.json --output docs/products

In one process and one sitting: the rate of large float32 products before and after, the seconds of whole optimizer
steps, and the arithmetic that these steps could not do without, counted from the model and the packed batches:

- a linear layer of the backbone: 6 x its parameters a computed token (2 forward, 4 backward), the prefix once a batch;
- scores and values of attention: 12 x heads x head size for each pair of a query and a key it may see, so the causal
  half counts as half, and nothing counts that the backward pass forms again;
- the head: 6 x vocabulary x hidden size at supervised positions alone.

The share is that arithmetic over (rate x seconds). A second figure comes from torch's profiler, over the last steps:
seconds inside matrix products, useful or not, against the whole.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from report import Table, write
from task import Clock, Task, our_trainer, prepare, random_qwen3
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import PretrainedConfig, PreTrainedModel, TrainerCallback

from sft_pipeline.data.packing import PackedCollator
from sft_pipeline.utils.constants import IGNORED

SIZE, PRODUCTS = 2048, 9  # of the products that measure the rate
PROFILED = 2  # steps at the end
MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_addmm_activation", "mkldnn")
SHOWN = 8  # other operations in the table


def product_rate() -> float:
    """GFLOP/s of a large float32 product, the median of some."""
    one, other = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    torch.mm(one, other)
    seconds = []
    for _ in range(PRODUCTS):
        started = time.perf_counter()
        torch.mm(one, other)
        seconds.append(time.perf_counter() - started)
    return 2 * SIZE**3 / statistics.median(seconds) / 1e9


def useful_flops(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, float]:
    """Arithmetic that one packed batch needs, forward and backward, by part."""
    config = model.config.get_text_config()
    linear = sum(layer.weight.numel() for layer in model.base_model.modules() if isinstance(layer, nn.Linear))
    targets = int(batch["labels"].ne(IGNORED).sum())
    return {
        "linear layers": 6.0 * linear * batch["input_ids"].numel(),
        "attention": 12.0 * attention_width(config) * attended_pairs(batch["row_lengths"].tolist()),
        "head": 6.0 * config.vocab_size * config.hidden_size * targets,
    }


def attention_width(config: PretrainedConfig) -> int:
    """Layers x heads x head size."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * config.num_attention_heads * size


def attended_pairs(row_lengths: Sequence[int]) -> int:
    """Pairs of a query and a key it may see: [prefix, rest of row 1, ...] with the prefix computed once."""
    prefix, *own = row_lengths
    return prefix * (prefix + 1) // 2 + sum(rest * prefix + rest * (rest + 1) // 2 for rest in own)


class ProfileLast(TrainerCallback):
    """torch's profiler over the last `PROFILED` steps."""

    def __init__(self, steps: int) -> None:
        self.first, self.profiler = steps - PROFILED, profile(activities=[ProfilerActivity.CPU])
        self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.first:
            self.profiler.start()
            self.seconds = -time.perf_counter()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter()
        self.profiler.stop()

    def operations(self) -> dict[str, float]:
        """Seconds that each operation spent itself, the longest first."""
        found = {event.key: event.self_cpu_time_total / 1e6 for event in self.profiler.key_averages()}
        return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def measure(task: Task, batch: int, warm_up: int) -> dict[str, Any]:
    """All figures of one run over the rows, in file order."""
    rows = [dict(zip(task.rows, row)) for row in zip(*task.rows.values())]
    batches = [PackedCollator()(rows[at : at + batch]) for at in range(0, len(rows), batch)]
    if len(batches) <= warm_up + PROFILED:
        raise SystemExit(f"{len(batches)} steps are too few: {warm_up} warm up and {PROFILED} are profiled; add --rows")
    clock, profiled = Clock(), ProfileLast(len(batches))
    before = product_rate()
    with tempfile.TemporaryDirectory() as folder:
        trainer = our_trainer(task, folder, batch)
        for callback in (clock, profiled):
            trainer.add_callback(callback)
        trainer.train()
    after = product_rate()
    timed = slice(warm_up, len(batches) - PROFILED)
    parts = [useful_flops(trainer.model, one) for one in batches[timed]]
    return {
        "rate_gflops": {"before": before, "after": after},
        "steps": len(parts),
        "step_seconds": [end - start for start, end in zip([clock.began, *clock.ends], clock.ends)][timed],
        "useful_gflop": {name: sum(part[name] for part in parts) / 1e9 for name in parts[0]},
        "profile": {"seconds": profiled.seconds, "operations": profiled.operations()},
    }


def tables(found: dict[str, Any]) -> list[Table]:
    """What was counted and timed, and what the profiler saw."""
    rate = statistics.mean(found["rate_gflops"].values())
    useful, seconds = sum(found["useful_gflop"].values()), sum(found["step_seconds"])
    counted = [[name, f"{work:,.0f}", f"{work / rate:.2f}"] for name, work in found["useful_gflop"].items()]
    counted.append(["together", f"{useful:,.0f}", f"{useful / rate:.2f}"])
    counted.append([f"{found['steps']} whole steps", "", f"{seconds:.2f}"])
    counted.append([f"share of {rate:,.0f} GFLOP/s", "", f"{useful / (rate * seconds):.0%}"])
    whole, operations = found["profile"]["seconds"], found["profile"]["operations"]
    inside = sum(spent for name, spent in operations.items() if name.startswith(MATRIX_PRODUCTS))
    others = [(name, spent) for name, spent in operations.items() if not name.startswith(MATRIX_PRODUCTS)][:SHOWN]
    profiled = [(f"{PROFILED} whole steps", whole), ("matrix products", inside), *others]
    return [
        Table(["arithmetic needed", "GFLOP", "seconds"], counted),
        Table(
            ["profiled", "seconds", "share"],
            [[n[:44], f"{spent:.2f}", f"{spent / whole:.1%}"] for n, spent in profiled],
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder or smollm2-135m; with --shape, a tokenizer folder")
    parser.add_argument("data")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--warm_up", type=int, default=2, help="steps that are not counted")
    parser.add_argument("--shape", choices=["qwen3"], help="random weights of Qwen3-0.6B's shape")
    parser.add_argument("--layers", type=int, default=4, help="with --shape: its number of layers")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.shape:
            random_qwen3(args.model, args.layers, Path(folder))
        found = measure(prepare(folder if args.shape else args.model, args.data, args.rows), args.batch, args.warm_up)
    made = tables(found)
    for table in made:
        table.show()
    if args.output:
        shape = {"model": args.model, "shape": args.shape, "layers": args.layers if args.shape else None}
        write(args.output, {**shape, **found}, "\n".join(table.markdown() for table in made))


if __name__ == "__main__":
    main()
