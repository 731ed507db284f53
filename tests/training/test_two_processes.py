"""Two real processes (gloo) against one: losses, weights, evaluation, throughput, resuming."""

import json
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from accelerate import PartialState
from support.processes import run_ranks
from support.trainers import make_trainer
from support.two_processes import HELD_OUT, PROCESSES, ROWS, STEPS

from sft_pipeline.config import SFTArguments, build_config_record

REFERENCE = ("padded", 8, 1, 0)
BUDGET = ("packed", 1, 2, 48)
# collator, rows a micro-batch, accumulation, tokens a micro-batch
ONE_PROCESS = {
    "packed 8 x 1": ("packed", 8, 1, 0),
    "packed 2 x 4": ("packed", 2, 4, 0),
    "padded 1 x 8": ("padded", 1, 8, 0),
}
TWO_PROCESSES = {
    "padded 2 x 2": ("padded", 2, 2, 0),
    "packed 4 x 1": ("packed", 4, 1, 0),
    "packed 2 x 2": ("packed", 2, 2, 0),
}
RESUMED, RESUMED_AT = "packed 2 x 2", 5  # within the second epoch
SAVING = {"save_strategy": "steps", "save_steps": RESUMED_AT}


def build(folder: Path, run: tuple[str, int, int, int], **arguments):
    collator, size, accumulation, tokens = run
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    more = {"max_steps": STEPS, "max_grad_norm": 1.0, "held_out": HELD_OUT, "per_device_eval_batch_size": 2}
    return make_trainer(folder, collator, rows=ROWS, tokens_per_batch=tokens, **more, **sizes, **arguments)


def report(trainer, checkpoint: str | None = None) -> dict:
    """Ten steps, and what is compared of them."""
    trainer.train(resume_from_checkpoint=checkpoint)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": [entry["loss"] for entry in logged],
        "norms": [entry["grad_norm"] for entry in logged],
        "eval_loss": trainer.evaluate()["eval_loss"],
        "tokens": trainer.accelerator.reduce(torch.tensor(trainer._tokens)).item(),
        "steps": trainer.state.global_step,
        "weights": {name: p.detach().flatten().tolist() for name, p in trainer.model.named_parameters()},
    }


def work(process: int, folder: str) -> None:
    """One of the two processes: all runs in turn; the first writes what it found."""
    out, ddp = Path(folder), {"ddp_backend": "gloo"}
    found = {name: report(build(out / name, run, **SAVING, **ddp)) for name, run in TWO_PROCESSES.items()}
    resumed = build(out / "resumed", TWO_PROCESSES[RESUMED], **ddp)
    found["budget"] = report(build(out, (*BUDGET[:2], 1, BUDGET[3]), **ddp))
    found["resumed"] = report(resumed, str(out / RESUMED / f"checkpoint-{RESUMED_AT}"))
    if process == 0:  # as the first process of a run does before it trains
        build_config_record(SFTArguments("model", ["rows"]), resumed.args)
    assert resumed.args.world_size == PartialState().num_processes == PROCESSES
    if process == 0:
        (out / "found.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> dict[str, dict]:
    """What two processes found, by run."""
    folder = tmp_path_factory.mktemp("two")
    run_ranks(work, PROCESSES, str(folder))
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> dict:
    """One process, padded, eight rows at a time."""
    return report(build(tmp_path_factory.mktemp("one"), REFERENCE))


def assert_same(found: dict, expected: dict) -> None:
    assert found["steps"] == expected["steps"] == STEPS
    for key in ("losses", "norms"):
        assert found[key] == pytest.approx(expected[key][-len(found[key]) :], rel=1e-5)
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    for name, weights in expected["weights"].items():
        torch.testing.assert_close(torch.tensor(found["weights"][name]), torch.tensor(weights), rtol=0, atol=1e-5)


def test_ten_steps_teach_something(one):
    """Else equal weights would say little."""
    assert len(one["losses"]) == STEPS and one["losses"][-1] < one["losses"][0] - 0.1
    assert len(set(one["losses"])) == STEPS


@pytest.mark.parametrize("name", TWO_PROCESSES)
def test_two_processes_are_one(name, two, one):
    assert_same(two[name], one)


@pytest.mark.parametrize("name", ONE_PROCESS)
def test_packed_is_padded_and_accumulation_changes_nothing(name, one, tmp_path):
    assert_same(report(build(tmp_path, ONE_PROCESS[name])), one)


def test_two_processes_with_a_budget_are_one_with_twice_the_accumulation(two, tmp_path):
    expected = report(build(tmp_path, BUDGET))
    assert_same(two["budget"], expected)
    assert two["budget"]["tokens"] == pytest.approx(expected["tokens"], abs=STEPS)


def test_tokens_of_all_processes_are_counted(two, one):
    """An empty micro-batch, one in each of three epochs that ended, is one token."""
    assert two["packed 4 x 1"]["tokens"] == one["tokens"] + 3


@pytest.mark.parametrize("where", ["one process", "two processes"])
def test_a_run_resumed_within_an_epoch_sees_the_rows_it_would_have_seen(where, two, one, tmp_path):
    if where == "two processes":
        found = two["resumed"]
    else:
        report(build(tmp_path, REFERENCE, **SAVING))
        found = report(build(tmp_path / "resumed", REFERENCE), str(tmp_path / f"checkpoint-{RESUMED_AT}"))
    assert_same(found, one)
