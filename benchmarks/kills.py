"""Runs that are killed (SIGKILL) over and over and started again by nobody's hand: do they end, and as they should?

    python benchmarks/kills.py smollm2-135m alpaca_en_demo.json --kills 50 --output docs/kills
    python benchmarks/kills.py smollm2-135m alpaca_en_demo.json --kills 50 --trainer plain

Half of the kills come at a moment drawn from the length of a whole run, half while a checkpoint is being written, a
millisecond to a second after that began. The same command is then started again: ours is `train` with
--resume_from_checkpoint auto, plain is transformers.Trainer with the checkpoint that `get_last_checkpoint` finds. A
start that fails needs a hand: the newest checkpoint is deleted. What a run leaves as its last checkpoint is compared
bit by bit with that of a run that was never killed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from report import ROOT, SYSTEM, Table, write

BATCH = 4
ENDED, KILLED = "ended", "killed"


@dataclass(frozen=True)
class Plan:
    """What is trained, by which trainer, and how often it is saved."""

    trainer: str
    model: str
    data: str
    steps: int
    save_steps: int

    def start(self, folder: Path) -> subprocess.Popen:
        """The command that is given first and after every kill alike."""
        words = ["-m", "sft_pipeline", "train", *self._keys(folder)]
        if self.trainer == "plain":
            words = [str(ROOT / "benchmarks" / "kills.py"), json.dumps([self.__dict__, str(folder)])]
        with (folder.parent / f"{folder.name}.log").open("a") as log:
            environment = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
            return subprocess.Popen([sys.executable, *words], stdout=log, stderr=log, env=environment)

    def _keys(self, folder: Path) -> list[str]:
        keys = {"model_name_or_path": self.model, "train_data": self.data, "template": "role", "system_prompt": SYSTEM}
        keys |= {"output_dir": str(folder), "resume_from_checkpoint": "auto", **self.settings()}
        return [f"--{key}={value}" for key, value in keys.items()]

    def settings(self) -> dict[str, Any]:
        """TrainingArguments of both trainers."""
        return {
            "max_steps": self.steps,
            "save_strategy": "steps",
            "save_steps": self.save_steps,
            "save_total_limit": 2,
            "per_device_train_batch_size": BATCH,
            "learning_rate": 1e-5,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }

    def saving(self, folder: Path) -> bool:
        """Whether a checkpoint is being written: ours has a place for that, the plain one's has no last file yet."""
        if self.trainer == "ours":
            return any(folder.glob(".saving/checkpoint-*"))
        return any(not (place / "trainer_state.json").exists() for place in folder.glob("checkpoint-*"))


@dataclass
class Account:
    """What became of the runs."""

    runs: int = 0
    kills: int = 0
    kills_while_saving: int = 0
    without_a_hand: int = 0
    hands: int = 0
    differing_runs: int = 0
    differences: list[str] = field(default_factory=list)


def attack(plan: Plan, run: subprocess.Popen, folder: Path, seconds: float, saving: bool) -> str:
    """Kill the run at a random moment; it may have ended before."""
    if saving:
        while run.poll() is None and not plan.saving(folder):
            time.sleep(0.001)
        time.sleep(10 ** random.uniform(-3, 0))
    else:
        end = time.monotonic() + random.uniform(0, seconds)
        while run.poll() is None and time.monotonic() < end:
            time.sleep(0.001)
    run.kill()
    return KILLED if run.wait() < 0 else ENDED


def one_run(plan: Plan, folder: Path, seconds: float, kills: int, account: Account) -> None:
    """From the first start to the end, with so many kills on the way, fewer where it ends before."""
    account.runs += 1
    killed = hands = 0
    while True:
        run = plan.start(folder)
        saving = killed % 2 == 1
        if killed < kills and attack(plan, run, folder, seconds, saving) == KILLED:
            killed += 1
            account.kills += 1
            account.kills_while_saving += saving and plan.saving(folder)
            continue
        if run.wait() == 0:
            break
        hands += 1
        delete_newest(folder)
    account.hands += hands
    account.without_a_hand += not hands


def delete_newest(folder: Path) -> None:
    """What a person does with a run that does not start again."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda place: int(place.name.split("-")[1]))
    if not checkpoints:
        sys.exit(f"{folder} has no checkpoint and does not start: see its log beside it\n{folder}.log")
    shutil.rmtree(checkpoints[-1])


def all_runs(plan: Plan, folder: Path, kills: int, kills_a_run: int) -> Account:
    from sft_pipeline.verify_resume import compare

    started, account = time.monotonic(), Account()
    last = f"checkpoint-{plan.steps}"
    if plan.start(folder / "whole").wait():
        sys.exit((folder / "whole.log").read_text()[-3000:])
    seconds = time.monotonic() - started
    while account.kills < kills:
        place = folder / f"run_{account.runs}"
        one_run(plan, place, seconds, min(kills_a_run, kills - account.kills), account)
        _, found = compare(folder / "whole" / last, place / last)
        account.differing_runs += bool(found)
        account.differences += [f"{place.name}: {name}" for name in found[:5]]
        shutil.rmtree(place)
        print(json.dumps(account.__dict__), flush=True)
    return account


def plain(keys: dict[str, Any], folder: str) -> None:
    """transformers.Trainer as its examples use it, on the rows that ours trains."""
    from task import prepare
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    from sft_pipeline.labels import IGNORED

    plan = Plan(**keys)
    task = prepare(plan.model, plan.data, plan.steps * BATCH)
    rows = [
        {"input_ids": ids, "labels": [IGNORED, *labels[:-1]]}
        for ids, labels in zip(task.rows["input_ids"], task.rows["labels"])
    ]
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(task.model),
        args=TrainingArguments(output_dir=folder, **plan.settings()),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder))


def table(trainer: str, account: Account) -> Table:
    header = ["", "runs", "kills", "while saving", "ended without a hand", "hands", "ended with other bits"]
    figures = [account.runs, account.kills, account.kills_while_saving]
    figures += [account.without_a_hand, account.hands, account.differing_runs]
    return Table(header, [[trainer, *map(str, figures)]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder or smollm2-135m")
    parser.add_argument("data", help="a JSON file of instruction rows, such as alpaca_en_demo.json")
    parser.add_argument("--trainer", choices=("ours", "plain"), default="ours")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--kills_a_run", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="of a run")
    parser.add_argument("--save_steps", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    args = parser.parse_args()
    random.seed(args.seed)
    sys.path.insert(0, str(ROOT))
    plan = Plan(args.trainer, args.model, str(Path(args.data).resolve()), args.steps, args.save_steps)
    with tempfile.TemporaryDirectory() as folder:
        account = all_runs(plan, Path(folder), args.kills, args.kills_a_run)
    made = table(args.trainer, account)
    made.show()
    if args.output:
        write(args.output, {"plan": plan.__dict__, "account": account.__dict__}, made.markdown())


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("["):
        plain(*json.loads(sys.argv[1]))
    else:
        main()
