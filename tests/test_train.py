"""Whole runs on a tiny model: results, repeating, resuming and what is saved."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from support.training_runs import EVALUATED_RUN, run_train
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_pipeline.cli import main
from sft_pipeline.config import parse_config
from sft_pipeline.data.chat_templates import build_template
from sft_pipeline.data.messages import add_system_prompt, parse_conversation, split_answer
from sft_pipeline.data.pipeline import load_splits
from sft_pipeline.inference.answers import answer_prompts
from sft_pipeline.runs.output_dir import EVALUATION_DIR, RESULTS_FILE, RUN_FILE, TEMPLATE_FILE
from sft_pipeline.train import train
from sft_pipeline.utils.errors import SFTError

SYSTEM = "You are 冬瓜."
WORDS = ["text", "user", "answer", "system", "question"]
STEPS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """40 rows of uneven length."""
    rows = [
        {"instruction": f"Say {word} {count} times.", "input": "", "output": " ".join([word] * count) + "."}
        for count in range(1, 9)
        for word in WORDS
    ]
    file = tmp_path_factory.mktemp("data") / "rows.json"
    file.write_text(json.dumps(rows))
    return file


@pytest.fixture(scope="module")
def config(data, model_folder, tmp_path_factory) -> Path:
    keys = {
        **EVALUATED_RUN,
        "model_name_or_path": str(model_folder),
        "train_data": str(data),
        "held_out": 6,
        "system_prompt": SYSTEM,
        "max_length": 128,
        "num_answers": 3,
        "num_instructions": 2,
        "max_new_tokens": 6,
        "max_steps": STEPS,
        "gradient_accumulation_steps": 2,
        "seed": 7,
    }
    file = tmp_path_factory.mktemp("config") / "tiny.yaml"
    file.write_text(yaml.safe_dump(keys, allow_unicode=True))
    return file


@pytest.fixture(scope="module")
def run(config, tmp_path_factory) -> tuple[Path, dict]:
    """The uninterrupted run that most tests look at: its folder and its results."""
    folder = tmp_path_factory.mktemp("run") / "out"
    return folder, run_train(config, "--output_dir", str(folder))


def curve(results: dict) -> list[tuple]:
    return [(e["step"], e.get("loss"), e.get("eval_loss"), e.get("grad_norm")) for e in results["loss_curve"]]


def test_results_are_complete_and_on_disk(run, config):
    folder, results = run
    assert json.loads((folder / RESULTS_FILE).read_text()) == json.loads(json.dumps(results))
    assert results["eval_loss"]["after"] < results["eval_loss"]["before"]
    assert results["steps"] == STEPS and results["seed"] == 7
    steps = [e["loss"] for e in results["loss_curve"] if "loss" in e]
    assert len(steps) == STEPS and results["train_loss"] == pytest.approx(sum(steps) / STEPS, abs=1e-4)
    assert results["tokens_per_second"] > 0 and results["peak_memory_gib"] > 0 and results["seconds"] > 0
    parts = results["seconds_by_part"]
    names = "reading rows, encoding rows, loading the model, training, held-out loss, answering, saving"
    assert ", ".join(parts) == names and min(parts.values()) > 0
    during_training = sum(parts[name] for name in ("training", "held-out loss", "answering", "saving"))
    assert during_training > 0.9 * results["seconds"]
    assert set(results["versions"]) >= {"sft_pipeline", "torch", "transformers", "datasets", "accelerate"}
    assert results["config"]["learning_rate"] == 0.01 and results["config"]["template"] == "role"
    assert results["rows"]["train"]["kept"] == 34 and results["rows"]["held_out"]["kept"] == 6
    evaluated = [(e["step"], e["eval_loss"]) for e in results["loss_curve"] if "eval_loss" in e]
    assert [step for step, _ in evaluated] == [0, 2, 4]
    assert results["eval_loss"] == {"before": evaluated[0][1], "after": evaluated[-1][1]}


def test_answers_are_of_held_out_prompts_before_and_after(run, config):
    _, results = run
    _, held_out = load_splits(parse_config(str(config), []))
    conversations = [parse_conversation(text)["messages"] for text in held_out["conversation"][:3]]
    prompts = [messages[-2]["content"] for messages in conversations]
    assert [answer["prompt"] for answer in results["answers"]] == prompts
    for answer in results["answers"]:
        assert answer.keys() >= {"prompt", "before", "after", "stopped", "stopped_before", "reference"}
        assert isinstance(answer["stopped"], bool)
    assert [answer["reference"] for answer in results["answers"]] == [m[-1]["content"] for m in conversations]
    assert any(answer["before"] != answer["after"] for answer in results["answers"])
    share = results["before_and_after"]["stop_rate"]
    assert share["before"] == sum(answer["stopped_before"] for answer in results["answers"]) / 3
    assert share["after"] == sum(answer["stopped"] for answer in results["answers"]) / 3


def test_the_first_row_and_the_answers_are_shown(config, tmp_path):
    console = Console(record=True, width=200, quiet=False, file=open(tmp_path / "shown", "w"))  # noqa: SIM115
    with console.file:
        train(parse_config(str(config), ["--output_dir", str(tmp_path / "out"), "--max_steps", "1"]), console)
    output = console.export_text()
    assert "first training row" in output and "the stop token" in output and SYSTEM in output
    assert "held-out loss" in output and "before" in output and "after" in output
    assert f"./launch.sh chat {tmp_path / 'out'}" in output


def test_run_yaml_repeats_the_run(run, tmp_path):
    folder, results = run
    assert yaml.safe_load((folder / RUN_FILE).read_text())["use_cpu"] is True
    again = run_train(folder / RUN_FILE, "--output_dir", str(tmp_path / "again"))
    assert curve(again) == curve(results)
    assert again["answers"] == results["answers"]


def test_run_yaml_keeps_values_that_are_the_librarys_defaults_but_not_ours(config, tmp_path):
    """logging_steps is 500 in TrainingArguments and 10 here; an overwrite must not repeat itself."""
    keys = ["--output_dir", str(tmp_path / "out"), "--logging_steps", "500", "--eval_on_start", "false"]
    run_train(config, *keys, "--overwrite_output_dir", "--max_steps", "1")
    args = parse_config(str(tmp_path / "out" / RUN_FILE), [])
    assert args.logging_steps == 500 and args.eval_on_start is False
    assert args.overwrite_output_dir is False


def test_saved_folder_loads_plainly_and_answers_the_same(run, config):
    folder, results = run
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    _, held_out = load_splits(parse_config(str(config), []))
    conversations = [add_system_prompt(parse_conversation(text), SYSTEM) for text in held_out["conversation"][:3]]
    prompts = [split_answer(conversation)[0] for conversation in conversations]
    answers = answer_prompts(model, build_template("role", tokenizer), prompts, 6)
    assert [answer.text for answer in answers] == [answer["after"] for answer in results["answers"]]
    assert [answer.stopped for answer in answers] == [answer["stopped"] for answer in results["answers"]]


def test_saved_chat_template_renders_what_was_trained(run, config):
    """The system prompt that was trained comes in by itself."""
    folder, _ = run
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = build_template("role", tokenizer)
    conversation = parse_conversation(load_splits(parse_config(str(config), []))[0][0]["conversation"])
    with_system = add_system_prompt(conversation, SYSTEM)
    [[sequence]] = template.render([with_system])
    trained = tokenizer.decode([token for span in sequence.spans for token in span.ids])
    assert tokenizer.apply_chat_template(conversation["messages"], tokenize=False) == trained
    prompt = tokenizer.apply_chat_template(conversation["messages"][:-1], tokenize=False, add_generation_prompt=True)
    assert prompt == tokenizer.decode(template.encode_prompt(split_answer(with_system)[0]))
    settings = {"template": "role", "chat_template_kwargs": {}, "system_prompt": SYSTEM}
    assert json.loads((folder / TEMPLATE_FILE).read_text()) == settings


def test_stop_and_pad_ids_are_saved_everywhere(run):
    folder, _ = run
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    for holder in (tokenizer, model.config, model.generation_config):
        assert (holder.eos_token_id, holder.pad_token_id) == (end, pad)


def test_without_held_out_rows_there_is_no_evaluation(config, tmp_path):
    """And with padded batches and the tokenizer's own template."""
    keys = ["--held_out", "0", "--packing", "false", "--template", "chat", "--max_steps", "1", "--save_strategy", "no"]
    results = run_train(config, "--output_dir", str(tmp_path / "out"), *keys)
    assert results["eval_loss"] == {"before": None, "after": None}
    assert results["answers"] == [] and results["before_and_after"] == {} and results["rows"]["held_out"] is None
    assert results["metrics"] is None and not (tmp_path / "out" / EVALUATION_DIR).exists()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert SYSTEM in tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)


@pytest.mark.parametrize("key", ["packing", "share_prefixes"])
def test_packed_and_padded_runs_are_the_same_run(key, run, config, tmp_path, caplog):
    with caplog.at_level("INFO", logger="sft_pipeline"):
        other = run_train(config, "--output_dir", str(tmp_path / "out"), f"--{key}", "false")
    for step, other_step in zip(curve(run[1]), curve(other), strict=True):
        assert [x for x in step if x is not None] == pytest.approx([x for x in other_step if x is not None], rel=2e-3)
    assert f"{key}: false" in caplog.text


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("key", ["activation_checkpointing", "gradient_checkpointing"])
def test_activation_checkpointing_changes_no_loss(key, run, config, tmp_path):
    results = run_train(config, "--output_dir", str(tmp_path / "out"), f"--{key}", "true")
    for expected, step in zip(curve(run[1]), curve(results), strict=True):
        assert [x for x in expected if x is not None] == pytest.approx([x for x in step if x is not None], abs=1e-6)


def test_a_budget_of_tokens_changes_no_loss(run, config, tmp_path, caplog):
    """The rows of a step stay those of per_device_train_batch_size x gradient_accumulation_steps."""
    with caplog.at_level("INFO", logger="sft_pipeline"):
        results = run_train(config, "--output_dir", str(tmp_path / "out"), "--tokens_per_batch", "128")
    for expected, step in zip(curve(run[1]), curve(results), strict=True):
        assert [x for x in expected if x is not None] == pytest.approx([x for x in step if x is not None], rel=5e-5)
    assert "packed rows: no padding" in caplog.text


def test_the_best_model_is_saved_and_training_stops_early(config, tmp_path):
    keys = ["--load_best_model_at_end", "true", "--early_stopping_patience", "1", "--eval_steps", "1"]
    keys += ["--save_steps", "1", "--learning_rate", "0.3", "--max_steps", "8"]
    results = run_train(config, "--output_dir", str(tmp_path / "out"), *keys)
    losses = [e["eval_loss"] for e in results["loss_curve"] if "eval_loss" in e and e["step"]]
    assert results["steps"] < 8
    assert results["eval_loss"]["after"] == pytest.approx(min(losses), rel=1e-6)


def test_a_dry_run_reports_and_writes_nothing(config, tmp_path, capsys):
    main(["train", str(config), "--dry_run", "--output_dir", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"dry run: 34 rows, {STEPS} steps, ") for line in lines)
    assert any("first training row" in line for line in lines) and not (tmp_path / "out").exists()


def test_a_dry_run_ends_with_the_error_of_the_run(config, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(SystemExit) as exit_info:
        main(["train", str(config), "--dry_run", "--output_dir", str(tmp_path / "out")])
    assert exit_info.value.code == 2 and f"output_dir {tmp_path / 'out'}" in capsys.readouterr().err


# Resuming.


@pytest.fixture
def interrupted(run, tmp_path) -> Path:
    """The run's folder as it was when it was killed after step 2."""
    folder = Path(shutil.copytree(run[0], tmp_path / "interrupted"))
    shutil.rmtree(folder / "checkpoint-4")
    for file in folder.iterdir():
        if file.is_file() and file.name != RUN_FILE:
            file.unlink()
    return folder


@pytest.mark.parametrize("key", ["true", "named"])
def test_a_resumed_run_ends_with_the_same_bits(key, interrupted, run, config):
    folder, results = run
    file = interrupted / EVALUATION_DIR / "step_000000.json"
    first_evaluation = json.loads(file.read_text())
    first_evaluation["table"][0]["answer"] = "kept from the first start"
    file.write_text(json.dumps(first_evaluation))
    run_yaml = (interrupted / RUN_FILE).read_bytes()
    checkpoint = "true" if key == "true" else str(interrupted / "checkpoint-2")
    resumed = run_train(config, "--output_dir", str(interrupted), "--resume_from_checkpoint", checkpoint)

    expected, weights = (load_file(path / "model.safetensors") for path in (folder, interrupted))
    assert expected.keys() == weights.keys() and all(torch.equal(expected[name], weights[name]) for name in expected)
    assert resumed["steps"] == STEPS
    assert resumed["eval_loss"] == results["eval_loss"]
    assert [entry for entry in curve(resumed) if entry[1]] == [entry for entry in curve(results) if entry[1]]
    assert resumed["answers"][0]["before"] == "kept from the first start"
    assert [row["after"] for row in resumed["answers"]] == [row["after"] for row in results["answers"]]
    assert (interrupted / RUN_FILE).read_bytes() == run_yaml


def test_resuming_into_another_folder_makes_it(interrupted, config, tmp_path):
    keys = ["--output_dir", str(tmp_path / "other"), "--resume_from_checkpoint", str(interrupted / "checkpoint-2")]
    assert run_train(config, *keys)["steps"] == STEPS
    assert (tmp_path / "other" / RUN_FILE).is_file()


@pytest.mark.parametrize("exists", [True, False])
def test_nothing_to_resume(exists, config, tmp_path):
    folder = tmp_path / "out"
    if exists:
        folder.mkdir()
    with pytest.raises(SFTError, match=f"^output_dir {folder}: no checkpoint to resume from; leave --resume_from"):
        run_train(config, "--output_dir", str(folder), "--resume_from_checkpoint", "true")


def test_a_named_checkpoint_that_is_not_there(config, tmp_path):
    keys = ["--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint", str(tmp_path / "checkpoint-9")]
    with pytest.raises(SFTError, match=r"checkpoint-9: no such folder; give a checkpoint-N folder, or true$"):
        run_train(config, *keys)
    assert not (tmp_path / "out").exists()
