"""bf16 on the CPU from end to end, weights in bfloat16, frozen weights under LoRA, and a given attention."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import build_model
from support.training_runs import run_train
from support.wrong_kernels import use_wrong_attention, use_wrong_head
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sft_pipeline.config import SFTConfig, parse_config
from sft_pipeline.model.loading import load_model
from sft_pipeline.runs.output_dir import RUN_FILE
from sft_pipeline.training import evaluation_callback, model_setup
from sft_pipeline.training.device_check import check_on_device
from sft_pipeline.training.sft_trainer import SFTTrainer
from sft_pipeline.utils.errors import SFTError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft
BF16_ERROR = 0.01  # of losses of about 5.6: a bf16 number has 8 bits


@pytest.fixture(scope="module")
def config(write_config, tmp_path_factory) -> Path:
    keys = {"held_out": 4, "num_answers": 2, "num_instructions": 0, "max_new_tokens": 4, "max_steps": 4}
    keys |= {"logging_steps": 1, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.01}
    return write_config(tmp_path_factory.mktemp("precision"), rows=20, **keys)


def run(config: Path, folder: Path, **keys: object) -> dict:
    words = [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in keys.items()]
    return run_train(config, "--output_dir", str(folder), *words)


def losses(results: dict) -> list[float]:
    return [entry[key] for entry in results["loss_curve"] for key in ("loss", "eval_loss") if key in entry]


def dtypes(model: nn.Module, trained: bool | None = None) -> set[torch.dtype]:
    return {w.dtype for w in model.parameters() if trained is None or w.requires_grad == trained}


@pytest.fixture(scope="module")
def fp32(config, tmp_path_factory) -> dict:
    return run(config, tmp_path_factory.mktemp("fp32") / "out")


@pytest.fixture(scope="module", params=["autocast", "weights"])
def bf16(request, config, tmp_path_factory) -> tuple[Path, dict, dict]:
    """A run in bf16: its folder, its results and its keys."""
    keys = {"bf16": True} if request.param == "autocast" else {"dtype": "bfloat16"}
    folder = tmp_path_factory.mktemp("bf16") / "out"
    return folder, run(config, folder, **keys), keys


def test_a_run_in_bf16_trains_evaluates_and_answers_like_one_in_float32(bf16, fp32):
    folder, results, keys = bf16
    assert losses(results) == pytest.approx(losses(fp32), abs=4 * BF16_ERROR) and losses(results) != losses(fp32)
    assert results["eval_loss"]["after"] < results["eval_loss"]["before"] - 0.1
    assert len(results["answers"]) == 2 and all(answer["after"] is not None for answer in results["answers"])
    assert results["before_and_after"].keys() == fp32["before_and_after"].keys()
    dtype = torch.bfloat16 if "dtype" in keys else torch.float32
    assert {weight.dtype for weight in load_file(folder / "model.safetensors").values()} == {dtype}
    optimizer = torch.load(folder / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert {state["exp_avg"].dtype for state in optimizer["state"].values()} == {dtype}
    assert dtypes(load_model(str(folder))) == {torch.float32}, "for other commands"


def test_a_run_in_bf16_is_repeated_and_resumed_with_the_same_bits(bf16, tmp_path):
    folder, results, _ = bf16
    again = run_train(folder / RUN_FILE, "--output_dir", str(tmp_path / "again"))
    assert losses(again) == losses(results) and again["answers"] == results["answers"]
    resumed = tmp_path / "resumed"
    run_train(folder / RUN_FILE, "--output_dir", str(resumed), "--resume_from_checkpoint", str(folder / "checkpoint-2"))
    weights = [load_file(path / "model.safetensors") for path in (folder, resumed)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_packed_and_padded_runs_in_bf16_agree(bf16, config, tmp_path):
    _, results, keys = bf16
    padded = run(config, tmp_path / "padded", packing=False, **keys)
    assert losses(padded) == pytest.approx(losses(results), abs=2 * BF16_ERROR)


def test_dtypes_that_are_no_choice(config):
    with pytest.raises(SFTError, match="dtype: invalid choice: 'float16'"):
        parse_config(str(config), ["--dtype", "float16"])
    with pytest.raises(SFTError) as error:
        SFTConfig(use_cpu=True, dtype="float16")
    assert str(error.value) == "dtype is float16; give float32 or bfloat16 (for float16: fp16: true, over float32)"
    with pytest.raises(SFTError, match="^dtype: bfloat16 and fp16 exclude each other; set bf16: true, or dtype: fl"):
        SFTConfig(use_cpu=True, dtype="bfloat16", fp16=True)
    with pytest.raises(SFTError, match="^dtype: bfloat16 would become float32 under bf16 and fsdp or deepspeed; set"):
        SFTConfig(use_cpu=True, dtype="bfloat16", bf16=True, fsdp=True)


def read_lines(config: Path, folder: Path, caplog, **keys: object) -> tuple[dict, list[str]]:
    with caplog.at_level("INFO", logger="sft_pipeline"):
        results = run(config, folder, max_steps=2, **keys)
    return results, [record.getMessage() for record in caplog.records]


def test_with_a_given_attention_rows_are_padded(config, tmp_path, caplog):
    results, lines = read_lines(config, tmp_path / "eager", caplog, attn_implementation="eager")
    reason = "attn_implementation is eager, and packed rows have an attention of their own"
    assert f"batches are padded: {reason}" in lines
    padded = run(config, tmp_path / "padded", max_steps=2, packing=False)
    assert losses(results) == pytest.approx(losses(padded), abs=1e-5)
    with pytest.raises(SFTError) as error:
        run(config, tmp_path / "budget", attn_implementation="eager", tokens_per_batch=4096)
    assert str(error.value) == f"tokens_per_batch: 4096 needs packing, which is off ({reason}); set it to 0"


def test_the_given_attention_is_the_one_that_trains_and_not_the_one_of_the_checks(config, tmp_path):
    """Such as FlashAttention, which does not run where the model is checked."""
    calls = []

    def attend(module, query, *args, **kwargs):
        calls.append(query.shape[0])
        return sdpa_attention_forward(module, query, *args, **kwargs)

    AttentionInterface.register("gpu_attention", attend)
    words = ["--attn_implementation", "gpu_attention", "--output_dir", str(tmp_path), "--max_steps", "1"]
    trainer = SFTTrainer(args=parse_config(str(config), words))
    assert calls == []
    trainer.train()
    assert calls


def test_an_attention_that_there_is_not(model_folder):
    for name in ("nonsense", "flash_attention_2"):
        with pytest.raises(SFTError) as error:
            load_model(str(model_folder), attn_implementation=name)
        message = f"{model_folder}: cannot load the model with attn_implementation: {name} ("
        assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_model_given_as_an_object_keeps_its_dtype_and_attention(config, tokenizer, tmp_path):
    def build(model, **keys):
        words = ["--output_dir", str(tmp_path), *(f"--{key}={value}" for key, value in keys.items())]
        args = parse_config(str(config), words)
        return SFTTrainer(model, args, processing_class=tokenizer)

    model = build_model(len(tokenizer)).to(torch.bfloat16)
    trainer = build(model)
    assert dtypes(trainer.model) == {torch.bfloat16} and trainer.config_record["dtype"] == "bfloat16"
    with pytest.raises(SFTError) as error:
        build(build_model(len(tokenizer)), dtype="bfloat16")
    assert str(error.value) == (
        "dtype: the model is given as an object in torch.float32; convert it, or give the model's name"
    )
    with pytest.raises(SFTError, match="^attn_implementation: the model is given as an object; set it there, or give"):
        build(model, attn_implementation="sdpa")


def build_lora_trainer(config: Path, folder: Path, model=None, **keys: object) -> SFTTrainer:
    words = [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in keys.items()]
    return SFTTrainer(model, args=parse_config(str(config), ["--output_dir", str(folder), "--lora=true", *words]))


def test_frozen_layers_under_lora_are_in_bfloat16_and_change_no_bit(config, tmp_path, monkeypatch, caplog):
    pytest.importorskip("peft")
    rounded, lines = read_lines(config, tmp_path / "rounded", caplog, bf16=True, lora=True)
    assert "the frozen weights of 15 layers are in bfloat16" in lines  # 7 in each of two layers, and the head
    monkeypatch.setattr(model_setup, "should_round_frozen_layers", lambda *args: False)
    whole = run(config, tmp_path / "whole", bf16=True, lora=True, max_steps=2)
    assert losses(rounded) == losses(whole)
    adapters = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("rounded", "whole")]
    assert all(torch.equal(weight, adapters[1][name]) for name, weight in adapters[0].items()) and adapters[0]
    assert {weight.dtype for weight in adapters[0].values()} == {torch.float32}
    fp32 = run(config, tmp_path / "fp32", lora=True, max_steps=2)
    assert losses(rounded) == pytest.approx(losses(fp32), abs=2 * BF16_ERROR)


def test_which_weights_are_rounded_under_lora(config, tmp_path, tokenizer, model_folder):
    pytest.importorskip("peft")
    trainer = build_lora_trainer(config, tmp_path, bf16=True)
    assert dtypes(trainer.model, trained=True) == {torch.float32}
    kinds = {
        type(module): weight.dtype
        for module in trainer.model.modules()
        for weight in module.parameters(recurse=False)
        if not weight.requires_grad
    }
    assert kinds.pop(nn.Linear) == torch.bfloat16 and set(kinds.values()) == {torch.float32} and len(kinds) == 2
    assert dtypes(build_lora_trainer(config, tmp_path).model) == {torch.float32}
    assert dtypes(build_lora_trainer(config, tmp_path, bf16=True, lora_merge=True).model) == {torch.float32}
    trainer = build_lora_trainer(config, tmp_path, dtype="bfloat16")
    assert dtypes(trainer.model, trained=False) == {torch.bfloat16}
    assert dtypes(trainer.model, trained=True) == {torch.float32}
    given = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    args = parse_config(str(config), ["--output_dir", str(tmp_path), "--lora=true", "--bf16=true"])
    assert dtypes(SFTTrainer(given, args, processing_class=tokenizer).model) == {torch.float32}


def test_adapters_are_merged_into_the_weights_that_were_loaded(config, tmp_path, model_folder):
    """In float32, although they are trained in bf16: the merged weights differ from the base by the adapters alone."""
    pytest.importorskip("peft")
    run(config, tmp_path / "adapters", bf16=True, lora=True, max_steps=2)
    run(config, tmp_path / "merged", bf16=True, lora=True, lora_merge=True, max_steps=2)
    merged, adapted = load_model(str(tmp_path / "merged")), load_model(str(tmp_path / "adapters"))
    for (name, weight), expected in zip(merged.named_parameters(), adapted.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, atol=1e-6, rtol=0, msg=name)


def test_a_run_in_bf16_decodes_with_bfloat16_weights(config, tmp_path, monkeypatch):
    seen = []

    def answer(model, *args, **kwargs):
        seen.append(dtypes(model))
        return answer_prompts(model, *args, **kwargs)

    answer_prompts = evaluation_callback.answer_prompts
    monkeypatch.setattr(evaluation_callback, "answer_prompts", answer)
    run(config, tmp_path / "bf16", bf16=True, lora=True, max_steps=2)
    run(config, tmp_path / "fp32", max_steps=2)
    assert seen == [{torch.bfloat16}] * 2 + [{torch.float32}] * 2


# The check of packing and the head on the device


def build_trainer(config: Path, folder: Path, **keys: object) -> SFTTrainer:
    words = [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in keys.items()]
    return SFTTrainer(args=parse_config(str(config), ["--output_dir", str(folder), "--eval_strategy=no", *words]))


@pytest.mark.parametrize("keys", [{"bf16": True}, {"dtype": "bfloat16"}, {"bf16": True, "lora": True}])
def test_an_attention_that_is_wrong_under_autocast_alone_is_found_before_the_first_step(keys, config, tmp_path):
    trainer = build_trainer(config, tmp_path / "right", **keys)
    check_on_device(trainer, packed=True)
    with use_wrong_attention(), pytest.raises(SFTError) as error:
        trainer.train()
    message = r"packing changes what LlamaForCausalLM computes on cpu in 16 bits: its hidden states have an error of "
    assert re.fullmatch(
        message + r"[\d.e-]+, at most [\d.e-]+ is due to rounding; set packing: false", str(error.value)
    )
    assert trainer.state.global_step == 0


def test_a_head_that_is_wrong_under_autocast_alone_is_found(config, tmp_path):
    trainer = build_trainer(config, tmp_path, bf16=True, packing=False)
    message = "^the loss on cpu in 16 bits is not the cross-entropy of the logits of Llama"
    with use_wrong_head(), pytest.raises(SFTError, match=message):
        check_on_device(trainer, packed=False)
