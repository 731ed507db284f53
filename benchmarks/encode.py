"""Compare rows encoded per second with TRL: a file of Alpaca rows repeated to 20,000 rows, to Arrow on disk.

    pip install -e ".[bench]"
    python benchmarks/encode.py MODEL alpaca_en_demo.json [--num_proc 2]
    python benchmarks/encode.py MODEL alpaca_en_demo.json --turns 8 --rows 500

Ours is measured from conversations to shifted, masked rows and their counts. TRL's is the construction of an SFTTrainer
with a tiny model, from prompt and completion in the form that is fastest there: rendered text for the role template,
which saves it all rendering, and messages for the tokenizer's own chat template.

With --turns the rows are conversations with reasoning (benchmarks/conversations.py), whose chat template leaves out the
reasoning of earlier answers. TRL gets the same sequences, each as a prompt of messages and a completion; in a second
comparison the conversation as it is, which it makes one sequence of, with the masks of no answer but the last right.

Every repetition encodes into an empty cache, in the order ours, TRL, ours, TRL for each case; medians are printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
from datasets import Dataset
from report import SYSTEM_PROMPT, require_bench_extra
from task import AGENT_TEMPLATE, build_conversations
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from sft_pipeline.data.chat_templates import build_template
from sft_pipeline.data.encode import Encoder, encode_dataset
from sft_pipeline.data.messages import Conversation, add_system_prompt
from sft_pipeline.data.role_template import ROLE_HEADERS
from sft_pipeline.data.sources import load_conversations

ROWS = 20_000
MAX_LENGTH = 8192  # nothing is dropped on either side


@dataclass(frozen=True)
class Case:
    """Conversations, how ours encodes them, and the rows that TRL gets for them."""

    conversations: list[Conversation]
    encoder: Encoder
    trl_rows: list[dict[str, Any]]


def measure_ours(case: Case, num_proc: int) -> float:
    """Return conversations/s of this project."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SFT_PIPELINE_CACHE"] = cache
        start_time = time.perf_counter()
        encode_dataset(case.conversations, case.encoder, num_proc)
        return len(case.conversations) / (time.perf_counter() - start_time)


def measure_trl(case: Case, num_proc: int, trl: Any) -> float:
    """Return conversations/s of TRL, for rows that are on disk as a user's are; `trl` is (SFTConfig, SFTTrainer)."""
    config_class, trainer_class = trl
    tokenizer = case.encoder.template.tokenizer
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with tempfile.TemporaryDirectory() as folder:
        Dataset.from_list(case.trl_rows).save_to_disk(f"{folder}/rows")
        saved_rows = datasets.load_from_disk(f"{folder}/rows")
        disabled: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none"}
        config = config_class(output_dir=folder, max_length=MAX_LENGTH, dataset_num_proc=num_proc, **disabled)
        start_time = time.perf_counter()
        trainer_class(model=model, args=config, train_dataset=saved_rows, processing_class=tokenizer)
        return len(case.conversations) / (time.perf_counter() - start_time)


def render_prompt_and_completion(conversation: Conversation) -> dict[str, str]:
    """Render prompt and completion as text in the role template, with the start token; TRL adds the end token."""
    *prompt_messages, answer = add_system_prompt(conversation, SYSTEM_PROMPT)["messages"]
    prompt = "".join(ROLE_HEADERS[message["role"]] + message["content"] for message in prompt_messages)
    return {"prompt": f"<|im_start|>{prompt}{ROLE_HEADERS['assistant']}", "completion": answer["content"]}


def split_prompts_and_completions(conversation: Conversation, system_prompt: str | None) -> Iterator[dict[str, Any]]:
    """Yield the prompt messages and the completion of every answer of a conversation."""
    messages = add_system_prompt(conversation, system_prompt)["messages"]
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            yield {"prompt": messages[:index], "completion": [message]}


def build_cases(data: str, tokenizer: PreTrainedTokenizerBase, rows: int, turns: int) -> dict[str, Case]:
    source = load_conversations(data)
    if turns:
        encoder = Encoder(build_template("chat", tokenizer, str(AGENT_TEMPLATE)), max_length=MAX_LENGTH)
        conversations = build_conversations(source, tokenizer, rows, turns)
        sequences = [row for item in conversations for row in split_prompts_and_completions(item, None)]
        return {
            f"{turns} turns, the same sequences": Case(conversations, encoder, sequences),
            f"{turns} turns, TRL one sequence": Case(conversations, encoder, [dict(item) for item in conversations]),
        }
    conversations = (source * (1 + rows // len(source)))[:rows]
    texts = [render_prompt_and_completion(item) for item in conversations]
    messages = [row for item in conversations for row in split_prompts_and_completions(item, SYSTEM_PROMPT)]
    return {
        name: Case(conversations, Encoder(build_template(name, tokenizer), SYSTEM_PROMPT, MAX_LENGTH), trl_rows)
        for name, trl_rows in (("role", texts), ("chat", messages))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model or tokenizer folder, or a hub name")
    parser.add_argument("data", help="a file of instruction rows, such as alpaca_en_demo.json")
    parser.add_argument("--num_proc", type=int, default=2, help="processes that encode (2)")
    parser.add_argument("--repeat", type=int, default=3, help="rounds (3)")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"conversations to encode ({ROWS})")
    parser.add_argument(
        "--turns", type=int, default=0, help="exchanges of a conversation; by default the rows as they are"
    )
    args = parser.parse_args()
    require_bench_extra("trl")
    from trl import SFTConfig, SFTTrainer  # here, so that --help works without TRL

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as the command line sets it: processes, not threads
    datasets.disable_progress_bars()
    cases = build_cases(args.data, AutoTokenizer.from_pretrained(args.model), args.rows, args.turns)
    speeds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in cases}
    for _ in range(args.repeat):
        for name, case in cases.items():
            speeds[name][0].append(measure_ours(case, args.num_proc))
            speeds[name][1].append(measure_trl(case, args.num_proc, (SFTConfig, SFTTrainer)))
    for name, (ours, trl) in speeds.items():
        for side, measured in (("ours", ours), ("TRL", trl)):
            print(f"{name}, {side}: median {statistics.median(measured):,.0f} rows/s of {[round(s) for s in measured]}")
        print(f"{name}: {statistics.median(ours) / statistics.median(trl):.2f} times TRL's rows/s")


if __name__ == "__main__":
    main()
