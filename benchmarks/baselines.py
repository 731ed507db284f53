"""Train one of the trainers that benchmarks/peers.py compares; peers.py starts this script, a process per trainer.

    python benchmarks/baselines.py encode TASK.json MODEL DATA.json ROWS
    python benchmarks/baselines.py encode-random TASK.json TOKENIZER DATA.json ROWS LAYERS
    python benchmarks/baselines.py encode-conversations TASK.json MODEL DATA.json COUNT TURNS
    python benchmarks/baselines.py ours|reference|trl-plain|trl-group|trl-pack TASK.json
    python benchmarks/baselines.py ours-conversations|ours-unshared|trl-conversations|trl-accumulated TASK.json STEPS

The first three write TASK.json: the rows encoded for a model folder, or for random weights of Qwen3's shape, or
conversations of several sequences (benchmarks/conversations.py). The others train on it and print their speed, memory
and losses as one line of JSON. The trl modes need TRL: pip install -e ".[bench]"
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from task import (
    MAX_LENGTH,
    StepTimer,
    Task,
    build_task_trainer,
    encode_conversations,
    encode_task,
    get_peak_memory_gib,
    get_shared_settings,
    record_losses,
    save_random_qwen3,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from sft_pipeline.data.padding import split_sequences
from sft_pipeline.utils.constants import IGNORED

BATCH_SIZE = 8
ENCODE_MODES = ("encode-random", "encode-conversations")
CONVERSATION_MODES = ("ours-conversations", "ours-unshared", "trl-conversations", "trl-accumulated")
TRL_SETTINGS: dict[str, dict[str, Any]] = {
    "trl-plain": {"per_device_train_batch_size": BATCH_SIZE},
    "trl-group": {"per_device_train_batch_size": BATCH_SIZE, "train_sampling_strategy": "group_by_length"},
    "trl-pack": {"per_device_train_batch_size": 2, "packing": True, "packing_strategy": "bfd"},
}


def train_plain_loop(task: Task) -> dict[str, Any]:
    """Train in the plain loop of a notebook: right padding, all logits, torch's AdamW with its defaults."""
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    losses, start_time = [], time.perf_counter()
    for input_ids, attention_mask, labels in iterate_padded_batches(task):
        optimizer.zero_grad()
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return format_metrics(task, time.perf_counter() - start_time, losses)


def iterate_padded_batches(task: Task) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield ids, attention mask and shifted labels, each of shape (rows, longest row)."""
    ids, labels = ([torch.tensor(row) for row in task.rows[name]] for name in ("input_ids", "labels"))
    pad = torch.nn.utils.rnn.pad_sequence
    for start in range(0, len(ids), BATCH_SIZE):
        rows = slice(start, start + BATCH_SIZE)
        mask = pad([torch.ones_like(row) for row in ids[rows]], batch_first=True)
        yield pad(ids[rows], batch_first=True), mask, pad(labels[rows], batch_first=True, padding_value=IGNORED)


def train_trl(task: Task, options: dict[str, Any]) -> dict[str, Any]:
    """Train with TRL's SFTTrainer at its defaults, but without gradient checkpointing and bf16, as the others do."""
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    sequences = list(iterate_sequences(task))
    labels = [[IGNORED, *labels[:-1]] for _, labels in sequences]  # TRL shifts by itself
    rows = Dataset.from_dict({"input_ids": [ids for ids, _ in sequences], "labels": labels})
    disabled = {"bf16": False, "gradient_checkpointing": False}
    settings = {**get_shared_settings(), **disabled, **options}
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(output_dir=folder, **{"max_length": MAX_LENGTH, **settings})
        model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(task.model)
        return time_training(SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer), task)


def iterate_sequences(task: Task) -> Iterator[tuple[list[int], list[int]]]:
    """Iterate over the (input_ids, labels) of all sequences of all rows."""
    names = ("input_ids", "labels", "sequence_lengths")
    for row in zip(*(task.rows[name] for name in names)):
        yield from ((ids.tolist(), labels.tolist()) for ids, labels in split_sequences(dict(zip(names, row))))


def choose_trl_packs(task: Task, steps: int, accumulate: bool) -> dict[str, Any]:
    """Return TRL's settings for packs that hold the longest sequence, and for about `steps` optimizer steps.

    A step is one batch, as this project's is; or with `accumulate` batches of two packs of MAX_LENGTH tokens, as in the
    other comparison, or of one longer pack.
    """
    longest = max(len(ids) for ids, _ in iterate_sequences(task))
    length = MAX_LENGTH * -(-longest // MAX_LENGTH)
    packs_per_step = -(-task.tokens // (length * steps))
    packs = min(packs_per_step, max(1, 2 * MAX_LENGTH // length)) if accumulate else packs_per_step
    accumulation = round(packs_per_step / packs)
    return {
        "max_length": length,
        "packing": True,
        "packing_strategy": "bfd",
        "per_device_train_batch_size": packs,
        "gradient_accumulation_steps": accumulation,
    }


def train_ours(task: Task, batch_size: int = BATCH_SIZE, **options: Any) -> dict[str, Any]:
    """Train with this project's trainer."""
    with tempfile.TemporaryDirectory() as folder:
        return time_training(build_task_trainer(task, folder, batch_size, **options), task)


def time_training(trainer: Trainer, task: Task) -> dict[str, Any]:
    timer, losses = StepTimer(), record_losses(trainer)
    trainer.add_callback(timer)
    trainer.train()
    return format_metrics(task, timer.seconds, losses)


def format_metrics(task: Task, seconds: float, losses: list[float]) -> dict[str, Any]:
    return {
        "tokens_per_second": round(task.tokens / seconds, 1),
        "seconds": round(seconds, 2),
        "peak_gib": round(get_peak_memory_gib(), 2),
        "losses": [round(loss, 7) for loss in losses],
    }


def run_mode(mode: str, file: Path, arguments: list[str]) -> dict[str, Any]:
    """Encode the rows into `file`, or train one trainer on it; return what is printed."""
    if mode == "encode-random":
        tokenizer, data, rows, layers = arguments
        save_random_qwen3(tokenizer, int(layers), file.parent / "model")
        mode, arguments = "encode", [str(file.parent / "model"), data, rows]
    if mode == "encode-conversations":
        model, data, count, turns = arguments
        task = encode_conversations(model, data, int(count), int(turns))
        task.write(file)
        return task.stats
    if mode == "encode":
        model, data, count = arguments
        task = encode_task(model, data, int(count))
        task.write(file)
        return task.stats
    task = Task.read(file)
    if mode in TRL_SETTINGS:
        return train_trl(task, TRL_SETTINGS[mode])
    if mode in CONVERSATION_MODES:
        steps = int(arguments[0])
        if mode.startswith("trl"):
            return train_trl(task, choose_trl_packs(task, steps, accumulate=mode == "trl-accumulated"))
        batch_size = -(-len(task.rows["input_ids"]) // steps)
        return train_ours(task, batch_size, share_prefixes=mode == "ours-conversations")
    return train_ours(task) if mode == "ours" else train_plain_loop(task)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "mode", choices=["encode", *ENCODE_MODES, "ours", "reference", *TRL_SETTINGS, *CONVERSATION_MODES]
    )
    parser.add_argument("task", type=Path, metavar="TASK.json")
    parser.add_argument("arguments", nargs="*", help="of encode: MODEL DATA.json ROWS; of the others: see above")
    args = parser.parse_args()
    print(json.dumps(run_mode(args.mode, args.task, args.arguments)))


if __name__ == "__main__":
    main()
