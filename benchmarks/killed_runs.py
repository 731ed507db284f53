"""The runs that kills.py starts and kills: a small model, and trainers, each started as its users start it.

Every start is a fork of a process that has imported all modules and done nothing else (no threads, no tensors), so
that it takes a tenth of a second instead of six. SIGKILL ends a forked process as it ends any other.
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
from report import SYSTEM_PROMPT
from task import Task, encode_task
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from sft_pipeline.cli import main as run_cli
from sft_pipeline.model.loading import load_tokenizer, resolve_model
from sft_pipeline.training.sft_trainer import SFTTrainer
from sft_pipeline.utils.constants import IGNORED
from sft_pipeline.utils.files import get_cache_dir

BATCH_SIZE, STEPS_PER_EPOCH = 4, 10
# Bytes that a run writes into its pipe: a checkpoint or the final model is being saved, or has been.
CHECKPOINT_BEGIN, CHECKPOINT_END, MODEL_BEGIN, MODEL_END = b"S", b"s", b"E", b"e"


@dataclass(frozen=True)
class Plan:
    """Length of a run, how often it saves, and the shape of its model; the same for both trainers."""

    steps: int
    save_steps: int
    layers: int = 4
    width: int = 128
    vocabulary: int = 1000

    def build_settings(self) -> dict[str, Any]:
        """Return the TrainingArguments of both trainers."""
        return {
            "max_steps": self.steps,
            "save_strategy": "steps",
            "save_steps": self.save_steps,
            "save_total_limit": 2,
            "per_device_train_batch_size": BATCH_SIZE,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }

    def build_record(self) -> dict[str, Any]:
        """Return the plan as it is kept in OUTPUT.json."""
        return asdict(self) | {"rows a step": BATCH_SIZE, "steps an epoch": STEPS_PER_EPOCH}


def write_task_files(plan: Plan, model: str, data: str, folder: Path) -> None:
    """Write what every run starts from: the shortest rows, a small random model of the given model's family with a
    small vocabulary, and the encoded rows."""
    rows = json.loads(Path(data).read_text(encoding="utf-8"))
    rows = sorted(rows, key=lambda row: len(str(row)))[: STEPS_PER_EPOCH * BATCH_SIZE]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    path = resolve_model(model, get_cache_dir())
    tokenizer = load_tokenizer(path).train_new_from_iterator([str(rows)], plan.vocabulary, show_progress=False)
    config = AutoConfig.from_pretrained(path, vocab_size=len(tokenizer), num_hidden_layers=plan.layers)
    config.hidden_size, config.intermediate_size, config.head_dim = plan.width, 2 * plan.width, plan.width // 4
    config.num_attention_heads, config.num_key_value_heads, config.layer_types = 4, 2, None
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    encode_task(str(folder / "model"), str(folder / "rows.json"), len(rows)).write(folder / "task.json")


def train_ours(plan: Plan, task: Path, output: Path, **more_keys: Any) -> None:
    """Run `sft-pipeline train`, the same command after every kill; each run has its own cache of encoded rows."""
    os.environ["SFT_PIPELINE_CACHE"] = str(output.with_suffix(".cache"))
    keys = {"model_name_or_path": task / "model", "train_data": task / "rows.json", "template": "role", "num_proc": 1}
    keys |= {"system_prompt": SYSTEM_PROMPT, "output_dir": output, "resume_from_checkpoint": "auto"}
    keys |= plan.build_settings() | more_keys
    run_cli(["train", *(f"--{key}={value}" for key, value in keys.items())])


def train_sharded(plan: Plan, task: Path, output: Path) -> None:
    """Run `sft-pipeline train` in two processes that shard the model with FSDP2, and write its checkpoints together."""
    config = json.dumps({"state_dict_type": "SHARDED_STATE_DICT"})
    train_ours(plan, task, output, fsdp="true", fsdp_config=config, per_device_train_batch_size=BATCH_SIZE // 2)


def train_plain(plan: Plan, task: Path, output: Path) -> None:
    """Run transformers.Trainer as its examples do, on the same rows."""
    encoded = Task.read(task / "task.json")
    rows = [
        {"input_ids": ids, "labels": [IGNORED, *labels[:-1]]}
        for ids, labels in zip(encoded.rows["input_ids"], encoded.rows["labels"])
    ]
    tokenizer = AutoTokenizer.from_pretrained(encoded.model)
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(encoded.model),
        args=TrainingArguments(output_dir=str(output), **plan.build_settings()),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(output) if output.is_dir() else None)
    trainer.save_model()


@dataclass(frozen=True)
class Kind:
    """A way to train that is tried."""

    title: str
    trainer: type[Trainer]
    train: Callable[[Plan, Path, Path], None]
    num_processes: int = 1


TRAINERS = {
    "ours": Kind("sft_pipeline", SFTTrainer, train_ours),
    "sharded": Kind("sft_pipeline, two processes (FSDP2)", SFTTrainer, train_sharded, 2),
    "plain": Kind("transformers.Trainer", Trainer, train_plain),
}


def run_training(name: str, plan: Plan, task: Path, output: Path, marks: int, rank: int = 0, port: int = 0) -> None:
    """Train in a forked process: its output goes to OUTPUT.log, progress of the first process to the pipe `marks`.

    rank, port: of this process among those of the run, as torchrun sets them.
    """
    log = os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    kind = TRAINERS[name]
    if kind.num_processes > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": kind.num_processes, "MASTER_PORT": port}
        ranks["LOCAL_WORLD_SIZE"] = kind.num_processes
        os.environ |= {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"}
    patch_trainer(kind.trainer, output.with_suffix(".rows"), marks if rank == 0 else os.open(os.devnull, os.O_WRONLY))
    kind.train(plan, task, output)


def list_modules_of_a_run(name: str, plan: Plan, task: Path, output: Path) -> list[str]:
    """Train once, in one process, and return the modules that are then imported."""
    pipe, marks = os.pipe()
    run_training("plain" if name == "plain" else "ours", plan, task, output, marks)
    os.close(pipe)
    return sorted(sys.modules)


def import_modules(names: list[str]) -> None:
    """Import what can be imported by name. Exits if that leaves more than one thread, since it could not be forked."""
    for name in names:
        with warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")
            importlib.import_module(name)
    threads = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    if threads.count("jemalloc_bg_thd") + 1 < len(threads):  # Arrow's allocator has one, and handles forks
        sys.exit(f"{threads} are the threads after the imports: a forked run would not be like a new one")


def patch_trainer(trainer_class: type[Trainer], rows: Path, marks: int) -> None:
    """Mark begin and end of every save in the pipe; append `step sha256-of-its-tokens` to `rows` for every step."""
    save_checkpoint, save_model = trainer_class._save_checkpoint, trainer_class.save_model
    training_step = trainer_class.training_step

    def save_marked_checkpoint(self: Trainer, *args: Any, **kwargs: Any) -> None:
        os.write(marks, CHECKPOINT_BEGIN)
        save_checkpoint(self, *args, **kwargs)
        os.write(marks, CHECKPOINT_END)

    def save_marked_model(self: Trainer, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        is_last = output_dir is None  # else of a checkpoint
        if is_last:
            os.write(marks, MODEL_BEGIN)
        save_model(self, output_dir, *args, **kwargs)
        if is_last:
            os.write(marks, MODEL_END)

    def run_recorded_step(self: Trainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        digest = hashlib.sha256(inputs["input_ids"].numpy().tobytes()).hexdigest()
        with rows.open("a", encoding="utf-8") as file:
            file.write(f"{self.state.global_step} {digest}\n")
        return training_step(self, model, inputs, *args, **kwargs)

    patched: Any = trainer_class
    patched._save_checkpoint, patched.save_model = save_marked_checkpoint, save_marked_model
    patched.training_step = run_recorded_step
