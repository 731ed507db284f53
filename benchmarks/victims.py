"""What kills.py trains and kills: a small model, and the two trainers, each as its users start it.

Every start is a fork of a process that has imported all and done nothing else (no threads, no tensors), so that it
costs a tenth of a second instead of six. SIGKILL ends a forked process as it ends any other.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import sys
import warnings
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
from sft_pipeline.data.padding import IGNORED
from sft_pipeline.model.loading import load_tokenizer, resolve_model
from sft_pipeline.training.trainer import SupervisedTrainer
from sft_pipeline.utils.files import get_cache_dir

BATCH, EPOCH = 4, 10  # rows a step, steps an epoch
SAVING, SAVED, ENDING, ENDED = b"S", b"s", b"E", b"e"


@dataclass(frozen=True)
class Plan:
    """How long a run is and how often it saves; both trainers start from the same files in `folder`."""

    steps: int
    save_steps: int
    layers: int = 4
    width: int = 128
    vocabulary: int = 1000

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
    """The files that every run starts from: the shortest rows, a small random model of the given one's family with a
    tokenizer of few words, and the rows' ids."""
    rows = sorted(json.loads(Path(data).read_text(encoding="utf-8")), key=lambda row: len(str(row)))[: EPOCH * BATCH]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    path = resolve_model(model, get_cache_dir())
    tokenizer = load_tokenizer(path).train_new_from_iterator([str(rows)], plan.vocabulary, show_progress=False)
    config = AutoConfig.from_pretrained(path, vocab_size=len(tokenizer), num_hidden_layers=plan.layers)
    config.hidden_size, config.intermediate_size, config.head_dim = plan.width, 2 * plan.width, plan.width // 4
    config.num_attention_heads, config.num_key_value_heads, config.layer_types = 4, 2, None
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    prepare(str(folder / "model"), str(folder / "rows.json"), len(rows)).write(folder / "task.json")


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


def modules_of_a_run(name: str, plan: Plan, task: Path, output: Path) -> list[str]:
    """What a run imports on its way, so that later ones find it imported."""
    pipe, marks = os.pipe()
    start(name, plan, task, output, marks)
    os.close(pipe)
    return sorted(sys.modules)


def import_all(names: list[str]) -> None:
    """As far as they can be imported by name. Raises SystemExit where that leaves more than one thread to fork."""
    for name in names:
        with warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")
            importlib.import_module(name)
    tasks = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    if tasks.count("jemalloc_bg_thd") + 1 < len(tasks):  # Arrow's allocator has one, and knows of forks
        sys.exit(f"{tasks} are the threads after the imports: a fork of them would not be a start like another")


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

    hooked: Any = trainer
    hooked._save_checkpoint, hooked.save_model, hooked.training_step = saving, ending, step


def plan_record(plan: Plan) -> dict[str, Any]:
    return asdict(plan) | {"rows a step": BATCH, "steps an epoch": EPOCH}
