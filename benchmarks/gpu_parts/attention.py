"""Attention over packed rows and trees against sdpa over the padded sequences: milliseconds and error.

`packed` is the attention that this project chooses for rows side by side (torch's variable-length attention where it
can), `packed, flex` FlexAttention over the same rows, which it takes for every tree.

One layer's queries, keys and values in bf16 (float32 on a CPU), forward and backward. The error is that of the output
against sdpa in float32 over each sequence by itself, next to the error of sdpa in the same precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from report import Run, Table
from scaling import Shape
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gpu_parts.inputs import Row, build_conversations, build_rows, draw_ids, iterate_sequences, join
from gpu_parts.measuring import Setting, build_table, record_errors, time_call
from sft_pipeline.data.packing import pack_rows
from sft_pipeline.data.prefix_tree import build_prefix_tree
from sft_pipeline.kernels.cuda_attention import attend_flex
from sft_pipeline.model.packed_attention import packed_attention_forward

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def build_cases(setting: Setting) -> dict[str, list[Row]]:
    """Build batches of about 16k tokens (few on a CPU), by what they are."""
    vocabulary, scale = setting.shape.vocabulary, setting.scale
    random = np.random.default_rng(0)
    count = setting.choose(72, 4)
    return {
        "rows of 226 tokens": build_rows(count, vocabulary, scale=scale),
        "with a shared start of 500": build_rows(count, vocabulary, shared=round(500 * scale), scale=scale),
        "8-turn conversations": build_conversations(setting.choose(4, 1), vocabulary, scale=scale),
        "one row of 16k": [join([(draw_ids(random, setting.choose(16_384, 200), vocabulary), 1)])],
    }


def draw_heads(shape: Shape, lines: int, length: int, setting: Setting) -> list[Tensor]:
    """Draw queries, keys and values (lines, heads, length, head size)."""
    counts = (shape.heads, shape.kv_heads, shape.kv_heads)
    return [
        torch.randn(lines, count, length, shape.head_size, device=setting.device).to(setting.dtype).requires_grad_()
        for count in counts
    ]


def build_packed(rows: Sequence[Row], name: str) -> tuple[Attend, int]:
    """Return the attention `name` of a packed batch and its number of tokens."""
    tree: Any = pack_rows(list(rows), name == "tree")["prefix_tree"]
    module = torch.nn.Module()
    module.is_causal = True  # type: ignore[assignment]  # as the attention layers of transformers have it

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if name == "packed, flex":
            return attend_flex(query, key, value, tree, query.shape[-1] ** -0.5, None).transpose(1, 2)
        return packed_attention_forward(module, query, key, value, None, prefix_tree=tree)[0].transpose(1, 2)

    return attend, len(tree.subtree_end)


def attend_padded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend as `Trainer` does over rows that are padded on the right, if no mask is needed: the fastest kernel."""
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def compute_packed_error(rows: Sequence[Row], share: bool, attend: Attend, heads: list[Tensor]) -> tuple[float, float]:
    """Return the largest error of the packed output, relative to its largest value, and that of sdpa in this dtype."""
    sequences = [np.array(ids) for ids, _ in iterate_sequences(rows)]
    output = attend(*heads).detach().float()
    packed_error = sdpa_error = largest = 0.0
    for index in build_prefix_tree(sequences, share).positions:
        positions = torch.from_numpy(index).to(output.device)
        own = [tensor.detach()[:, :, positions] for tensor in heads]
        exact = attend_padded(*(tensor.float() for tensor in own))
        packed_error = max(packed_error, (output[:, :, positions] - exact).abs().max().item())
        sdpa_error = max(sdpa_error, (attend_padded(*own).float() - exact).abs().max().item())
        largest = max(largest, exact.abs().max().item())
    return packed_error / largest, sdpa_error / largest


def time_attention(attend: Attend, heads: list[Tensor], setting: Setting) -> Run:
    """Return milliseconds of the forward pass, and of both."""
    grad_output = torch.randn_like(heads[0])

    def run_forward() -> None:
        with torch.no_grad():
            attend(*heads)

    def run_both() -> None:
        for tensor in heads:
            tensor.grad = None
        attend(*heads).backward(grad_output)

    repeat, warm_up = setting.choose((20, 5), (2, 1))
    times = {
        "forward_ms": time_call(run_forward, setting.device, repeat, warm_up),
        "both_ms": time_call(run_both, setting.device, repeat, warm_up),
    }
    for tensor in heads:
        tensor.grad = None
    return times


def measure(setting: Setting) -> Run:
    shape = setting.shape
    torch.set_float32_matmul_precision("highest")
    results: Run = {"shape": shape.name, "measurements": []}
    for data, rows in build_cases(setting).items():
        lengths = [len(ids) for ids, _ in iterate_sequences(rows)]
        # FlexAttention has no backward pass on a CPU.
        for name in ("tree", "packed", *["packed, flex"] * setting.on_cuda, "padded"):
            run: Run = {"data": data, "name": name, "tokens": sum(lengths)}
            torch.manual_seed(0)
            with record_errors(run):
                if name == "padded":
                    run["computed_tokens"] = len(lengths) * max(lengths)
                    heads = draw_heads(shape, len(lengths), max(lengths), setting)
                    run |= time_attention(attend_padded, heads, setting)
                else:
                    attend, run["computed_tokens"] = build_packed(rows, name)
                    heads = draw_heads(shape, 1, run["computed_tokens"], setting)
                    run["max_error"], run["sdpa_error"] = compute_packed_error(rows, name == "tree", attend, heads)
                    run |= time_attention(attend, heads, setting)
            results["measurements"].append(run)
            setting.save(results)
    return results


def build_tables(results: Run) -> list[Table]:
    header = [f"a layer of {results['shape']}", "tokens", "forward, ms", "with backward", "error", "sdpa's"]
    return [build_table(header, results["measurements"], "{data}, {name}", format_cells)]


def format_cells(run: Run) -> list[str]:
    errors = [f"{run[key]:.1e}" if key in run else "" for key in ("max_error", "sdpa_error")]
    return [f"{run['computed_tokens']:,}", f"{run['forward_ms']:.2f}", f"{run['both_ms']:.2f}", *errors]
