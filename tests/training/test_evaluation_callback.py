"""Answers while training: what is asked, logged and kept, at what cost, and that training does not notice."""

import json
import math
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerControl
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sft_pipeline.config import parse_config
from sft_pipeline.data.chat_templates import build_template
from sft_pipeline.data.encode import build_input_ids_and_labels
from sft_pipeline.data.messages import add_system_prompt
from sft_pipeline.data.pipeline import load_conversations, prepare_data
from sft_pipeline.evaluation.bootstrap import compute_paired_difference
from sft_pipeline.evaluation.metrics.degeneration import is_loop
from sft_pipeline.evaluation.metrics.instruction_following import is_followed, load_instructions, sample_instructions
from sft_pipeline.evaluation.step_results import EvalPrompt, StepResults, compute_changes, join_answers
from sft_pipeline.inference.answers import answer_prompts
from sft_pipeline.reports.console_summary import print_results
from sft_pipeline.runs.output_dir import EVALUATION_DIR, RUN_FILE
from sft_pipeline.train import train
from sft_pipeline.training import evaluation_callback as callback_module
from sft_pipeline.training.builder import build_trainer
from sft_pipeline.training.evaluation_callback import (
    UNMEASURED,
    AnswerBudget,
    EvaluationCallback,
    build_questions,
    count_supervised_bytes,
    describe_results,
    select_first,
)
from sft_pipeline.utils.errors import SFTError

ROOT = Path(__file__).parents[2]
SYSTEM = "You are 冬瓜."
ROWS, ASKED, INSTRUCTIONS = 5, 4, 3


@pytest.fixture(scope="module")
def config(model_folder, tmp_path_factory) -> Path:
    """Evaluations at the steps 0, 2 and 4, checkpoints at 2 and 4; time enough for every question at each."""
    folder = tmp_path_factory.mktemp("config")
    rows = [
        {"instruction": f"Say {word} {count} times.", "input": "", "output": " ".join([word] * count) + "。"}
        for count in range(1, 9)
        for word in ("text", "答", "question")
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    keys = {
        "model_name_or_path": str(model_folder),
        "train_data": str(folder / "rows.json"),
        "held_out": ROWS,
        "template": "role",
        "system_prompt": SYSTEM,
        "num_answers": ASKED,
        "num_instructions": INSTRUCTIONS,
        "max_new_tokens": 6,
        "eval_answer_share": 1000,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "num_proc": 1,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(keys, allow_unicode=True))
    return file


def run_train(config: Path, folder: Path, *overrides: str) -> dict:
    return train(*parse_config(str(config), ["--output_dir", str(folder), *overrides]), Console(quiet=True))


@pytest.fixture(scope="module")
def run(config, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("run") / "out"
    return folder, run_train(config, folder)


def evaluations(folder: Path) -> dict[str, dict]:
    files = sorted((folder / EVALUATION_DIR).iterdir())
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


# What is asked and kept.


def test_a_file_an_evaluation(run):
    kept = evaluations(run[0])
    assert list(kept) == ["step_000000", "step_000002", "step_000004"]
    for name, one in kept.items():
        assert (one["step"], one["complete"], len(one["table"])) == (int(name[-6:]), True, ASKED + INSTRUCTIONS)
        assert one["seconds"] > 0


def test_the_table_asks_held_out_prompts_and_instructions_and_has_the_models_answers(run, config):
    folder, _ = run
    _, held_out = load_conversations(parse_config(str(config), [])[0])
    rows, told = held_out["messages"][:ASKED], sample_instructions(INSTRUCTIONS)
    prompts = [row[-2]["content"] for row in rows] + [one.prompt for one in told]
    template = build_template("role", AutoTokenizer.from_pretrained(folder))
    asked = [add_system_prompt([{"role": "user", "content": prompt}], SYSTEM) for prompt in prompts]
    expected = answer_prompts(AutoModelForCausalLM.from_pretrained(folder), template, asked, 6)
    table = evaluations(folder)["step_000004"]["table"]
    assert [row["prompt"] for row in table] == prompts
    assert [row["reference"] for row in table] == [row[-1]["content"] for row in rows] + [None] * INSTRUCTIONS
    assert [row["instruction"] for row in table] == [None] * ASKED + [one.id for one in told]
    found = [(row["answer"], row["stopped"], row["tokens"], row["error"]) for row in table]
    assert found == [(one.text, one.stopped, one.tokens, None) for one in expected]
    assert [row["followed"] for row in table[:ASKED]] == [None] * ASKED
    assert [row["followed"] for row in table[ASKED:]] == [
        is_followed(one, row["answer"]) for one, row in zip(told, table[ASKED:])
    ]


def plain_figures(one: dict) -> dict[str, float]:
    """From the file alone, by the definitions; the metrics left out here have their own tests with their functions."""
    rows = [row for row in one["table"] if row["instruction"] is None]
    told = [row for row in one["table"] if row["instruction"]]
    nll, tokens, correct = (sum(one["held_out"][name]) for name in ("nll_nats", "tokens", "correct"))
    answers, references = [row["answer"] for row in rows], [row["reference"] for row in rows]
    return {
        "answers": len(rows),
        "instructions": len(told),
        "answer_errors": 0,
        "nll_nats_per_token": nll / tokens,
        "perplexity": math.exp(nll / tokens),
        "bits_per_byte": nll / math.log(2) / one["utf8_bytes"],
        "token_accuracy": correct / tokens,
        "stop_rate": sum(row["stopped"] for row in rows) / len(rows),
        "cap_rate": sum(not row["stopped"] for row in rows) / len(rows),
        "loop_rate": sum(map(is_loop, answers)) / len(rows),
        "bleu_percent": sacrebleu.corpus_bleu(answers, [references], tokenize="zh", force=True).score,
        "chrf_percent": sacrebleu.corpus_chrf(answers, [references]).score,
        "instructions_followed_rate": sum(row["followed"] for row in told) / len(told),
    }


def test_every_figure_can_be_computed_again_from_the_file(run):
    for one in evaluations(run[0]).values():
        for name, value in plain_figures(one).items():
            assert one["metrics"][name] == pytest.approx(value, rel=1e-12), name
        assert callback_module.compute_table_metrics(one["table"]).items() <= one["metrics"].items()
        assert one["metrics"].keys() >= {"rep_4_share", "distinct_2_share", "prompt_echo_share", "answer_length_ratio"}
        assert one["metrics"].keys() >= {
            "rouge_l_f1",
            "exact_match_rate",
            "word_f1",
            "instructions_followed_rate_language_en",
        }


def test_the_figures_are_logged_at_their_step_beside_the_loss(run):
    folder, results = run
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    logged = {entry["step"]: entry for entry in history if "eval_answers" in entry}
    losses = {entry["step"]: entry for entry in history if "eval_loss" in entry}
    for one in evaluations(folder).values():
        entry, loss = logged[one["step"]], losses[one["step"]]
        beside = {"nll_nats_per_token": "loss", "perplexity": "perplexity", "token_accuracy": "token_accuracy"}
        for name, value in one["metrics"].items():
            if name in beside:
                assert loss[f"eval_{beside[name]}"] == pytest.approx(value, rel=1e-12)
            else:
                assert entry[f"eval_{name}"] == value
        assert entry["eval_answer_seconds"] == pytest.approx(one["seconds"], abs=0.006)
    assert len(logged) == len(losses) == 3
    assert results["metrics"] == evaluations(folder)["step_000004"]["metrics"]


@pytest.mark.parametrize("train_on", ["all", "last"])
@pytest.mark.parametrize("name", ["role", "chat"])
def test_bytes_are_those_of_the_supervised_answers(name, train_on, tokenizer):
    template = build_template(name, tokenizer)
    talk = ["Hi", "Hello, 你好!", "Spell the stop token", "It is <|im_end|>.", "Bye", "再见"]
    messages = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(talk)]
    _, labels = build_input_ids_and_labels(template.render([messages], train_on)[0])
    answers = talk[1::2] if train_on == "all" else talk[-1:]
    assert count_supervised_bytes(labels, template) == sum(len(text.encode()) for text in answers)
    # An answer cut by the length limit has no stop token.
    cut = labels[: max(at for at, label in enumerate(labels) if label == template.stop_token_id)]
    assert count_supervised_bytes(cut, template) == count_supervised_bytes(labels, template)


def test_instructions_are_sampled_fairly():
    everything = sample_instructions(1000)
    assert sorted(one.id for one in everything) == sorted(one.id for one in load_instructions())
    groups = {(one.language, one.category) for one in load_instructions()}
    for count in range(1, 3 * len(groups) + 1):
        taken = [(one.language, one.category) for one in sample_instructions(count)]
        assert len(taken) == count
        assert max(map(taken.count, groups)) - min(map(taken.count, groups)) <= 1


# Errors in rows.


def with_positions(config: Path, folder: Path, positions: int) -> list[str]:
    """Overrides for a copy of the tiny model with so many positions."""
    source = Path(yaml.safe_load(config.read_text())["model_name_or_path"])
    shutil.copytree(source, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": positions}))
    return ["--model_name_or_path", str(folder), "--max_steps", "1", "--save_strategy", "no"]


def test_prompts_over_the_context_stand_in_the_table_with_their_error(config, tmp_path):
    lengths = []
    template = build_template(
        "role", AutoTokenizer.from_pretrained(yaml.safe_load(config.read_text())["model_name_or_path"])
    )
    sft = parse_config(str(config), [])[0]
    for question in build_questions(load_conversations(sft)[1], sft):
        lengths.append(len(template.encode_prompt(question.messages)))
    limit = sorted(lengths)[len(lengths) // 2] + 6
    results = run_train(config, tmp_path / "out", *with_positions(config, tmp_path / "model", limit))
    one = evaluations(tmp_path / "out")["step_000001"]
    refused = [length + 6 > limit for length in lengths]
    assert any(refused) and not all(refused)
    assert [row["error"] is not None for row in one["table"]] == refused
    for row in one["table"]:
        if row["error"]:
            assert row["error"].endswith(f"new ones exceed {limit}: shorten either") and row["answer"] == ""
    assert one["metrics"]["answer_errors"] == sum(refused)
    assert one["metrics"]["answers"] == ASKED - sum(refused[:ASKED])
    assert results["before_and_after"]["stop_rate"]["items"] == ASKED - sum(refused[:ASKED])
    assert [bool(one["error"]) for one in results["answers"]] == refused[:ASKED]


def test_a_model_that_cannot_generate_is_trained_all_the_same(config, tmp_path, monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise SFTError("Mamba: no")

    monkeypatch.setattr(callback_module, "answer_prompts", refuse)
    results = run_train(config, tmp_path / "out", "--max_steps", "1", "--save_strategy", "no")
    one = evaluations(tmp_path / "out")["step_000001"]
    assert [row["error"] for row in one["table"]] == ["Mamba: no"] * (ASKED + INSTRUCTIONS)
    assert one["metrics"]["answers"] == 0 and one["metrics"]["bits_per_byte"] > 0
    assert list(results["before_and_after"]) == ["nll_nats_per_token"]


def test_parameters_in_parts_are_not_generated_with(trainer):
    trainer.is_fsdp_enabled = True
    found = trainer.answering._share(trainer.model, trainer.answering.questions[:2])
    assert [one.error for one in found] == [
        "parameters that are divided among processes (FSDP, ZeRO-3) are not generated with"
    ] * 2


def test_references_without_words_cost_no_run():
    rows = [{"instruction": None, "prompt": "p", "reference": "?!", "answer": "a", "stopped": True, "error": None}]
    metrics = callback_module.compute_table_metrics(rows)
    assert metrics["stop_rate"] == 1 and "bleu_percent" not in metrics


# Training does not notice.


@pytest.mark.parametrize(("dropout", "packing"), [(0.0, "true"), (0.2, "true"), (0.2, "false")])
def test_training_gives_the_same_bits_without_it(dropout, packing, config, tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(yaml.safe_load(config.read_text())["model_name_or_path"], model)
    settings = json.loads((model / "config.json").read_text()) | {"attention_dropout": dropout}
    (model / "config.json").write_text(json.dumps(settings))
    keys = ["--packing", packing, "--model_name_or_path", str(model), "--eval_steps", "1", "--max_steps", "3"]
    keys += ["--save_strategy", "no"]
    run_train(config, tmp_path / "with", *keys)
    assert len(evaluations(tmp_path / "with")) == 4
    monkeypatch.setattr(EvaluationCallback, "on_evaluate", lambda *args, **kwargs: None)
    run_train(config, tmp_path / "without", *keys)
    assert not (tmp_path / "without" / EVALUATION_DIR).exists()
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("with", "without"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    history = [
        json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in ("with", "without")
    ]
    losses = [[(e["loss"], e["grad_norm"]) for e in entries if "loss" in e] for entries in history]
    assert losses[0] == losses[1] and len(losses[0]) == 3


@pytest.fixture
def trainer(config, tmp_path, tiny_model, make_tokenizer):
    """A trainer with the callback as its `answering`, evaluated once."""
    sft, training = parse_config(str(config), ["--output_dir", str(tmp_path / "out"), "--report_to", "none"])
    template = build_template("role", make_tokenizer())
    data = prepare_data(sft, template)
    trainer = build_trainer(sft, training, tiny_model, template, data)
    trainer.answering = EvaluationCallback(trainer, template, data.held_out_messages, sft)
    trainer.add_callback(trainer.answering)
    trainer.evaluate()
    return trainer


def state_of(model: torch.nn.Module) -> dict:
    """Everything of a model and of the process that an evaluation could leave changed."""
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "attributes": {name: set(vars(module)) for name, module in model.named_modules()},
        "forwards": {name: vars(module).get("forward") for name, module in model.named_modules()},
        "config": model.config.to_dict() | {"attention": model.config._attn_implementation},
        "generation_config": model.generation_config.to_dict(),
        "parameters": {n: (p.requires_grad, p.data_ptr(), p.sum().item(), p.grad) for n, p in model.named_parameters()},
        "attention": set(ALL_ATTENTION_FUNCTIONS.keys()),
        "gradients": torch.is_grad_enabled(),
        "random": (random.getstate(), torch.get_rng_state().tolist(), str(np.random.get_state())),
    }


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_every_random_state_are_left_as_they_were(fails, trainer, monkeypatch):
    model = trainer.model.train()
    model.model.layers[1].eval()  # a frozen part keeps its mode
    model.model.embed_tokens.weight.requires_grad_(False)
    before = state_of(model)
    if fails:
        monkeypatch.setattr("sft_pipeline.inference.engine._check_layers", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.answering.on_evaluate(trainer.args, trainer.state, TrainerControl(), model=model)
    else:
        trainer.answering.on_evaluate(trainer.args, trainer.state, TrainerControl(), model=model)
        assert len(trainer.answering.evaluations) == 2
    assert state_of(model) == before


# Resuming and ending.


def interrupted(run: tuple[Path, dict], folder: Path) -> Path:
    """The run's folder as it was when it was killed between the evaluation at step 4 and the checkpoint there."""
    shutil.copytree(run[0], folder)
    shutil.rmtree(folder / "checkpoint-4")
    for file in folder.iterdir():
        if file.is_file() and file.name != RUN_FILE:
            file.unlink()
    (folder / EVALUATION_DIR / "best.json").write_text((folder / EVALUATION_DIR / "step_000004.json").read_text())
    return folder


@pytest.mark.parametrize("same_folder", [True, False])
def test_a_resumed_run_asks_nothing_twice(same_folder, run, config, tmp_path, monkeypatch):
    old = interrupted(run, tmp_path / "old")
    folder = old if same_folder else tmp_path / "new"
    asked = []
    plain = callback_module.answer_prompts
    counted = lambda *args, **key: asked.append(len(args[2])) or plain(*args, **key)  # noqa: E731
    monkeypatch.setattr(callback_module, "answer_prompts", counted)
    resumed = run_train(config, folder, "--resume_from_checkpoint", str(old / "checkpoint-2"))
    assert asked == [ASKED + INSTRUCTIONS]
    kept, whole = evaluations(folder), evaluations(run[0])
    assert kept.keys() == whole.keys()
    for name in ("step_000000", "step_000002"):
        assert kept[name] == whole[name]
    assert kept["step_000004"]["table"] == whole["step_000004"]["table"]
    assert resumed["before_and_after"] == run[1]["before_and_after"]
    assert resumed["config"]["eval_on_start"] is True
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [0, 2, 4]


def test_the_finished_model_is_always_asked_everything(config, tmp_path):
    """With no time for answers on the way, and a last step that is none of the evaluations'."""
    run_train(config, tmp_path / "out", "--max_steps", "3", "--eval_answer_share", "0")
    found = [(one["step"], one["complete"], len(one["table"])) for one in evaluations(tmp_path / "out").values()]
    assert found == [(0, True, 7), (2, False, 0), (3, True, 7)]


def test_the_best_model_has_a_file_of_its_own(config, tmp_path):
    # The greater loss is called the better one, so that the best model is not the last.
    keys = ["--load_best_model_at_end", "true", "--metric_for_best_model", "eval_loss", "--greater_is_better", "true"]
    results = run_train(config, tmp_path / "out", *keys)
    kept = evaluations(tmp_path / "out")
    losses = {one["step"]: one["metrics"]["nll_nats_per_token"] for name, one in kept.items() if name != "best"}
    best = max(list(losses)[1:], key=losses.get)
    assert list(losses) == [0, 2, 4] and best == 2
    assert kept["best"]["step"] == best and kept["best"]["table"] == kept["step_000002"]["table"]
    assert results["metrics"] == kept["best"]["metrics"]
    assert results["before_and_after"]["nll_nats_per_token"]["after"] == pytest.approx(losses[best], rel=1e-12)


def test_without_an_evaluation_at_step_0_there_is_no_before(config, tmp_path, capsys):
    results = run_train(config, tmp_path / "out", "--eval_on_start", "false", "--max_steps", "2")
    assert list(evaluations(tmp_path / "out")) == ["step_000002"]
    assert results["before_and_after"] == {} and results["metrics"]["answers"] == ASKED
    assert [one["before"] for one in results["answers"]] == [None] * ASKED
    print_results(results, "out", Console(width=80))
    shown = capsys.readouterr().out
    assert "after" in shown and "before" not in shown


# The budget.


@given(
    share=st.floats(0.01, 1),
    cost=st.floats(0.01, 10),
    intervals=st.lists(st.floats(0, 500), min_size=1, max_size=9),
)
def test_answers_on_the_way_stay_under_their_share(share, cost, intervals):
    """Whatever the intervals; the number never rises once there is one."""
    budget, counts = AnswerBudget(share), []
    budget.pay(50, 50 * cost, on_the_way=False)  # step 0 is not on the way
    for seconds in intervals:
        budget.training_seconds += seconds
        counts.append(budget.questions())
        budget.pay(counts[-1], counts[-1] * cost, on_the_way=True)
        assert budget.answer_seconds <= share * budget.training_seconds * (1 + 1e-9)
    begun = next((at for at, count in enumerate(counts) if count), len(counts))
    assert all(count <= counts[begun] for count in counts[begun:])
    assert begun == len(counts) or counts[begun] <= share * sum(intervals[: begun + 1]) / cost


def test_equal_intervals_ask_the_same_number():
    budget, counts = AnswerBudget(0.1), []
    budget.pay(10, 20.0, on_the_way=False)
    for _ in range(5):
        budget.training_seconds += 100.0
        counts.append(budget.questions())
        budget.pay(counts[-1], 2.0 * counts[-1], on_the_way=True)
    assert counts == [5] * 5


def test_what_cost_more_than_thought_is_paid_back():
    budget = AnswerBudget(0.1)
    budget.pay(10, 10.0, on_the_way=False)
    budget.training_seconds = 100.0
    assert budget.questions() == 10
    budget.pay(10, 40.0, on_the_way=True)
    budget.training_seconds = 300.0
    assert budget.questions() == 0
    budget.training_seconds = 600.0
    assert budget.questions() == 5


def test_an_unknown_cost_is_measured_on_a_few():
    assert AnswerBudget(0.1).questions() == UNMEASURED and AnswerBudget(0).questions() == 0


def evaluation(step: int, table: list, complete: bool = True, nll=(4.0, 6.0), tokens=(2.0, 3.0)) -> StepResults:
    return StepResults(step, complete, 3.0, {}, {"nll_nats": list(nll), "tokens": list(tokens)}, 9, table)


def test_a_resumed_run_goes_on_with_the_same_number():
    budget = AnswerBudget(0.1)
    for one in (evaluation(0, [{}] * 6), evaluation(2, [{}] * 3, complete=False)):
        budget.recall(one)
    budget.training_seconds = 1000.0
    assert budget.questions() == 3


@given(held_out=st.integers(0, 12), instructions=st.integers(0, 12), count=st.integers(0, 30))
def test_fewer_questions_are_the_first_of_both_kinds(held_out, instructions, count):
    rows = [EvalPrompt([], reference=str(at)) for at in range(held_out)]
    told = [EvalPrompt([], instruction=str(at)) for at in range(instructions)]
    asked = select_first(rows + told, count)
    kept = [one for one in asked if one.instruction is None]
    assert len(asked) == min(count, held_out + instructions)
    assert asked == rows[: len(kept)] + told[: len(asked) - len(kept)]
    if asked:
        assert abs(len(kept) - len(asked) * held_out / (held_out + instructions)) < 1


# Before and after.


def row(answered: str, stopped: bool = True, **more) -> dict:
    return {
        "instruction": None,
        "prompt": "p",
        "reference": "r",
        "answer": answered,
        "stopped": stopped,
        "error": None,
    } | more


LOOP = "again and " * 12


def test_changes_are_paired_differences_over_what_both_have():
    old = [row(LOOP, False), row("a"), row("b", error="too long"), row("c", False, prompt="other")]
    new = [row("x"), row("y"), row("z"), row("c")]
    instruction = load_instructions()[0]
    before, after = (
        evaluation(0, [*old, row(instruction.bad, instruction=instruction.id)]),
        evaluation(4, [*new, row(instruction.good, instruction=instruction.id)], nll=(2.0, 5.0)),
    )
    found = compute_changes(before, after)
    expected = compute_paired_difference([0, 1], [1, 1])
    stop = {"before": 0.5, "after": 1.0, "difference": 0.5, "low": expected.low, "high": expected.high, "items": 2}
    assert found["stop_rate"] == stop
    assert found["loop_rate"]["before"] == 0.5 and found["loop_rate"]["after"] == 0
    one = {"before": 0.0, "after": 1.0, "difference": 1.0, "low": None, "high": None, "items": 1}
    assert found["instructions_followed_rate"] == one
    loss = compute_paired_difference([4, 6], [2, 5], a_weights=[2, 3], b_weights=[2, 3])
    assert found["nll_nats_per_token"] == {
        "before": 2.0, "after": 1.4, "difference": pytest.approx(-0.6), "low": loss.low, "high": loss.high, "items": 2,
    }  # fmt: skip
    assert [one["before"] for one in join_answers(before, after)] == [LOOP, "a", "b"]


def test_a_diverged_loss_has_no_interval_and_other_rows_no_change():
    diverged = compute_changes(evaluation(0, []), evaluation(4, [], nll=(math.nan, 1.0)))["nll_nats_per_token"]
    assert math.isnan(diverged["after"]) and diverged["low"] is None and diverged["before"] == 2
    assert compute_changes(evaluation(0, []), evaluation(4, [], tokens=(2.0, 4.0))) == {}


def test_the_printed_table_fits_80_columns(capsys):
    changed = {"before": 0.0, "after": 1.0, "difference": 1.0, "low": 0.25, "high": 1.0, "items": 1000}
    loss = {"before": 13.0656, "after": 12.2367, "difference": -10.829, "low": -10.91, "high": -10.745, "items": 1000}
    metrics = {"nll_nats_per_token": loss} | dict.fromkeys(
        ("stop_rate", "loop_rate", "instructions_followed_rate"), changed
    )
    metrics["loop_rate"] = changed | {"low": None, "high": None}
    results = {
        "answers": [],
        "before_and_after": metrics,
        "steps": 9,
        "seconds": 9,
        "tokens_per_second": 9.0,
        "peak_memory_gib": 3,
    }
    print_results(results, "out", Console(width=80))
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) + line.count("复读机") * 3 <= 80 for line in lines)
    table = [" ".join(line.split()) for line in lines[:5]]
    assert table == [
        "before after change 95% interval of",
        "held-out loss, nats/token 13.066 12.237 -10.829 -10.910 to -10.745 1000",
        "answers that end on their own 0% 100% +100% +25% to +100% 1000",
        "answers in a loop 0% 100% +100% 1000",
        "instructions followed 0% 100% +100% +25% to +100% 1000",
    ]


def test_the_line_of_an_evaluation_says_how_many_were_asked(config, tmp_path, capsys):
    keys = ["--disable_tqdm", "false", "--max_steps", "3", "--eval_answer_share", "0", "--save_strategy", "no"]
    run_train(config, tmp_path / "out", *keys)
    shown = capsys.readouterr().out.splitlines()
    assert any(line.startswith("step 0: 4 answers, ") and "of 3 instructions followed; " in line for line in shown)
    assert "step 2: the first 0 of 7 questions; 0 s" in shown
    failed = StepResults(
        1, True, 2.0, {"answers": 0, "instructions": 0, "answer_errors": 1}, {}, 0, [row("", error="too long")]
    )
    assert describe_results(failed, 1) == "1 not answered (too long); 2 s"


def test_where_nothing_is_to_be_asked_no_line_says_so(config, tmp_path, capsys):
    nothing = ("--num_answers", "0", "--num_instructions", "0", "--disable_tqdm", "False")
    run_train(config, tmp_path / "out", *nothing)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert told and all("held-out loss" in line for line in told)


# Several processes.


def test_two_processes_make_the_table_of_one(run, config, tmp_path):
    """Real processes over gloo; before the first step the model is the same, so the whole file is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    keys = ["--output_dir", str(tmp_path / "out"), "--per_device_train_batch_size", "2", "--eval_answer_share", "0"]
    command = [sys.executable, "-m", "sft_pipeline", "train", str(config), *keys]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    two, one = evaluations(tmp_path / "out"), evaluations(run[0])
    assert two.keys() == one.keys()
    assert two["step_000000"]["table"] == one["step_000000"]["table"]
    assert two["step_000000"]["held_out"]["tokens"] == one["step_000000"]["held_out"]["tokens"]
    for name, value in one["step_000000"]["metrics"].items():
        assert two["step_000000"]["metrics"][name] == pytest.approx(value, rel=1e-5)
    assert two["step_000002"]["table"] == []
    assert [row["prompt"] for row in two["step_000004"]["table"]] == [
        row["prompt"] for row in one["step_000004"]["table"]
    ]
    assert "held-out loss" in said[0] and "held-out loss" not in said[1]
