"""Rows encoded a second, here and by TRL: a file of Alpaca's shape repeated to 20,000 rows, to Arrow on disk.

    python benchmarks/encode.py MODEL alpaca_en_demo.json [--num_proc 2]

Ours is from messages to shifted, masked rows and their account. TRL's is the building of an SFTTrainer on a model of
no size, from prompt and completion in the form that is quickest there: finished text for the role template, which
spares it all rendering, and messages for the tokenizer's own chat template. Every repetition encodes anew into an
empty cache, in the order ours, TRL, ours, TRL for each template; medians are printed. TRL comes from the extra `bench`.
"""

import argparse
import os
import statistics
import tempfile
import time
from typing import Any

import datasets
from datasets import Dataset
from report import SYSTEM
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from sft_pipeline.data.chat_templates import ROLE_HEADERS, build_template
from sft_pipeline.data.encode import Encoder, encode_dataset
from sft_pipeline.data.messages import Message, add_system_prompt
from sft_pipeline.data.sources import load_source

ROWS = 20_000
TEMPLATES = ("role", "chat")


def ours(rows: Dataset, template: str, tokenizer: PreTrainedTokenizerBase, num_proc: int) -> float:
    """Rows a second."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SFT_PIPELINE_CACHE"] = cache
        started = time.perf_counter()
        encode_dataset(rows, Encoder(build_template(template, tokenizer), SYSTEM), num_proc)
        return len(rows) / (time.perf_counter() - started)


def trl(rows: Dataset, tokenizer: PreTrainedTokenizerBase, num_proc: int) -> float:
    """Rows a second, of rows that are on disk as those of a user are."""
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with tempfile.TemporaryDirectory() as folder:
        rows.save_to_disk(f"{folder}/rows")
        on_disk = datasets.load_from_disk(f"{folder}/rows")
        off: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none"}
        config = SFTConfig(output_dir=folder, max_length=1024, dataset_num_proc=num_proc, **off)
        started = time.perf_counter()
        SFTTrainer(model=model, args=config, train_dataset=on_disk, processing_class=tokenizer)
        return len(rows) / (time.perf_counter() - started)


def as_text(row: dict[str, list[Message]]) -> dict[str, str]:
    """The role template's prompt and completion; the start token is spelled, TRL adds the end token."""
    *before, answer = add_system_prompt(row["messages"], SYSTEM)
    prompt = "".join(ROLE_HEADERS[message["role"]] + message["content"] for message in before)
    return {"prompt": f"<|im_start|>{prompt}{ROLE_HEADERS['assistant']}", "completion": answer["content"]}


def as_messages(row: dict[str, list[Message]]) -> dict[str, list[Message]]:
    *before, answer = add_system_prompt(row["messages"], SYSTEM)
    return {"prompt": before, "completion": [answer]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--num_proc", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rows", type=int, default=ROWS)
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as the command line sets it: processes, not threads
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    source = load_source(args.data)
    rows = datasets.concatenate_datasets([source] * (1 + args.rows // len(source))).select(range(args.rows))
    for_trl = {
        name: rows.map(shape, remove_columns=rows.column_names)
        for name, shape in zip(TEMPLATES, (as_text, as_messages))
    }
    speeds: dict[tuple[str, str], list[float]] = {(who, name): [] for name in TEMPLATES for who in ("ours", "TRL")}
    for _ in range(args.repeat):
        for (who, name), found in speeds.items():
            others = (tokenizer, args.num_proc)
            found.append(ours(rows, name, *others) if who == "ours" else trl(for_trl[name], *others))
    for (who, name), found in speeds.items():
        print(f"{name}, {who}: median {statistics.median(found):,.0f} rows/s of {[round(speed) for speed in found]}")
    for name in TEMPLATES:
        ratio = statistics.median(speeds["ours", name]) / statistics.median(speeds["TRL", name])
        print(f"{name}: {ratio:.2f} times TRL's rows/s")


if __name__ == "__main__":
    main()
