"""Rows encoded a second: a file of Alpaca's shape repeated to 20,000 rows, from messages to Arrow on disk.

    python benchmarks/encode.py MODEL alpaca_en_demo.json [--num_proc 2]

Every repetition encodes anew into an empty cache; the order is role, chat, role, chat, ... and medians are printed.
"""

import argparse
import os
import statistics
import tempfile
import time

import datasets
from transformers import AutoTokenizer

from sft_pipeline.data.encode import Encoder, encode_dataset
from sft_pipeline.data.sources import load_source
from sft_pipeline.data.templates import build_template

ROWS = 20_000
SYSTEM = "你是小冬瓜智能体,请安全详细回答用户 USER 的问题"


def rows_per_second(rows: datasets.Dataset, template: str, tokenizer, num_proc: int) -> float:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SFT_PIPELINE_CACHE"] = cache
        started = time.perf_counter()
        encode_dataset(rows, Encoder(build_template(template, tokenizer), SYSTEM), num_proc)
        return len(rows) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--num_proc", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as the command line sets it: processes, not threads
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    source = load_source(args.data)
    rows = datasets.concatenate_datasets([source] * (1 + ROWS // len(source))).select(range(ROWS))
    speeds: dict[str, list[float]] = {"role": [], "chat": []}
    for _ in range(args.repeat):
        for template, found in speeds.items():
            found.append(rows_per_second(rows, template, tokenizer, args.num_proc))
    for template, found in speeds.items():
        print(f"{template}: median {statistics.median(found):,.0f} rows/s of {[round(speed) for speed in found]}")


if __name__ == "__main__":
    main()
