"""A process that trains with one of the trainers that `speed` compares, once for each line of its standard input.

    python benchmarks/gpu_parts/trainers.py NAME    # `speed` starts it

A line is a request in JSON: {"shape", "small", "device", "data", "tokens", "steps", "warm_up"}. The answer is a line
that begins with RESULT. One process serves many requests, since importing the libraries takes longer than training;
each trainer has its own process, since Liger replaces functions of transformers for all models of a process.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from datasets import Dataset, disable_progress_bars
from report import Run
from task import get_shared_settings
from transformers import PreTrainedModel, Trainer, TrainingArguments

from gpu_parts.inputs import (
    Row,
    build_conversations,
    build_model,
    build_rows,
    build_tokenizer,
    count_work,
    iterate_sequences,
    split_batches,
)
from gpu_parts.measuring import GIB, Setting, StepClock, get_peak_gib, record_errors, reset_peak
from gpu_parts.ours import build_our_trainer
from sft_pipeline.utils.constants import IGNORED

# Keys of the run's arguments in which the trainers differ.
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours-compiled": {"torch_compile": True},
    "ours-unshared": {"share_prefixes": False},
}
LIGER = {"use_liger_kernel": True}
PLAIN: dict[str, dict[str, Any]] = {"trainer": {}, "trainer-liger": LIGER}
TRL: dict[str, dict[str, Any]] = {"trl": {}, "trl-liger": LIGER, "trl-liger-flex": LIGER}
PACK_LENGTH = 2048  # tokens of TRL's packs, at least; longer if a sequence is
ROW_TOKENS, CONVERSATION_TOKENS = 226, 3990  # in the mean
RESULT = "RESULT "


def choose_attention(name: str, device: torch.device) -> str:
    """Return the attention of the model: TRL's packs are fastest with FlashAttention, where it is installed."""
    if name.endswith("flex"):
        return "flex_attention"
    return "flash_attention_2" if name in TRL and device.type == "cuda" and find_spec("flash_attn") else "sdpa"


def build_trainer(
    name: str, model: PreTrainedModel, rows: Sequence[Row], row_count: int, tokens: int, folder: str, device_type: str
) -> Trainer:
    """Build the trainer `name` on rows, of which `row_count` are a batch of about `tokens` tokens."""
    if name in OURS:
        keys = {"per_device_train_batch_size": row_count, **OURS[name]}
        return build_our_trainer(model, rows, folder, device_type, **keys)
    use_cpu = device_type == "cpu"
    settings = {**get_shared_settings(use_cpu), "output_dir": folder, "bf16": not use_cpu}
    # Our defaults: batches are collated beside the steps, and no step waits to look at its loss.
    settings |= {"dataloader_num_workers": int(not use_cpu), "logging_nan_inf_filter": False}
    sequences = list(iterate_sequences(rows))
    labels = [[IGNORED, *labels[:-1]] for _, labels in sequences]  # these trainers shift by themselves
    dataset = Dataset.from_dict({"input_ids": [ids for ids, _ in sequences], "labels": labels})
    if name in PLAIN:
        size = round(row_count * len(sequences) / len(rows))
        plain_args = TrainingArguments(**settings, per_device_train_batch_size=size, **PLAIN[name])
        return Trainer(model, plain_args, data_collator=pad_sequences, train_dataset=dataset)
    import trl

    length = max(min(PACK_LENGTH, tokens), *(len(ids) for ids, _ in sequences))
    packing = {"packing": True, "packing_strategy": "bfd", "max_length": length, "activation_checkpointing": False}
    packing["per_device_train_batch_size"] = max(1, round(tokens / length))
    trl_args = trl.SFTConfig(**settings, **packing, **TRL[name])
    return trl.SFTTrainer(model=model, args=trl_args, train_dataset=dataset, processing_class=build_tokenizer())


def pad_sequences(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Collate sequences as a data collator of transformers does: padded on the right, with an attention mask."""

    def pad(name: str, value: int) -> torch.Tensor:
        lines = [torch.tensor(row[name]) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(lines, batch_first=True, padding_value=value)

    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row["input_ids"]), dtype=torch.long) for row in rows], True)
    return {"input_ids": pad("input_ids", 0), "attention_mask": mask, "labels": pad("labels", IGNORED)}


def train(name: str, setting: Setting, data: str, tokens: int, steps: int, warm_up: int) -> Run:
    """Train `warm_up` + `steps` steps of about `tokens` tokens; return speed, memory and mean loss.

    data: "rows" without a shared start, or "conversations" of 8 turns. Tokens are those of all sequences.
    """
    device, shape = setting.device, setting.shape
    mean, build = (CONVERSATION_TOKENS, build_conversations) if data == "conversations" else (ROW_TOKENS, build_rows)
    row_count = max(1, round(tokens / (mean * setting.scale)))
    rows = build((warm_up + steps) * row_count, shape.vocabulary, scale=setting.scale)
    reset_peak(device)
    held = torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else 0.0
    clock = StepClock(device, warm_up)
    with tempfile.TemporaryDirectory() as folder:
        model = build_model(shape, device, attention=choose_attention(name, device))
        trainer = build_trainer(name, model, rows, row_count, tokens, folder, device.type)
        trainer.add_callback(clock)
        loss = trainer.train().training_loss
    # TRL packs rows in an order of its own: its steps have these tokens in the mean.
    batches = split_batches(rows, row_count)
    work = count_work(shape, batches if name in TRL else batches[warm_up:], share=name in OURS and data != "rows")
    share = clock.steps / trainer.state.max_steps if name in TRL else 1.0
    return {
        "tokens_per_second": share * work["tokens"] / clock.seconds,
        "computed_tokens": share * work["computed_tokens"],
        "flops_per_second": share * work["flops"] / clock.seconds,
        "step_seconds": clock.seconds / clock.steps,
        "peak_gib": get_peak_gib(device),
        "held_gib": held,  # before the model was built: a part of the peak
        "loss": loss,
        "steps": clock.steps,
    }


def main() -> None:
    name = sys.argv[1]
    disable_progress_bars()
    for line in sys.stdin:
        request = json.loads(line)
        device = torch.device(request.pop("device"))
        setting = Setting(device, request.pop("shape"), request.pop("small"))
        result: Run = {}
        with record_errors(result):
            result |= train(name, setting, **request)
        reset_peak(device)
        print(f"{RESULT}{json.dumps(result)}", flush=True)


if __name__ == "__main__":
    main()
