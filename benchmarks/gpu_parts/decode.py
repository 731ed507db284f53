"""Decoding of this project against transformers' `generate`, greedy: tokens/s in turns A B A B, and equal answers.

Prompts of random ids, and a fixed number of new tokens. In float32 (TF32 off) an answer must be equal token for token
up to a tie; in bf16, where rounding decides sooner, it is only counted. A tie: two logits within 1e-4 of each other.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from generate import Comparison, Ids, time_rounds
from report import Run, Table

from gpu_parts.inputs import ROW_SIZES, build_model, draw_ids
from gpu_parts.measuring import Setting, build_table, record_errors, reset_peak

TIE = 1e-4
BATCH_SIZES = (1, 16, 64)


def build_prompts(count: int, vocabulary: int, scale: float) -> Ids:
    random = np.random.default_rng(0)
    return [draw_ids(random, max(2, round(scale * ROW_SIZES[i % len(ROW_SIZES)][0])), vocabulary) for i in range(count)]


def compare_answers(comparison: Comparison, prompts: Ids, new_tokens: int) -> Run:
    """Compare our answers in a batch with theirs one prompt at a time."""
    ours = comparison.generate_ours(prompts, new_tokens, len(prompts), stops=False)
    theirs = comparison.generate_theirs(prompts, new_tokens, 1, stops=False)
    margins = [comparison.compute_margin(*answers) for answers in zip(prompts, ours, theirs)]
    differing = [margin for margin in margins if margin is not None]
    return {
        "answers": len(prompts),
        "equal": margins.count(None),
        "differ_at_a_tie": sum(margin < TIE for margin in differing),
        "differ_elsewhere": sum(margin >= TIE for margin in differing),
        "largest_margin": max(differing, default=0.0),
    }


def measure(setting: Setting) -> Run:
    device, shape = setting.device, setting.shape
    torch.set_float32_matmul_precision("highest")
    new_tokens, scale = setting.choose((64, 1.0), (6, 0.1))
    results: Run = {"shape": shape.name, "new_tokens": new_tokens, "equality": [], "measurements": []}
    for dtype in (torch.float32, torch.bfloat16) if setting.on_cuda else (torch.float32,):
        reset_peak(device)
        model = build_model(shape, device, dtype, initializer_range=0.05).eval()
        comparison = Comparison(model, stop_token_id=2)
        name = str(dtype).removeprefix("torch.")
        equality: Run = {"dtype": name}
        with record_errors(equality):
            prompts = build_prompts(setting.choose(16, 3), shape.vocabulary, scale)
            equality |= compare_answers(comparison, prompts, new_tokens)
        results["equality"].append(equality)
        for size in setting.choose(BATCH_SIZES, (1, 3)):
            if setting.seconds_left < 20:
                results["unfinished"] = f"from {name}, batches of {size} on"
                return results
            run: Run = {"dtype": name, "batch": size}
            with record_errors(run):
                run |= time_batches(comparison, build_prompts(size, shape.vocabulary, scale), new_tokens, setting)
            results["measurements"].append(run)
            setting.save(results)
    return results


def time_batches(comparison: Comparison, prompts: Ids, new_tokens: int, setting: Setting) -> Run:
    """Return the speeds of both for one batch of prompts, after a short one that warms up."""
    size = len(prompts)
    methods: dict[str, Any] = {
        "ours": lambda ids: comparison.generate_ours(ids, new_tokens, size, stops=False),
        "theirs": lambda ids: comparison.generate_theirs(ids, new_tokens, size, stops=False),
    }
    comparison.generate_ours(prompts, 2, size, stops=False)
    comparison.generate_theirs(prompts, 2, size, stops=False)
    start_time = time.perf_counter()
    return time_rounds(setting.rounds, prompts, methods) | {"all_seconds": time.perf_counter() - start_time}


def build_tables(results: Run) -> list[Table]:
    speeds = [f"{results['shape']}, {results['new_tokens']} tokens each", "ours, tokens/s", "transformers", "ratio"]
    equality = ["answers against transformers'", "answers", "equal", "differ at a tie", "elsewhere"]
    return [
        build_table(speeds, results["measurements"], "{dtype}, {batch} prompts", format_speed),
        build_table(equality, results["equality"], "{dtype}", format_equality),
    ]


def format_speed(run: Run) -> list[str]:
    speed = run["tokens_per_second"]
    return [f"{speed['ours']:,.1f}", f"{speed['theirs']:,.1f}", f"{run['ratio']:.2f}x"]


def format_equality(run: Run) -> list[str]:
    return [str(run[key]) for key in ("answers", "equal", "differ_at_a_tie", "differ_elsewhere")]
