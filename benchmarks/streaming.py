"""Measure rows/s and peak memory of a stream over a large file, and how long it takes to go on at its end.

    python benchmarks/streaming.py MODEL [--gigabytes 2] [--folder /tmp]

Writes a JSONL file of that size, of numbered rows with 1,500 characters each, and reads and encodes it in one process
as a run with `streaming: true` does. Memory is the peak resident memory of the process so far.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from sft_pipeline.arguments import SourceEntry
from sft_pipeline.data.chat_templates import build_template
from sft_pipeline.data.encode import Encoder
from sft_pipeline.data.row_stream import RowStream
from sft_pipeline.data.streamed_sources import SourceMix, open_stream
from sft_pipeline.model.loading import load_tokenizer, resolve_model
from sft_pipeline.training.memory import measure_peak_memory_gib
from sft_pipeline.utils.files import get_cache_dir

ANSWER = "A long answer of many words that goes on and on. " * 30


def write_rows(file: Path, size: int) -> None:
    """Write rows of `size` bytes together, and some more."""
    with file.open("w", encoding="utf-8") as lines:
        number = 0
        while lines.tell() < size:
            rows = [{"instruction": f"Question {n}?", "output": f"{n} {ANSWER}"} for n in range(number, number + 1000)]
            lines.write("".join(json.dumps(row) + "\n" for row in rows))
            number += len(rows)


def measure_stream(file: Path, encoder: Encoder) -> None:
    """Read the whole file and print a line for each tenth of it, then go on after the last row."""
    mix = SourceMix([open_stream(SourceEntry(str(file)))])
    stream, size, reported = RowStream(mix, encoder, seed=42), file.stat().st_size, 0
    start = time.perf_counter()
    for _ in stream:
        if stream.account.rows % 1000:
            continue
        state = stream.state_dict()
        share = mix.state_dict()["sources"][0]["offset"] / size
        is_last = state["mix"]["progress"][0]["passes"] > 0
        if is_last or share >= (reported + 1) / 10:
            reported += 1
            rate = stream.account.rows / (time.perf_counter() - start)
            where = "all" if is_last else f"{share:.0%}"
            print(f"{where}: {stream.account.rows:,} rows, {rate:,.0f} rows/s, {measure_peak_memory_gib():.2f} GiB")
        if is_last:
            break
    resumed = RowStream(SourceMix([open_stream(SourceEntry(str(file)))]), encoder, seed=42)
    start = time.perf_counter()
    resumed.load_state_dict(state)
    next(iter(resumed))
    print(f"resumed after row {resumed.account.rows - 1:,}: {time.perf_counter() - start:.2f} s to the next row")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or name of a model whose tokenizer encodes the rows")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--folder", help="where the file is written; a temporary folder in it is deleted afterwards")
    options = parser.parse_args()
    tokenizer = load_tokenizer(str(resolve_model(options.model, get_cache_dir())))
    encoder = Encoder(build_template("chat", tokenizer))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(file, int(options.gigabytes * 1e9))
        measure_stream(file, encoder)


if __name__ == "__main__":
    main()
