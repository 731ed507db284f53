"""The input that benchmarked trainers share: a model folder, rows encoded once, and this project's trainer on them."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from report import ROOT, SYSTEM_PROMPT
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainerCallback,
)

from sft_pipeline.config import parse_config
from sft_pipeline.data.chat_templates import build_template
from sft_pipeline.data.encode import Encoder, encode_dataset
from sft_pipeline.data.messages import Conversation, Message
from sft_pipeline.data.packing import pack_rows
from sft_pipeline.data.sources import load_conversations
from sft_pipeline.model.loading import load_tokenizer, resolve_model
from sft_pipeline.training.memory import GIB, measure_peak_rss
from sft_pipeline.training.sft_trainer import SFTTrainer
from sft_pipeline.utils.files import get_cache_dir

MAX_LENGTH = 1024
AGENT_TEMPLATE = ROOT / "configs" / "templates" / "agent.jinja"


@dataclass(frozen=True)
class Task:
    """Rows of `input_ids` and shifted `labels`, their counts, and the folder of the model to train on them."""

    model: str
    rows: dict[str, list[list[int]]]
    stats: dict[str, Any]

    @property
    def tokens(self) -> int:
        """Tokens of the rows, without padding; a shared prefix counts in every row."""
        return self.stats["tokens"]

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> Task:
        return cls(**json.loads(file.read_text(encoding="utf-8")))


def encode_task(model: str, data: str, rows: int) -> Task:
    """Encode the first `rows` rows of `data` with the role template and the reference's system prompt."""
    datasets.disable_progress_bars()
    path = resolve_model(model, get_cache_dir())
    encoder = Encoder(build_template("role", load_tokenizer(path)), SYSTEM_PROMPT, MAX_LENGTH)
    encoded, stats = encode_dataset(load_conversations(data)[:rows], encoder)
    return Task(path, encoded[:], asdict(stats))


def encode_conversations(model: str, data: str, count: int, turns: int) -> Task:
    """Encode conversations of `build_conversations`, each answer with its reasoning under the prompt it would get."""
    datasets.disable_progress_bars()
    path = resolve_model(model, get_cache_dir())
    tokenizer = load_tokenizer(path)
    conversations = build_conversations(load_conversations(data), tokenizer, count, turns)
    encoder = Encoder(build_template("chat", tokenizer, str(AGENT_TEMPLATE)), max_length=4 * MAX_LENGTH)
    encoded, stats = encode_dataset(conversations, encoder)
    return Task(path, encoded[:], asdict(stats) | {"collate_ms": time_collator(encoded.to_list())})


def time_collator(rows: list[dict[str, Any]]) -> float:
    """Return the milliseconds that packing all rows into one batch takes, the median of 15."""
    seconds = []
    for _ in range(15):
        start = time.perf_counter()
        pack_rows(rows)
        seconds.append(time.perf_counter() - start)
    return round(1e3 * statistics.median(seconds), 2)


def build_conversations(
    rows: list[Conversation], tokenizer: PreTrainedTokenizerBase, count: int, turns: int
) -> list[Conversation]:
    """Build `count` conversations of `turns` exchanges from single exchanges, in order.

    Question, reasoning and answer are cut to 100 tokens each. The reasoning is the answer of another exchange, as real
    reasoning would be a text about as long that the chat template leaves out of later prompts.
    """

    def cut(text: str) -> str:
        return str(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:100])).strip()

    texts = [[cut(message["content"]) for message in row["messages"][-2:]] for row in rows]
    conversations: list[Conversation] = []
    for number in range(count):
        messages: list[Message] = []
        for turn in range(number * turns, (number + 1) * turns):
            question, answer = texts[turn % len(texts)]
            reasoning = texts[(turn + len(texts) // 2) % len(texts)][1]
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer, "reasoning_content": reasoning})
        conversations.append({"messages": messages})
    return conversations


def save_random_qwen3(tokenizer: str, layers: int, folder: Path) -> None:
    """Save a model folder of Qwen3-0.6B's shape with random weights and `layers` of its 28 layers."""
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def build_task_trainer(task: Task, folder: str, batch_size: int, **options: Any) -> SFTTrainer:
    """Build the trainer as `train` does, with the settings that all trainers share; rows stay in file order."""
    keys = {
        "model_name_or_path": task.model,
        "train_data": "encoded already",
        "template": "role",
        "output_dir": folder,
        "per_device_train_batch_size": batch_size,
        "optim": "adamw_torch_fused",
        **get_shared_settings(),
        **options,
    }
    args = parse_config(None, [f"--{key}={value}" for key, value in keys.items()])
    return SFTTrainer(args=args, train_dataset=datasets.Dataset.from_dict(task.rows))


def get_shared_settings(use_cpu: bool = True) -> dict[str, Any]:
    """Return the TrainingArguments of every compared Trainer: plain AdamW, no clipping, no shuffling, no files."""
    return {
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "max_grad_norm": 0.0,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "logging_strategy": "no",
        "logging_first_step": False,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": use_cpu,
        "disable_tqdm": True,
    }


class StepTimer(TrainerCallback):
    """Record when training began and when each optimizer step ended, by `time.perf_counter`."""

    def __init__(self) -> None:
        self.start_time = 0.0
        self.end_times: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start_time = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.end_times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Seconds of all steps, from the first batch on."""
        return self.end_times[-1] - self.start_time


def record_losses(trainer: Trainer) -> list[float]:
    """Return a list that training fills with each step's unrounded loss."""
    losses: list[float] = []
    training_step = trainer.training_step

    def run_recorded_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = training_step(*args, **kwargs)
        losses.append(loss.item())
        return loss

    trainer.training_step = run_recorded_step  # type: ignore[method-assign]  # of this trainer object alone
    return losses


def get_peak_memory_gib() -> float:
    """Return this process's peak resident memory in GiB."""
    return measure_peak_rss() / GIB
