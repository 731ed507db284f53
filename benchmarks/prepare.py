"""Measure rows/s and peak memory of `prepare`, and of reading the shards it wrote in shuffled order.

    python benchmarks/prepare.py MODEL alpaca_en_demo.json [--rows 1000000] [--num_proc 2]

The rows of a file of Alpaca rows are written repeatedly as JSONL, each with a number of its own, so that no two are
equal. `prepare` runs as a user runs it, in a process of its own with empty caches, a thousand rows held out. Memory is
that of the whole process tree, read twice per second from /proc/PID/smaps_rollup (Linux): PSS, which counts a page
shared by n processes as 1/n in each, and its anonymous part. The remainder are pages of mapped files, which the kernel
reclaims when memory runs short.
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
from sft_pipeline.data.packing import pack_rows
from sft_pipeline.data.sources import load_conversations
from sft_pipeline.model.loading import resolve_model
from sft_pipeline.utils.constants import IGNORED
from sft_pipeline.utils.files import get_cache_dir

HELD_OUT = 1000
MAX_ROWS_READ = 200_000
ROWS_PER_STEP = 16


def write_rows(source: str, count: int, file: Path) -> None:
    """Write `count` numbered rows as JSONL."""
    rows = [conversation["messages"] for conversation in load_conversations(source)]
    with file.open("w", encoding="utf-8") as lines:
        for number in range(count):
            *_, question, answer = (message["content"] for message in rows[number % len(rows)])
            row = {"instruction": f"{question} ({number})", "input": "", "output": answer}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_memory(pid: int) -> tuple[int, int]:
    """Return (PSS, its anonymous part) in KiB; zeros for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0, 0
    sizes = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
    return sizes["Pss"], sizes["Pss_Anon"]


def run_measured(command: list[str], **environment: str) -> tuple[float, float, float]:
    """Run a command; return seconds, and the peaks of PSS and its anonymous part over its processes, in GiB."""
    start_time, peaks = time.perf_counter(), [0, 0]
    with subprocess.Popen(command, env={**os.environ, **environment}) as run:
        while run.poll() is None:
            tree = [run.pid, *(child.pid for child in psutil.Process(run.pid).children(recursive=True))]
            peaks = list(map(max, peaks, map(sum, zip(*map(read_memory, tree)))))
            time.sleep(0.5)
    if run.returncode:
        sys.exit(run.returncode)
    return time.perf_counter() - start_time, peaks[0] / 2**20, peaks[1] / 2**20


def read_shards(folder: Path) -> None:
    """Read the first packed batches of an epoch, as `train` does."""
    files = sorted(folder.glob("train/*.arrow"))
    rows = concatenate_datasets([Dataset.from_file(str(file)) for file in files])
    sampler = StepBatchSampler(count_row_tokens(rows), seed=0, rows=ROWS_PER_STEP)
    batches = list(islice(sampler, MAX_ROWS_READ // ROWS_PER_STEP))
    loader = DataLoader(rows, batch_sampler=batches, collate_fn=pack_rows)
    targets = sum(int(batch["labels"].ne(IGNORED).sum()) for batch in loader)
    print(f"{len(rows):,} rows in {len(files)} shards; read {sum(map(len, batches)):,} of them, {targets:,} targets")


def print_measurement(name: str, rows: int, seconds: float, peak: float, anonymous: float) -> None:
    print(
        f"{name}: {rows:,} rows in {seconds:.0f} s, {rows / seconds:,.0f} rows/s; peak {peak:.2f} GiB PSS, "
        f"{anonymous:.2f} GiB anonymous",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder, a hub name or smollm2-135m")
    parser.add_argument("data", help="a file of rows; with --read the folder of shards")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows to prepare (1000000)")
    parser.add_argument("--num_proc", type=int, default=2, help="processes that encode (2)")
    parser.add_argument("--keep", help="a folder that keeps rows, caches and shards for the next call")
    parser.add_argument("--read", action="store_true", help="only read rows from shards")
    args = parser.parse_args()
    if args.read:
        read_shards(Path(args.data))
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
        options = [f"--{key}={value}" for key, value in keys.items()]
        caches = {"SFT_PIPELINE_CACHE": f"{work}/cache", "HF_DATASETS_CACHE": f"{work}/datasets"}
        prepare_command = [sys.executable, "-m", "sft_pipeline", "prepare", *options]
        print_measurement("prepare", args.rows, *run_measured(prepare_command, **caches))
        read_command = [sys.executable, __file__, args.model, str(shards), "--read"]
        print_measurement("read", min(MAX_ROWS_READ, args.rows), *run_measured(read_command))
        print(f"{sum(path.stat().st_size for path in shards.rglob('*.arrow')) / 1e9:.2f} GB of shards")


if __name__ == "__main__":
    main()
