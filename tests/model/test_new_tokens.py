"""Tokens that are added: trained under LoRA too, saved, resumed and served."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from rich.console import Console
from safetensors.torch import load_file
from support.tiny import build_model
from transformers import AutoTokenizer

from sft_pipeline.commands.export import export_model
from sft_pipeline.config import SFTConfig, parse_config
from sft_pipeline.inference.answers import answer_prompts
from sft_pipeline.model.loading import load_model, load_tokenizer
from sft_pipeline.runs.trained_model import load_trained
from sft_pipeline.train import train
from sft_pipeline.training.sft_trainer import SFTTrainer
from sft_pipeline.utils.errors import SFTError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft
NEW = ["<tool>", "</tool>"]
KEYS = {"learning_rate": 0.05, "max_steps": 6, "num_answers": 2, "num_instructions": 0, "max_new_tokens": 6}
KEYS |= {"held_out": 2, "save_strategy": "steps", "save_steps": 3, "num_train_epochs": 3}
LORA = {"lora": True, "lora_rank": 4}


@pytest.fixture(params=["tied", "untied"])
def base(request, tokenizer, tmp_path):
    """The folder of a model with embeddings that are the head's too, or not."""
    folder = tmp_path / "base"
    model = build_model(len(tokenizer))
    if request.param == "tied":
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def parse(write_config, base, tmp_path):
    """parse(key=value, ...) is the config of a run on rows that have the new tokens."""
    rows = [{"prompt": f"Call {n}.", "completion": f"<tool>{n}</tool>"} for n in range(12)]
    data = tmp_path / "tools.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))

    def parse_keys(name="out", *overrides, **keys):
        own = {"model_name_or_path": str(base), "train_data": str(data), "add_tokens": NEW}
        config = write_config(tmp_path, 1, **(KEYS | own | keys))
        return parse_config(str(config), ["--output_dir", str(tmp_path / name), *overrides])

    return parse_keys


def run(args):
    return train(args, Console(quiet=True))


def compute_logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[5, 6, 300, 7, 301]]) % model.config.vocab_size).logits


def read_bits(folder):
    file = next(folder.glob("*model.safetensors"))
    return {name: weight.numpy().tobytes() for name, weight in load_file(file).items()}


def test_new_tokens_under_lora(parse, base, tokenizer, tmp_path):
    """peft issue 2898: tokens that are added are learned, in embeddings and head, and are there after loading."""
    size = len(tokenizer)
    results = run(parse(**LORA))
    assert results["eval_loss"]["after"] < results["eval_loss"]["before"]
    folder = tmp_path / "out"
    assert load_tokenizer(str(folder))("a<tool>")["input_ids"][-1] == size
    saved = load_file(folder / "adapter_model.safetensors")
    rows = {name: weight for name, weight in saved.items() if "lora_" not in name}
    is_tied = json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    assert [weight.shape for weight in rows.values()] == [(2, 32)] * (1 if is_tied else 2)

    model, template, _ = load_trained(str(folder))
    assert model.config.vocab_size == model.lm_head.weight.shape[0] == size + 2
    untrained = load_model(str(base))
    for layer, before in ((model.model.embed_tokens, untrained.model.embed_tokens), (model.lm_head, untrained.lm_head)):
        assert torch.equal(layer.weight[:size].cpu(), before.weight)
        mean = before.weight.mean(0)
        assert ((layer.weight[size:].cpu() - mean).abs().max(1).values > 1e-2).all()  # both tokens are trained
    by_peft = AutoPeftModelForCausalLM.from_pretrained(str(folder))  # it reads the tokenizer's length
    torch.testing.assert_close(compute_logits(by_peft), compute_logits(model.cpu()), atol=1e-5, rtol=1e-4)

    answers = json.loads((folder / "results.json").read_text())["answers"]
    prompts = [{"messages": [{"role": "user", "content": result["prompt"]}]} for result in answers]
    assert [answer.text for answer in answer_prompts(model, template, prompts, 6)] == [row["after"] for row in answers]
    export_model(str(folder), tmp_path / "exported")
    assert torch.equal(compute_logits(load_model(str(tmp_path / "exported"))), compute_logits(model))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "exported")) == size + 2
    run(parse("merged", "--lora_merge", "true", **LORA))
    merged = compute_logits(load_model(str(tmp_path / "merged")))
    torch.testing.assert_close(merged, compute_logits(model), atol=1e-5, rtol=1e-4)


def test_new_tokens_beside_adapters_on_quantized_weights(parse, tmp_path):
    """Every way to load what was trained gives the model that was evaluated."""
    keys = {**LORA, "load_in_4bit": True}
    trainer = SFTTrainer(args=parse(**keys))
    trainer.train()
    trainer.save_model()
    trainer.save_results()
    with torch.no_grad():
        expected = compute_logits(trainer.model)
    export_model(str(tmp_path / "out"), tmp_path / "exported")
    run(parse("merged", "--lora_merge", "true", **keys))
    for folder in ("out", "exported", "merged"):
        actual = compute_logits(load_model(str(tmp_path / folder)))
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


RESUMED = {"full": {}, "lora": LORA, "bf16": {**LORA, "bf16": True}, "4 bits": {**LORA, "load_in_4bit": True}}


@pytest.mark.parametrize("keys", RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(keys, parse, tokenizer, tmp_path):
    run(parse(**keys))
    run(parse("second", "--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-3"), **keys))
    assert read_bits(tmp_path / "second") == read_bits(tmp_path / "out")
    if not keys:
        assert load_model(str(tmp_path / "out")).lm_head.weight.shape[0] == len(tokenizer) + 2


def test_packed_and_padded_runs_agree(parse):
    keys = {**LORA, "learning_rate": 0.002}  # AdamW enlarges the rounding of the first steps
    packed, padded = (run(parse(name, "--packing", str(name == "out").lower(), **keys)) for name in ("out", "padded"))
    assert packed["eval_loss"]["after"] == pytest.approx(padded["eval_loss"]["after"], abs=1e-4)


def test_answers_have_the_new_tokens(parse):
    results = run(parse(**LORA, max_steps=60, save_strategy="no", eval_strategy="no"))
    for answer in results["answers"]:
        assert "<tool>" in answer["after"], answer["after"]


def test_a_model_is_trained_on_from_there(parse, base, tokenizer, tmp_path, caplog):
    run(parse(**LORA))
    caplog.clear()
    with caplog.at_level("INFO"):
        trainer = SFTTrainer(args=parse("second", model_name_or_path=str(tmp_path / "out"), **LORA))
    assert "the tokenizer already has '<tool>', '</tool>'" in caplog.text
    trainer.train()
    trainer.save_model()
    loaded = load_model(str(tmp_path / "second"))
    torch.testing.assert_close(compute_logits(loaded), compute_logits(trainer.model), atol=1e-5, rtol=1e-4)


def test_the_initial_rows_are_the_same_at_every_start(parse, tokenizer):
    first, second, other = (SFTTrainer(args=parse(seed=seed)).model.lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first[-2:], other[-2:])
    assert torch.allclose(first[-1], first[: len(tokenizer)].mean(0), atol=0.05)


def test_what_is_refused(parse, base, tmp_path):
    for tokens, message in (([""], "add_tokens: '' is empty"), (["<a>", "<a>"], "add_tokens: '<a>' is there twice")):
        with pytest.raises(SFTError, match=message):
            SFTConfig(add_tokens=tokens)
    refused = {
        "'<|im_end|>' is a special token of the tokenizer; remove it": {"add_tokens": ["<|im_end|>"]},
        "of the adapters, only LoRA trains new tokens": {"peft": {"peft_type": "LOHA", "target_modules": ["q_proj"]}},
        "sets trainable_token_indices of peft; remove one": {"peft": {"trainable_token_indices": [5]}},
        "modules_to_save all of embed_tokens; remove embed_tokens": {"peft": {"modules_to_save": ["embed_tokens"]}},
    }
    for message, keys in refused.items():
        with pytest.raises(SFTError, match=f"add_tokens:? .*{message}|add_tokens: {message}"):
            SFTTrainer(args=parse(**keys))
