"""LoRA through `peft`: what is trained, what is saved, and that it goes on from there."""

import importlib.util
import json

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from sft_pipeline.arguments import SFTArguments
from sft_pipeline.config import parse_config
from sft_pipeline.inference.answers import answer_prompts
from sft_pipeline.model.loading import load_model
from sft_pipeline.model.lora import add_adapters
from sft_pipeline.model.peft_config import build_peft_config
from sft_pipeline.runs.trained_model import load_trained
from sft_pipeline.train import train
from sft_pipeline.utils.errors import SFTError

PeftModel = pytest.importorskip("peft", reason="the extra `lora` is not installed").PeftModel
ADAPTERS, BASE = "adapter_config.json", "base_model_name_or_path"
# peft 0.21 still asks transformers 5.23 under the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def config(model_folder, tmp_path):
    rows = [{"prompt": f"Say {n}.", "completion": ["one", "two", "three"][n % 3]} for n in range(24)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    keys = {
        "model_name_or_path": str(model_folder),
        "train_data": str(data),
        "held_out": 4,
        "template": "role",
        "lora": True,
        "lora_rank": 4,
        "lora_alpha": 8,
        "learning_rate": 0.05,
        "max_steps": 6,
        "num_answers": 2,
        "max_new_tokens": 4,
        "use_cpu": True,
        "disable_tqdm": True,
        "output_dir": str(tmp_path / "out"),
    }
    file = tmp_path / "lora.yaml"
    file.write_text(yaml.safe_dump(keys))
    return file


def run(config, *overrides):
    return train(parse_config(str(config), list(overrides)), Console(quiet=True))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 9)[None]).logits


def test_only_the_adapters_are_trained_and_saved(config, model_folder, tmp_path):
    results = run(config)
    assert results["eval_loss"]["after"] < results["eval_loss"]["before"]
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert saved and all("lora_" in name for name in saved)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    adapted, base = load_model(str(tmp_path / "out")), load_model(str(model_folder))
    assert (logits(adapted) - logits(base)).abs().max() > 1e-3


def test_the_merged_model_computes_what_the_adapters_do(config, tmp_path):
    run(config)
    run(config, "--lora_merge", "true", "--output_dir", str(tmp_path / "merged"))
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    merged, adapted = load_model(str(tmp_path / "merged")), load_model(str(tmp_path / "out"))
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-5, rtol=1e-4)


def test_packed_and_padded_runs_agree(config, tmp_path):
    packed = run(config)
    padded = run(config, "--packing", "false", "--output_dir", str(tmp_path / "padded"))
    assert packed["eval_loss"]["after"] == pytest.approx(padded["eval_loss"]["after"], abs=1e-4)


def test_checkpointing_changes_nothing(config, tmp_path):
    plain = run(config)
    checkpointed = run(config, "--activation_checkpointing", "true", "--output_dir", str(tmp_path / "checkpointed"))
    assert checkpointed["eval_loss"] == pytest.approx(plain["eval_loss"], abs=1e-6)


def read_bits(folder):
    return {name: weight.numpy().tobytes() for name, weight in load_file(folder / "adapter_model.safetensors").items()}


IA3 = {"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
FIELDS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "modules_to_save": ["lm_head", "embed_tokens"]},
    "ia3": IA3,
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_the_fields_of_peft_are_trained_saved_resumed_and_merged(fields, config, tmp_path):
    """From a YAML file or JSON; a resumed run ends with the bits of an uninterrupted one."""
    keys = yaml.safe_load(config.read_text())
    for key in ("lora", *(["lora_rank", "lora_alpha"] if "peft_type" in fields else [])):
        del keys[key]
    config.write_text(yaml.safe_dump(keys | {"peft": fields, "save_steps": 3, "save_strategy": "steps"}))
    results = run(config)
    assert results["eval_loss"]["after"] < results["eval_loss"]["before"] and results["config"]["peft"] == fields
    record = json.loads((tmp_path / "out" / ADAPTERS).read_text())
    assert all(record[name] == value or set(record[name]) == set(value) for name, value in fields.items())
    checkpoint = str(tmp_path / "out" / "checkpoint-3")
    over = ["--output_dir", str(tmp_path / "second"), "--resume_from_checkpoint", checkpoint]
    run(config, f"--peft={json.dumps(fields)}", *over)
    assert read_bits(tmp_path / "second") == read_bits(tmp_path / "out")
    run(config, "--lora_merge", "true", "--output_dir", str(tmp_path / "merged"))
    adapted = logits(load_model(str(tmp_path / "out")))
    torch.testing.assert_close(logits(load_model(str(tmp_path / "merged"))), adapted, atol=1e-5, rtol=1e-4)


OTHERS = {
    "r": ({}, {"lora_rank": 2}, "with r: 4, and this run has 2"),
    "alpha": ({}, {"lora_alpha": 3}, "with lora_alpha: 8, and this run has 3"),
    "targets": ({}, {"lora_target_modules": ["q_proj"]}, "with target_modules: .*, and this run has .'q_proj'"),
    "pissa": ({"peft": {"init_lora_weights": "pissa"}}, {"lora_rank": 8}, "init_lora_weights: pissa, .* has True"),
    "lora": ({}, {"peft": {"init_lora_weights": "pissa"}}, "with init_lora_weights: True, and this run has pissa"),
    "kind": ({}, {"lora": False, "lora_rank": 16, "lora_alpha": 32, "peft": IA3}, "and this run has"),
    "4 bits": ({}, {"load_in_4bit": True}, "with quantization: None, and this run has load_in_4bit"),
    "8 bits": ({"load_in_4bit": True}, {"load_in_8bit": True}, "with quantization: load_in_4bit, .* has load_in_8bit"),
    "none": ({}, {"lora": False}, "has adapters, and this run trains none; set the keys lora or peft"),
    "full": ({"lora": False}, {}, "has a whole model, and this run trains adapters; remove lora and peft"),
}


@pytest.mark.parametrize(("keys", "other_keys", "message"), OTHERS.values(), ids=OTHERS)
def test_a_run_resumes_with_the_adapters_that_it_had_or_not_at_all(keys, other_keys, message, config, tmp_path):
    """Nothing is written: the run can be resumed with its own keys."""
    own = yaml.safe_load(config.read_text()) | {"max_steps": 2, "save_steps": 1, "save_strategy": "steps"}
    config.write_text(yaml.safe_dump(own | keys))
    run(config)
    checkpoint = str(tmp_path / "out" / "checkpoint-1")
    over = ["--output_dir", str(tmp_path / "second"), "--resume_from_checkpoint", checkpoint]
    config.write_text(yaml.safe_dump(own | other_keys))
    with pytest.raises(SFTError, match=f"^{checkpoint}: .*{message}"):
        run(config, *over)
    assert not any((tmp_path / "second").iterdir())


def test_unknown_layers_are_named(tiny_model):
    with pytest.raises(SFTError, match=r"peft: Target modules \{'nowhere'\} not found in the base model"):
        add_adapters(tiny_model, build_peft_config(SFTArguments(lora_target_modules=["nowhere"])))


def test_missing_peft_is_reported(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SFTError, match="lora: true needs peft"):
        build_peft_config(SFTArguments())


def test_adapters_are_merged_into_their_base(config, tmp_path):
    """A folder of adapters loads as the plain model that they make, whole and trainable."""
    run(config)
    folder = tmp_path / "out"
    model, template, _ = load_trained(str(folder))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    by_hand = PeftModel.from_pretrained(load_model(json.loads((folder / ADAPTERS).read_text())[BASE]), str(folder))
    torch.testing.assert_close(logits(model.cpu()), logits(by_hand), atol=1e-5, rtol=1e-4)
    results = json.loads((folder / "results.json").read_text())["answers"]
    prompts = [{"messages": [{"role": "user", "content": result["prompt"]}]} for result in results]
    answers = answer_prompts(model, template, prompts, 4)
    assert [answer.text for answer in answers] == [result["after"] for result in results]


# peft looks for the base's configuration in its folder, which holds adapters alone.
@pytest.mark.filterwarnings("ignore:Could not find a config file in .* vocabulary was not modified:UserWarning")
def test_adapters_on_a_model_of_adapters(config, tmp_path):
    run(config)
    over = ["--model_name_or_path", str(tmp_path / "out"), "--output_dir", str(tmp_path / "second")]
    run(config, *over)
    record = json.loads((tmp_path / "second" / ADAPTERS).read_text())
    assert record[BASE] == str(tmp_path / "out")
    run(config, *over, "--lora_merge", "true", "--overwrite_output_dir")
    merged = logits(load_model(str(tmp_path / "second")))
    run(config, *over, "--overwrite_output_dir")
    torch.testing.assert_close(logits(load_model(str(tmp_path / "second"))), merged, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{}", "adapter_config.json: has no base_model_name_or_path; set it to the base model's folder"),
        ("mine", "adapter_config.json: has no base_model_name_or_path"),
        ('{"base_model_name_or_path": null}', "adapter_config.json: has no base_model_name_or_path"),
        (
            '{"base_model_name_or_path": "/not/there"}',
            "adapter_config.json: no base model at /not/there; set base_model_name_or_path to its folder",
        ),
    ],
)
def test_adapters_without_their_base(record, message, tmp_path):
    (tmp_path / ADAPTERS).write_text(record)
    with pytest.raises(SFTError, match=message):
        load_model(str(tmp_path))


def test_adapters_that_do_not_fit_or_cannot_be_read(model_folder, tmp_path, monkeypatch):
    (tmp_path / ADAPTERS).write_text(json.dumps({BASE: str(model_folder), "peft_type": "LORA", "r": 4}))
    with pytest.raises(SFTError, match=f"{tmp_path}: a model folder without weights"):
        load_model(str(tmp_path))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(SFTError, match=f"{tmp_path}: its adapters do not fit {model_folder}"):
        load_model(str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SFTError, match=f"{tmp_path}: holds adapters and needs peft; install it with"):
        load_model(str(tmp_path))
