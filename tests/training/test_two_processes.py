"""Two processes (gloo) compared with one: losses, weights, evaluation, token counts, resuming."""

import json
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from accelerate import PartialState
from support.model_kinds import EXPERTS_PACKED, build_llava, make
from support.processes import run_ranks
from support.trainers import make_trainer
from support.two_processes import CONVERSATIONS, HELD_OUT, PROCESSES, ROWS, STEPS

from sft_pipeline.config import SFTConfig, build_config_record
from sft_pipeline.model.freezing import freeze_unreached
from sft_pipeline.model.loss_forward import patch_loss_forward

REFERENCE = ("padded", 8, 1, 0)
# collator, rows per micro-batch, accumulation, tokens per micro-batch
ONE_PROCESS = {
    "packed 8 x 1": ("packed", 8, 1, 0),
    "packed 2 x 4": ("packed", 2, 4, 0),
    "a budget of 48 tokens": ("packed", 4, 2, 48),
    "padded 1 x 8": ("padded", 1, 8, 0),
}
TWO_PROCESSES = {
    "padded 2 x 2": ("padded", 2, 2, 0),
    "packed 4 x 1": ("packed", 4, 1, 0),
    "packed 2 x 2": ("packed", 2, 2, 0),
    "a budget of 48 tokens": ("packed", 2, 2, 48),
}
RESUMED, RESUMED_AT = "packed 2 x 2", 5  # within the second epoch
# With parameters that no row reaches, and with experts that few tokens of a process reach.
KINDS = {"a vision tower": build_llava, "experts": EXPERTS_PACKED["Mixtral"]}
SAVING = {"save_strategy": "steps", "save_steps": RESUMED_AT}


def build(folder: Path, run: tuple[str, int, int, int], **arguments):
    collator, size, accumulation, tokens_per_batch = run
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    options = {"max_steps": STEPS, "max_grad_norm": 1.0, "per_device_eval_batch_size": 2}
    arguments = {"rows": ROWS, "held_out": HELD_OUT, **arguments}
    return make_trainer(folder, collator, tokens_per_batch=tokens_per_batch, **options, **sizes, **arguments)


def build_kind(folder: Path, kind: str, processes: int = 1, **arguments):
    """As in SFTTrainer, DDP does not search for unused parameters: one without a gradient is an error."""
    model = make(KINDS[kind])
    patch_loss_forward(model)
    freeze_unreached(model)
    run = ("packed", 4 // processes, 2, 0)
    return build(folder / kind, run, model=model, ddp_find_unused_parameters=False, **arguments)


def train_and_report(trainer, checkpoint: str | None = None) -> dict:
    """Train, and return what the tests compare."""
    trainer.args.ddp_find_unused_parameters = (
        False  # as in SFTTrainer: a trained parameter without gradient is an error
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": [entry["loss"] for entry in logged],
        "norms": [entry["grad_norm"] for entry in logged],
        "eval_loss": trainer.evaluate()["eval_loss"],
        "tokens": trainer.accelerator.reduce(torch.tensor(trainer._num_tokens)).item(),
        "steps": trainer.state.global_step,
        "weights": {name: p.detach().flatten().tolist() for name, p in trainer.model.named_parameters()},
    }


def run_worker(process: int, folder: str) -> None:
    """Run all trainings in turn in one of two processes; process 0 writes the reports."""
    out, ddp = Path(folder), {"ddp_backend": "gloo"}
    reports = {name: train_and_report(build(out / name, run, **SAVING, **ddp)) for name, run in TWO_PROCESSES.items()}
    resumed = build(out / "resumed", TWO_PROCESSES[RESUMED], **ddp)
    reports["conversations"] = train_and_report(build(out, TWO_PROCESSES["packed 4 x 1"], **CONVERSATIONS, **ddp))
    reports["resumed"] = train_and_report(resumed, str(out / RESUMED / f"checkpoint-{RESUMED_AT}"))
    for kind in KINDS:
        reports[kind] = train_and_report(build_kind(out, kind, processes=PROCESSES, **ddp))
    if process == 0:  # as the first process of a run does before it trains
        build_config_record(SFTConfig.from_training_arguments(resumed.args))
    assert resumed.args.world_size == PartialState().num_processes == PROCESSES
    if process == 0:
        (out / "reports.json").write_text(json.dumps(reports))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> dict[str, dict]:
    """Reports of two processes, by run."""
    folder = tmp_path_factory.mktemp("two")
    run_ranks(run_worker, PROCESSES, str(folder))
    return json.loads((folder / "reports.json").read_text())


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> dict:
    """Report of one process, padded, eight rows per micro-batch."""
    return train_and_report(build(tmp_path_factory.mktemp("one"), REFERENCE))


def assert_same(report: dict, expected: dict) -> None:
    assert report["steps"] == expected["steps"] == STEPS
    for key in ("losses", "norms"):
        assert report[key] == pytest.approx(expected[key][-len(report[key]) :], rel=1e-5)
    assert report["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    for name, weights in expected["weights"].items():
        torch.testing.assert_close(torch.tensor(report["weights"][name]), torch.tensor(weights), rtol=0, atol=1e-5)


def test_ten_steps_lower_the_loss(one_process):
    """Otherwise equal weights would prove little."""
    assert len(one_process["losses"]) == STEPS and one_process["losses"][-1] < one_process["losses"][0] - 0.1
    assert len(set(one_process["losses"])) == STEPS


@pytest.mark.parametrize("name", TWO_PROCESSES)
def test_two_processes_train_like_one(name, two_processes, one_process):
    assert_same(two_processes[name], one_process)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_models_whose_parameters_are_not_all_reached(kind, two_processes, tmp_path):
    expected = train_and_report(build_kind(tmp_path, kind))
    assert_same(two_processes[kind], expected)


@pytest.mark.parametrize("name", ONE_PROCESS)
def test_packing_and_accumulation_do_not_change_training(name, one_process, tmp_path):
    assert_same(train_and_report(build(tmp_path, ONE_PROCESS[name])), one_process)


def test_two_processes_train_conversations_of_several_sequences_like_one(two_processes, tmp_path):
    """Their trees against the padded sequences of one process; the held-out loss counts each sequence once."""
    expected = train_and_report(build(tmp_path, REFERENCE, **CONVERSATIONS))
    assert_same(two_processes["conversations"], expected)


def test_tokens_of_all_processes_are_counted(two_processes, one_process):
    """An empty micro-batch counts two tokens; there is one in each of three complete epochs."""
    assert two_processes["packed 4 x 1"]["tokens"] == one_process["tokens"] + 6


@pytest.mark.parametrize("where", ["one process", "two processes"])
def test_a_run_resumed_within_an_epoch_continues_with_the_same_rows(where, two_processes, one_process, tmp_path):
    if where == "two processes":
        report = two_processes["resumed"]
    else:
        train_and_report(build(tmp_path, REFERENCE, **SAVING))
        report = train_and_report(build(tmp_path / "resumed", REFERENCE), str(tmp_path / f"checkpoint-{RESUMED_AT}"))
    assert_same(report, one_process)
