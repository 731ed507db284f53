"""Runs that are killed (SIGKILL) over and over and started again by nobody's hand: do they end, and as they should?

    python benchmarks/kills.py smollm2-135m alpaca_en_demo.json --kills 60 --output docs/kills    # again: adds to it

Half of the kills come at a moment drawn from the length of a whole run, a quarter while a checkpoint is being written,
a quarter while the model is being saved at the end. The same command is then started again (victims.py): ours is
`train` with --resume_from_checkpoint auto, plain is transformers.Trainer with the checkpoint that
`get_last_checkpoint` finds.
A start that fails needs a hand: the newest checkpoint is deleted. What a run leaves is compared bit by bit with what a
run left that was never killed: the last checkpoint (weights, optimizer, all else), the tokens of every step that was
trained by any start, and the model that was saved at the end.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import select
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# Before torch is imported: a process that is forked has to have one thread.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

from report import ROOT, Table, write

sys.path.insert(0, str(ROOT))

from victims import (
    ENDED,
    ENDING,
    SAVED,
    SAVING,
    STARTS,
    Plan,
    import_all,
    make_task,
    modules_of_a_run,
    plan_record,
    start,
)

from sft_pipeline.commands.verify_resume import compare_checkpoints
from sft_pipeline.utils.files import hash_file

FORK = multiprocessing.get_context("fork")
AIMS = {"anywhere": 2, "checkpoint": 1, "end": 1}  # by weight
# Of differences; the first ones begin with "other" in the table.
OTHER = ("weights", "optimizer", "rows", "other state", "saved model")
KINDS = (*OTHER, "a step too many", "last checkpoint gone")
FILES = {"model.safetensors": "weights", "optimizer.pt": "optimizer"}
NOTE = """
Hands: the newest checkpoint was cut off within its save, and the run does not start until somebody deletes it.

A step too many: a plain Trainer that goes on from the checkpoint of its last step, because it was killed between that
and the end, trains one more step and saves a checkpoint of it (`Trainer._run_epoch` of transformers 5.23 asks after a
step whether `max_steps` is reached, not before). Under the linear schedule of these runs the learning rate is 0 by
then: the weights are the same, the optimizer's averages are not. Under a constant schedule the weights are others too
(tried with four starts: four different models). Each further kill at the end adds a step, and the second one's
checkpoint displaces that of the last step (`save_total_limit` is 2): last checkpoint gone.

Weights, optimizer and other state are compared in the checkpoint of the last step, where it is there; the saved model
is compared in every run.
"""


@dataclass
class Account:
    """What became of the runs of one trainer."""

    runs: int = 0
    kills: int = 0
    kills_within_a_checkpoint: int = 0
    kills_within_the_last_save: int = 0
    runs_without_a_hand: int = 0
    hands: int = 0
    differing: dict[str, int] = field(default_factory=dict)  # runs, by what differs
    differences: list[str] = field(default_factory=list)


class Start:
    """A process that trains in `output`, and what it has said of where it is."""

    def __init__(self, name: str, plan: Plan, task: Path, output: Path) -> None:
        self.pipe, marks = os.pipe()
        self.process: BaseProcess = FORK.Process(target=start, args=(name, plan, task, output, marks))
        self.process.start()
        os.close(marks)
        self.marks: list[tuple[bytes, float]] = []  # and when, by time.monotonic

    def read(self, seconds: float) -> bool:
        """Wait so long for a mark; False once the process has ended."""
        if not select.select([self.pipe], [], [], max(0.0, seconds))[0]:
            return True
        mark = os.read(self.pipe, 1)
        self.marks.append((mark, time.monotonic()))
        return bool(mark)

    def wait(self, mark: bytes, count: int) -> bool:
        """Until the mark has come so often; False if the process ended before."""
        while sum(one == mark for one, _ in self.marks) < count:
            if not self.read(60.0):
                return False
        return True

    def kill(self, seconds: float) -> bool:
        """SIGKILL after so many seconds; False if the process ended before."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and self.read(left):
            pass
        self.process.kill()
        while self.read(60.0):
            pass
        return self.ended() < 0

    def ended(self) -> int:
        """The exit status."""
        while self.read(60.0):
            pass
        os.close(self.pipe)
        self.process.join()
        return int(self.process.exitcode or 0)

    def within(self) -> bytes:
        """The last mark: SAVING or ENDING where the process died within a save."""
        return next((mark for mark, _ in reversed(self.marks) if mark), b"")

    def lasted(self, first: bytes, last: bytes) -> float:
        """Median seconds between two marks."""
        begun, done = ([at for mark, at in self.marks if mark == wanted] for wanted in (first, last))
        return statistics.median(b - a for a, b in zip(begun, done))


@dataclass
class Harness:
    """One trainer's runs in `folder`."""

    name: str
    plan: Plan
    folder: Path
    account: Account
    lasts: dict[str, float] = field(default_factory=dict)  # seconds, by aim

    def whole(self) -> None:
        """The run that is never killed, and how long it and its saves take, once all is imported."""
        first = (self.name, replace(self.plan, steps=self.plan.save_steps), self.folder.parent, self.folder / "first")
        import_all(in_a_fork(lambda: modules_of_a_run(*first)))
        began, run = time.monotonic(), self.start(self.folder / "whole")
        if run.ended():
            sys.exit((self.folder / "whole.log").read_text(encoding="utf-8")[-3000:])
        self.lasts = {"anywhere": time.monotonic() - began}
        self.lasts |= {"checkpoint": run.lasted(SAVING, SAVED), "end": run.lasted(ENDING, ENDED)}

    def start(self, output: Path) -> Start:
        return Start(self.name, self.plan, self.folder.parent, output)

    def one_run(self, kills: int, seed: str) -> None:
        """From the first start to the end, with so many kills on the way; then the comparison."""
        chance, output = random.Random(seed), self.folder / f"run_{self.account.runs}"
        hands = 0
        while True:
            run = self.start(output)
            if kills and self.attack(run, chance):
                kills -= 1
                continue
            if run.process.exitcode is None:
                run.ended()
            if run.process.exitcode == 0:
                break
            hands += 1
            lend_a_hand(output)
        self.account.runs += 1
        self.account.hands += hands
        self.account.runs_without_a_hand += not hands
        self.compare(output)

    def attack(self, run: Start, chance: random.Random) -> bool:
        """Kill the run at a random moment; False if it ended before."""
        [aim] = chance.choices(list(AIMS), list(AIMS.values()))
        seconds, count = chance.uniform(0, self.lasts[aim] * (1 if aim == "anywhere" else 1.2)), chance.randint(1, 3)
        if aim != "anywhere" and not run.wait(*((SAVING, count) if aim == "checkpoint" else (ENDING, 1))):
            run.ended()
            return False
        if not run.kill(seconds):
            return False
        self.account.kills += 1
        self.account.kills_within_a_checkpoint += run.within() == SAVING
        self.account.kills_within_the_last_save += run.within() == ENDING
        return True

    def compare(self, output: Path) -> None:
        """In a process of its own: this one stays without tensors."""
        found = in_a_fork(lambda: differences(self.folder / "whole", output, self.plan.steps))
        kinds = Counter(self.account.differing)
        kinds.update({name.split(": ")[0] for name in found})
        self.account.differing = dict(kinds)
        self.account.differences += [f"{output.name}: {name}" for name in found[:5]]
        shutil.rmtree(output)


def in_a_fork(work: Callable[[], Any]) -> Any:
    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=lambda: theirs.send(work()))
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    return found


def differences(whole: Path, other: Path, steps: int) -> list[str]:
    """What differs, as `kind: name`."""
    last, model = f"checkpoint-{steps}", "model.safetensors"
    expected, rows = (set(folder.with_suffix(".rows").read_text().split("\n")) for folder in (whole, other))
    found = ["saved model: bytes"] if hash_file(whole / model) != hash_file(other / model) else []
    for line in sorted(rows ^ expected):
        step = int(line.split()[0])
        found.append(f"{'a step too many' if step >= steps else 'rows'}: step {step}")
    if not (other / last).is_dir():
        left = sorted(place.name for place in other.glob("checkpoint-*"))
        return [*found, f"last checkpoint gone: {', '.join(left)} are there"]
    for folder in (whole / last, other / last):  # the library's pickle of its arguments, which is not read here
        (folder / "training_args.bin").unlink(missing_ok=True)
    names = compare_checkpoints(whole / last, other / last)[1]
    return found + [f"{FILES.get(name.split(': ')[0], 'other state')}: {name}" for name in names]


def lend_a_hand(output: Path) -> None:
    """What a person does with a run that does not start again: without the newest checkpoint, or from the beginning."""
    checkpoints = sorted(output.glob("checkpoint-*"), key=lambda place: int(place.name.split("-")[1]))
    if not output.exists():
        sys.exit(f"it does not start:\n{output.with_suffix('.log').read_text(encoding='utf-8')[-3000:]}")
    shutil.rmtree(checkpoints[-1] if checkpoints else output)


def table(accounts: dict[str, Account]) -> Table:
    header = ["", "runs", "kills", "within a checkpoint", "within the last save", "ended without a hand", "hands"]
    header += [f"other {kind.removeprefix('other ')}" if kind in OTHER else kind for kind in KINDS]
    rows = []
    for name, one in accounts.items():
        figures = [one.runs, one.kills, one.kills_within_a_checkpoint, one.kills_within_the_last_save]
        figures += [one.runs_without_a_hand, one.hands]
        figures += [one.differing.get(kind, 0) for kind in KINDS]
        rows.append([{"ours": "sft_pipeline", "plain": "transformers.Trainer"}[name], *map(str, figures)])
    return Table(header, rows)


def read_accounts(output: Path | None, plan: Plan) -> dict[str, Account]:
    """What was found before, if that was of the same plan."""
    file = output and output.with_suffix(".json")
    if file is None or not file.is_file():
        return {name: Account() for name in STARTS}
    record = json.loads(file.read_text(encoding="utf-8"))
    if record["plan"] != plan_record(plan):
        sys.exit(f"{file} is of another plan; delete it, or give another --output")
    return {name: Account(**record["trainers"][name]) for name in STARTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder or smollm2-135m: the family and the tokenizer of the small model")
    parser.add_argument("data", help="a JSON file of instruction rows, such as alpaca_en_demo.json")
    parser.add_argument("--trainers", nargs="+", choices=list(STARTS), default=list(STARTS))
    parser.add_argument("--kills", type=int, default=60, help="of each trainer (60)")
    parser.add_argument("--minutes", type=float, default=60.0, help="for all trainers: no run begins after that")
    parser.add_argument("--kills_a_run", type=int, default=10)
    parser.add_argument("--steps", type=int, default=16, help="of a run")
    parser.add_argument("--save_steps", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md, or add to them")
    args = parser.parse_args()
    plan = Plan(args.steps, args.save_steps)
    accounts = read_accounts(args.output, plan)
    with tempfile.TemporaryDirectory() as folder:
        in_a_fork(lambda: make_task(plan, args.model, str(Path(args.data).resolve()), Path(folder)))
        for name in args.trainers:
            harness = Harness(name, plan, Path(folder) / name, accounts[name])
            harness.folder.mkdir()
            harness.whole()
            print(name, {aim: round(seconds, 3) for aim, seconds in harness.lasts.items()}, flush=True)
            most = harness.account.kills + args.kills
            end = time.monotonic() + 60 * args.minutes / len(args.trainers)
            while harness.account.kills < most and time.monotonic() < end:
                left = min(args.kills_a_run, most - harness.account.kills)
                harness.one_run(left, f"{args.seed} {name} {harness.account.runs}")
                print(name, json.dumps(asdict(harness.account)), flush=True)
                if args.output:
                    found = {name: asdict(account) for name, account in accounts.items()}
                    markdown = table(accounts).markdown() + NOTE
                    write(args.output, {"plan": plan_record(plan), "trainers": found}, markdown)
    table(accounts).show()


if __name__ == "__main__":
    main()
