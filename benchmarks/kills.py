"""Kill runs with SIGKILL again and again, restart each with the same command, and check what they end with.

    python benchmarks/kills.py smollm2-135m alpaca_en_demo.json --kills 60 --output docs/kills    # again: adds to it

Needs no extra beyond the package itself. Half of the kills come at a moment drawn from the length of a whole run, a
quarter while a checkpoint is written, a quarter while the final model is saved. The same command is then started again
(killed_runs.py): `ours` is `train` with --resume_from_checkpoint auto, `sharded` the same in two processes that shard
the model, of which one is killed and the other is stopped as torchrun would stop it, `plain` is transformers.Trainer
with the checkpoint that `get_last_checkpoint` returns. Where a start fails, the newest checkpoint is deleted, as a
person would have to, and counted. The result of a run is compared bit by bit with that of a run that was never killed:
the last checkpoint (weights, optimizer, other state), the tokens of every step that any start trained, and the final
model.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# Before torch is imported: a process must have a single thread to be forked.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

from report import ROOT, Table, find_free_port, write_results

sys.path.insert(0, str(ROOT))

from killed_runs import (
    CHECKPOINT_BEGIN,
    CHECKPOINT_END,
    MODEL_BEGIN,
    MODEL_END,
    TRAINERS,
    Plan,
    import_modules,
    list_modules_of_a_run,
    run_training,
    write_task_files,
)

from sft_pipeline.commands.verify_resume import compare_checkpoints
from sft_pipeline.utils.files import hash_file

FORK = multiprocessing.get_context("fork")
TARGETS = {"anywhere": 2, "checkpoint": 1, "end": 1}  # when to kill, by weight
# Kinds of differences, as OUTPUT.json names them, and their titles in the table.
DIFFERENCES = {
    "weights": "different weights",
    "optimizer": "different optimizer state",
    "rows": "different rows trained",
    "other state": "other state different",
    "saved model": "a different final model",
    "a step too many": "an extra step trained",
    "last checkpoint gone": "the last checkpoint missing",
}
KINDS_OF_FILES = {"model.safetensors": "weights", "pytorch_model_fsdp": "weights", "optimizer": "optimizer"}
GRACE_SECONDS = 10.0  # that the other processes of a run have after SIGTERM; torchrun gives them 30
NOTE = """
Checkpoints deleted by hand: a kill within a save left the newest checkpoint incomplete, and the run does not start
until somebody deletes it.

Extra step trained: a plain Trainer that resumes from the checkpoint of its last step, because it was killed between
that checkpoint and the end, trains one more step and saves a checkpoint of it (`Trainer._run_epoch` of transformers
5.23 tests after a step whether `max_steps` is reached, not before). Under the linear schedule of these runs the
learning rate is 0 by then: the weights stay the same, the optimizer's averages do not. Under a constant schedule the
weights change too (tried with four starts: four different models). Each further kill at the end adds a step, and the
second extra checkpoint replaces that of the last step (`save_total_limit` is 2): last checkpoint missing.

Two processes: one of them, drawn at random, is killed, and the other stopped as torchrun would stop it. Both write
their shards of every checkpoint.

Weights, optimizer and other state are compared in the checkpoint of the last step, where it exists; the saved model
is compared in every run.
"""


@dataclass
class RunCounts:
    """What happened to the runs of one trainer; the fields are the keys of OUTPUT.json."""

    runs: int = 0
    kills: int = 0
    kills_within_a_checkpoint: int = 0
    kills_within_the_last_save: int = 0
    runs_without_a_hand: int = 0  # that finished without a checkpoint deleted by hand
    hands: int = 0  # checkpoints deleted by hand
    differing: dict[str, int] = field(default_factory=dict)  # runs, by kind of difference
    differences: list[str] = field(default_factory=list)


class TrainingProcesses:
    """The processes of a run that trains in `output`, and the marks of its saves that it has written."""

    def __init__(self, name: str, plan: Plan, task: Path, output: Path) -> None:
        read_end, marks = os.pipe()
        self.pipe: int | None = read_end  # None once all processes have ended
        port = find_free_port()
        arguments = (name, plan, task, output, marks)
        ranks = range(TRAINERS[name].num_processes)
        self.processes: list[BaseProcess] = [
            FORK.Process(target=run_training, args=(*arguments, rank, port)) for rank in ranks
        ]
        for process in self.processes:
            process.start()
        os.close(marks)
        self.marks: list[tuple[bytes, float]] = []  # with their time, by time.monotonic

    def read_mark(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for a mark or the end of a process; return False once all have ended."""
        if self.pipe is None:
            return False
        running = [process.sentinel for process in self.processes if process.exitcode is None]
        if self.pipe not in connection.wait([self.pipe, *running], max(0.0, timeout)):
            self._stop_after_a_failure()
            return True
        mark = os.read(self.pipe, 1)
        if not mark:
            os.close(self.pipe)
            self.pipe = None
            return False
        self.marks.append((mark, time.monotonic()))
        return True

    def _stop_after_a_failure(self) -> None:
        """Stop all processes once one has failed, as torchrun does."""
        if any(process.exitcode for process in self.processes):
            for process in self.processes:
                process.terminate()
            for process in self.processes:
                process.join(GRACE_SECONDS)
                process.kill()

    def wait_for_mark(self, mark: bytes, count: int) -> bool:
        """Wait until the mark has come `count` times; return False if the run ended earlier."""
        while sum(name == mark for name, _ in self.marks) < count:
            if not self.read_mark(60.0):
                return False
        return True

    def kill_after(self, seconds: float, rank: int) -> bool:
        """Send SIGKILL to one process after some seconds; return False if the run ended earlier."""
        end_time = time.monotonic() + seconds
        while (remaining := end_time - time.monotonic()) > 0 and self.read_mark(remaining):
            pass
        self.processes[rank].kill()
        self.wait_for_exit()
        return bool(self.processes[rank].exitcode)

    def wait_for_exit(self) -> bool:
        """Wait for the end of all processes; return whether they succeeded."""
        while self.read_mark(60.0):
            pass
        for process in self.processes:
            process.join()
        return not any(process.exitcode for process in self.processes)

    def get_last_mark(self) -> bytes:
        """Return the last mark: CHECKPOINT_BEGIN or MODEL_BEGIN if the process died within a save."""
        return self.marks[-1][0] if self.marks else b""

    def compute_median_seconds(self, begin_mark: bytes, end_mark: bytes) -> float:
        """Return the median seconds between two marks."""
        begins, ends = ([moment for mark, moment in self.marks if mark == wanted] for wanted in (begin_mark, end_mark))
        return statistics.median(end - begin for begin, end in zip(begins, ends))


@dataclass
class Experiment:
    """The runs of one trainer in `folder`."""

    name: str
    plan: Plan
    folder: Path
    counts: RunCounts
    durations: dict[str, float] = field(default_factory=dict)  # seconds, by target

    def run_reference(self) -> None:
        """Train the run that is never killed, and measure how long it and its saves take once all is imported."""
        short_plan = replace(self.plan, steps=self.plan.save_steps)
        arguments = (self.name, short_plan, self.folder.parent, self.folder / "first")
        import_modules(call_in_fork(lambda: list_modules_of_a_run(*arguments)))
        start_time, run = time.monotonic(), self.start_run(self.folder / "whole")
        if not run.wait_for_exit():
            sys.exit((self.folder / "whole.log").read_text(encoding="utf-8")[-3000:])
        self.durations = {"anywhere": time.monotonic() - start_time}
        self.durations["checkpoint"] = run.compute_median_seconds(CHECKPOINT_BEGIN, CHECKPOINT_END)
        self.durations["end"] = run.compute_median_seconds(MODEL_BEGIN, MODEL_END)

    def start_run(self, output: Path) -> TrainingProcesses:
        return TrainingProcesses(self.name, self.plan, self.folder.parent, output)

    def run_with_kills(self, kills: int, seed: str) -> None:
        """Train one run from its first start to its end with so many kills, and compare the result."""
        rng, output = random.Random(seed), self.folder / f"run_{self.counts.runs}"
        deletions = 0
        while True:
            run = self.start_run(output)
            if kills and self.kill_run(run, rng):
                kills -= 1
                continue
            if run.wait_for_exit():
                break
            deletions += 1
            delete_newest_checkpoint(output)
        self.counts.runs += 1
        self.counts.hands += deletions
        self.counts.runs_without_a_hand += not deletions
        self.compare_with_reference(output)

    def kill_run(self, run: TrainingProcesses, rng: random.Random) -> bool:
        """Kill a process of the run at a random moment; return False if the run ended earlier."""
        [target] = rng.choices(list(TARGETS), list(TARGETS.values()))
        seconds = rng.uniform(0, self.durations[target] * (1 if target == "anywhere" else 1.2))
        count = rng.randint(1, 3)
        mark, count = (CHECKPOINT_BEGIN, count) if target == "checkpoint" else (MODEL_BEGIN, 1)
        if target != "anywhere" and not run.wait_for_mark(mark, count):
            return False
        if not run.kill_after(seconds, rng.randrange(len(run.processes))):
            return False
        self.counts.kills += 1
        self.counts.kills_within_a_checkpoint += run.get_last_mark() == CHECKPOINT_BEGIN
        self.counts.kills_within_the_last_save += run.get_last_mark() == MODEL_BEGIN
        return True

    def compare_with_reference(self, output: Path) -> None:
        """Count the differences from the run that was never killed, in a fork: this process must hold no tensors."""
        differences = call_in_fork(lambda: find_differences(self.folder / "whole", output, self.plan.steps))
        kinds = Counter(self.counts.differing)
        kinds.update({difference.split(": ")[0] for difference in differences})
        self.counts.differing = dict(kinds)
        self.counts.differences += [f"{output.name}: {difference}" for difference in differences[:5]]
        shutil.rmtree(output)


def call_in_fork(function: Callable[[], Any]) -> Any:
    """Call the function in a forked process and return its result."""
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=lambda: sender.send(function()))
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    return result


def find_differences(reference: Path, output: Path, steps: int) -> list[str]:
    """Return what differs between two runs, as `kind: name`."""
    last, model = f"checkpoint-{steps}", "model.safetensors"
    expected, rows = (set(folder.with_suffix(".rows").read_text().split("\n")) for folder in (reference, output))
    differences = ["saved model: bytes"] if hash_file(reference / model) != hash_file(output / model) else []
    for line in sorted(rows ^ expected):
        step = int(line.split()[0])
        differences.append(f"{'a step too many' if step >= steps else 'rows'}: step {step}")
    if not (output / last).is_dir():
        present = sorted(path.name for path in output.glob("checkpoint-*"))
        return [*differences, f"last checkpoint gone: {', '.join(present)} are there"]
    for folder in (reference / last, output / last):  # the library's pickle of its arguments, which is not compared
        (folder / "training_args.bin").unlink(missing_ok=True)
    # torch writes an id that it draws, and the folder, into the .metadata of a sharded checkpoint.
    names = [name for name in compare_checkpoints(reference / last, output / last)[1] if not name.endswith(".metadata")]
    return differences + [f"{find_kind(name)}: {name}" for name in names]


def find_kind(name: str) -> str:
    """Return the kind of a difference in a checkpoint, by the file or folder that its name begins with."""
    part = name.split(": ")[0].split("/")[0]
    return next((kind for start, kind in KINDS_OF_FILES.items() if part.startswith(start)), "other state")


def delete_newest_checkpoint(output: Path) -> None:
    """Do what a person does with a run that does not start again: delete its newest checkpoint, or all of it."""
    checkpoints = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    if not output.exists():
        sys.exit(f"it does not start:\n{output.with_suffix('.log').read_text(encoding='utf-8')[-3000:]}")
    shutil.rmtree(checkpoints[-1] if checkpoints else output)


def build_table(counts: dict[str, RunCounts]) -> Table:
    """Build the table with a column per trainer."""
    lines: dict[str, list[int]] = {
        "runs": [entry.runs for entry in counts.values()],
        "kills": [entry.kills for entry in counts.values()],
        "kills within a checkpoint save": [entry.kills_within_a_checkpoint for entry in counts.values()],
        "kills within the final save": [entry.kills_within_the_last_save for entry in counts.values()],
        "runs finished unattended": [entry.runs_without_a_hand for entry in counts.values()],
        "checkpoints deleted by hand": [entry.hands for entry in counts.values()],
    }
    for kind, title in DIFFERENCES.items():
        lines[f"runs with {title}"] = [entry.differing.get(kind, 0) for entry in counts.values()]
    rows = [[title, *map(str, numbers)] for title, numbers in lines.items()]
    return Table(["", *(TRAINERS[name].title for name in counts)], rows)


def read_counts(output: Path | None, plan: Plan) -> dict[str, RunCounts]:
    """Return the counts that OUTPUT.json holds, if it is there; exits if they are of another plan."""
    file = output and output.with_suffix(".json")
    if file is None or not file.is_file():
        return {name: RunCounts() for name in TRAINERS}
    record = json.loads(file.read_text(encoding="utf-8"))
    if record["plan"] != plan.build_record():
        sys.exit(f"{file} has the counts of another plan; delete it, or give another --output")
    return {name: RunCounts(**record["trainers"].get(name, {})) for name in TRAINERS}


def write_counts(output: Path, plan: Plan, counts: dict[str, RunCounts]) -> None:
    """Write OUTPUT.json and OUTPUT.md."""
    record = {"plan": plan.build_record(), "trainers": {name: asdict(entry) for name, entry in counts.items()}}
    write_results(output, record, build_table(counts).format_markdown() + NOTE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder or smollm2-135m: family and tokenizer of the small model")
    parser.add_argument("data", help="a JSON file of instruction rows, such as alpaca_en_demo.json")
    parser.add_argument("--trainers", nargs="+", choices=list(TRAINERS), default=list(TRAINERS))
    parser.add_argument("--kills", type=int, default=60, help="kills of each trainer (60)")
    parser.add_argument("--minutes", type=float, default=60.0, help="for all trainers: no run starts after that (60)")
    parser.add_argument("--kills_a_run", type=int, default=10, help="maximum kills of a run (10)")
    parser.add_argument("--steps", type=int, default=16, help="steps of a run (16)")
    parser.add_argument("--save_steps", type=int, default=2, help="steps between checkpoints (2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments (0)")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md, or add to them")
    args = parser.parse_args()
    plan = Plan(args.steps, args.save_steps)
    counts = read_counts(args.output, plan)
    with tempfile.TemporaryDirectory() as folder:
        call_in_fork(lambda: write_task_files(plan, args.model, str(Path(args.data).resolve()), Path(folder)))
        for name in args.trainers:
            experiment = Experiment(name, plan, Path(folder) / name, counts[name])
            experiment.folder.mkdir()
            experiment.run_reference()
            durations = {target: round(seconds, 3) for target, seconds in experiment.durations.items()}
            print(name, durations, flush=True)
            max_kills = experiment.counts.kills + args.kills
            end_time = time.monotonic() + 60 * args.minutes / len(args.trainers)
            while experiment.counts.kills < max_kills and time.monotonic() < end_time:
                kills = min(args.kills_a_run, max_kills - experiment.counts.kills)
                experiment.run_with_kills(kills, f"{args.seed} {name} {experiment.counts.runs}")
                print(name, json.dumps(asdict(experiment.counts)), flush=True)
                if args.output:
                    write_counts(args.output, plan, counts)
    build_table(counts).print()


if __name__ == "__main__":
    main()
