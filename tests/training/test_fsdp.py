"""Two processes (gloo) that shard a model with FSDP2, compared with one: losses, weights, checkpoints.

With every optimization on: packed rows, shared prefix computed once, the head in chunks, fused layers.
"""

import json
import sys
import warnings
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
from support.wrong_kernels import use_wrong_attention, use_wrong_head
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainerCallback

from sft_pipeline.arguments import SFTArguments
from sft_pipeline.kernels.cpu_layer_training import use_fused_layers
from sft_pipeline.model import linear_cross_entropy
from sft_pipeline.model.lora import add_adapters
from sft_pipeline.model.peft_config import build_peft_config
from sft_pipeline.training.fsdp import FULL, SHARDED, _check_plugin, detect_state_dict_type, gather_weights
from sft_pipeline.utils.errors import SFTError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft
CHECKPOINT_STEP = 5  # resumed from there, within the second epoch
ONE_PROCESS_SIZES, TWO_PROCESS_SIZES = (8, 1), (2, 2)  # rows per micro-batch, accumulation
CHUNK_BYTES = 4 * 3 * VOCABULARY  # three positions of the head per chunk


class ShardedGradients(TrainerCallback):
    """Between the micro-batches of a step, each process holds its shards of the gradients only."""

    def on_substep_end(self, args, state, control, model, **kwargs):
        assert all(isinstance(weight.grad, DTensor) for weight in model.parameters() if weight.requires_grad)


def build(folder: Path, state_dict_type: str | None, tied: bool = True, adapters: bool = False, **arguments):
    """Return a trainer of eight packed rows per step with fused layers. state_dict_type: None for no FSDP."""
    size, accumulation = ONE_PROCESS_SIZES if state_dict_type is None else TWO_PROCESS_SIZES
    model = make_model(tie_word_embeddings=tied)
    if adapters:
        torch.manual_seed(1)
        model = add_adapters(model, build_peft_config(SFTArguments(lora_rank=4, lora_alpha=8)))
    assert use_fused_layers(model) == (0 if adapters else 2)
    if state_dict_type:
        fsdp = {"fsdp": True, "fsdp_config": {"state_dict_type": state_dict_type}}
        arguments = {"ddp_backend": "gloo", "callbacks": [ShardedGradients()], **fsdp, **arguments}
    steps = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": CHECKPOINT_STEP, "max_grad_norm": 1.0}
    steps["logging_steps"] = 2  # one logged mean spans the checkpoint
    adam = {"optim": "adamw_torch", "learning_rate": 1e-2, "adam_epsilon": 1e-4}
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    options = {"per_device_eval_batch_size": 2, "held_out": HELD_OUT, **steps, **adam, **sizes, **arguments}
    return make_trainer(folder, "packed", rows=ROWS, model=model, **options)


def train_and_report(trainer, checkpoint: str | None = None) -> dict:
    """Train, and return what the tests compare."""
    trainer.train(resume_from_checkpoint=checkpoint)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in trainer.model.named_parameters()}
    return {
        "losses": [entry["loss"] for entry in logged],
        "norms": [entry["grad_norm"] for entry in logged],
        "eval_loss": trainer.evaluate()["eval_loss"],
        "weights": {name: weight.detach().flatten().tolist() for name, weight in weights.items()},
    }


def run_worker(process: int, folder: str, plain: str, plain_adapters: str) -> None:
    """Run all trainings in turn in one of two processes; process 0 writes the reports.

    plain, plain_adapters: checkpoints of one process without FSDP.
    """
    warnings.filterwarnings("error", ".*returned a view tensor")  # which FSDP2 could lose track of
    linear_cross_entropy.CHUNK_BYTES = CHUNK_BYTES
    out, reports = Path(folder), {}
    for state_dict_type in (FULL, SHARDED):
        trainer = build(out / state_dict_type, state_dict_type)
        reports[state_dict_type] = train_and_report(trainer)
        batches = list(trainer.get_train_dataloader())
        shared = [int(batch["token_counts"].sum()) - batch["input_ids"].numel() for batch in batches]
        assert sum(tokens > 0 for tokens in shared) >= len(shared) / 2, "the shared prefix is computed once"
        assert isinstance(trainer.model, FSDPModule)
        assert isinstance(trainer.model.model.layers[0].self_attn.q_proj.weight, DTensor)
        checkpoint = out / state_dict_type / f"checkpoint-{CHECKPOINT_STEP}"
        assert detect_state_dict_type(checkpoint) == state_dict_type
        trainer.save_model()
        assert trainer.accelerator.state.fsdp_plugin.state_dict_type.name == state_dict_type, "unchanged by the save"
        resumed = build(out / "resumed", state_dict_type)
        reports[f"{state_dict_type} resumed"] = train_and_report(resumed, str(checkpoint))
    reports["untied"] = train_and_report(build(out / "untied", SHARDED, tied=False, save_strategy="no"))
    trainer = build(out / "adapters", SHARDED, adapters=True, max_steps=CHECKPOINT_STEP)
    reports["adapters"] = train_and_report(trainer)
    trainer.save_model()
    for state_dict_type, saved in ((FULL, SHARDED), (SHARDED, FULL)):
        other, checkpoint = out / f"from {saved}", out / saved / f"checkpoint-{CHECKPOINT_STEP}"
        resumed = build(other, state_dict_type)
        reports[f"{state_dict_type} from {saved}"] = train_and_report(resumed, str(checkpoint))
        assert resumed.accelerator.state.fsdp_plugin.state_dict_type.name == state_dict_type
        assert detect_state_dict_type(other / f"checkpoint-{STEPS}") == state_dict_type
    reports["plain resumed"] = train_and_report(build(out / "plain", SHARDED), plain)
    adapters = build(out / "plain adapters", FULL, adapters=True)
    reports["plain adapters resumed"] = train_and_report(adapters, plain_adapters)
    with pytest.raises(SFTError) as error_info:
        train_and_report(build(out / "plain", SHARDED, adapters=True), plain)
    reports["other weights"] = str(error_info.value)
    with pytest.raises(SFTError) as error_info:
        build(out / "other", FULL, fsdp_config={"cpu_offload": True})
    reports["offload"] = str(error_info.value)
    for adapters in (False, True):
        options = {"adapters": adapters, "bf16": True, "max_steps": 1, "logging_steps": 1, "save_strategy": "no"}
        name = f"16 bits, adapters: {adapters}"
        trainer = build(out / "bf16", SHARDED, **options)
        reports[name] = [trainer.train().training_loss]
        for use_wrong_kernel in (use_wrong_attention, use_wrong_head):
            with use_wrong_kernel():
                reports[name].append(read_training_error(out / "wrong", options))
    if process == 0:
        (out / "reports.json").write_text(json.dumps(reports))
    torch.distributed.destroy_process_group()


def read_training_error(folder: Path, options: dict) -> str:
    with pytest.raises(SFTError) as error_info:
        build(folder, SHARDED, **options).train()
    return str(error_info.value)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A checkpoint of one process without FSDP."""
    return tmp_path_factory.mktemp("one") / f"checkpoint-{CHECKPOINT_STEP}"


@pytest.fixture(scope="module")
def plain_adapters(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("adapters") / f"checkpoint-{CHECKPOINT_STEP}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, plain, one_process, plain_adapters, one_process_with_adapters) -> Path:
    """Folder of the runs of two processes and their reports."""
    folder = tmp_path_factory.mktemp("two")
    run_ranks(run_worker, PROCESSES, str(folder), str(plain), str(plain_adapters))
    return folder


@pytest.fixture(scope="module")
def one_process(plain) -> dict:
    """Report of one process without FSDP, eight rows per micro-batch."""
    return train_and_report(build(plain.parent, None))


@pytest.fixture(scope="module")
def one_process_with_adapters(plain_adapters) -> dict:
    return train_and_report(build(plain_adapters.parent, None, adapters=True))


def assert_same(report: dict, expected: dict) -> None:
    for key in ("losses", "norms"):
        assert report[key] == pytest.approx(expected[key][-len(report[key]) :], rel=1e-5)
    assert report["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    for name, weights in expected["weights"].items():
        torch.testing.assert_close(torch.tensor(report["weights"][name]), torch.tensor(weights), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def reports(folder) -> dict:
    return json.loads((folder / "reports.json").read_text())


RUNS = [FULL, SHARDED, f"{FULL} resumed", f"{SHARDED} resumed", f"{FULL} from {SHARDED}", f"{SHARDED} from {FULL}"]


@pytest.mark.parametrize("name", [*RUNS, "plain resumed"])
def test_two_processes_with_a_sharded_model_train_like_one(name, reports, one_process):
    assert_same(reports[name], one_process)


def test_two_processes_without_tied_embeddings_train_like_one(reports, tmp_path):
    assert_same(reports["untied"], train_and_report(build(tmp_path, None, tied=False, save_strategy="no")))


@pytest.mark.parametrize("state_dict_type", [FULL, SHARDED])
def test_one_process_resumes_from_a_checkpoint_of_two(state_dict_type, folder, one_process, tmp_path, monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_BYTES", CHUNK_BYTES)
    checkpoint = folder / state_dict_type / f"checkpoint-{CHECKPOINT_STEP}"
    assert_same(train_and_report(build(tmp_path, None), str(checkpoint)), one_process)


@pytest.mark.parametrize("state_dict_type", [FULL, SHARDED])
def test_the_final_model_is_saved_unsharded(state_dict_type, folder, reports):
    model = AutoModelForCausalLM.from_pretrained(folder / state_dict_type)
    assert (
        model.config.architectures == ["LlamaForCausalLM"] and model.lm_head.weight is model.model.embed_tokens.weight
    )
    for name, weight in model.named_parameters():
        assert weight.flatten().tolist() == reports[state_dict_type]["weights"][name]


def test_two_processes_with_adapters_train_like_one_and_save_them_unsharded(folder, reports, tmp_path):
    trainer = build(tmp_path, None, adapters=True, max_steps=CHECKPOINT_STEP)
    assert_same(reports["adapters"], train_and_report(trainer))
    trainer.save_model()
    saved, expected = (load_file(path / "adapter_model.safetensors") for path in (folder / "adapters", tmp_path))
    assert saved.keys() == expected.keys() and saved
    for name, weight in expected.items():
        torch.testing.assert_close(saved[name], weight, rtol=0, atol=1e-5)


def test_adapters_are_resumed_with_and_without_fsdp(folder, reports, one_process_with_adapters, tmp_path):
    assert_same(reports["plain adapters resumed"], one_process_with_adapters)
    for name in ("adapters", "plain adapters"):  # sharded, and full
        checkpoint = folder / name / f"checkpoint-{CHECKPOINT_STEP if name == 'adapters' else STEPS}"
        resumed = build(tmp_path / name, None, adapters=True)
        assert_same(train_and_report(resumed, str(checkpoint)), one_process_with_adapters)


def test_a_checkpoint_of_another_model_is_refused(reports, plain):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert reports["other weights"] == f"{plain}: has no weights of {name}; resume with the model that was saved"


@pytest.mark.parametrize("adapters", [False, True])
def test_packing_and_the_head_are_checked_in_the_precision_of_a_sharded_run(adapters, reports, tmp_path):
    name = f"16 bits, adapters: {adapters}"
    loss, error, head_error = reports[name]
    expected = build(tmp_path, None, max_steps=1, save_strategy="no").train().training_loss
    assert loss == pytest.approx(expected, rel=1e-2)
    assert error.startswith("packing changes what LlamaForCausalLM computes on cpu in 16 bits: its hidden states have ")
    assert head_error.startswith(
        "the loss on cpu in 16 bits is not the cross-entropy of the logits of LlamaForCausalLM (they differ by "
    )


def test_cpu_offload_is_refused_on_cpus(reports):
    expected = "fsdp_config: cpu_offload needs an accelerator and this run is on CPUs; set it to false"
    assert reports["offload"] == expected


def test_weights_sharded_by_zero3_are_gathered(monkeypatch):
    """With a stand-in for deepspeed, which need not be installed; with it: test_deepspeed.py."""
    gathered, model = [], torch.nn.Linear(2, 2)
    with gather_weights(model):
        assert not gathered
    zero = SimpleNamespace(GatheredParameters=lambda weights: gathered.append(weights) or nullcontext())
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero))
    monkeypatch.setattr("sft_pipeline.training.fsdp.is_deepspeed_zero3_enabled", lambda: True)
    with gather_weights(model):
        assert [id(weight) for weight in gathered[0]] == [id(weight) for weight in model.parameters()]


@pytest.fixture
def reset_fsdp(monkeypatch) -> None:
    """Undo the environment variable that accelerate sets."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")


def test_fsdp_with_one_process_is_refused(reset_fsdp, tmp_path):
    with pytest.raises(
        SFTError, match="^fsdp needs two or more processes and this run has one: start more, or turn fsdp off$"
    ):
        make_trainer(tmp_path, fsdp=True)


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ({"fsdp_version": 1}, "fsdp_config: version 1 is not supported; set version to 2"),
    ],
)
def test_unsupported_settings_are_refused(plugin, message):
    plugin = {"fsdp_version": 2, "cpu_ram_efficient_loading": False} | plugin
    with pytest.raises(SFTError, match=f"^{message}$"):
        _check_plugin(SimpleNamespace(**plugin))
