"""Compare training speed and memory with a plain PyTorch loop and with TRL in three modes.

    pip install -e ".[bench]"
    python benchmarks/peers.py smollm2-135m alpaca_en_demo.json --output docs/peers
    python benchmarks/peers.py QWEN3_TOKENIZER alpaca_en_demo.json --shape qwen3 --layers 4 --output docs/peers_qwen3

All train the same ids (role template, at most 1,024 tokens) from the same weights with the same settings: float32 on
the CPU, AdamW at 1e-5, weight decay 0.01, no clipping, 8 rows per step in file order, no gradient checkpointing. Two
things differ: the order of rows in `trl-group`, and the content of a step in `trl-pack` (2 packs of 1,024 tokens).
Each trainer runs in a process of its own, all of them once, then all again. Seconds are those of the optimizer steps,
without loading and encoding; tokens do not count padding; memory is the process's peak.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from report import Run, Table, compute_median, draw_bars, require_bench_extra, run_child, run_rounds, write_results

NAMES = {
    "reference": "plain loop",
    "trl-plain": "TRL",
    "trl-group": "TRL, grouped by length",
    "trl-pack": "TRL, packed",
    "ours": "this project",
}
OURS = NAMES["ours"]
TOLERANCE = 1e-5  # accepted difference of a step's loss from the plain loop's


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder or smollm2-135m; with --shape, a tokenizer folder")
    parser.add_argument("data", help="a file of instruction rows, such as alpaca_en_demo.json")
    parser.add_argument("--rows", type=int, default=48, help="rows to train on (48)")
    parser.add_argument("--repeat", type=int, default=2, help="rounds over all trainers (2)")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(NAMES), help=",".join(NAMES))
    parser.add_argument("--shape", choices=["qwen3"], help="random weights of Qwen3-0.6B's shape")
    parser.add_argument("--layers", type=int, default=4, help="with --shape: number of layers (4)")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json, OUTPUT.md and OUTPUT.png")
    args = parser.parse_args()
    if unknown := set(args.only) - set(NAMES):
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; choose from {', '.join(NAMES)}")
    return args


def main() -> None:
    args = parse_arguments()
    require_bench_extra(
        *["trl"] * any(name.startswith("trl") for name in args.only), *["matplotlib"] * bool(args.output)
    )
    with tempfile.TemporaryDirectory() as folder:
        task = str(Path(folder) / "task.json")
        mode, layers = ("encode-random", [str(args.layers)]) if args.shape else ("encode", [])
        stats = run_child("baselines.py", mode, task, args.model, args.data, str(args.rows), *layers)
        print("{kept} rows, {tokens:,} tokens, {supervised_tokens:,} of them supervised".format(**stats))
        results = run_rounds(args.only, args.repeat, lambda name: run_child("baselines.py", name, task))
    speed_table, loss_table = build_speed_table(results), build_loss_table(results)
    for table in filter(None, (speed_table, loss_table)):
        table.print()
    summary = "\n".join(filter(None, (describe_ratios(results), describe_loss_difference(results))))
    print(summary)
    if args.output:
        shape = {"model": args.model, "shape": args.shape, "layers": args.layers if args.shape else None}
        markdown = f"{speed_table.format_markdown()}\n{summary}\n"
        write_results(args.output, {**shape, "rows": stats, "runs": results}, markdown)
        draw_picture(args.output.with_suffix(".png"), results)


def draw_picture(picture: Path, results: dict[str, list[Run]]) -> None:
    panels = {"tokens/s": "tokens_per_second", "peak memory, GiB": "peak_gib"}
    values = {title: [compute_median(runs, key) for runs in results.values()] for title, key in panels.items()}
    draw_bars(picture, [NAMES[name] for name in results], values, OURS)


def build_speed_table(results: dict[str, list[Run]]) -> Table:
    """Build the table of medians, the range of speeds, and this project's speed and memory relative to each row."""
    header = ["", "tokens/s", "range", "seconds", "GiB", "ours: speed", "memory"]
    our_runs = results.get("ours")
    rows = []
    for name, runs in results.items():
        speeds = [run["tokens_per_second"] for run in runs]
        speed, peak = compute_median(runs, "tokens_per_second"), compute_median(runs, "peak_gib")
        ratios = []
        if our_runs:
            ratios = [
                compute_median(our_runs, "tokens_per_second") / speed,
                compute_median(our_runs, "peak_gib") / peak,
            ]
        cells = [f"{speed:.0f}", f"{min(speeds):.0f}-{max(speeds):.0f}", f"{compute_median(runs, 'seconds'):.1f}"]
        rows.append([NAMES[name], *cells, f"{peak:.2f}", *(f"{ratio:.2f}x" for ratio in ratios)])
    return Table(header if our_runs else header[:-2], rows, OURS)


def describe_ratios(results: dict[str, list[Run]]) -> str:
    """Describe this project's speed over TRL's best mode and over the plain loop, and its memory over TRL packed."""
    if "ours" not in results:
        return ""
    speeds = {name: compute_median(runs, "tokens_per_second") for name, runs in results.items()}
    parts = []
    if trl_names := [name for name in results if name.startswith("trl")]:
        best = max(trl_names, key=speeds.__getitem__)
        parts.append(f"{speeds['ours'] / speeds[best]:.2f} times TRL's best ({NAMES[best]})")
    if "reference" in results:
        parts.append(f"{speeds['ours'] / speeds['reference']:.2f} times the plain loop")
    sentences = [f"Speed of this project: {', '.join(parts)}."] if parts else []
    if "trl-pack" in results:
        share = compute_median(results["ours"], "peak_gib") / compute_median(results["trl-pack"], "peak_gib")
        sentences.append(f"Its memory: {share:.2f} of TRL packed's.")
    return " ".join(sentences)


def build_loss_table(results: dict[str, list[Run]]) -> Table | None:
    """Build the table of each step's loss, for the trainers that take the same rows in the same order."""
    names = [name for name in ("reference", "ours", "trl-plain") if name in results]
    if len(names) < 2:
        return None
    steps = zip(*(results[name][0]["losses"] for name in names))
    rows = [[str(step), *(f"{loss:.6f}" for loss in losses)] for step, losses in enumerate(steps, 1)]
    return Table(["loss of step", *(NAMES[name] for name in names)], rows)


def describe_loss_difference(results: dict[str, list[Run]]) -> str:
    """Describe the largest difference of a step's loss between this project and the plain loop, over all rounds."""
    if not {"reference", "ours"} <= set(results):
        return ""
    expected = results["reference"][0]["losses"]
    pairs = [pair for run in results["ours"] for pair in zip(expected, run["losses"], strict=True)]
    largest = max(abs(plain_loss - loss) for plain_loss, loss in pairs)
    within = "within" if largest <= TOLERANCE else "NOT within"
    return (
        f"Losses of {len(expected)} steps differ from the plain loop's by {largest:.1e} at most, "
        f"{within} {TOLERANCE:.0e}."
    )


if __name__ == "__main__":
    main()
