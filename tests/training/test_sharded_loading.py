"""`cpu_ram_efficient_loading`: two processes (gloo) of which the first loads the model, and their answers.

Compared with one process, and with two that both load it.
"""

import ctypes
import json
import re
from pathlib import Path

import pytest
import torch
from support.processes import run_ranks
from support.task_files import write_tasks
from support.tiny import build_model
from support.trainers import make_model, make_trainer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sft_pipeline.config import parse_config
from sft_pipeline.model import loss_forward
from sft_pipeline.model.loading import build_empty_model, load_model
from sft_pipeline.runs.output_dir import EVALUATION_DIR
from sft_pipeline.training import model_setup, sft_trainer
from sft_pipeline.training.sft_trainer import SFTTrainer
from sft_pipeline.training.sharded_answers import ShardedAnswerer
from sft_pipeline.utils.errors import SFTError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft
PROCESSES, STEPS = 2, 3
LORA = ["--lora", "true", "--lora_rank", "4", "--lora_target_modules", "q_proj", "v_proj"]


@pytest.fixture(scope="module")
def config(write_config, tmp_path_factory) -> Path:
    keys = {"held_out": 5, "num_answers": 5, "num_instructions": 2, "max_new_tokens": 6, "eval_answer_share": 1000}
    keys |= {"eval_strategy": "steps", "eval_steps": 1, "max_steps": STEPS, "learning_rate": 0.01, "logging_steps": 1}
    return write_config(tmp_path_factory.mktemp("config"), rows=24, **keys)


def build(config: Path, folder: Path, *overrides: str, on_main: bool | None = None, model=None) -> SFTTrainer:
    """A trainer of eight rows per step. on_main: whether the first of two processes loads alone; None: one process."""
    accumulation, words = (4, []) if on_main is None else (2, ["--fsdp", "true", "--ddp_backend", "gloo"])
    if on_main is not None:
        fsdp = {"cpu_ram_efficient_loading": on_main, "state_dict_type": "SHARDED_STATE_DICT"}
        words += ["--fsdp_config", json.dumps(fsdp)]
    words += ["--output_dir", str(folder), "--gradient_accumulation_steps", str(accumulation), *overrides]
    return SFTTrainer(model, parse_config(str(config), words))


def train_and_report(trainer: SFTTrainer) -> dict:
    """Train, and return what the tests compare; weights are those of the whole model."""
    states = torch.get_rng_state().sum().item()
    trainer.train()
    weights = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in trainer.model.named_parameters()}
    return {
        "random states": states,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "answers": [[row["answer"] for row in results.table] for results in trainer.evaluation.evaluations],
        "eval losses": [results.metrics["nll_nats_per_token"] for results in trainer.evaluation.evaluations],
        "errors": [row["error"] for results in trainer.evaluation.evaluations for row in results.table],
        "weights": {name: weight.detach().flatten().tolist() for name, weight in weights.items()},
    }


def read_error(function, *arguments, **options) -> str:
    with pytest.raises(SFTError) as error_info:
        function(*arguments, **options)
    return str(error_info.value)


def run_worker(process: int, folder: str, config: str, broken: str, tasks: str) -> None:
    out, file = Path(folder), Path(config)
    reports = {"tasks": {}}
    for name, overrides in (("full", []), ("lora", LORA)):
        trainer = build(file, out / name, *overrides, on_main=True)
        devices = {weight.device.type for weight in trainer.model.parameters()}
        assert devices == ({"cpu"} if process == 0 else {"meta"})
        frequencies = dict(trainer.model.named_buffers())
        assert all(buffer.device.type == "cpu" and buffer.abs().sum() > 0 for buffer in frequencies.values())
        reports[name] = train_and_report(trainer)
        assert all(isinstance(weight, DTensor) for weight in trainer.model.parameters())
        trainer.save_model()
        trainer = build(file, out / f"{name} by both", *overrides, "--eval_tasks", tasks, on_main=False)
        reports[f"{name}, loaded by both"] = train_and_report(trainer)
        reports["tasks"][f"{name}, gathered"] = trainer.task_scores
    trainer = build(file, out / "object", on_main=True, model=load_model(parse_config(config).model_name_or_path))
    assert all(weight.device.type == "cpu" for weight in trainer.model.parameters()), "whole on both"
    reports["a model object"] = train_and_report(trainer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardedAnswerer, "fits", lambda self: False)
        trainer = build(file, out / "in step", "--eval_tasks", tasks, on_main=True)
        reports["in step"] = train_and_report(trainer)
        reports["tasks"]["in step"] = trainer.task_scores
    reports["no answers"] = train_and_report(
        build(file, out / "no answers", "--num_answers", "0", "--num_instructions", "0", on_main=True)
    )
    reports["evaluate"] = read_error(build(file, out / "evaluate", on_main=True).evaluate)
    # Both processes end with the same error, also where only the first one can find it.
    with pytest.MonkeyPatch.context() as patch:
        if process == 0:
            patch.setattr(loss_forward, "CHECK_TOLERANCE", {torch.float32: -1.0})
        reports["check"] = read_error(build, file, out / "check", on_main=True)
    model = ["--model_name_or_path", broken]
    reports["load"] = read_error(build, file, out / "load", *model, on_main=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_setup, "build_empty_model", lambda *arguments: build_model(50))
        reports["other model"] = read_error(build, file, out / "other", on_main=True)
    (out / f"reports{process}.json").write_text(json.dumps(reports))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def broken(model_folder, tmp_path_factory) -> Path:
    """A model folder whose weights were cut off."""
    folder = tmp_path_factory.mktemp("broken")
    for file in model_folder.iterdir():
        content = file.read_bytes()
        (folder / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> str:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def folder(config, broken, tasks, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_ranks(run_worker, PROCESSES, str(folder), str(config), str(broken), tasks)
    return folder


@pytest.fixture(scope="module")
def reports(folder) -> dict:
    first, second = (json.loads((folder / f"reports{process}.json").read_text()) for process in range(PROCESSES))
    assert first == second
    return first


@pytest.fixture(scope="module")
def one_process(config, tasks, tmp_path_factory) -> dict[str, dict]:
    folder, reports = tmp_path_factory.mktemp("one"), {}
    for name, keys in (("full", []), ("lora", LORA)):
        trainer = build(config, folder / name, *keys, "--eval_tasks", tasks)
        reports[name] = train_and_report(trainer) | {"tasks": trainer.task_scores}
    return reports


@pytest.mark.parametrize("name", ["full", "lora"])
def test_it_does_not_matter_who_loads_the_model(name, reports, one_process):
    """Not for a single bit: of adapters that start with random weights neither."""
    assert reports[name] == reports[f"{name}, loaded by both"]
    for key in ("losses", "eval losses"):
        assert reports[name][key] == pytest.approx(one_process[name][key], rel=1e-5)
    for key, weights in one_process[name]["weights"].items():
        assert reports[name]["weights"][key] == pytest.approx(weights, abs=1e-5)
    assert reports[name]["random states"] == one_process[name]["random states"]


@pytest.mark.parametrize("name", ["full", "lora", "in step"])
def test_sharded_models_answer_as_whole_ones(name, reports, one_process):
    expected = one_process["lora" if name == "lora" else "full"]["answers"]
    assert reports[name]["answers"] == expected and len(expected) == STEPS + 1
    assert len({json.dumps(answers) for answers in expected}) > 1, "they change while the model is trained"
    assert set(reports[name]["errors"]) == {None}


@pytest.mark.parametrize("name", ["full, gathered", "lora, gathered", "in step"])
def test_the_tasks_of_two_processes_have_the_scores_of_one(name, reports, one_process):
    """Those of likelihood and of generation, on both processes (`reports`); in DDP: test_final_tasks.py."""
    scores, expected = reports["tasks"][name], one_process["lora" if name.startswith("lora") else "full"]["tasks"]
    assert list(scores) == list(expected) == ["chosen acc", "likelihood word_perplexity", "written chrf"]
    for key, score in scores.items():
        assert score["value"] == pytest.approx(expected[key]["value"], rel=1e-4) and score["questions"] == 4
    assert len({run["tasks"]["likelihood word_perplexity"]["value"] for run in one_process.values()}) == 2
    assert expected["written chrf"]["value"] > 0


@pytest.mark.parametrize("name", ["full", "in step"])
def test_answers_change_no_bit_of_the_training(name, reports):
    for key in ("losses", "eval losses", "weights"):
        assert reports[name][key] == reports["no answers"][key]


def test_a_model_object_is_whole_on_every_process(reports):
    assert reports["a model object"] == reports["full"]


def test_the_saved_model_is_the_trained_one(folder, reports):
    for name, weight in AutoModelForCausalLM.from_pretrained(folder / "full").named_parameters():
        assert weight.flatten().tolist() == reports["full"]["weights"][name]
    assert (folder / "lora" / "adapter_model.safetensors").is_file()
    assert len(list((folder / "full" / EVALUATION_DIR).iterdir())) == STEPS + 1


def test_an_error_of_the_process_that_has_the_weights_is_raised_on_all(reports, broken):
    assert re.match("LlamaForCausalLM: its own loss is not the cross-entropy of its logits", reports["check"])
    assert re.match(f"{broken}: cannot load the model", reports["load"])
    assert reports["other model"] == (
        "fsdp_config: cpu_ram_efficient_loading: the first process loaded another model.embed_tokens.weight than the "
        "model's config describes; set it to false"
    )


def test_an_evaluation_before_training_is_refused(reports):
    assert reports["evaluate"] == "evaluate: fsdp shards the model when training starts; call train first"


def test_an_empty_model_has_the_shapes_and_buffers_of_the_loaded_one(model_folder):
    empty, loaded = build_empty_model(str(model_folder)), load_model(str(model_folder))
    assert {name: weight.shape for name, weight in empty.named_parameters()} == {
        name: weight.shape for name, weight in loaded.named_parameters()
    }
    assert all(weight.is_meta for weight in empty.parameters())
    for name, buffer in loaded.named_buffers():
        assert torch.equal(empty.get_buffer(name), buffer)
    assert empty.name_or_path == loaded.name_or_path and empty.config.to_dict() == loaded.config.to_dict()


# Buffers that are saved.


def run_saved_buffer(process: int, folder: str) -> None:
    """A buffer that is saved, as experts of DeepSeek-V3 have one; accelerate would take it for a weight."""
    model = make_model()
    model.register_buffer("scale", torch.tensor([2.0, 3.0]))
    model.model.layers[0].register_buffer("offset", torch.tensor(4.0))
    fsdp = {"fsdp": True, "fsdp_config": {"cpu_ram_efficient_loading": True}, "ddp_backend": "gloo"}
    trainer = make_trainer(Path(folder), model=model, **fsdp)
    trainer.train()
    assert trainer.model.scale.tolist() == [2.0, 3.0] and trainer.model.model.layers[0].offset == 4.0
    assert {"scale", "model.layers.0.offset"} <= trainer.model.state_dict().keys()
    torch.distributed.destroy_process_group()


def test_buffers_that_are_saved_keep_their_values(tmp_path):
    run_ranks(run_saved_buffer, PROCESSES, str(tmp_path))


# Memory.

LAYERS, HIDDEN = 10, 512
M_MMAP_THRESHOLD = -3  # of mallopt in glibc's malloc.h


@pytest.fixture(scope="module")
def large_model(tokenizer, tmp_path_factory) -> Path:
    """A folder of a model of 170 MB, most of it in its layers."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 4 * HIDDEN, "num_hidden_layers": LAYERS}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=8, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def read_memory(name: str) -> int:
    """Bytes of the process' resident memory: VmRSS, or VmHWM for its peak."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", text)[1])


def run_memory_worker(process: int, folder: str, config: str, model: str) -> None:
    peaks = []
    # What is freed goes back to the system at once, so that resident memory is what the process holds.
    sft_trainer.set_malloc_options = lambda: ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)

    def shard(*words: str) -> nn.Module:
        trainer = build(Path(config), Path(folder) / str(len(peaks)), "--num_answers", "0", *words, on_main=True)
        trainer.rehearse = stop  # called when the model has been sharded
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        return trainer.model

    def stop() -> None:
        peaks.append(read_memory("VmHWM"))
        raise KeyboardInterrupt

    shard()  # what is imported and allocated once
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = read_memory("VmRSS")
    weights = shard("--model_name_or_path", model).parameters()
    (Path(folder) / f"{process}.json").write_text(
        json.dumps([peaks[-1] - before, 4 * sum(weight.numel() for weight in weights)])
    )
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux's /proc")
def test_the_second_process_never_holds_the_model_whole(config, large_model, tmp_path):
    run_ranks(run_memory_worker, PROCESSES, str(tmp_path), str(config), str(large_model))
    (first, size), (second, _) = (
        json.loads((tmp_path / f"{process}.json").read_text()) for process in range(PROCESSES)
    )
    assert size > 150e6
    assert first > 0.9 * size, "the first process has loaded all of it"
    assert second < 0.75 * size, "its half, and one weight at a time"
