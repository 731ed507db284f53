"""Rows a second and peak memory of `prepare`, and of reading rows in shuffled order from the shards it wrote.

    python benchmarks/prepare.py MODEL alpaca_en_demo.json [--rows 1000000] [--num_proc 2]

The rows of a file of Alpaca's shape are written again and again as JSONL, each with a number of its own, so that no two
are alike. `prepare` runs as a user runs it, in a process of its own with empty caches, a thousand rows held out.
Memory is that of the whole tree of processes, read twice a second from /proc/PID/smaps_rollup (Linux): PSS, which
counts a page shared by n processes as 1/n in each, and of it the anonymous part. The rest are pages of mapped files,
which the kernel takes back when memory runs short.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import psutil
from datasets import Dataset, concatenate_datasets
from torch.utils.data import DataLoader

from sft_pipeline.data.batch_sampler import StepBatchSampler, count_row_tokens
from sft_pipeline.data.packing import PackedCollator
from sft_pipeline.data.padding import IGNORED
from sft_pipeline.data.sources import load_source
from sft_pipeline.model.loading import resolve_model
from sft_pipeline.utils.files import get_cache_dir

HELD_OUT = 1000
READ = 200_000  # rows at most
STEP = 16  # rows


def write_rows(source: str, count: int, file: Path) -> None:
    """`count` rows as JSONL."""
    rows = load_source(source)["messages"][:]
    with file.open("w", encoding="utf-8") as lines:
        for number in range(count):
            *_, question, answer = (message["content"] for message in rows[number % len(rows)])
            row = {"instruction": f"{question} ({number})", "input": "", "output": answer}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def memory(process: int) -> tuple[int, int]:
    """(PSS, its anonymous part) in KiB; nothing of a process that has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0, 0
    sizes = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
    return sizes["Pss"], sizes["Pss_Anon"]


def watch(command: list[str], **environment: str) -> tuple[float, float, float]:
    """Run it: seconds, and the peaks of PSS and of its anonymous part over its processes, in GiB."""
    started, peaks = time.perf_counter(), [0, 0]
    with subprocess.Popen(command, env={**os.environ, **environment}) as run:
        while run.poll() is None:
            tree = [run.pid, *(child.pid for child in psutil.Process(run.pid).children(recursive=True))]
            peaks = list(map(max, peaks, map(sum, zip(*map(memory, tree)))))
            time.sleep(0.5)
    if run.returncode:
        sys.exit(run.returncode)
    return time.perf_counter() - started, peaks[0] / 2**20, peaks[1] / 2**20


def read(folder: Path) -> None:
    """The first packed batches of an epoch, as `train` reads them."""
    files = sorted(folder.glob("train/*.arrow"))
    rows = concatenate_datasets([Dataset.from_file(str(file)) for file in files])
    batches = list(islice(StepBatchSampler(count_row_tokens(rows), seed=0, rows=STEP), READ // STEP))
    loader = DataLoader(rows, batch_sampler=batches, collate_fn=PackedCollator())
    targets = sum(int(batch["labels"].ne(IGNORED).sum()) for batch in loader)
    print(f"{len(rows):,} rows in {len(files)} shards; read {sum(map(len, batches)):,} of them, {targets:,} targets")


def report(name: str, rows: int, seconds: float, peak: float, anonymous: float) -> None:
    print(
        f"{name}: {rows:,} rows in {seconds:.0f} s, {rows / seconds:,.0f} rows/s; at most {peak:.2f} GiB PSS, "
        f"{anonymous:.2f} GiB anonymous",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", help="a file of rows; with --read the shards")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--num_proc", type=int, default=2)
    parser.add_argument(
        "--keep", help="a folder for rows, caches and shards; what an earlier call left is not done again"
    )
    parser.add_argument("--read", action="store_true", help="read rows from shards, nothing else")
    args = parser.parse_args()
    if args.read:
        read(Path(args.data))
        return
    with nullcontext(args.keep) if args.keep else tempfile.TemporaryDirectory() as work:
        file, shards = Path(work) / "rows.jsonl", Path(work) / "shards"
        if not file.exists():
            write_rows(args.data, args.rows, file)
        print(f"{file.stat().st_size / 1e9:.2f} GB of JSONL", flush=True)
        keys = {"train_data": file, "held_out": HELD_OUT, "prepared_data": shards}
        keys |= {
            "model_name_or_path": resolve_model(args.model, get_cache_dir()),
            "num_proc": args.num_proc,
            "template": "role",
        }
        words = [f"--{key}={value}" for key, value in keys.items()]
        caches = {"SFT_PIPELINE_CACHE": f"{work}/cache", "HF_DATASETS_CACHE": f"{work}/datasets"}
        report("prepare", args.rows, *watch([sys.executable, "-m", "sft_pipeline", "prepare", *words], **caches))
        report("read", min(READ, args.rows), *watch([sys.executable, __file__, args.model, str(shards), "--read"]))
        print(f"{sum(path.stat().st_size for path in shards.rglob('*.arrow')) / 1e9:.2f} GB of shards")


if __name__ == "__main__":
    main()
