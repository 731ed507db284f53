"""Sizes of parallelism that would give the processes of a group other rows are refused; data ranks are the mesh's."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import ParallelismConfig
from support.processes import run_ranks
from support.trainers import make_trainer
from support.two_processes import HELD_OUT, ROWS
from transformers import TrainingArguments

from sft_pipeline.training.parallel_sizes import check_parallel_sizes
from sft_pipeline.utils.errors import SFTError

SHORTEN = "for long rows use fsdp with its activation_checkpointing, or a lower max_length"
SHARD = "shard the model with fsdp (configs/accelerate/fsdp2.yaml)"
REFUSED = {
    "tp_size": f"parallelism_config_tp_size is 2: tensor parallelism is not supported; set it to 1 and {SHARD}",
    "cp_size": f"parallelism_config_cp_size is 2: context parallelism is not supported; set it to 1 and {SHORTEN}",
    "sp_size": f"parallelism_config_sp_size is 2: sequence parallelism is not supported; set it to 1 and {SHORTEN}",
}


def refusal(*arguments) -> str:
    with pytest.raises(SFTError) as error_info:
        check_parallel_sizes(*arguments)
    return str(error_info.value)


@pytest.mark.parametrize("name", REFUSED)
def test_sizes_of_accelerates_variables_and_of_the_config_are_refused(name, tmp_path, monkeypatch):
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    check_parallel_sizes(args)
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    check_parallel_sizes(args)
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}", "2")
    assert refusal(args) == REFUSED[name]
    with pytest.raises(SFTError):  # the trainer refuses before accelerate builds the groups
        make_trainer(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "false")
    check_parallel_sizes(args)
    args.parallelism_config = SimpleNamespace(**{name: 2})
    assert refusal(args) == REFUSED[name]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tensor_parallel": {"autotp_size": 2}}, f"deepspeed: autotp_size is 2: tensor .* 1 and {SHARD[:20]}.*"),
        ({"sequence_parallel_size": 4}, "deepspeed: sequence_parallel_size is 4: sequence parallelism is not .*"),
        ({"zero_optimization": {"stage": 3}}, None),
    ],
)
def test_sizes_of_deepspeeds_config_are_refused(config, message, tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    args.hf_deepspeed_config = SimpleNamespace(config=config)
    if message is None:
        check_parallel_sizes(args)
    else:
        with pytest.raises(SFTError, match=f"^{message}$"):
            check_parallel_sizes(args)


@pytest.mark.parametrize("name", ["tp_size", "fsdp_size"])
def test_a_model_that_was_loaded_in_parts_is_refused(name, tiny_model, tmp_path, monkeypatch):
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    check_parallel_sizes(args, tiny_model)
    monkeypatch.setattr(type(tiny_model), name, 2)
    expected = "LlamaForCausalLM was loaded with a tp_plan or distributed_config, in parts; load it whole, and "
    assert refusal(args, tiny_model) == expected + SHARD


# Shards within groups of processes, replicas among the groups (HSDP): four processes.


def run_worker(process: int, folder: str) -> None:
    sizes = {"DP_REPLICATE_SIZE": 2, "DP_SHARD_SIZE": 2}
    os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] = "true"
    os.environ.update({f"PARALLELISM_CONFIG_{name}": str(size) for name, size in sizes.items()})
    ParallelismConfig._validate_accelerator = lambda config, accelerator: None  # it refuses CPUs
    fsdp = {"fsdp": True, "fsdp_config": {"cpu_ram_efficient_loading": True}, "ddp_backend": "gloo"}
    trainer = make_trainer(Path(folder), "packed", rows=ROWS, held_out=HELD_OUT, max_steps=4, **SIZES, **fsdp)
    assert trainer.data_ranks == (4, process)
    trainer.train()
    mesh = trainer.model.model.layers[0].mlp.up_proj.weight.device_mesh
    assert mesh.shape == (2, 2)
    weights = trainer.model.state_dict()  # sharded, whatever the last forward pass left
    report = {name: weight.full_tensor().flatten().tolist() for name, weight in weights.items()}
    report["eval_loss"] = trainer.evaluate()["eval_loss"]
    if process == 0:
        (Path(folder) / "report.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()


SIZES = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 1}


def test_replicas_of_shards_train_like_one_process(tmp_path):
    run_ranks(run_worker, 4, str(tmp_path / "four"))
    report = json.loads((tmp_path / "four" / "report.json").read_text())
    trainer = make_trainer(tmp_path, "packed", rows=ROWS, held_out=HELD_OUT, max_steps=4, per_device_train_batch_size=8)
    assert trainer.data_ranks == (1, 0)
    trainer.train()
    assert report["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)
    for name, weight in trainer.model.named_parameters():
        assert report[name] == pytest.approx(weight.detach().flatten().tolist(), abs=1e-5)


def test_accelerates_names_of_the_sizes():
    """They are read by these names."""
    assert {"tp_size", "cp_size", "sp_size"} <= set(ParallelismConfig.__dataclass_fields__)
