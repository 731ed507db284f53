"""QLoRA: adapters on weights in 4 and 8 bits, against peft's own forward on the same weights; merges and refusals."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from support.causal_models import tiny
from support.processes import run_ranks
from support.resuming import names
from support.trees import build_row
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, Qwen3Config

from sft_pipeline.commands.export import export_model
from sft_pipeline.commands.verify_resume import compare_checkpoints
from sft_pipeline.config import parse_config
from sft_pipeline.data.packing import pack_rows
from sft_pipeline.data.padding import PaddingCollator
from sft_pipeline.inference.answers import answer_prompts
from sft_pipeline.kernels.cpu_layer_training import use_fused_layers
from sft_pipeline.model.loading import load_model
from sft_pipeline.model.loss_forward import patch_loss_forward
from sft_pipeline.model.packed_attention import find_packing_obstacle, use_packed_attention
from sft_pipeline.model.quantization import QUANTIZATION_FILE, dequantize_base, set_up_quantized_layers
from sft_pipeline.runs.trained_model import load_trained
from sft_pipeline.train import train
from sft_pipeline.training.memory_estimate import estimate_memory
from sft_pipeline.training.sft_trainer import SFTTrainer
from sft_pipeline.utils.errors import SFTError

peft = pytest.importorskip("peft", reason="the extra `lora` is not installed")
nn = pytest.importorskip("bitsandbytes", reason="the extra `qlora` is not installed").nn
# peft 0.21 still asks transformers 5.23 under the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
KINDS = {"load_in_4bit": NF4 | {"bnb_4bit_compute_dtype": torch.float32}, "load_in_8bit": {"load_in_8bit": True}}
FAMILIES = {"Llama": LlamaConfig, "Qwen3": Qwen3Config}
QUANTIZED = {"load_in_4bit": nn.Linear4bit, "load_in_8bit": nn.Linear8bitLt}
ADAPTERS = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
# Sequences that share 5 tokens, two of them 8; the second row has two.
ROWS = [
    build_row(([5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [False] * 4 + [True] * 6)),
    build_row(
        ([5, 6, 7, 8, 9, 10, 11, 12, 20, 21, 22], [False] * 5 + [True] * 6),
        ([5, 6, 7, 8, 9, 30, 31, 32], [False] * 3 + [True] * 5),
    ),
]


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> dict[str, str]:
    """Folders of tiny models, with weights large enough that their activations differ by row."""
    folder = tmp_path_factory.mktemp("families")
    for name, config in FAMILIES.items():
        tiny(config, initializer_range=0.3).save_pretrained(folder / name)
    return {name: str(folder / name) for name in FAMILIES}


def add_adapters(model):
    """The same adapters at each call, which change what the model computes."""
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(**ADAPTERS))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model


def load_quantized(folder: str, kind: str):
    model = load_model(folder, quantization_config=BitsAndBytesConfig(**KINDS[kind]))
    set_up_quantized_layers(model)
    return model


def find_quantized(model) -> list[torch.nn.Module]:
    return [module for module in model.modules() if isinstance(module, tuple(QUANTIZED.values()))]


def compute_grads(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_of_a_tree_are_those_of_peft_on_padded_rows(family, kind, families):
    config = BitsAndBytesConfig(**KINDS[kind])
    base = AutoModelForCausalLM.from_pretrained(families[family], quantization_config=config)
    reference = add_adapters(base).train()  # int8 layers round their inputs in evaluation mode
    padded = PaddingCollator(0, 1)(ROWS)
    logits = reference(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits
    targets = padded["shift_labels"].flatten()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum") / 7
    expected.backward()

    model = load_quantized(families[family], kind)
    assert find_packing_obstacle(model) is None and patch_loss_forward(model) is None
    use_packed_attention(model)
    model = add_adapters(model).train()
    assert use_fused_layers(model) == 0 and len(find_quantized(model)) == 14
    loss = model(**pack_rows(ROWS), num_items_in_batch=7).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    grads, expected_grads = compute_grads(model), compute_grads(reference)
    assert grads.keys() == expected_grads.keys() and len(grads) == 28
    for name, grad in expected_grads.items():
        assert (grads[name] - grad).abs().max() <= 1e-4 * grad.abs().max().clamp_min(1e-3), name


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_computes_what_training_does(kind, families, monkeypatch):
    """bitsandbytes would round the inputs of int8 layers, and change the layout of nf4 weights on some CPUs."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model, rows = load_quantized(families["Llama"], kind), torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    with torch.no_grad():
        trained, evaluated = model.train()(rows).logits, model.eval()(rows).logits
        torch.testing.assert_close(evaluated, trained, rtol=0, atol=0)
        torch.testing.assert_close(model(rows[:1]).logits, trained[:1], rtol=1e-5, atol=1e-5)
        plain = dequantize_base(model, torch.float32)
        assert not find_quantized(plain)
        torch.testing.assert_close(plain(rows).logits, trained, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_stay_when_their_base_is_dequantized(kind, families):
    model, rows = add_adapters(load_quantized(families["Llama"], kind)).eval(), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = model(rows).logits
        plain = dequantize_base(model, torch.float32).eval()
        assert all(p.dtype == torch.float32 for p in plain.parameters())
        torch.testing.assert_close(plain(rows).logits, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(plain.merge_and_unload()(rows).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def config(write_config, tmp_path) -> Path:
    keys = {"held_out": 3, "lora": True, "lora_rank": 4, "lora_alpha": 8, "learning_rate": 0.05, "max_steps": 4}
    keys |= {"num_answers": 1, "num_instructions": 0, "max_new_tokens": 4, "output_dir": str(tmp_path / "out")}
    return write_config(tmp_path, rows=11, **keys)


def run(config, *overrides):
    return train(parse_config(str(config), list(overrides)), Console(quiet=True))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 9)[None]).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_bit_by_bit_and_every_way_to_load_it_agrees(kind, config, model_folder, tmp_path):
    quantized, saving = f"--{kind}=true", ("--save_strategy=steps", "--save_steps=2")
    results = run(config, quantized, *saving)
    assert results["eval_loss"]["after"] < results["eval_loss"]["before"]
    out = tmp_path / "out"
    run(
        config,
        quantized,
        *saving,
        f"--resume_from_checkpoint={out / 'checkpoint-2'}",
        f"--output_dir={tmp_path / 're'}",
    )
    count, different = compare_checkpoints(out / "checkpoint-4", tmp_path / "re" / "checkpoint-4")
    assert count > 50 and different == []

    assert all("lora_" in name for name in load_file(out / "adapter_model.safetensors"))
    quantized_base = load_quantized(str(model_folder), kind)
    expected = logits(peft.PeftModel.from_pretrained(quantized_base, str(out)))
    on_plain_base = logits(peft.PeftModel.from_pretrained(load_model(str(model_folder)), str(out)))
    assert (on_plain_base - expected).abs().max() > 1e-4  # what a loader that forgets the quantization computes

    run(config, quantized, "--lora_merge=true", f"--output_dir={tmp_path / 'merged'}")
    merged_files = names(tmp_path / "merged")
    assert "model.safetensors" in merged_files and not {"adapter_config.json", QUANTIZATION_FILE} & {*merged_files}
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    export_model(str(out), tmp_path / "exported")
    for folder in ("out", "out/checkpoint-4", "merged", "exported"):
        model = load_model(str(tmp_path / folder))
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)

    model, template, _ = load_trained(str(out))
    answers = json.loads((out / "results.json").read_text())["answers"]
    prompts = [{"messages": [{"role": "user", "content": answer["prompt"]}]} for answer in answers]
    texts = [answer.text for answer in answer_prompts(model, template, prompts, 4)]
    assert texts == [answer["after"] for answer in answers]


def test_packed_checkpointed_and_padded_runs_agree(config, tmp_path):
    losses = []
    for number, override in enumerate(("packing=true", "packing=false", "activation_checkpointing=true")):
        results = run(config, "--load_in_4bit=true", f"--{override}", f"--output_dir={tmp_path / str(number)}")
        losses.append(results["eval_loss"]["after"])
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16=true", "bfloat16"), ("dtype=bfloat16", "bfloat16"), ("fp16=false", "float32")]
)
def test_products_are_in_the_precision_of_the_run(precision, dtype, config, caplog):
    with caplog.at_level("INFO", logger="sft_pipeline"):
        trainer = SFTTrainer(args=parse_config(str(config), ["--load_in_4bit=true", f"--{precision}"]))
    assert any(message.endswith("on weights in 4 bits") for message in caplog.messages)
    layers = find_quantized(trainer.model)
    assert layers and {layer.compute_dtype for layer in layers} == {getattr(torch, dtype)}
    assert {layer.weight.quant_type for layer in layers} == {"nf4"} and layers[0].weight.quant_state.nested
    trainer.train()


def run_worker(process: int, config: str, folder: str) -> None:
    """Train in one of two processes, with each kind; write the adapters, and what the process holds of the base."""
    for kind in KINDS:
        overrides = [f"--{kind}=true", "--per_device_train_batch_size=2", "--ddp_backend=gloo", "--num_answers=0"]
        trainer = SFTTrainer(args=parse_config(config, [*overrides, f"--output_dir={folder}/{kind}"]))
        trainer.train()
        model = trainer.accelerator.unwrap_model(trainer.model)
        adapters = {name: p.tolist() for name, p in model.named_parameters() if p.requires_grad}
        report = {"adapters": adapters, "size": model.get_memory_footprint()}
        report["devices"] = [str(layer.weight.device) for layer in find_quantized(model)]
        Path(folder, f"{kind} {process}.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()


def test_the_base_of_a_qlora_over_several_processes_is_whole_on_each(config, tmp_path):
    """peft issue 2505: each process quantizes its own base on its own device, and they train as one does."""
    run_ranks(run_worker, 2, str(config), str(tmp_path))
    for kind in KINDS:
        overrides = [f"--{kind}=true", "--per_device_train_batch_size=4", "--num_answers=0"]
        trainer = SFTTrainer(args=parse_config(str(config), [*overrides, f"--output_dir={tmp_path / 'one' / kind}"]))
        trainer.train()
        for process in range(2):
            report = json.loads((tmp_path / f"{kind} {process}.json").read_text())
            assert report["devices"] == ["cpu"] * 14 and report["size"] == trainer.model.get_memory_footprint()
            for name, weight in trainer.model.named_parameters():
                if weight.requires_grad:
                    adapters = torch.tensor(report["adapters"][name])
                    torch.testing.assert_close(adapters, weight.data, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_knows_the_quantized_weights(kind, families, config):
    args = parse_config(str(config), [f"--{kind}=true"])
    with torch.device("meta"):
        sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
        empty = add_adapters(tiny(LlamaConfig, **sizes))
    weights = estimate_memory(empty, args, 64, packed=True).weights
    folder = Path(families["Llama"]).parent / f"wide {kind}"
    tiny(LlamaConfig, **sizes).save_pretrained(folder)
    footprint = add_adapters(load_quantized(str(folder), kind)).get_memory_footprint()
    dequantized = 4 * 128 * 256  # the largest layer, while it computes
    assert weights == pytest.approx(footprint + dequantized, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_quantized_is_one_line(kind, config, tiny_model, tokenizer, monkeypatch):
    def refuse(message, *overrides, **arguments):
        with pytest.raises(SFTError, match=message):
            args = parse_config(str(config), [f"--{kind}=true", *overrides])
            SFTTrainer(args=args, **arguments)

    refuse(f"{kind}: quantized weights are not trained, only adapters on them; set lora: true", "--lora=false")
    refuse(f"{kind}: layers with quantized weights are not compiled; turn torch_compile off", "--torch_compile=true")
    refuse(
        "load_in_4bit and load_in_8bit are both set; remove one of them", "--load_in_4bit=true", "--load_in_8bit=true"
    )
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        refuse(f"{kind}: fsdp and deepspeed do not shard quantized weights here; turn one of them off")
    refuse(
        f"{kind}: the model is given as an object; load it with its quantization_config, or give its name",
        model=tiny_model,
        processing_class=tokenizer,
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refuse(rf"{kind}: true needs bitsandbytes; install it with `pip install 'sft_pipeline\[qlora\]'`$")


def test_a_quantized_model_given_as_an_object_is_trained_with_adapters(config, model_folder, tokenizer, tmp_path):
    args = ["--lora=false", "--num_answers=0"]
    for kind in KINDS:
        quantization_config = BitsAndBytesConfig(**KINDS[kind])
        model = AutoModelForCausalLM.from_pretrained(model_folder, quantization_config=quantization_config)
        with pytest.raises(SFTError, match="the model: quantized weights are not trained, only adapters on them"):
            SFTTrainer(model, parse_config(str(config), args), processing_class=tokenizer)
        config_of_run = parse_config(str(config), [*args, f"--output_dir={tmp_path / kind}"])
        trainer = SFTTrainer(model, config_of_run, processing_class=tokenizer, peft_config=peft.LoraConfig(**ADAPTERS))
        trainer.train()
        trainer.save_model()
        expected = logits(trainer.model)
        torch.testing.assert_close(logits(load_model(str(tmp_path / kind))), expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_is_saved_quantized_is_refused(config, model_folder, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder, quantization_config=BitsAndBytesConfig(**NF4))
    model.save_pretrained(tmp_path / "nf4")
    tokenizer.save_pretrained(tmp_path / "nf4")
    for method in ("bitsandbytes", "gptq", "awq"):
        file = tmp_path / "nf4" / "config.json"
        record = json.loads(file.read_text())
        record["quantization_config"]["quant_method"] = method
        file.write_text(json.dumps(record))
        message = rf"nf4: its weights are saved quantized \({method}\); give the unquantized model, with load_in_4bit"
        for override in ("--load_in_4bit=true", "--lora=false"):
            with pytest.raises(SFTError, match=message):
                run(config, f"--model_name_or_path={tmp_path / 'nf4'}", override)


def test_adapters_that_were_trained_on_quantized_weights_need_what_they_were_trained_with(
    config, tmp_path, monkeypatch
):
    run(config, "--load_in_4bit=true", "--num_answers=0")
    out = tmp_path / "out"
    file = out / QUANTIZATION_FILE
    with pytest.raises(SFTError, match="out: holds adapters, and they are not merged into quantized weights; `export`"):
        run(config, "--load_in_4bit=true", f"--model_name_or_path={out}", f"--output_dir={tmp_path / 'second'}")
    find_spec = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
        with pytest.raises(
            SFTError, match=f"trained on quantized weights and needs bitsandbytes; .*; or delete {file}"
        ):
            load_model(str(out))
    file.write_text("[]")
    with pytest.raises(SFTError, match=f"{file}: not as a run writes it .*; delete {file} to put the adapters on the"):
        load_model(str(out))
    file.unlink()
    load_model(str(out))


def test_keys_are_recorded(config):
    run(config, "--load_in_8bit=true", "--num_answers=0")
    record = yaml.safe_load((config.parent / "out" / "run.yaml").read_text())
    assert record["load_in_8bit"] is True and record["load_in_4bit"] is False
