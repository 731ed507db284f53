"""Two real processes (gloo) that divide a model by FSDP2, against one: losses, weights, checkpoints and what one makes of them."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from test_processes import HELD_OUT, PROCESSES, ROWS, STEPS
from test_trainer import make_model, make_trainer
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from sft_pipeline.model.fused_training import use_fused_layers
from sft_pipeline.sharded import FULL, SHARDED, saved_as

AT = 5  # the step of the checkpoint that is gone on from, within the second epoch
ONE, TWO = (8, 1), (1, 4)  # rows a micro-batch, accumulation


def build(folder: Path, kind: str | None, tied: bool = True, **arguments):
    """A trainer of eight rows a step, packed, the layers fused; `kind` is the state_dict_type of FSDP."""
    size, accumulation = ONE if kind is None else TWO
    model = make_model(tie_word_embeddings=tied)
    assert use_fused_layers(model) == 2
    if kind:
        arguments |= {"ddp_backend": "gloo", "fsdp": True, "fsdp_config": {"state_dict_type": kind}}
    plan = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": AT, "max_grad_norm": 1.0}
    adam = {"optim": "adamw_torch", "learning_rate": 1e-2, "adam_epsilon": 1e-4}
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    more = {"per_device_eval_batch_size": 2, "held_out": HELD_OUT, **plan, **adam, **sizes, **arguments}
    return make_trainer(folder, "packed", rows=ROWS, model=model, **more)


def report(trainer, checkpoint: str | None = None) -> dict:
    """What is compared of the steps up to the last."""
    trainer.train(resume_from_checkpoint=checkpoint)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in trainer.model.named_parameters()}
    return {
        "losses": [entry["loss"] for entry in logged],
        "norms": [entry["grad_norm"] for entry in logged],
        "eval_loss": trainer.evaluate()["eval_loss"],
        "weights": {name: weight.detach().flatten().tolist() for name, weight in weights.items()},
    }


def work(process: int, port: int, folder: str) -> None:
    """One of the two processes: all runs in turn; the first writes what it found."""
    place = {"RANK": process, "LOCAL_RANK": process, "WORLD_SIZE": PROCESSES, "MASTER_PORT": port}
    place |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": 1}
    os.environ.update({key: str(value) for key, value in place.items()})
    out, found = Path(folder), {}
    for kind in (FULL, SHARDED):
        trainer = build(out / kind, kind)
        found[kind] = report(trainer)
        assert isinstance(trainer.model, FSDPModule)
        assert isinstance(trainer.model.model.layers[0].self_attn.q_proj.weight, DTensor)
        assert saved_as(out / kind / f"checkpoint-{AT}") == kind
        trainer.save_model()
        found[f"{kind} resumed"] = report(build(out / "resumed", kind), str(out / kind / f"checkpoint-{AT}"))
    found["untied"] = report(build(out / "untied", FULL, tied=False, save_strategy="no"))
    if process == 0:
        (out / "found.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where two processes have left their runs and what they found."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, args=(port, str(folder)), nprocs=PROCESSES)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> dict:
    """One process that divides nothing, eight rows at a time."""
    return report(build(tmp_path_factory.mktemp("one"), None))


def assert_same(found: dict, expected: dict) -> None:
    for key in ("losses", "norms"):
        assert found[key] == pytest.approx(expected[key][-len(found[key]) :], rel=1e-5)
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    for name, weights in expected["weights"].items():
        torch.testing.assert_close(torch.tensor(found["weights"][name]), torch.tensor(weights), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [FULL, SHARDED, f"{FULL} resumed", f"{SHARDED} resumed"])
def test_two_processes_that_divide_the_model_are_one(name, folder, one):
    assert_same(json.loads((folder / "found.json").read_text())[name], one)
