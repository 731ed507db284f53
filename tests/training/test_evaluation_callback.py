"""Evaluation during training: questions, logs, files and cost, and no effect on args."""

import json
import math
import random
import shutil
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
from support.agent import CALL, REPLY, assistant, script_answers, user, write_call, write_rows
from support.processes import Command, find_free_port
from support.step_results import make_results, make_row
from support.templates import AGENT_TEMPLATE
from support.training_runs import EVALUATED_RUN
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerControl
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sft_pipeline.config import parse_config
from sft_pipeline.data.chat_templates import build_template
from sft_pipeline.data.encode import build_input_ids_and_labels
from sft_pipeline.data.messages import add_system_prompt, parse_conversation, split_answer
from sft_pipeline.data.pipeline import load_splits
from sft_pipeline.evaluation.metrics.degeneration import is_loop
from sft_pipeline.evaluation.metrics.instruction_following import is_followed, sample_instructions
from sft_pipeline.evaluation.step_results import EvalPrompt, StepResults
from sft_pipeline.inference.answers import answer_prompts
from sft_pipeline.reports.console_summary import print_results
from sft_pipeline.runs.output_dir import EVALUATION_DIR, RUN_FILE
from sft_pipeline.train import train
from sft_pipeline.training import evaluation_callback as callback_module
from sft_pipeline.training.evaluation_callback import (
    INITIAL_QUESTIONS,
    AnswerBudget,
    EvaluationCallback,
    build_questions,
    count_supervised_bytes,
    describe_results,
    select_first,
)
from sft_pipeline.training.sft_trainer import SFTTrainer
from sft_pipeline.utils.errors import SFTError

ROOT = Path(__file__).parents[2]
SYSTEM = "You are 冬瓜."
ROWS, NUM_ANSWERS, NUM_INSTRUCTIONS = 5, 4, 3


@pytest.fixture(scope="module")
def config(model_folder, tmp_path_factory) -> Path:
    """Config with evaluations at steps 0, 2 and 4 that ask every question, and checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("config")
    rows = [
        {"instruction": f"Say {word} {count} times.", "input": "", "output": " ".join([word] * count) + "。"}
        for count in range(1, 9)
        for word in ("text", "答", "question")
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    keys = {
        **EVALUATED_RUN,
        "model_name_or_path": str(model_folder),
        "train_data": str(folder / "rows.json"),
        "held_out": ROWS,
        "system_prompt": SYSTEM,
        "num_answers": NUM_ANSWERS,
        "num_instructions": NUM_INSTRUCTIONS,
        "max_new_tokens": 6,
        "eval_answer_share": 1000,
        "max_steps": 4,
        "num_proc": 1,
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(keys, allow_unicode=True))
    return file


def run_train(config: Path, folder: Path, *overrides: str) -> dict:
    return train(parse_config(str(config), ["--output_dir", str(folder), *overrides]), Console(quiet=True))


@pytest.fixture(scope="module")
def run(config, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("run") / "out"
    return folder, run_train(config, folder)


def load_evaluations(folder: Path) -> dict[str, dict]:
    files = sorted((folder / EVALUATION_DIR).iterdir())
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


# Questions and files.


def test_each_evaluation_writes_a_file(run):
    results = load_evaluations(run[0])
    assert list(results) == ["step_000000", "step_000002", "step_000004"]
    for name, result in results.items():
        assert (result["step"], result["complete"]) == (int(name[-6:]), True)
        assert len(result["table"]) == NUM_ANSWERS + NUM_INSTRUCTIONS and result["seconds"] > 0


def test_the_table_has_held_out_prompts_and_instructions_with_the_answers_of_the_model(run, config):
    folder, _ = run
    _, held_out = load_splits(parse_config(str(config), []))
    rows = [parse_conversation(text)["messages"] for text in held_out["conversation"][:NUM_ANSWERS]]
    instructions = sample_instructions(NUM_INSTRUCTIONS)
    prompts = [row[-2]["content"] for row in rows] + [instruction.prompt for instruction in instructions]
    template = build_template("role", AutoTokenizer.from_pretrained(folder))
    conversations = [
        add_system_prompt({"messages": [{"role": "user", "content": prompt}]}, SYSTEM) for prompt in prompts
    ]
    expected = answer_prompts(AutoModelForCausalLM.from_pretrained(folder), template, conversations, 6)
    table = load_evaluations(folder)["step_000004"]["table"]
    assert [row["prompt"] for row in table] == prompts
    assert [row["reference"] for row in table] == [row[-1]["content"] for row in rows] + [None] * NUM_INSTRUCTIONS
    assert [row["instruction"] for row in table] == [None] * NUM_ANSWERS + [
        instruction.id for instruction in instructions
    ]
    answers = [(row["answer"], row["stopped"], row["tokens"], row["error"]) for row in table]
    assert answers == [(answer.text, answer.stopped, answer.tokens, None) for answer in expected]
    assert [row["followed"] for row in table[:NUM_ANSWERS]] == [None] * NUM_ANSWERS
    assert [row["followed"] for row in table[NUM_ANSWERS:]] == [
        is_followed(instruction, row["answer"]) for instruction, row in zip(instructions, table[NUM_ANSWERS:])
    ]


def compute_expected_metrics(results: dict) -> dict[str, float]:
    """Compute metrics from a file by their definitions; the other metrics are tested with their functions."""
    rows = [row for row in results["table"] if row["instruction"] is None]
    instructions = [row for row in results["table"] if row["instruction"]]
    nll, tokens, correct = (sum(results["held_out"][name]) for name in ("nll_nats", "tokens", "correct"))
    answers, references = [row["answer"] for row in rows], [row["reference"] for row in rows]
    return {
        "answers": len(rows),
        "instructions": len(instructions),
        "answer_errors": 0,
        "nll_nats_per_token": nll / tokens,
        "perplexity": math.exp(nll / tokens),
        "bits_per_byte": nll / math.log(2) / results["utf8_bytes"],
        "token_accuracy": correct / tokens,
        "stop_rate": sum(row["stopped"] for row in rows) / len(rows),
        "cap_rate": sum(not row["stopped"] for row in rows) / len(rows),
        "loop_rate": sum(map(is_loop, answers)) / len(rows),
        "bleu_percent": sacrebleu.corpus_bleu(answers, [references], tokenize="zh", force=True).score,
        "chrf_percent": sacrebleu.corpus_chrf(answers, [references]).score,
        "instructions_followed_rate": sum(row["followed"] for row in instructions) / len(instructions),
    }


def test_every_metric_can_be_computed_from_the_file(run):
    for results in load_evaluations(run[0]).values():
        for name, value in compute_expected_metrics(results).items():
            assert results["metrics"][name] == pytest.approx(value, rel=1e-12), name
        assert callback_module.compute_table_metrics(results["table"]).items() <= results["metrics"].items()
        assert results["metrics"].keys() >= {
            "rep_4_share",
            "distinct_2_share",
            "prompt_echo_share",
            "answer_length_ratio",
        }
        assert results["metrics"].keys() >= {
            "rouge_l_f1",
            "exact_match_rate",
            "word_f1",
            "instructions_followed_rate_language_en",
        }


def test_the_metrics_are_logged_at_their_step(run):
    folder, results = run
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    logged = {entry["step"]: entry for entry in history if "eval_answers" in entry}
    losses = {entry["step"]: entry for entry in history if "eval_loss" in entry}
    for evaluation in load_evaluations(folder).values():
        entry, loss = logged[evaluation["step"]], losses[evaluation["step"]]
        logged_by_trainer = {
            "nll_nats_per_token": "loss",
            "perplexity": "perplexity",
            "token_accuracy": "token_accuracy",
        }
        for name, value in evaluation["metrics"].items():
            if name in logged_by_trainer:
                assert loss[f"eval_{logged_by_trainer[name]}"] == pytest.approx(value, rel=1e-12)
            else:
                assert entry[f"eval_{name}"] == value
        assert entry["eval_answer_seconds"] == pytest.approx(evaluation["seconds"], abs=0.006)
    assert len(logged) == len(losses) == 3
    assert results["metrics"] == load_evaluations(folder)["step_000004"]["metrics"]


@pytest.mark.parametrize("train_on", ["all", "last"])
@pytest.mark.parametrize("name", ["role", "chat"])
def test_count_supervised_bytes(name, train_on, tokenizer):
    template = build_template(name, tokenizer)
    texts = ["Hi", "Hello, 你好!", "Spell the stop token", "It is <|im_end|>.", "Bye", "再见"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    [[sequence]] = template.render([{"messages": messages}], train_on)
    _, labels = build_input_ids_and_labels(sequence)
    answers = texts[1::2] if train_on == "all" else texts[-1:]
    assert count_supervised_bytes(labels, template) == sum(len(text.encode()) for text in answers)
    # An answer cut by the length limit has no stop token.
    cut = labels[: max(i for i, label in enumerate(labels) if label == template.stop_token_id)]
    assert count_supervised_bytes(cut, template) == count_supervised_bytes(labels, template)


# Rows with errors.


def limit_positions(config: Path, folder: Path, positions: int) -> list[str]:
    """Copy the tiny model with another number of positions; return config overrides for it."""
    source = Path(yaml.safe_load(config.read_text())["model_name_or_path"])
    shutil.copytree(source, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": positions}))
    return ["--model_name_or_path", str(folder), "--max_steps", "1", "--save_strategy", "no"]


def test_prompts_longer_than_the_context_have_an_error_in_the_table(config, tmp_path):
    lengths = []
    template = build_template(
        "role", AutoTokenizer.from_pretrained(yaml.safe_load(config.read_text())["model_name_or_path"])
    )
    args = parse_config(str(config), [])
    held_out = map(parse_conversation, load_splits(args)[1]["conversation"])
    for question in build_questions({None: held_out}, NUM_ANSWERS, NUM_INSTRUCTIONS, args.system_prompt):
        lengths.append(len(template.encode_prompt(question.conversation)))
    limit = sorted(lengths)[len(lengths) // 2] + 6
    results = run_train(config, tmp_path / "out", *limit_positions(config, tmp_path / "model", limit))
    evaluation = load_evaluations(tmp_path / "out")["step_000001"]
    refused = [length + 6 > limit for length in lengths]
    assert any(refused) and not all(refused)
    assert [row["error"] is not None for row in evaluation["table"]] == refused
    for row in evaluation["table"]:
        if row["error"]:
            message = f"new tokens exceed the limit of {limit}: shorten the prompt or reduce max_new_tokens"
            assert row["error"].endswith(message) and row["answer"] == ""
    assert evaluation["metrics"]["answer_errors"] == sum(refused)
    assert evaluation["metrics"]["answers"] == NUM_ANSWERS - sum(refused[:NUM_ANSWERS])
    assert results["before_and_after"]["stop_rate"]["items"] == NUM_ANSWERS - sum(refused[:NUM_ANSWERS])
    assert [bool(answer["error"]) for answer in results["answers"]] == refused[:NUM_ANSWERS]


def test_a_model_that_cannot_generate_is_trained(config, tmp_path, monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise SFTError("Mamba: no")

    monkeypatch.setattr(callback_module, "answer_prompts", refuse)
    results = run_train(config, tmp_path / "out", "--max_steps", "1", "--save_strategy", "no")
    evaluation = load_evaluations(tmp_path / "out")["step_000001"]
    assert [row["error"] for row in evaluation["table"]] == ["Mamba: no"] * (NUM_ANSWERS + NUM_INSTRUCTIONS)
    assert evaluation["metrics"]["answers"] == 0 and evaluation["metrics"]["bits_per_byte"] > 0
    assert list(results["before_and_after"]) == ["nll_nats_per_token"]


# No effect on args.


@pytest.mark.parametrize(("dropout", "packing"), [(0.0, "true"), (0.2, "true"), (0.2, "false")])
def test_training_computes_the_same_bits_without_the_callback(dropout, packing, config, tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(yaml.safe_load(config.read_text())["model_name_or_path"], model)
    settings = json.loads((model / "config.json").read_text()) | {"attention_dropout": dropout}
    (model / "config.json").write_text(json.dumps(settings))
    keys = ["--packing", packing, "--model_name_or_path", str(model), "--eval_steps", "1", "--max_steps", "3"]
    keys += ["--save_strategy", "no"]
    run_train(config, tmp_path / "with", *keys)
    assert len(load_evaluations(tmp_path / "with")) == 4
    monkeypatch.setattr(EvaluationCallback, "on_evaluate", lambda *args, **kwargs: None)
    run_train(config, tmp_path / "without", *keys)
    assert not (tmp_path / "without" / EVALUATION_DIR).exists()
    weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("with", "without"))
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)
    history = [
        json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in ("with", "without")
    ]
    losses = [[(e["loss"], e["grad_norm"]) for e in entries if "loss" in e] for entries in history]
    assert losses[0] == losses[1] and len(losses[0]) == 3


@pytest.fixture
def trainer(config, tmp_path, tiny_model, make_tokenizer):
    """A trainer with the callback as its `evaluation`, evaluated once."""
    args = parse_config(str(config), ["--output_dir", str(tmp_path / "out"), "--report_to", "none"])
    trainer = SFTTrainer(tiny_model, args, processing_class=make_tokenizer())
    trainer.evaluate()
    return trainer


def test_other_rows_have_a_loss_and_do_not_replace_the_evaluation_of_the_held_out_rows(trainer, tmp_path):
    [file] = (tmp_path / "out" / EVALUATION_DIR).iterdir()
    content, logged = file.read_bytes(), len(trainer.state.log_history)
    rows = {"some": trainer.eval_dataset.select([0, 1]), "all": trainer.eval_dataset.select(range(ROWS))}
    metrics = trainer.evaluate(rows)
    [results] = trainer.evaluation.evaluations
    assert metrics["eval_all_loss"] == pytest.approx(results.metrics["nll_nats_per_token"], rel=1e-6)
    nll, tokens = (sum(results.held_out[name][:2]) for name in ("nll_nats", "tokens"))
    assert metrics["eval_some_loss"] == pytest.approx(nll / tokens, rel=1e-6) != metrics["eval_all_loss"]
    assert file.read_bytes() == content and len(trainer.state.log_history) == logged + 2, "no answers, no bits per byte"
    trainer.evaluate(trainer.eval_dataset)
    assert len(trainer.evaluation.evaluations) == 2


def get_state(model: torch.nn.Module) -> dict:
    """Return all state of the model and the process that an evaluation could change."""
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
def test_the_model_and_every_random_state_are_restored(fails, trainer, monkeypatch):
    model = trainer.model.train()
    model.model.layers[1].eval()  # a frozen part keeps its mode
    model.model.embed_tokens.weight.requires_grad_(False)
    state = get_state(model)
    if fails:
        monkeypatch.setattr("sft_pipeline.inference.engine._check_layers", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.evaluation.on_evaluate(trainer.args, trainer.state, TrainerControl(), model=model)
    else:
        trainer.evaluation.on_evaluate(trainer.args, trainer.state, TrainerControl(), model=model)
        assert len(trainer.evaluation.evaluations) == 2
    assert get_state(model) == state


# Resuming and ending.


def prepare_interrupted_run(run: tuple[Path, dict], folder: Path) -> Path:
    """Copy the folder of the run as if killed between the evaluation and the checkpoint of step 4."""
    shutil.copytree(run[0], folder)
    shutil.rmtree(folder / "checkpoint-4")
    for file in folder.iterdir():
        if file.is_file() and file.name != RUN_FILE:
            file.unlink()
    (folder / EVALUATION_DIR / "best.json").write_text((folder / EVALUATION_DIR / "step_000004.json").read_text())
    return folder


@pytest.mark.parametrize("same_folder", [True, False])
def test_a_resumed_run_asks_no_question_again(same_folder, run, config, tmp_path, monkeypatch):
    old = prepare_interrupted_run(run, tmp_path / "old")
    folder = old if same_folder else tmp_path / "new"
    num_asked = []
    original = callback_module.answer_prompts
    counted = lambda *args, **kwargs: num_asked.append(len(args[2])) or original(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(callback_module, "answer_prompts", counted)
    resumed = run_train(config, folder, "--resume_from_checkpoint", str(old / "checkpoint-2"))
    assert num_asked == [NUM_ANSWERS + NUM_INSTRUCTIONS]
    evaluations, expected = load_evaluations(folder), load_evaluations(run[0])
    assert evaluations.keys() == expected.keys()
    for name in ("step_000000", "step_000002"):
        assert evaluations[name] == expected[name]
    assert evaluations["step_000004"]["table"] == expected["step_000004"]["table"]
    assert resumed["before_and_after"] == run[1]["before_and_after"]
    assert resumed["config"]["eval_on_start"] is True
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [0, 2, 4]


def test_the_final_model_is_asked_every_question(config, tmp_path):
    """With no time for intermediate answers, and no evaluation due at the last step."""
    run_train(config, tmp_path / "out", "--max_steps", "3", "--eval_answer_share", "0")
    evaluations = load_evaluations(tmp_path / "out").values()
    assert [(item["step"], item["complete"], len(item["table"])) for item in evaluations] == [
        (0, True, 7),
        (2, False, 0),
        (3, True, 7),
    ]


def test_the_best_model_has_its_own_file(config, tmp_path):
    # A greater loss counts as better, so that the best model is not the last.
    keys = ["--load_best_model_at_end", "true", "--metric_for_best_model", "eval_loss", "--greater_is_better", "true"]
    results = run_train(config, tmp_path / "out", *keys)
    evaluations = load_evaluations(tmp_path / "out")
    steps = [item for name, item in evaluations.items() if name != "best"]
    losses = {item["step"]: item["metrics"]["nll_nats_per_token"] for item in steps}
    best = max(list(losses)[1:], key=losses.get)
    assert list(losses) == [0, 2, 4] and best == 2
    assert evaluations["best"]["step"] == best
    assert evaluations["best"]["table"] == evaluations["step_000002"]["table"]
    assert results["metrics"] == evaluations["best"]["metrics"]
    assert results["before_and_after"]["nll_nats_per_token"]["after"] == pytest.approx(losses[best], rel=1e-12)


def test_without_an_evaluation_at_step_0_nothing_is_compared(config, tmp_path, capsys):
    results = run_train(config, tmp_path / "out", "--eval_on_start", "false", "--max_steps", "2")
    assert list(load_evaluations(tmp_path / "out")) == ["step_000002"]
    assert results["before_and_after"] == {} and results["metrics"]["answers"] == NUM_ANSWERS
    assert [answer["before"] for answer in results["answers"]] == [None] * NUM_ANSWERS
    print_results(results, "out", Console(width=80))
    output = capsys.readouterr().out
    assert "after" in output and "before" not in output


# The budget.


@given(
    share=st.floats(0.01, 1),
    cost=st.floats(0.01, 10),
    intervals=st.lists(st.floats(0, 500), min_size=1, max_size=9),
)
def test_intermediate_answers_stay_under_their_share(share, cost, intervals):
    """For any intervals; the number of questions never rises above the first one."""
    budget, counts = AnswerBudget(share), []
    budget.add_cost(50, 50 * cost, charge=False)  # step 0 does not count against the budget
    for seconds in intervals:
        budget.training_seconds += seconds
        counts.append(budget.count_questions())
        budget.add_cost(counts[-1], counts[-1] * cost, charge=True)
        assert budget.answer_seconds <= share * budget.training_seconds * (1 + 1e-9)
    first = next((i for i, count in enumerate(counts) if count), len(counts))
    assert all(count <= counts[first] for count in counts[first:])
    assert first == len(counts) or counts[first] <= share * sum(intervals[: first + 1]) / cost


def test_equal_intervals_ask_the_same_number():
    budget, counts = AnswerBudget(0.1), []
    budget.add_cost(10, 20.0, charge=False)
    for _ in range(5):
        budget.training_seconds += 100.0
        counts.append(budget.count_questions())
        budget.add_cost(counts[-1], 2.0 * counts[-1], charge=True)
    assert counts == [5] * 5


def test_an_underestimated_cost_is_made_up_for():
    budget = AnswerBudget(0.1)
    budget.add_cost(10, 10.0, charge=False)
    budget.training_seconds = 100.0
    assert budget.count_questions() == 10
    budget.add_cost(10, 40.0, charge=True)
    budget.training_seconds = 300.0
    assert budget.count_questions() == 0
    budget.training_seconds = 600.0
    assert budget.count_questions() == 5


def test_an_unknown_cost_is_measured_on_a_few_questions():
    assert AnswerBudget(0.1).count_questions() == INITIAL_QUESTIONS and AnswerBudget(0).count_questions() == 0


def test_a_resumed_run_keeps_the_number_of_questions():
    budget = AnswerBudget(0.1)
    for results in (make_results(0, [{}] * 6), make_results(2, [{}] * 3, complete=False)):
        budget.restore(results)
    budget.training_seconds = 1000.0
    assert budget.count_questions() == 3


@given(num_held_out=st.integers(0, 12), num_instructions=st.integers(0, 12), count=st.integers(0, 30))
def test_select_first_takes_the_first_of_both_kinds(num_held_out, num_instructions, count):
    held_out = [EvalPrompt({}, reference={"role": "assistant", "content": str(i)}) for i in range(num_held_out)]
    instructions = [EvalPrompt({}, instruction=str(i)) for i in range(num_instructions)]
    selected = select_first(held_out + instructions, count)
    num_selected = sum(question.instruction is None for question in selected)
    assert len(selected) == min(count, num_held_out + num_instructions)
    assert selected == held_out[:num_selected] + instructions[: len(selected) - num_selected]
    if selected:
        assert abs(num_selected - len(selected) * num_held_out / (num_held_out + num_instructions)) < 1


# Printed results.


def test_the_printed_table_fits_80_columns(capsys):
    change = {"before": 0.0, "after": 1.0, "difference": 1.0, "low": 0.25, "high": 1.0, "items": 1000}
    loss = {"before": 13.0656, "after": 12.2367, "difference": -10.829, "low": -10.91, "high": -10.745, "items": 1000}
    metrics = {"nll_nats_per_token": loss} | dict.fromkeys(
        ("stop_rate", "loop_rate", "tool_call_match_rate", "instructions_followed_rate"), change
    )
    metrics["loop_rate"] = change | {"low": None, "high": None}
    results = {
        "answers": [],
        "before_and_after": metrics,
        "steps": 9,
        "seconds": 9,
        "seconds_by_part": {"reading rows": 0.2, "training": 8.4, "saving": 0.7},
        "tasks": {},
        "tokens_per_second": 9.0,
        "peak_memory_gib": 3,
    }
    print_results(results, "out", Console(width=80))
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) + line.count("复读机") * 3 <= 80 for line in lines)
    table = [" ".join(line.split()) for line in lines[:6]]
    assert table == [
        "before after change 95% interval of",
        "held-out loss, nats/token 13.066 12.237 -10.829 -10.910 to -10.745 1000",
        "answers that end on their own 0% 100% +100% +25% to +100% 1000",
        "answers in a loop 0% 100% +100% 1000",
        "tool calls matched 0% 100% +100% +25% to +100% 1000",
        "instructions followed 0% 100% +100% +25% to +100% 1000",
    ]
    assert "time: training 8 s, saving 1 s" in lines


def test_the_line_of_an_evaluation_has_the_number_of_questions(config, tmp_path, capsys):
    keys = ["--disable_tqdm", "false", "--max_steps", "3", "--eval_answer_share", "0", "--save_strategy", "no"]
    run_train(config, tmp_path / "out", *keys)
    output = capsys.readouterr().out.splitlines()
    assert any(line.startswith("step 0: 4 answers, ") and "of 3 instructions followed; " in line for line in output)
    assert "step 2: the first 0 of 7 questions; 0 s" in output
    failed = StepResults(
        1, True, 2.0, {"answers": 0, "instructions": 0, "answer_errors": 1}, {}, 0, [make_row("", error="too long")]
    )
    assert describe_results(failed, 1) == "1 not answered (too long); 2 s"


def test_without_questions_no_line_is_printed(config, tmp_path, capsys):
    keys = ("--num_answers", "0", "--num_instructions", "0", "--disable_tqdm", "False")
    run_train(config, tmp_path / "out", *keys)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert lines and all("held-out loss" in line for line in lines)


# Tools.


@pytest.fixture
def agent_config(config, tmp_path) -> Path:
    """Config of one step with a template for tools, whose held-out rows are a text, a tool call and a reply."""
    (tmp_path / "agent.jinja").write_text(AGENT_TEMPLATE)
    rows = [{"messages": [user(f"Say {n}."), assistant(f"It is {n}.")]} for n in range(4)]
    held_out = {"text.jsonl": [{"text": "Once upon a time"}], "agent.jsonl": [CALL, REPLY]}
    keys = yaml.safe_load(config.read_text()) | {
        "train_data": write_rows(tmp_path / "rows.jsonl", rows),
        "eval_data": [write_rows(tmp_path / name, content) for name, content in held_out.items()],
        "held_out": 0,
        "template": "chat",
        "chat_template": str(tmp_path / "agent.jinja"),
        "num_answers": 3,
        "num_instructions": 1,
        "max_steps": 1,
        "save_strategy": "no",
    }
    (tmp_path / "agent.yaml").write_text(yaml.safe_dump(keys, allow_unicode=True))
    return tmp_path / "agent.yaml"


def test_held_out_calls_are_asked_and_compared(agent_config, tmp_path, tokenizer, monkeypatch, capsys):
    """At step 0 the model does not call, at the end it does. A text counts in the loss and is not asked."""
    call = write_call("get_weather", '{"city": "Oslo"}')
    before = ["Hm.", call[:-30], "the answer", "x"]
    after = [f"<think>\nHm.\n</think>\n\n{call}", call, "Yes, 4 degrees.", "x"]
    prompts = script_answers(monkeypatch, tokenizer, *before, *after)
    results = run_train(agent_config, tmp_path / "out", "--disable_tqdm", "false")
    first, last = load_evaluations(tmp_path / "out").values()
    assert [result["metrics"]["tool_call_match_rate"] for result in (first, last)] == [0, 1]
    assert [result["metrics"]["exact_match_rate"] for result in (first, last)] == [0, 1]  # of the reply alone
    called, called_first, replied, _ = last["table"]
    assert called["reference"] == called["answer"] == 'get_weather({"city": "Oslo"})'
    assert (called["calls_match"], called["reasoning"]) == (True, "Hm.") and replied["calls_match"] is None
    assert (called_first["calls_match"], called_first["reasoning"]) == (True, None)
    assert replied["prompt"] == 'Is it cold in Oslo? → get_weather({"city": "Oslo"}) → {"degrees": 4}'

    template = build_template("chat", AutoTokenizer.from_pretrained(tmp_path / "out"))
    asked = [template.encode_prompt(split_answer(row)[0]) for row in (CALL, CALL, REPLY)]
    assert prompts[:3] == prompts[4:7] == asked
    # Every answer of a row counts in the loss, in one sequence or several.
    texts = [f"<think>\nI must look.\n</think>\n\n{call}", "<think>\n4 is cold.\n</think>\n\nYes, 4 degrees."]
    texts += [texts[0], "nce upon a time"]  # without a bos token nothing predicts the first token of a text
    assert last["utf8_bytes"] == sum(map(len, texts)) and last["metrics"]["answers"] == 3
    assert sum(last["held_out"]["tokens"]) == sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)

    change = {"before": 0, "after": 1, "difference": 1, "low": 1, "high": 1, "items": 2}
    assert results["before_and_after"]["tool_call_match_rate"] == change
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [entry["eval_tool_call_match_rate"] for entry in history if "eval_answers" in entry] == [0, 1]
    output = capsys.readouterr().out
    assert "100% of 2 tool calls matched; " in output
    report = (tmp_path / "out" / "report.html").read_text()
    assert "tool calls matched" in report and "calls match" in report and "other calls" in report
    assert report.count("<summary>reasoning</summary>") == 1


def test_a_template_that_refuses_a_prompt_leaves_it_unanswered(trainer, tmp_path):
    """With any trainer and rows that were not encoded."""
    evaluation = EvaluationCallback(trainer, trainer.template, [CALL], num_answers=1, num_instructions=0)
    [answer] = evaluation._generate_local_answers(trainer.model, evaluation.questions)
    assert answer.error.startswith("`template: role` does not write tools; use `template: chat`")


# Several processes.


def test_two_processes_write_the_same_table_as_one(run, config, tmp_path):
    """With gloo. Before the first step the model is the same, so the complete file is."""
    keys = ["--output_dir", str(tmp_path / "out"), "--per_device_train_batch_size", "2", "--eval_answer_share", "0"]
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_port())}
    ranks = [environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    processes = [Command(["train", config, *keys], ROOT, tmp_path, **rank) for rank in ranks]
    statuses, outputs, errors = zip(*(process.wait() for process in processes))
    assert statuses == (0, 0), errors
    evaluations, expected = load_evaluations(tmp_path / "out"), load_evaluations(run[0])
    assert evaluations.keys() == expected.keys()
    assert evaluations["step_000000"]["table"] == expected["step_000000"]["table"]
    assert evaluations["step_000000"]["held_out"]["tokens"] == expected["step_000000"]["held_out"]["tokens"]
    for name, value in expected["step_000000"]["metrics"].items():
        assert evaluations["step_000000"]["metrics"][name] == pytest.approx(value, rel=1e-5)
    assert evaluations["step_000002"]["table"] == []
    assert [row["prompt"] for row in evaluations["step_000004"]["table"]] == [
        row["prompt"] for row in expected["step_000004"]["table"]
    ]
    assert "held-out loss" in outputs[0] and "held-out loss" not in outputs[1]
