"""`eval_tasks`: tasks of lm-evaluation-harness at the end of a run."""

import json
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support.processes import run_ranks
from support.task_files import write_tasks

from sft_pipeline.commands.evaluate import EvaluateOptions, load_prompt_set, run_model
from sft_pipeline.config import parse_config
from sft_pipeline.evaluation.harness import TaskOptions, load_tasks
from sft_pipeline.reports.html import write_report
from sft_pipeline.train import rehearse_run, train
from sft_pipeline.training import final_tasks
from sft_pipeline.training.sft_trainer import SFTTrainer
from sft_pipeline.utils.errors import SFTError

# peft 0.21 still asks transformers 5.23 under the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TASKS = {"eval_tasks": ["configs/tasks"], "max_steps": 2, "held_out": 2, "num_answers": 1, "num_instructions": 1}


@pytest.fixture
def parse(write_config, tmp_path):
    """parse(key=value, ...) is the config of a run of two steps that ends with both tasks."""
    return lambda **keys: parse_config(
        str(write_config(tmp_path, 8, output_dir=str(tmp_path / "out"), max_new_tokens=4, **TASKS | keys))
    )


@pytest.mark.parametrize("keys", [{}, {"lora": True, "packing": False}, {"bf16": True}], ids=["full", "lora", "bf16"])
def test_a_run_ends_with_its_tasks(parse, tmp_path, monkeypatch, keys):
    """The scores are those of `evaluate` on the saved model, in results.json, page, card, summary and trackers."""
    logged, sent = StringIO(), {}
    original = SFTTrainer.log
    monkeypatch.setattr(SFTTrainer, "log", lambda self, logs, *args: (sent.update(logs), original(self, logs, *args)))
    results = train(parse(**keys), Console(file=logged, width=200))
    scores = results["tasks"]
    assert set(scores) == {"facts_answer exact_match", "facts_choice acc"}
    assert json.loads((tmp_path / "out" / "results.json").read_text())["tasks"] == scores
    if "bf16" not in keys:
        options = EvaluateOptions(tasks=TaskOptions(("configs/tasks",)))
        tasks = load_tasks(options.tasks)
        [evaluated] = run_model(str(tmp_path / "out"), "x", load_prompt_set(options), options, tasks)
        assert [score.as_json() for score in evaluated.task_scores] == list(scores.values())
    choice = scores["facts_choice acc"]
    assert (choice["questions"], choice["num_fewshot"]) == (48, 0) and 0 < choice["value"] < 1
    text = f"{choice['value']:.3f} ± {choice['standard_error']:.3f}"
    assert f"task facts_choice acc: {text} of 48 questions" in logged.getvalue()
    assert sent["eval_facts_choice_acc"] == choice["value"] and "eval_facts_answer_exact_match" in sent
    assert "<h2>Tasks of lm-evaluation-harness</h2>" in (tmp_path / "out" / "report.html").read_text()
    assert "tasks" in results["seconds_by_part"]


def test_a_run_that_ends_within_its_tasks_keeps_its_results(parse, tmp_path, monkeypatch):
    """All but the scores, and the report says so."""
    out, seen = tmp_path / "out", []

    def end(*args):
        seen.append((out / "model.safetensors").is_file())
        raise KeyboardInterrupt

    monkeypatch.setattr(final_tasks, "run_tasks", end)
    with pytest.raises(KeyboardInterrupt):
        train(parse(), Console(quiet=True))
    results = json.loads((out / "results.json").read_text())
    assert seen == [True] and results["tasks"] == {}
    assert results["steps"] == 2 and results["eval_loss"]["after"] and results["answers"] and results["rows"]["train"]
    page = write_report([out]).read_text()
    assert "Without scores: " in page and f"./launch.sh evaluate {out} --tasks configs/tasks</pre>" in page


def test_an_error_in_a_task_does_not_lose_the_run(parse, tmp_path, monkeypatch, caplog):
    def fail(*args):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(final_tasks, "run_tasks", fail)
    results = train(parse(), Console(quiet=True))
    assert results["tasks"] == {} and (tmp_path / "out" / "model.safetensors").is_file()
    [warning] = [record.getMessage() for record in caplog.records if "eval_tasks" in record.getMessage()]
    assert warning == (
        "eval_tasks: not evaluated (RuntimeError: out of memory); the model is saved, and "
        f"`evaluate {tmp_path / 'out'} --tasks configs/tasks` asks them again"
    )


def run_rank(process: int, config: str, tasks: str, out: str) -> None:
    trainer = SFTTrainer(
        args=parse_config(config, ["--eval_tasks", tasks, "--output_dir", out, "--ddp_backend", "gloo"])
    )
    trainer.train()
    Path(f"{out}{process}.json").write_text(json.dumps([trainer.args.world_size, trainer.task_scores]))
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_scores_of_the_model_that_they_save(write_config, tmp_path):
    tasks = write_tasks(tmp_path / "tasks")
    run_ranks(run_rank, 2, str(write_config(tmp_path, 8, **TASKS)), tasks, str(tmp_path / "out"))
    options = EvaluateOptions(tasks=TaskOptions((tasks,)))
    [evaluated] = run_model(str(tmp_path / "out"), "x", load_prompt_set(options), options, load_tasks(options.tasks))
    scores = {score.name: score.as_json() for score in evaluated.task_scores}
    for process in range(2):
        assert json.loads((tmp_path / f"out{process}.json").read_text()) == [2, scores]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["tasks"] == scores


@pytest.mark.parametrize("run", [train, rehearse_run])
def test_a_task_that_cannot_be_loaded_ends_a_run_at_its_start(parse, tmp_path, run):
    with pytest.raises(SFTError, match=r"^task configs/accelerate/cpu.yaml: cannot be loaded"):
        run(parse(eval_tasks="configs/accelerate/cpu.yaml"), Console(quiet=True))
    assert not (tmp_path / "out").exists()
