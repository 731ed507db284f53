"""This project beside what a user would pick instead: a plain loop, and TRL in three modes; needs the extra `bench`.

    python benchmarks/peers.py smollm2-135m alpaca_en_demo.json --output docs/peers
    python benchmarks/peers.py QWEN3_TOKENIZER alpaca_en_demo.json --shape qwen3 --layers 4 --output docs/peers_qwen3

All get the same ids (role template, at most 1,024 tokens), weights and settings: float32 on the CPU, AdamW at 1e-5,
weight decay 0.01, no clipping, 8 rows a step in file order, gradient checkpointing off. Not alike are only the order
of rows in `trl-group` and what a step of `trl-pack` holds (2 packs of 1,024 tokens). Each contender runs in a process
of its own, all of them once, then all again. Seconds are those of the optimizer steps, loading and encoding left out;
tokens are real ones, without padding; memory is the most that the process ever had.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from report import Run, Table, bars, median, rounds, run_child, write

NAMES = {
    "reference": "plain loop",
    "trl-plain": "TRL",
    "trl-group": "TRL, grouped by length",
    "trl-pack": "TRL, packed",
    "ours": "this project",
}
OURS = NAMES["ours"]
CLOSE = 1e-5  # largest accepted difference of a step's loss from the plain loop's


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder or smollm2-135m; with --shape, a tokenizer folder")
    parser.add_argument("data", help="instruction rows, such as alpaca_en_demo.json")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(NAMES), help=",".join(NAMES))
    parser.add_argument("--shape", choices=["qwen3"], help="random weights of Qwen3-0.6B's shape")
    parser.add_argument("--layers", type=int, default=4, help="with --shape: its number of layers")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json, OUTPUT.md and OUTPUT.png")
    args = parser.parse_args()
    if unknown := set(args.only) - set(NAMES):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(NAMES)}")
    return args


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        task = str(Path(folder) / "task.json")
        made = ["random"] if args.shape else ["prepare"]
        size = [str(args.layers)] if args.shape else []
        account = run_child("contenders.py", *made, task, args.model, args.data, str(args.rows), *size)
        print("{kept} rows, {tokens:,} tokens, {supervised_tokens:,} of them supervised".format(**account))
        found = rounds(args.only, args.repeat, lambda name: run_child("contenders.py", name, task))
    table, losses = speed_table(found), loss_table(found)
    for one in filter(None, (table, losses)):
        one.show()
    verdict = "\n".join(filter(None, (ratios(found), agreement(found))))
    print(verdict)
    if args.output:
        shape = {"model": args.model, "shape": args.shape, "layers": args.layers if args.shape else None}
        write(args.output, {**shape, "rows": account, "runs": found}, f"{table.markdown()}\n{verdict}\n")
        names = [NAMES[name] for name in found]
        panels = {"tokens a second": "tokens_per_second", "memory at most, GiB": "peak_gib"}
        values = {title: [median(runs, key) for runs in found.values()] for title, key in panels.items()}
        bars(args.output.with_suffix(".png"), names, values, OURS)


def speed_table(found: dict[str, list[Run]]) -> Table:
    """Medians, the range of speeds, and how many times as fast and as large this project is."""
    header = ["", "tokens/s", "range", "seconds", "GiB", "ours: speed", "memory"]
    own = found.get("ours")
    rows = []
    for name, runs in found.items():
        speeds = [run["tokens_per_second"] for run in runs]
        speed, peak = median(runs, "tokens_per_second"), median(runs, "peak_gib")
        times = [median(own, "tokens_per_second") / speed, median(own, "peak_gib") / peak] if own else []
        figures = [f"{speed:.0f}", f"{min(speeds):.0f}-{max(speeds):.0f}", f"{median(runs, 'seconds'):.1f}"]
        rows.append([NAMES[name], *figures, f"{peak:.2f}", *(f"{value:.2f}x" for value in times)])
    return Table(header if own else header[:-2], rows, OURS)


def ratios(found: dict[str, list[Run]]) -> str:
    """This project's speed over the best of TRL and over the loop, and its memory over TRL packed."""
    if "ours" not in found:
        return ""
    speed = {name: median(runs, "tokens_per_second") for name, runs in found.items()}
    said = []
    if peers := [name for name in found if name.startswith("trl")]:
        best = max(peers, key=speed.__getitem__)
        said.append(f"{speed['ours'] / speed[best]:.2f} times the speed of TRL's best ({NAMES[best]})")
    if "reference" in found:
        said.append(f"{speed['ours'] / speed['reference']:.2f} times that of the plain loop")
    if "trl-pack" in found:
        share = median(found["ours"], "peak_gib") / median(found["trl-pack"], "peak_gib")
        said.append(f"{share:.2f} of TRL packed's memory")
    return f"This project: {', '.join(said)}." if said else ""


def loss_table(found: dict[str, list[Run]]) -> Table | None:
    """Each step's loss of those who take the same rows in the same order."""
    alike = [name for name in ("reference", "ours", "trl-plain") if name in found]
    if len(alike) < 2:
        return None
    steps = zip(*(found[name][0]["losses"] for name in alike))
    rows = [[str(at), *(f"{loss:.6f}" for loss in losses)] for at, losses in enumerate(steps, 1)]
    return Table(["loss of step", *(NAMES[name] for name in alike)], rows)


def agreement(found: dict[str, list[Run]]) -> str:
    """The largest difference of a step's loss between this project and the plain loop, over all rounds."""
    if not {"reference", "ours"} <= set(found):
        return ""
    expected = found["reference"][0]["losses"]
    pairs = [pair for run in found["ours"] for pair in zip(expected, run["losses"], strict=True)]
    largest = max(abs(one - other) for one, other in pairs)
    within = "within" if largest <= CLOSE else "NOT within"
    of = f"Losses of {len(expected)} steps differ from the plain loop's by"
    return f"{of} {largest:.1e} at most, {within} {CLOSE:.0e}."


if __name__ == "__main__":
    main()
