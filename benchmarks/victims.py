"""What kills.py trains and kills: a small model, and the two trainers, each as its users start it.

Every start is a fork of a process that has imported all and done nothing else (no threads, no tensors), so that it
costs a tenth of a second instead of six. SIGKILL ends a forked process as it ends any other.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from report import SYSTEM
from task import Task, prepare
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from sft_pipeline.cli import main as sft_pipeline
from sft_pipeline.data.collate import IGNORED
from sft_pipeline.model.loading import load_tokenizer
from sft_pipeline.trainer import SupervisedTrainer

BATCH, EPOCH = 4, 16  # rows a step, steps an epoch
SAVING, SAVED, ENDING, ENDED = b"S", b"s", b"E", b"e"


@dataclass(frozen=True)
class Plan:
    """How long a run is and how often it saves; both trainers start from the same files in `folder`."""

    steps: int
    save_steps: int
    layers: int = 2
    width: int = 64

    def settings(self) -> dict[str, Any]:
        """TrainingArguments of both trainers."""
        return {
            "max_steps": self.steps,
            "save_strategy": "steps",
            "save_steps": self.save_steps,
            "save_total_limit": 2,
            "per_device_train_batch_size": BATCH,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }


def make_task(plan: Plan, model: str, data: str, folder: Path) -> None:
    """The files that every run starts from: a random model of the given one's family, a few rows, and their ids."""
    task = prepare(model, data, EPOCH * BATCH)
    config = AutoConfig.from_pretrained(task.model)
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = plan.layers, plan.width, 2 * plan.width
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, plan.width // 4
    config.layer_types = None
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    load_tokenizer(task.model).save_pretrained(folder / "model")
    rows = json.loads(Path(data).read_text(encoding="utf-8"))[: EPOCH * BATCH]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    Task(str(folder / "model"), task.rows, task.account).write(folder / "task.json")


def ours(plan: Plan, task: Path, output: Path) -> None:
    """`sft-pipeline train`, the same command after every kill; its cache of encoded rows is each run's own."""
    os.environ["SFT_PIPELINE_CACHE"] = str(output.with_suffix(".cache"))
    keys = {"model_name_or_path": task / "model", "train_data": task / "rows.json", "template": "role", "num_proc": 1}
    keys |= {"system_prompt": SYSTEM, "output_dir": output, "resume_from_checkpoint": "auto", **plan.settings()}
    sft_pipeline(["train", *(f"--{key}={value}" for key, value in keys.items())])


def plain(plan: Plan, task: Path, output: Path) -> None:
    """transformers.Trainer as its examples use it, on the rows that ours trains."""
    prepared = Task.read(task / "task.json")
    rows = [
        {"input_ids": ids, "labels": [IGNORED, *labels[:-1]]}
        for ids, labels in zip(prepared.rows["input_ids"], prepared.rows["labels"])
    ]
    tokenizer = AutoTokenizer.from_pretrained(prepared.model)
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(prepared.model),
        args=TrainingArguments(output_dir=str(output), **plan.settings()),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(output) if output.is_dir() else None)
    trainer.save_model()


STARTS: dict[str, tuple[type[Trainer], Callable[[Plan, Path, Path], None]]] = {
    "ours": (SupervisedTrainer, ours),
    "plain": (Trainer, plain),
}


def start(name: str, plan: Plan, task: Path, output: Path, marks: int) -> None:
    """The life of a forked process: its words go into a log, where it is into the pipe `marks`."""
    log = os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    trainer, run = STARTS[name]
    watch(trainer, output.with_suffix(".rows"), marks)
    run(plan, task, output)


def watch(trainer: type[Trainer], rows: Path, marks: int) -> None:
    """Mark the begin and end of every save, and note the tokens of every step as a line `step sha256`."""
    save_checkpoint, save_model, training_step = trainer._save_checkpoint, trainer.save_model, trainer.training_step

    def saving(self: Trainer, *args: Any, **kwargs: Any) -> None:
        os.write(marks, SAVING)
        save_checkpoint(self, *args, **kwargs)
        os.write(marks, SAVED)

    def ending(self: Trainer, *args: Any, **kwargs: Any) -> None:
        if args or kwargs:  # the model of a checkpoint
            save_model(self, *args, **kwargs)
            return
        os.write(marks, ENDING)
        save_model(self)
        os.write(marks, ENDED)

    def step(self: Trainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        found = hashlib.sha256(inputs["input_ids"].numpy().tobytes()).hexdigest()
        with rows.open("a", encoding="utf-8") as file:
            file.write(f"{self.state.global_step} {found}\n")
        return training_step(self, model, inputs, *args, **kwargs)

    trainer._save_checkpoint, trainer.save_model, trainer.training_step = saving, ending, step


def plan_record(plan: Plan) -> dict[str, Any]:
    return asdict(plan) | {"rows a step": BATCH, "steps an epoch": EPOCH}
