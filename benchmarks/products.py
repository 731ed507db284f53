"""Measure which share of the machine's matrix-product rate training reaches, and profile the rest of a step.

    python benchmarks/products.py smollm2-135m alpaca_en_demo.json --output docs/products

In one process: the rate of large float32 matrix products before and after training, the seconds of whole optimizer
steps, and the arithmetic that these steps require, counted from the model and the packed batches:

- a linear layer of the backbone: 6 x its parameters per computed token (2 forward, 4 backward), shared prefixes once;
- attention scores and values: 12 x heads x head size for each pair of a query and a key that it may see, so the masked
  half of the matrix is not counted, nor is what the backward pass recomputes;
- the head: 6 x vocabulary x hidden size per target.

The share is that arithmetic over (rate x seconds). A second table comes from torch's profiler over the last steps: the
seconds inside matrix products, required or not, and those of other operations.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from report import Table, write_results
from task import StepTimer, Task, build_task_trainer, encode_task, save_random_qwen3
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import PretrainedConfig, PreTrainedModel, TrainerCallback

from sft_pipeline.data.packing import pack_rows

PRODUCT_SIZE, PRODUCTS = 2048, 9  # matrix size and number of products that measure the rate
PROFILED_STEPS = 2  # at the end
MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_addmm_activation", "mkldnn")
LISTED_OPERATIONS = 8  # operations in the table besides matrix products


def measure_product_rate() -> float:
    """Return the median GFLOP/s of some large float32 matrix products."""
    left_matrix, right_matrix = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE), torch.randn(PRODUCT_SIZE, PRODUCT_SIZE)
    torch.mm(left_matrix, right_matrix)
    seconds = []
    for _ in range(PRODUCTS):
        start_time = time.perf_counter()
        torch.mm(left_matrix, right_matrix)
        seconds.append(time.perf_counter() - start_time)
    return 2 * PRODUCT_SIZE**3 / statistics.median(seconds) / 1e9


def count_required_flops(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, float]:
    """Return the FLOP that one packed batch requires, forward and backward, by part of the model."""
    config = model.config.get_text_config()
    linear = sum(layer.weight.numel() for layer in model.base_model.modules() if isinstance(layer, nn.Linear))
    targets = len(batch["target_positions"])
    pairs = int(batch["position_ids"].sum()) + batch["position_ids"].numel()  # a token sees its depth and itself
    return {
        "linear layers": 6.0 * linear * batch["input_ids"].numel(),
        "attention": 12.0 * compute_attention_width(config) * pairs,
        "head": 6.0 * config.vocab_size * config.hidden_size * targets,
    }


def compute_attention_width(config: PretrainedConfig) -> int:
    """Return layers x heads x head size."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * config.num_attention_heads * size


class LastStepsProfiler(TrainerCallback):
    """Run torch's profiler over the last `PROFILED_STEPS` steps."""

    def __init__(self, steps: int) -> None:
        self.first_step, self.profiler = steps - PROFILED_STEPS, profile(activities=[ProfilerActivity.CPU])
        self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.first_step:
            self.profiler.start()
            self.seconds = -time.perf_counter()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter()
        self.profiler.stop()

    def sum_operation_seconds(self) -> dict[str, float]:
        """Return the seconds spent in each operation itself, the longest first."""
        seconds = {event.key: event.self_cpu_time_total / 1e6 for event in self.profiler.key_averages()}
        return dict(sorted(seconds.items(), key=lambda pair: -pair[1]))


def measure_training(task: Task, batch_size: int, warm_up: int) -> dict[str, Any]:
    """Train once over the rows, in file order, and return rate, step seconds, required arithmetic and profile."""
    rows = [dict(zip(task.rows, row)) for row in zip(*task.rows.values())]
    batches = [pack_rows(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    if len(batches) <= warm_up + PROFILED_STEPS:
        raise SystemExit(
            f"{len(batches)} steps are too few: {warm_up} warm up and {PROFILED_STEPS} are profiled; add --rows"
        )
    timer, profiler = StepTimer(), LastStepsProfiler(len(batches))
    first_rate = measure_product_rate()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_task_trainer(task, folder, batch_size)
        for callback in (timer, profiler):
            trainer.add_callback(callback)
        trainer.train()
    last_rate = measure_product_rate()
    timed_steps = slice(warm_up, len(batches) - PROFILED_STEPS)
    parts = [count_required_flops(trainer.model, batch) for batch in batches[timed_steps]]
    step_seconds = [end - start for start, end in zip([timer.start_time, *timer.end_times], timer.end_times)]
    return {
        "rate_gflops": {"before": first_rate, "after": last_rate},
        "steps": len(parts),
        "step_seconds": step_seconds[timed_steps],
        "useful_gflop": {name: sum(part[name] for part in parts) / 1e9 for name in parts[0]},
        "profile": {"seconds": profiler.seconds, "operations": profiler.sum_operation_seconds()},
    }


def build_tables(results: dict[str, Any]) -> list[Table]:
    """Build the table of counted arithmetic and time, and that of the profile."""
    rate = statistics.mean(results["rate_gflops"].values())
    total, seconds = sum(results["useful_gflop"].values()), sum(results["step_seconds"])
    counted = [[name, f"{gflop:,.0f}", f"{gflop / rate:.2f}"] for name, gflop in results["useful_gflop"].items()]
    counted.append(["total", f"{total:,.0f}", f"{total / rate:.2f}"])
    counted.append([f"{results['steps']} whole steps, measured", "", f"{seconds:.2f}"])
    counted.append([f"share of {rate:,.0f} GFLOP/s", "", f"{total / (rate * seconds):.0%}"])
    step_seconds, operations = results["profile"]["seconds"], results["profile"]["operations"]
    in_products = sum(spent for name, spent in operations.items() if name.startswith(MATRIX_PRODUCTS))
    listed = [(name, spent) for name, spent in operations.items() if not name.startswith(MATRIX_PRODUCTS)]
    profile_rows = [(f"{PROFILED_STEPS} whole steps", step_seconds), ("matrix products", in_products)]
    profile_rows += listed[:LISTED_OPERATIONS]
    return [
        Table(["required arithmetic", "GFLOP", "seconds"], counted),
        Table(
            ["profiled", "seconds", "share"],
            [[name[:44], f"{spent:.2f}", f"{spent / step_seconds:.1%}"] for name, spent in profile_rows],
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder or smollm2-135m; with --shape, a tokenizer folder")
    parser.add_argument("data", help="a file of instruction rows, such as alpaca_en_demo.json")
    parser.add_argument("--rows", type=int, default=64, help="rows to train on (64)")
    parser.add_argument("--batch", type=int, default=8, help="rows per step (8)")
    parser.add_argument("--warm_up", type=int, default=2, help="first steps that are not counted (2)")
    parser.add_argument("--shape", choices=["qwen3"], help="random weights of Qwen3-0.6B's shape")
    parser.add_argument("--layers", type=int, default=4, help="with --shape: number of layers (4)")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.shape:
            save_random_qwen3(args.model, args.layers, Path(folder))
        task = encode_task(folder if args.shape else args.model, args.data, args.rows)
        results = measure_training(task, args.batch, args.warm_up)
    tables = build_tables(results)
    for table in tables:
        table.print()
    if args.output:
        shape = {"model": args.model, "shape": args.shape, "layers": args.layers if args.shape else None}
        write_results(args.output, {**shape, **results}, "\n".join(table.format_markdown() for table in tables))


if __name__ == "__main__":
    main()
