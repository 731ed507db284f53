"""Two real processes (gloo) that divide a model by FSDP2, against one: losses, weights, checkpoints.

With what makes a step cheap: rows packed, their common start once, the head in chunks, layers fused.
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file
from support.processes import run_ranks
from support.trainers import VOCABULARY, make_model, make_trainer
from support.two_processes import HELD_OUT, PROCESSES, ROWS, STEPS
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from sft_pipeline.kernels.cpu_layer_training import use_fused_layers
from sft_pipeline.model import linear_cross_entropy
from sft_pipeline.model.lora import add_lora
from sft_pipeline.training.fsdp import FULL, SHARDED, _check, detect_state_dict_type, gather_weights
from sft_pipeline.utils.errors import SFTError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft
AT = 5  # the step of the checkpoint that is gone on from, within the second epoch
ONE, TWO = (8, 1), (2, 2)  # rows a micro-batch, accumulation
CHUNK_BYTES = 4 * 3 * VOCABULARY  # the head at three positions at a time


def build(folder: Path, kind: str | None, tied: bool = True, adapters: bool = False, **arguments):
    """A trainer of eight rows a step, packed, the layers fused; `kind` is the state_dict_type of FSDP."""
    size, accumulation = ONE if kind is None else TWO
    model = make_model(tie_word_embeddings=tied)
    if adapters:
        torch.manual_seed(1)
        model = add_lora(model, 4, 8, ["all-linear"])
    assert use_fused_layers(model) == (0 if adapters else 2)
    if kind:
        arguments = {"ddp_backend": "gloo", "fsdp": True, "fsdp_config": {"state_dict_type": kind}} | arguments
    plan = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": AT, "max_grad_norm": 1.0}
    plan["logging_steps"] = 2  # a mean over the step before and the one after the checkpoint
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


def work(process: int, folder: str) -> None:
    """One of the two processes: all runs in turn; the first writes what it found."""
    linear_cross_entropy.CHUNK_BYTES = CHUNK_BYTES
    out, found = Path(folder), {}
    for kind in (FULL, SHARDED):
        trainer = build(out / kind, kind)
        found[kind] = report(trainer)
        prefixes = [int(batch["row_lengths"][0]) for batch in trainer.get_train_dataloader()]
        assert prefixes.count(2) >= len(prefixes) / 2, "what rows share is computed once"
        assert isinstance(trainer.model, FSDPModule)
        assert isinstance(trainer.model.model.layers[0].self_attn.q_proj.weight, DTensor)
        assert detect_state_dict_type(out / kind / f"checkpoint-{AT}") == kind
        trainer.save_model()
        found[f"{kind} resumed"] = report(build(out / "resumed", kind), str(out / kind / f"checkpoint-{AT}"))
    found["untied"] = report(build(out / "untied", SHARDED, tied=False, save_strategy="no"))
    trainer = build(out / "adapters", SHARDED, adapters=True, max_steps=AT)
    found["adapters"] = report(trainer)
    trainer.save_model()
    with pytest.raises(SFTError) as refused:
        report(build(out / "other", FULL), str(out / SHARDED / f"checkpoint-{AT}"))
    found["other"] = str(refused.value)
    with pytest.raises(SFTError) as refused:
        build(out / "other", FULL, fsdp_config={"cpu_offload": True})
    found["offload"] = str(refused.value)
    if process == 0:
        (out / "found.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where two processes have left their runs and what they found."""
    folder = tmp_path_factory.mktemp("two")
    run_ranks(work, PROCESSES, str(folder))
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


@pytest.fixture(scope="module")
def found(folder) -> dict:
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("name", [FULL, SHARDED, f"{FULL} resumed", f"{SHARDED} resumed"])
def test_two_processes_that_divide_the_model_are_one(name, found, one):
    assert_same(found[name], one)


def test_so_are_they_without_tied_embeddings(found, tmp_path):
    assert_same(found["untied"], report(build(tmp_path, None, tied=False, save_strategy="no")))


@pytest.mark.parametrize("kind", [FULL, SHARDED])
def test_one_process_goes_on_from_a_checkpoint_of_two(kind, folder, one, tmp_path, monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_BYTES", CHUNK_BYTES)
    assert_same(report(build(tmp_path, None), str(folder / kind / f"checkpoint-{AT}")), one)


@pytest.mark.parametrize("kind", [FULL, SHARDED])
def test_the_finished_model_is_saved_whole(kind, folder, found):
    model = AutoModelForCausalLM.from_pretrained(folder / kind)
    assert (
        model.config.architectures == ["LlamaForCausalLM"] and model.lm_head.weight is model.model.embed_tokens.weight
    )
    for name, weight in model.named_parameters():
        assert weight.flatten().tolist() == found[kind]["weights"][name]


def test_so_are_they_with_adapters_which_are_saved_whole(folder, found, tmp_path):
    trainer = build(tmp_path, None, adapters=True, max_steps=AT)
    assert_same(found["adapters"], report(trainer))
    trainer.save_model()
    saved, expected = (load_file(place / "adapter_model.safetensors") for place in (folder / "adapters", tmp_path))
    assert saved.keys() == expected.keys() and saved
    for name, weight in expected.items():
        torch.testing.assert_close(saved[name], weight, rtol=0, atol=1e-5)


def test_a_checkpoint_that_this_run_cannot_read_is_refused(folder, found, tmp_path):
    place = folder / SHARDED / f"checkpoint-{AT}"
    said = f"{place}: has state_dict_type {SHARDED} and this run has {FULL}; use the one it was saved with"
    assert found["other"] == said
    place = folder / "adapters" / f"checkpoint-{AT}"
    with pytest.raises(
        SFTError, match=f"^{place}: adapters saved with fsdp go on with it alone; start more processes$"
    ):
        build(tmp_path, None, adapters=True).train(resume_from_checkpoint=str(place))


def test_cpus_have_nowhere_to_offload_to(found):
    said = "fsdp_config: cpu_offload moves weights from an accelerator to the CPU, and this run is on CPUs"
    assert found["offload"] == said


def test_weights_that_zero3_divided_are_gathered_for_a_moment(monkeypatch):
    """The package is not there; what is asked of it is."""
    gathered, model = [], torch.nn.Linear(2, 2)
    with gather_weights(model):
        assert not gathered
    zero = SimpleNamespace(GatheredParameters=lambda weights: gathered.append(weights) or nullcontext())
    monkeypatch.setitem(sys.modules, "deepspeed.zero", zero)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero))
    monkeypatch.setattr("sft_pipeline.training.fsdp.is_deepspeed_zero3_enabled", lambda: True)
    with gather_weights(model):
        assert [id(weight) for weight in gathered[0]] == [id(weight) for weight in model.parameters()]


@pytest.fixture
def one_process(monkeypatch) -> None:
    """accelerate leaves a mark in the environment."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")


def test_one_process_has_nobody_to_divide_with(one_process, tmp_path):
    with pytest.raises(
        SFTError, match="^fsdp divides a model among processes and this is one: start more, or leave fsdp out$"
    ):
        make_trainer(tmp_path, fsdp=True)


@pytest.mark.parametrize(
    ("plugin", "said"),
    [
        ({"fsdp_version": 1}, "fsdp_config: version 1 is not served; set version to 2"),
        ({"cpu_ram_efficient_loading": True}, "fsdp_config: cpu_ram_efficient_loading leaves all processes but one .*"),
    ],
)
def test_what_is_not_served_is_refused(plugin, said):
    plugin = {"fsdp_version": 2, "cpu_ram_efficient_loading": False} | plugin
    with pytest.raises(SFTError, match=f"^{said}$"):
        _check(SimpleNamespace(**plugin))
