"""Compare rows encoded per second with TRL: a file of Alpaca rows repeated to 20,000 rows, to Arrow on disk.

    pip install -e ".[bench]"
    python benchmarks/encode.py MODEL alpaca_en_demo.json [--num_proc 2]

Ours is measured from messages to shifted, masked rows and their counts. TRL's is the construction of an SFTTrainer
with a tiny model, from prompt and completion in the form that is fastest there: rendered text for the role template,
which saves it all rendering, and messages for the tokenizer's own chat template. Every repetition encodes into an
empty cache, in the order ours, TRL, ours, TRL for each template; medians are printed.
"""

import argparse
import os
import statistics
import tempfile
import time
from typing import Any

import datasets
from datasets import Dataset
from report import SYSTEM_PROMPT, require_bench_extra
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from sft_pipeline.data.chat_templates import ROLE_HEADERS, build_template
from sft_pipeline.data.encode import Encoder, encode_dataset
from sft_pipeline.data.messages import Message, add_system_prompt
from sft_pipeline.data.sources import load_conversations

ROWS = 20_000
TEMPLATES = ("role", "chat")


def measure_ours(rows: Dataset, template: str, tokenizer: PreTrainedTokenizerBase, num_proc: int) -> float:
    """Return rows/s of this project."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SFT_PIPELINE_CACHE"] = cache
        start_time = time.perf_counter()
        encode_dataset(rows, Encoder(build_template(template, tokenizer), SYSTEM_PROMPT), num_proc)
        return len(rows) / (time.perf_counter() - start_time)


def measure_trl(rows: Dataset, tokenizer: PreTrainedTokenizerBase, num_proc: int, trl: Any) -> float:
    """Return rows/s of TRL, for rows that are on disk as a user's are; `trl` is (SFTConfig, SFTTrainer)."""
    config_class, trainer_class = trl
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with tempfile.TemporaryDirectory() as folder:
        rows.save_to_disk(f"{folder}/rows")
        saved_rows = datasets.load_from_disk(f"{folder}/rows")
        disabled: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none"}
        config = config_class(output_dir=folder, max_length=1024, dataset_num_proc=num_proc, **disabled)
        start_time = time.perf_counter()
        trainer_class(model=model, args=config, train_dataset=saved_rows, processing_class=tokenizer)
        return len(rows) / (time.perf_counter() - start_time)


def render_prompt_and_completion(row: dict[str, list[Message]]) -> dict[str, str]:
    """Render prompt and completion as text in the role template, with the start token; TRL adds the end token."""
    *prompt_messages, answer = add_system_prompt(row["messages"], SYSTEM_PROMPT)
    prompt = "".join(ROLE_HEADERS[message["role"]] + message["content"] for message in prompt_messages)
    return {"prompt": f"<|im_start|>{prompt}{ROLE_HEADERS['assistant']}", "completion": answer["content"]}


def split_prompt_and_completion(row: dict[str, list[Message]]) -> dict[str, list[Message]]:
    """Split a conversation into prompt messages and the last answer."""
    *prompt_messages, answer = add_system_prompt(row["messages"], SYSTEM_PROMPT)
    return {"prompt": prompt_messages, "completion": [answer]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model or tokenizer folder, or a hub name")
    parser.add_argument("data", help="a file of instruction rows, such as alpaca_en_demo.json")
    parser.add_argument("--num_proc", type=int, default=2, help="processes that encode (2)")
    parser.add_argument("--repeat", type=int, default=3, help="rounds (3)")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"rows to encode ({ROWS})")
    args = parser.parse_args()
    require_bench_extra("trl")
    from trl import SFTConfig, SFTTrainer  # here, so that --help works without TRL

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as the command line sets it: processes, not threads
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    source = load_conversations(args.data)
    rows = datasets.concatenate_datasets([source] * (1 + args.rows // len(source))).select(range(args.rows))
    trl_rows = {
        name: rows.map(convert, remove_columns=rows.column_names)
        for name, convert in zip(TEMPLATES, (render_prompt_and_completion, split_prompt_and_completion))
    }
    speeds: dict[tuple[str, str], list[float]] = {(side, name): [] for name in TEMPLATES for side in ("ours", "TRL")}
    for _ in range(args.repeat):
        for (side, name), measured in speeds.items():
            if side == "ours":
                measured.append(measure_ours(rows, name, tokenizer, args.num_proc))
            else:
                measured.append(measure_trl(trl_rows[name], tokenizer, args.num_proc, (SFTConfig, SFTTrainer)))
    for (side, name), measured in speeds.items():
        print(f"{name}, {side}: median {statistics.median(measured):,.0f} rows/s of {[round(s) for s in measured]}")
    for name in TEMPLATES:
        ratio = statistics.median(speeds["ours", name]) / statistics.median(speeds["TRL", name])
        print(f"{name}: {ratio:.2f} times TRL's rows/s")


if __name__ == "__main__":
    main()
