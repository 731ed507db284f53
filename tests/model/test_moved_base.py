"""PiSSA and OLoRA take a part out of the base: what is saved and what is resumed is the model that was trained."""

import json
import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from support.processes import run_ranks

from sft_pipeline.config import parse_config
from sft_pipeline.model.loading import load_model
from sft_pipeline.train import train
from sft_pipeline.training.sft_trainer import SFTTrainer
from sft_pipeline.utils.errors import SFTError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft
FIELDS = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {
        "init_lora_weights": "pissa_niter_1",
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"v_proj": 3},
    },
    "olora": {"init_lora_weights": "olora", "use_rslora": True},
    "dora": {"init_lora_weights": "pissa", "use_dora": True, "modules_to_save": ["lm_head"]},
}
SAVE = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "num_answers": 0, "num_instructions": 0}


def parse(folder, write_config, fields, *overrides, **keys):
    own = {"peft": {"r": 4, "lora_alpha": 8, **fields}, "learning_rate": 0.02, "held_out": 2}
    config = write_config(folder, rows=12, **(SAVE | own | keys))
    return parse_config(str(config), ["--output_dir", str(folder / "out"), *overrides])


def compute_logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 9)[None]).logits


def read_bits(folder):
    return {name: weight.numpy().tobytes() for name, weight in load_file(folder / "adapter_model.safetensors").items()}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_what_is_saved_gives_the_trained_model_on_the_original_base(fields, write_config, model_folder, tmp_path):
    trainer = SFTTrainer(args=parse(tmp_path, write_config, fields))
    base = load_model(str(model_folder))
    # Nothing is trained yet: adapters and what is left of the base are the base.
    torch.testing.assert_close(compute_logits(trainer.model), compute_logits(base), atol=1e-5, rtol=1e-4)
    weight = trainer.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    assert (weight - base.model.layers[0].self_attn.q_proj.weight).abs().max() > 1e-3
    trainer.train()
    trainer.save_model()
    trained = compute_logits(trainer.model)
    assert (trained - compute_logits(base)).abs().max() > 1e-2
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-4"):
        by_peft = PeftModel.from_pretrained(load_model(str(model_folder)), str(folder))
        torch.testing.assert_close(compute_logits(by_peft), trained, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(compute_logits(load_model(str(folder))), trained, atol=1e-5, rtol=1e-4)
    record = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert record["r"] == 8 and record["init_lora_weights"] is True
    trainer.args.lora_merge = True
    trainer.save_model(str(tmp_path / "merged"))
    torch.testing.assert_close(compute_logits(load_model(str(tmp_path / "merged"))), trained, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(fields, write_config, tmp_path):
    train(parse(tmp_path, write_config, fields), Console(quiet=True))
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    over = ["--output_dir", str(tmp_path / "second"), "--resume_from_checkpoint", checkpoint]
    train(parse(tmp_path, write_config, fields, *over), Console(quiet=True))
    assert read_bits(tmp_path / "second") == read_bits(tmp_path / "out")


SHARED = {"num_answers": 0, "num_instructions": 0, "save_strategy": "no", "learning_rate": 1e-3}


def run_worker(process: int, config: str, folder: str) -> None:
    """Train in one of two processes; write the logits of its model, and what is left of a weight of its base."""
    for name in ("pissa", "olora"):
        overrides = ["--per_device_train_batch_size=2", "--ddp_backend=gloo", f"--peft={json.dumps(FIELDS[name])}"]
        trainer = SFTTrainer(args=parse_config(config, [*overrides, f"--output_dir={folder}/{name}"]))
        trainer.train()
        trainer.save_model()
        model = trainer.accelerator.unwrap_model(trainer.model)
        weight = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
        torch.save((compute_logits(model), weight), f"{folder}/{name} {process}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_take_the_same_part_out_of_the_base(write_config, tmp_path):
    config = str(write_config(tmp_path, rows=12, held_out=2, max_steps=4, **SHARED))
    run_ranks(run_worker, 2, config, str(tmp_path))
    for name in ("pissa", "olora"):
        overrides = ["--per_device_train_batch_size=4", f"--peft={json.dumps(FIELDS[name])}"]
        one = SFTTrainer(args=parse_config(config, [*overrides, f"--output_dir={tmp_path / 'one' / name}"]))
        one.train()
        (logits, weight), (other_logits, other_weight) = (torch.load(tmp_path / f"{name} {n}.pt") for n in range(2))
        assert torch.equal(weight, other_weight) and torch.equal(logits, other_logits)
        torch.testing.assert_close(logits, compute_logits(one.model), atol=1e-4, rtol=1e-3)
        saved = load_model(str(tmp_path / name))
        torch.testing.assert_close(compute_logits(saved), logits, atol=1e-5, rtol=1e-4)


def test_a_run_whose_base_was_split_otherwise_goes_on_up_to_rounding(write_config, tmp_path, caplog):
    """As on another machine, whose decomposition has other bits."""
    fields = {"init_lora_weights": "pissa_niter_0"}
    data = {"data_seed": 42}
    first = SFTTrainer(args=parse(tmp_path, write_config, fields, **data))
    first.train()
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    over = ["--output_dir", str(tmp_path / "second"), "--seed", "1"]
    second = SFTTrainer(args=parse(tmp_path, write_config, fields, *over, **data))
    with caplog.at_level(logging.WARNING):
        second.train(resume_from_checkpoint=checkpoint)
    assert "computed with another seed or machine; its base is restored from them, up to rounding" in caplog.text
    torch.testing.assert_close(compute_logits(second.model), compute_logits(first.model), atol=1e-4, rtol=1e-3)
    second.save_model()
    saved = load_model(str(tmp_path / "second"))
    torch.testing.assert_close(compute_logits(saved), compute_logits(second.model), atol=1e-5, rtol=1e-4)


def test_the_best_model_is_loaded(write_config, tmp_path):
    keys = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 1e-3}
    trainer = SFTTrainer(args=parse(tmp_path, write_config, FIELDS["pissa"], **keys))
    trainer.train()
    best = load_model(trainer.state.best_model_checkpoint)
    torch.testing.assert_close(compute_logits(trainer.model), compute_logits(best), atol=1e-5, rtol=1e-4)


def test_what_cannot_be_exact_is_refused(write_config, model_folder, tmp_path):
    with pytest.raises(SFTError, match="pissa and olora need a base in float32; use true, or dtype: float32"):
        SFTTrainer(args=parse(tmp_path, write_config, FIELDS["pissa"], dtype="bfloat16"))
    adapted = get_peft_model(load_model(str(model_folder)), LoraConfig(init_lora_weights="olora"))
    with pytest.raises(SFTError, match="give the base model, and the adapters as peft_config"):
        SFTTrainer(adapted, parse(tmp_path, write_config, {}, "--peft", "null"))
