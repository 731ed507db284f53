"""Compare training on conversations whose earlier reasoning is left out: with the tree, without it, and TRL packed.

    pip install -e ".[bench]"
    python benchmarks/conversations.py smollm2-135m alpaca_en_demo.json --turns 8 --output docs/conversations_8
    python benchmarks/conversations.py smollm2-135m alpaca_en_demo.json --turns 16 --output docs/conversations_16

Conversations are made of a file's rows: question, reasoning and answer of up to 100 tokens each in every exchange
(`build_conversations` in task.py), with the chat template configs/templates/agent.jinja, which leaves out the reasoning
of earlier answers. So every answer is a sequence of its own. All trainers get the same sequences, weights and settings:
float32 on the CPU, AdamW at 1e-5, no clipping, no gradient checkpointing, as many optimizer steps (TRL's packs fit this
only about), each in one batch; a second run of TRL accumulates batches of 2,048 tokens. Each runs in a process of its
own, all of them once, then all again. Tokens are those of all sequences; seconds are those of the optimizer steps;
memory is the process's peak.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from report import Run, Table, compute_median, require_bench_extra, run_child, run_rounds, write_results

NAMES = {
    "ours-conversations": "this project",
    "ours-unshared": "share_prefixes: false",
    "trl-conversations": "TRL, packed",
    "trl-accumulated": "TRL, packed, small batches",
}
OURS = "ours-conversations"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder or smollm2-135m")
    parser.add_argument("data", help="a file of instruction rows, such as alpaca_en_demo.json")
    parser.add_argument("--turns", type=int, default=8, help="exchanges of a conversation (8)")
    parser.add_argument("--count", type=int, default=4, help="conversations (4)")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps (2)")
    parser.add_argument("--repeat", type=int, default=2, help="rounds over all trainers (2)")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(NAMES), help=",".join(NAMES))
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    args = parser.parse_args()
    if unknown := set(args.only) - set(NAMES):
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; choose from {', '.join(NAMES)}")
    require_bench_extra(*["trl"] * any(name.startswith("trl") for name in args.only))
    with tempfile.TemporaryDirectory() as folder:
        task = str(Path(folder) / "task.json")
        sizes = (str(args.count), str(args.turns))
        stats = run_child("baselines.py", "encode-conversations", task, args.model, args.data, *sizes)
        counts = "{kept} conversations, {sequences} sequences, {tokens:,} tokens, {computed_tokens:,} of them computed"
        counts += ", collated into one batch in {collate_ms} ms"
        print(counts.format(**stats))
        results = run_rounds(
            args.only, args.repeat, lambda name: run_child("baselines.py", name, task, str(args.steps))
        )
    table = build_table(results)
    table.print()
    summary = describe_losses(results)
    print(summary)
    if args.output:
        record = {"model": args.model, "turns": args.turns, "steps": args.steps, "rows": stats, "runs": results}
        write_results(args.output, record, f"{counts.format(**stats)}.\n\n{table.format_markdown()}\n{summary}\n")


def build_table(results: dict[str, list[Run]]) -> Table:
    """Build the table of medians, the range of speeds, and this project's speed and memory relative to each row."""
    rows = []
    for name, runs in results.items():
        speeds = [run["tokens_per_second"] for run in runs]
        speed, peak = compute_median(runs, "tokens_per_second"), compute_median(runs, "peak_gib")
        cells = [f"{speed:.0f}", f"{min(speeds):.0f}-{max(speeds):.0f}", f"{compute_median(runs, 'seconds'):.1f}"]
        if OURS in results:
            ratios = (
                compute_median(results[OURS], "tokens_per_second") / speed,
                compute_median(results[OURS], "peak_gib") / peak,
            )
            cells += [f"{peak:.2f}", *(f"{ratio:.2f}x" for ratio in ratios)]
        rows.append([NAMES[name], *cells])
    header = ["", "tokens/s", "range", "seconds", "GiB", "ours: speed", "memory"]
    return Table(header if OURS in results else header[:-2], rows, NAMES[OURS])


def describe_losses(results: dict[str, list[Run]]) -> str:
    """Describe the largest difference of a step's loss with and without the tree."""
    pairs = [results[name][0]["losses"] for name in ("ours-conversations", "ours-unshared") if name in results]
    if len(pairs) < 2:
        return ""
    difference = max(abs(a - b) for a, b in zip(*pairs))
    return f"Largest difference of a step's loss with and without the tree: {difference:.1g}."


if __name__ == "__main__":
    main()
