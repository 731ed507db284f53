"""One contender of benchmarks/peers.py, in a process of its own; prints its figures as one JSON line.

    python benchmarks/contenders.py prepare TASK.json MODEL DATA.json ROWS
    python benchmarks/contenders.py random TASK.json TOKENIZER DATA.json ROWS LAYERS
    python benchmarks/contenders.py ours|reference|trl-plain|trl-group|trl-pack TASK.json

The first two write TASK.json, from a model folder or with random weights of Qwen3's shape; the others train on it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from task import MAX_LENGTH, Clock, Task, our_trainer, peak_gib, prepare, random_qwen3, record_losses, shared_settings
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from sft_pipeline.utils.constants import IGNORED

BATCH = 8
TRL: dict[str, dict[str, Any]] = {
    "trl-plain": {"per_device_train_batch_size": BATCH},
    "trl-group": {"per_device_train_batch_size": BATCH, "train_sampling_strategy": "group_by_length"},
    "trl-pack": {"per_device_train_batch_size": 2, "packing": True, "packing_strategy": "bfd"},
}


def reference(task: Task) -> dict[str, Any]:
    """The plain loop of a notebook: right padding, all logits, AdamW as torch makes it."""
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    losses, started = [], time.perf_counter()
    for input_ids, attention_mask, labels in padded_batches(task):
        optimizer.zero_grad()
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return figures(task, time.perf_counter() - started, losses)


def padded_batches(task: Task) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Ids, attention mask and shifted labels, each (rows, longest)."""
    ids, labels = ([torch.tensor(row) for row in task.rows[name]] for name in ("input_ids", "labels"))
    for at in range(0, len(ids), BATCH):
        part = slice(at, at + BATCH)
        pad = torch.nn.utils.rnn.pad_sequence
        mask = pad([torch.ones_like(row) for row in ids[part]], batch_first=True)
        yield pad(ids[part], batch_first=True), mask, pad(labels[part], batch_first=True, padding_value=IGNORED)


def trl(task: Task, name: str) -> dict[str, Any]:
    """TRL's SFTTrainer as it comes, but for gradient checkpointing and bf16, which the others do without."""
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    labels = [[IGNORED, *row[:-1]] for row in task.rows["labels"]]  # TRL shifts by itself
    rows = Dataset.from_dict({"input_ids": task.rows["input_ids"], "labels": labels})
    off = {"bf16": False, "gradient_checkpointing": False}
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(output_dir=folder, max_length=MAX_LENGTH, **{**shared_settings(), **off, **TRL[name]})
        model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(task.model)
        return timed(SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer), task)


def ours(task: Task) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return timed(our_trainer(task, folder, BATCH), task)


def timed(trainer: Trainer, task: Task) -> dict[str, Any]:
    clock, losses = Clock(), record_losses(trainer)
    trainer.add_callback(clock)
    trainer.train()
    return figures(task, clock.seconds, losses)


def figures(task: Task, seconds: float, losses: list[float]) -> dict[str, Any]:
    return {
        "tokens_per_second": round(task.tokens / seconds, 1),
        "seconds": round(seconds, 2),
        "peak_gib": round(peak_gib(), 2),
        "losses": [round(loss, 7) for loss in losses],
    }


def main(name: str, file: str, *arguments: str) -> dict[str, Any]:
    if name == "random":
        folder = Path(file).parent / "model"
        random_qwen3(arguments[0], int(arguments[3]), folder)
        name, arguments = "prepare", (str(folder), *arguments[1:3])
    if name == "prepare":
        task = prepare(arguments[0], arguments[1], int(arguments[2]))
        task.write(Path(file))
        return task.account
    task = Task.read(Path(file))
    return {"ours": ours, "reference": reference}[name](task) if name not in TRL else trl(task, name)


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
