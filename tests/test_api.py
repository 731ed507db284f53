"""The package from Python: SFTTrainer with rows in memory, and its parts with a plain transformers.Trainer."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from rich.console import Console
from safetensors.torch import load_file
from support.conversations import build_conversation
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

import sft_pipeline
from sft_pipeline import (
    Encoder,
    EvaluationCallback,
    PackingCollator,
    PaddingCollator,
    SFTConfig,
    SFTError,
    SFTTrainer,
    answer_prompts,
    build_template,
    encode_dataset,
    load_conversations,
    load_trained,
)
from sft_pipeline.config import parse_keys
from sft_pipeline.data.sources import load_source
from sft_pipeline.train import train

ROWS = [{"prompt": f"Say text {n} times.", "completion": "text " * n} for n in range(1, 9)]
HELD_OUT = [{"prompt": f"Say answer {n} times.", "completion": "answer " * n} for n in range(1, 4)]
SETTINGS = {
    "per_device_train_batch_size": 2,
    "learning_rate": 0.01,
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "num_proc": 1,
    "num_answers": 2,
    "num_instructions": 1,
    "max_new_tokens": 4,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}
LIBRARY_KEYS = {key.name for key in TrainingArguments.__dataclass_fields__.values()}


def make_args(folder: Path, **keys) -> SFTConfig:
    return SFTConfig(str(folder), **{**SETTINGS, **keys})


def train_model(folder: Path, model, rows, **options) -> SFTTrainer:
    keys = options.pop("keys", {})
    trainer = SFTTrainer(model, make_args(folder, **keys), train_dataset=rows, **options)
    trainer.train()
    trainer.save_model()
    return trainer


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    weights = read_weights(folder)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def trained(model_folder, tmp_path_factory) -> tuple[SFTTrainer, Path]:
    """Rows in memory, a model folder, and nothing else: the five lines of the README."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    args = SFTConfig(str(folder), max_length=1024, **SETTINGS)
    trainer = SFTTrainer(model=str(model_folder), train_dataset=ROWS, eval_dataset=HELD_OUT, args=args)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    return trainer, folder


def test_importing_the_package_loads_neither_torch_nor_transformers():
    code = "import sys, sft_pipeline; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_public_names_are_declared_alike_and_resolve():
    tree = ast.parse(Path(sft_pipeline.__file__).read_text(encoding="utf-8"))
    imported = {
        (str(node.module).removeprefix("sft_pipeline."), alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("sft_pipeline.")
        for alias in node.names
    }
    assert imported == {(module, name) for module, names in sft_pipeline.MODULES.items() for name in names}
    assert sft_pipeline.__all__ == sorted(name for _, name in imported) == dir(sft_pipeline)
    assert all(getattr(sft_pipeline, name).__doc__ for name in sft_pipeline.__all__)
    with pytest.raises(AttributeError, match="module 'sft_pipeline' has no attribute 'SFTTrainr'"):
        sft_pipeline.SFTTrainr  # noqa: B018


def test_five_lines_train_evaluate_and_save(trained, capsys):
    trainer, folder = trained
    assert trainer.state.global_step == 3 and trainer.args.max_length == 1024
    first, *_, last = trainer.evaluation.evaluations
    assert (first.step, last.step) == (0, 3) and last.complete
    assert [row["reference"] for row in last.table] == ["answer ", "answer answer ", None]
    model, template, _ = load_trained(str(folder))
    [answer] = answer_prompts(model, template, [build_conversation(["Say text 2 times."])], 4)
    assert answer.error is None and template.name == "chat"
    record = yaml.safe_load((folder / "run.yaml").read_text())
    assert record["learning_rate"] == 0.01 and record["eval_strategy"] == "epoch" and "train_data" not in record
    assert (folder / "preview.json").is_file() and (folder / "evaluation" / "step_000003.json").is_file()


def test_python_and_the_command_line_train_the_same_bits(trained, model_folder, tmp_path):
    for name, rows in {"train": ROWS, "eval": HELD_OUT}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    keys = {"model_name_or_path": str(model_folder), "output_dir": str(tmp_path / "out"), **SETTINGS}
    keys |= {f"{name}_data": [str(tmp_path / f"{name}.json")] for name in ("train", "eval")}
    results = train(parse_keys(keys), Console(quiet=True))
    trainer, folder = trained
    assert_same_weights(tmp_path / "out", read_weights(folder))
    assert results["eval_loss"]["after"] == trainer.state.log_history[-2]["eval_loss"]
    files = {path.name for path in folder.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} - files == {
        "results.json",
        "report.html",
        "trainer_state.json",
    }


def test_a_model_and_its_rows_may_be_objects(trained, model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    train_model(tmp_path, model, Dataset.from_list(ROWS), eval_dataset=Dataset.from_list(HELD_OUT))
    assert_same_weights(tmp_path, read_weights(trained[1]))


def test_encoded_rows_are_trained_as_they_are(trained, model_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    conversations, _ = load_source(ROWS)
    encoder = Encoder(build_template("chat", tokenizer))
    encoded = conversations.map(encoder, batched=True, remove_columns=conversations.column_names)
    # A selection that is not stored in the order of its rows.
    backwards = encoded.select(range(len(encoded) - 1, -1, -1)).select(range(len(encoded) - 1, -1, -1))
    as_list = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in encoded]
    encoded_by_list, _ = encode_dataset(load_conversations(ROWS), encoder)
    assert encoded_by_list.to_list() == encoded.select_columns(encoded_by_list.column_names).to_list()
    for name, rows in {"dataset": backwards, "list": as_list}.items():
        trainer = train_model(tmp_path / name, str(model_folder), rows)
        assert_same_weights(tmp_path / name, read_weights(trained[1]))
        assert trainer.data.train_stats.tokens == trained[0].data.train_stats.tokens
        assert trainer.data.train_stats.supervised_tokens == trained[0].data.train_stats.supervised_tokens


def test_a_model_may_be_trained_again(trained, model_folder, tmp_path):
    """As in a notebook whose cell is run twice. The first trainer's patches stay on the model."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    template = build_template("chat", AutoTokenizer.from_pretrained(model_folder))
    initial = {name: weight.clone() for name, weight in model.state_dict().items()}
    for name in ("first", "second"):
        model.load_state_dict(initial)
        train_model(tmp_path / name, model, ROWS, template=template)
        assert_same_weights(tmp_path / name, read_weights(trained[1]))
    prompt = build_conversation(["Say text."])
    [answer] = answer_prompts(model, template, [prompt], 4)
    ids = torch.tensor([template.encode_prompt(prompt)])
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert template.parse(generated[0, ids.shape[1] :].tolist())["content"] == answer.text


def test_held_out_rows_may_be_split_off(model_folder, tmp_path):
    args = make_args(tmp_path / "out", held_out=3, template="role", system_prompt="You are 冬瓜.")
    trainer = SFTTrainer(str(model_folder), args, train_dataset=ROWS)
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (5, 3)
    assert trainer.template.name == "role"
    assert trainer.evaluation.questions[0].conversation["messages"][0] == {"role": "system", "content": "You are 冬瓜."}


def test_plain_training_arguments_keep_their_values_and_get_our_defaults(model_folder, tmp_path):
    settings = {key: value for key, value in SETTINGS.items() if key in LIBRARY_KEYS and key != "logging_steps"}
    plain = TrainingArguments(str(tmp_path / "out"), **settings)
    trainer = SFTTrainer(str(model_folder), plain, train_dataset=ROWS, eval_dataset=HELD_OUT)
    assert (trainer.args.logging_steps, trainer.args.eval_strategy) == (500, "no")
    assert (trainer.args.max_length, trainer.args.num_answers) == (1024, 5)
    ours = trainer.args.to_dict()
    changed = {"remove_unused_columns", "ddp_find_unused_parameters", "dataloader_pin_memory"}
    changed.add("trackio_static_space_id")
    assert {key for key, value in plain.to_dict().items() if ours[key] != value} <= changed


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft
def test_adapters_by_peft_config_are_those_of_the_keys(model_folder, tmp_path):
    keys = {"lora": True, "lora_rank": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"]}
    by_keys = train_model(tmp_path / "keys", str(model_folder), ROWS, keys=keys)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    by_config = train_model(tmp_path / "config", str(model_folder), ROWS, peft_config=config)
    expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("keys", "config"))
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert by_keys.trainable_parameters == by_config.trainable_parameters > 0


def test_callbacks_are_called(model_folder, tmp_path):
    class Steps(TrainerCallback):
        seen = 0

        def on_step_end(self, *args, **kwargs):
            self.seen += 1

    steps = Steps()
    train_model(tmp_path, str(model_folder), ROWS, callbacks=[steps])
    assert steps.seen == 3


def test_a_trainer_may_evaluate_first_and_train_twice(model_folder, tmp_path):
    trainer = SFTTrainer(str(model_folder), make_args(tmp_path), train_dataset=ROWS, eval_dataset=HELD_OUT)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    first = trainer.evaluation.first
    assert sum(first.held_out["nll_nats"]) / sum(first.held_out["tokens"]) == pytest.approx(before)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


def test_training_resumes(model_folder, tmp_path):
    keys = {"save_strategy": "steps", "save_steps": 2}
    expected = train_model(tmp_path / "whole", str(model_folder), ROWS, keys=keys)
    assert expected.state.global_step == 3
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    trainer = SFTTrainer(str(model_folder), make_args(tmp_path / "resumed", **keys), train_dataset=ROWS)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    trainer.save_model()
    assert_same_weights(tmp_path / "resumed", read_weights(tmp_path / "whole"))
    # A checkpoint has the template too, so `chat` prompts its model as it was trained.
    settings = {"template": "chat", "chat_template_kwargs": {}, "system_prompt": None}
    assert json.loads((checkpoint / "sft_template.json").read_text()) == settings


def refuse(*parts: str, model=None, rows=ROWS, **options) -> None:
    with pytest.raises(SFTError) as caught:
        SFTTrainer(model, train_dataset=rows, **options)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_errors_name_what_is_wrong(model_folder, tiny_model, tmp_path):
    folder = str(model_folder)
    args = {"args": make_args(tmp_path / "out")}
    refuse("model: missing", **args)
    refuse("train_dataset: missing", model=folder, rows=None, **args)
    refuse("processing_class: missing", model=tiny_model, **args)
    refuse("train_dataset row 1: missing 'completion'", model=folder, rows=[ROWS[0], {"prompt": "x"}], **args)
    refuse("train_dataset row 0: expected an object", model=folder, rows=["a", "b"], **args)
    refuse("train_dataset: no rows", model=folder, rows=[], **args)
    refuse("train_dataset: cannot be read, it is of type DatasetDict", model=folder, rows=DatasetDict(), **args)
    refuse(
        "eval_dataset row 0: no answer",
        model=folder,
        eval_dataset=[{"messages": [{"role": "user", "content": "x"}]}],
        **args,
    )
    refuse("nowhere.json: no such file", model=folder, rows="nowhere.json", **args)
    held_out = make_args(tmp_path / "out", held_out=2)
    refuse("held_out and eval_dataset are both set", model=folder, args=held_out, eval_dataset=HELD_OUT)
    lora = make_args(tmp_path / "out", lora=True)
    template = build_template("chat", AutoTokenizer.from_pretrained(folder))
    refuse("processing_class: the Template", model=folder, template=template, processing_class=template.tokenizer)
    refuse("lora and peft_config", model=folder, args=lora, peft_config=LoraConfig())
    best = make_args(tmp_path / "out", load_best_model_at_end=True, save_strategy="epoch")
    refuse("load_best_model_at_end needs held-out rows", model=folder, args=best)


def test_errors_of_encoded_rows(model_folder, tmp_path):
    folder, args = str(model_folder), {"args": make_args(tmp_path / "out")}
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, 7, 8, -100]}

    def refuse_labels(labels: list[int], *parts: str) -> None:
        rows = [row, {"input_ids": [5, 6, 7, 8], "labels": labels}]
        for given in (rows, Dataset.from_list(rows)):
            refuse(*parts, model=folder, rows=given, **args)

    refuse_labels([-100, -100, 7, 8], "train_dataset row 1: labels[2] is 7, not the id at 3", "labels[1:] + [-100]")
    refuse_labels([6, 7, 8, 2], "train_dataset row 1: labels[3] is 2, not the id at 4")
    refuse_labels([6, 7, 8], "train_dataset row 1: has 4 input_ids and 3 labels")
    refuse("row 1: has 0 input_ids and 0 labels", model=folder, rows=[row, {"input_ids": [], "labels": []}], **args)
    refuse("no row has a supervised token", model=folder, rows=[{"input_ids": [5, 6], "labels": [-100, -100]}], **args)
    for lengths in ([3], [4, 1], [2, 2, -1], []):
        refuse(
            "train_dataset row 1: its sequence_lengths do not add up to its number of input_ids",
            model=folder,
            rows=[row | {"sequence_lengths": [4]}, row | {"sequence_lengths": lengths}],
            **args,
        )
    for lengths in ([0, 4], [4, 0], [2, 3, -1]):
        refuse(
            "train_dataset row 1: its sequence_lengths must be 1 or more",
            model=folder,
            rows=[row, row | {"sequence_lengths": lengths}, row],
            **args,
        )
    refuse(
        "train_dataset row 1: missing 'labels', which the first row",
        model=folder,
        rows=[row, {"input_ids": [5]}],
        **args,
    )
    # The last label of a sequence that is not the last of its row.
    two = {"input_ids": [5, 6, 7, 8], "labels": [6, 7, 8, -100], "sequence_lengths": [2, 2]}
    refuse("train_dataset row 0: labels[1] is 7, not the id at 2", model=folder, rows=[two], **args)
    refuse("encode both or none", model=folder, rows=[row], eval_dataset=HELD_OUT, **args)
    refuse("encode both or none", model=folder, rows=ROWS, eval_dataset=[row], **args)
    refuse("held_out: rows that are encoded", model=folder, rows=[row], args=make_args(tmp_path / "out", held_out=1))


def test_a_folder_that_holds_a_run_is_refused_when_training_starts(trained, model_folder, tmp_path):
    trainer = SFTTrainer(str(model_folder), make_args(trained[1]), train_dataset=ROWS)
    with pytest.raises(SFTError, match="already holds a run"):
        trainer.train()


def build_plain_trainer(folder: Path, model_folder: Path, collator, rows: Dataset, held_out: Dataset) -> Trainer:
    settings = {key: value for key, value in SETTINGS.items() if key in LIBRARY_KEYS}
    args = TrainingArguments(
        str(folder), **settings, eval_strategy="steps", eval_steps=3, remove_unused_columns=False,
        train_sampling_strategy="sequential", per_device_eval_batch_size=1, optim="sgd",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    data_collator = collator(model)
    return Trainer(model, args, data_collator=data_collator, train_dataset=rows, eval_dataset=held_out)


@pytest.mark.parametrize("packing", [False, True])
def test_collator_and_callback_serve_a_plain_trainer(packing, model_folder, tmp_path):
    """They train the steps of SFTTrainer."""
    template = build_template("chat", AutoTokenizer.from_pretrained(model_folder))
    rows, held_out = (
        load_source(part)[0].map(Encoder(template), batched=True, remove_columns=["conversation", "origin"])
        for part in (ROWS, HELD_OUT)
    )
    rows, held_out = (part.select_columns(["input_ids", "labels"]) for part in (rows, held_out))

    def build_collator(model):
        return PackingCollator(model) if packing else PaddingCollator(template.tokenizer.pad_token_id)

    plain = build_plain_trainer(tmp_path / "plain", model_folder, build_collator, rows, held_out)
    conversations = load_conversations(HELD_OUT)
    evaluation = EvaluationCallback(plain, template, conversations, num_answers=2, num_instructions=1, max_new_tokens=4)
    plain.add_callback(evaluation)
    plain.train()
    keys = {"packing": packing, "train_sampling_strategy": "sequential", "optim": "sgd"}
    ours = SFTTrainer(
        str(model_folder), make_args(tmp_path / "ours", **keys), train_dataset=rows, eval_dataset=held_out
    )
    ours.train()
    losses = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (plain, ours)]
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], abs=1e-5)
    for name, weight in plain.model.state_dict().items():
        torch.testing.assert_close(weight, ours.model.state_dict()[name], rtol=1e-4, atol=1e-5)
    [results] = evaluation.evaluations
    assert [row["reference"] for row in results.table] == ["answer ", "answer answer ", None]
    assert results.metrics["answers"] == 2 and "eval_stop_rate" in plain.state.log_history[-2]
    stored = json.loads((tmp_path / "plain" / "evaluation" / "step_000003.json").read_text())
    assert stored["table"] == results.table
