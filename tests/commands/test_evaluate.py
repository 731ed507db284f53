"""The command `evaluate`: its files, templates, data of a run and one-line errors."""

import json
import logging
import re
from dataclasses import replace

import datasets
import numpy as np
import pytest
from rich.console import Console
from support.agent import (
    CALL,
    CONVERSATIONS,
    OSLO,
    PLAIN,
    REPLY,
    TOOLS,
    assistant,
    save_agent,
    script_answers,
    write_call,
    write_rows,
)
from support.model_comparison import ROWS, SYSTEM, make_answer, make_results, plain_losses

from sft_pipeline.cli import main
from sft_pipeline.commands import evaluate as evaluate_module
from sft_pipeline.commands.evaluate import (
    EvaluateOptions,
    compare_with_judge,
    evaluate_models,
    load_eval_sets,
    load_prompt_set,
    run_model,
)
from sft_pipeline.data.messages import add_system_prompt
from sft_pipeline.evaluation import plots
from sft_pipeline.evaluation.judge import Judge
from sft_pipeline.evaluation.metrics.instruction_following import load_instructions
from sft_pipeline.evaluation.prompt_set import PromptSet
from sft_pipeline.utils.errors import SFTError

pytestmark = pytest.mark.usefixtures("few_instructions")


@pytest.fixture(autouse=True)
def as_it_was():
    """main() quietens the libraries for the whole process."""
    level = logging.getLogger("sft_pipeline").level
    yield
    logging.getLogger("sft_pipeline").setLevel(level)
    datasets.enable_progress_bars()


def test_without_matplotlib_all_other_files_are_written(data, model_folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    request = EvaluateOptions(data, num_prompts=2, max_new_tokens=2)
    evaluate_models([str(model_folder)], request, tmp_path / "out", False, Console(quiet=True))
    assert "no picture: it needs matplotlib; install it with `pip install 'sft_pipeline[plot]'`" in caplog.text
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"answers.jsonl", "evaluation.json", "evaluation.md"}


def test_the_command_prints_json_and_writes_all_files(data, model_folder, other_folder, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["evaluate", str(model_folder), str(other_folder), "--data", data, "--num_prompts", "2"]
    main([*words, "--max_new_tokens", "4", "--output", str(out), "--json"])
    output = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in output["entries"]] == [str(model_folder), str(other_folder)]
    assert json.loads((out / "evaluation.json").read_text()) == output
    assert (out / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 2 + 6
    assert lines[0]["prompt"] == [{"role": "user", "content": ROWS[0]["instruction"]}]
    assert [entry["model"] for entry in lines[0]["answers"]] == [str(model_folder), str(other_folder)]
    assert lines[2]["instruction"] == load_instructions()[0].id


def test_without_data_only_instructions(model_folder, capsys):
    main(["evaluate", str(model_folder), "--max_new_tokens", "2"])
    output = capsys.readouterr().out
    assert "instructions followed" in output and "loss" not in output and "0 held-out rows, 6 instructions" in output


def test_the_template_of_a_plain_folder_can_be_chosen(data, model_folder, other_folder):
    """It is asked as the run was: the other way round a run keeps its own."""
    plain = EvaluateOptions(data, num_prompts=2, max_new_tokens=2, template="role", system_prompt=SYSTEM)
    questions = load_prompt_set(plain)
    [results] = run_model(str(model_folder), "x", questions, plain)
    conversations = [add_system_prompt(row, SYSTEM) for row in questions.rows]
    expected = plain_losses(model_folder, conversations, "role")
    assert [loss.nll_nats for loss in results.losses] == pytest.approx([nll for nll, _, _ in expected], rel=1e-4)
    by_run = [
        next(run_model(str(other_folder), "x", questions, options)) for options in (plain, EvaluateOptions(data, 2, 2))
    ]
    assert by_run[0] == by_run[1]


def test_the_data_of_a_runs_folder_are_its_held_out_rows(data, model_folder, tmp_path):
    keys = {"model_name_or_path": str(model_folder), "train_data": [data], "held_out": 3}
    (tmp_path / "run.yaml").write_text(json.dumps(keys))
    [held] = load_eval_sets(str(tmp_path)).values()
    questions = {conversation["messages"][0]["content"] for conversation in held}
    assert len(held) == 3 and questions < {row["instruction"] for row in ROWS}
    # Several sets take turns, so that the first prompts are of all of them.
    sets = {name: str(tmp_path / f"{name}.json") for name in ("one", "two")}
    for name in sets:
        (tmp_path / f"{name}.json").write_text(
            json.dumps([{"instruction": f"{name} {n}", "output": "yes"} for n in range(2)])
        )
    (tmp_path / "run.yaml").write_text(json.dumps({**keys, "held_out": 0, "eval_data": sets}))
    assert list(load_eval_sets(str(tmp_path))) == ["one", "two"]
    prompt_set = load_prompt_set(EvaluateOptions(str(tmp_path), num_prompts=3))
    assert (prompt_set.texts, prompt_set.sets) == (["one 0", "two 0", "one 1"], ["one", "two", "one"])
    (tmp_path / "run.yaml").write_text(json.dumps({**keys, "held_out": 0}))
    message = f"^{tmp_path}: this run has no held-out rows; give a file, folder or hub name of rows$"
    with pytest.raises(SFTError, match=message):
        load_eval_sets(str(tmp_path))


def test_the_models_are_compared_on_each_held_out_set(data, model_folder, other_folder, tmp_path, capsys):
    sets = {"short": ROWS[:2], "long": [{"instruction": f"Say it {n} times.", "output": "text " * n} for n in (5, 9)]}
    for name, rows in sets.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    paths = {name: str(tmp_path / f"{name}.json") for name in sets}
    keys = {"model_name_or_path": str(model_folder), "train_data": [data], "eval_data": paths}
    (tmp_path / "run.yaml").write_text(json.dumps(keys))
    words = ["evaluate", str(model_folder), str(other_folder), "--max_new_tokens", "2", "--template", "role", "--json"]
    out = tmp_path / "out"
    main([*words, "--data", str(tmp_path), "--output", str(out)])
    content = json.loads(capsys.readouterr().out)
    assert content == json.loads((out / "evaluation.json").read_text()) and list(content["sets"]) == ["short", "long"]
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [line.get("set") for line in lines[:5]] == ["short", "long", "short", "long", None]
    for name, part in content["sets"].items():
        main([*words, "--data", paths[name]])
        alone = json.loads(capsys.readouterr().out)
        assert (part["rows"], part["instructions"]) == (2, 0)
        for entry, expected in zip(part["entries"], alone["entries"], strict=True):
            assert "instructions_followed_rate" not in entry["metrics"]
            known = {metric: expected["metrics"][metric] for metric in entry["metrics"]}
            assert entry["metrics"] == pytest.approx(known, rel=1e-5)
        assert f"\n## {name}\n\n| | " in (out / "evaluation.md").read_text()
    main([*words[:-1], "--data", str(tmp_path)])
    output = capsys.readouterr().out
    assert output.index("held-out set short") < output.index("held-out set long")


def test_tasks_of_two_models(model_folder, other_folder, tmp_path, capsys):
    """Scores with standard errors and paired differences, in the tables, the JSON and the files."""
    folders, out = [str(model_folder), str(other_folder)], tmp_path / "out"
    words = ["evaluate", *folders, "--tasks", "configs/tasks/facts_choice.yaml,facts_answer", "--include_path"]
    words += ["configs/tasks", "--num_fewshot", "1", "--limit", "12"]
    main([*words, "--output", str(out), "--json"])
    output = json.loads(capsys.readouterr().out)
    assert (output["rows"], output["instructions"], output["left_out"]) == (0, 0, 0)  # without data, tasks alone
    first, second = output["entries"]
    score = second["tasks"]["facts_choice acc"]
    assert second["metrics"]["facts_choice acc"] == score["value"] and "values" not in score
    assert (score["questions"], score["num_fewshot"], score["version"]) == (12, 1, "1")
    lines = [json.loads(line) for line in (out / "task_samples.jsonl").read_text().splitlines()]
    values = {name: [] for name in folders}
    for line in lines:
        if line["task"] == "facts_choice":
            likelihoods = [likelihood for [[likelihood, _]] in line["resps"]]
            assert line["metrics"]["acc"] == (likelihoods.index(max(likelihoods)) == line["target"])
            values[line["model"]].append(line["metrics"]["acc"])
    difference = second["differences"]["facts_choice acc"]
    for name, mean in zip(folders, ("mean_a", "mean_b")):
        assert difference[mean] == pytest.approx(np.mean(values[name])) and len(values[name]) == 12
    assert score["standard_error"] == pytest.approx(np.std(values[folders[1]], ddof=1) / 12**0.5)
    table = (out / "evaluation.md").read_text()
    cells = [f"{entry['tasks']['facts_choice acc']['value']:.3f} ± " for entry in (first, second)]
    assert re.search(rf"\| facts_choice acc \| {cells[0]}\S+ \| {cells[1]}\S+ \[[-+.0-9]+, [-+.0-9]+\] \|", table)
    assert "12 questions of facts_choice, 12 questions of facts_answer; intervals are of the difference" in table
    main(words[:2] + words[3:])
    [line] = [line for line in capsys.readouterr().out.splitlines() if "facts_choice acc" in line]
    assert cells[0] in line


def test_tasks_beside_held_out_rows(data, model_folder, capsys):
    words = ["evaluate", str(model_folder), "--data", data, "--num_prompts", "1", "--max_new_tokens", "2"]
    main([*words, "--tasks", "configs/tasks/facts_choice.yaml", "--limit", "2", "--json"])
    output = json.loads(capsys.readouterr().out)
    assert (output["rows"], output["instructions"]) == (1, 6)
    assert {"facts_choice acc", "nll_nats_per_token", "stop_rate"} <= output["entries"][0]["metrics"].keys()


def test_prompts_with_tools(model_folder, tokenizer, tmp_path, monkeypatch, capsys, caplog):
    """A call of the reference is compared as a call; its row counts in no overlap of texts. Texts are not asked."""
    folder = str(save_agent(model_folder, tmp_path / "agent"))
    data = write_rows(tmp_path / "rows.jsonl", CONVERSATIONS)
    call = write_call("get_weather", '{"city": "Oslo"}')
    texts = [f"<think>\nHm.\n</think>\n\n{call}", "Yes, 4 degrees.", "no"], [call[:-30], "Yes, 4 degrees.", "the text"]
    instructions = ["x"] * 6
    prompts = script_answers(monkeypatch, tokenizer, *texts[0], *instructions, *texts[1], *instructions)
    with caplog.at_level("INFO", "sft_pipeline"):
        main(["evaluate", folder, folder, "--data", data, "--output", str(tmp_path / "out"), "--json"])
    first, second = json.loads(capsys.readouterr().out)["entries"]
    assert [entry["metrics"]["tool_call_match_rate"] for entry in (first, second)] == [1, 0]
    assert [entry["metrics"]["exact_match_rate"] for entry in (first, second)] == [0.5, 1]
    assert "tool_call_match_rate" not in second["differences"] and "stop_rate" in second["differences"]  # of one row
    assert [ids[: len(prompts[0])] for ids in prompts[:2]] == [prompts[0]] * 2 and len(prompts) == 18
    assert "tool calls, %" in (tmp_path / "out" / "evaluation.md").read_text()
    called, replied, plain, *_ = map(json.loads, (tmp_path / "out" / "answers.jsonl").read_text().splitlines())
    assert called["tools"] == replied["tools"] == TOOLS and "tools" not in plain
    assert called["prompt"] == CALL["messages"][:-1] and called["reference"] == 'get_weather({"city": "Oslo"})'
    assert [answer["calls_match"] for answer in called["answers"]] == [True, False]
    assert called["answers"][0]["message"] == assistant("", OSLO, reasoning="Hm.")
    assert called["answers"][0]["text"] == texts[0][0]


def test_the_judge_reads_calls_and_no_reasoning(monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate_module, "judge_pairs", lambda *args, **kwargs: seen.append(args[1:]))
    called = replace(make_answer("x"), message=assistant("", OSLO, reasoning="Hm."))
    answered = replace(make_answer("x"), message=assistant("No.", reasoning="Hm."))
    first, second = (
        replace(make_results(name, ["x"]), answers=[answer]) for name, answer in zip("ab", (called, answered))
    )
    compare_with_judge(Judge("http://x", "m"), first, second, PromptSet([REPLY], []))
    prompt = 'Is it cold in Oslo? → get_weather({"city": "Oslo"}) → {"degrees": 4}'
    assert seen == [([prompt], ['get_weather({"city": "Oslo"})'], ["No."])]


def test_texts_have_no_prompt(model_folder, tmp_path, capsys):
    """They are left out of mixed rows: held-out rows of a run may be both."""
    data = write_rows(tmp_path / "texts.jsonl", [{"text": "Once"}, {"text": "upon"}])
    assert refusal(capsys, str(model_folder), "--data", data) == (
        f"{data}: its rows are texts without a prompt to answer; give rows of messages"
    )
    rows = write_rows(tmp_path / "rows.jsonl", CONVERSATIONS)
    train = write_rows(tmp_path / "train.jsonl", [{"text": "a time"}])
    keys = {"model_name_or_path": str(model_folder), "train_data": [train], "eval_data": [data, rows]}
    (tmp_path / "run.yaml").write_text(json.dumps(keys))
    assert load_prompt_set(EvaluateOptions(str(tmp_path))).rows == CONVERSATIONS


def test_a_template_that_cannot_write_a_row_is_named_before_any_model_is_asked(model_folder, tmp_path, capsys):
    folder = str(save_agent(model_folder, tmp_path / "agent"))
    data = write_rows(tmp_path / "rows.jsonl", [PLAIN, CALL])
    assert refusal(capsys, folder, str(model_folder), "--data", data).startswith(
        f"{model_folder}: the row with the prompt 'Is it cold in Oslo?': the chat template does not write tools; "
    )


def refusal(capsys, *words: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(["evaluate", *words])
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if line.startswith("sft-pipeline: ")]
    assert exit.value.code == 2 and output.out == "" and len(lines) == 1 and "Traceback" not in output.err
    return lines[0].removeprefix("sft-pipeline: ")


def test_error_messages(data, model_folder, tmp_path, capsys):
    model = str(model_folder)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "file").write_text("")
    cases = {
        ("./nowhere",): "./nowhere: no such model folder",
        (model, "./nowhere"): "./nowhere: no such model folder",
        (model, "--data", str(tmp_path / "empty.jsonl")): "empty.jsonl: no rows",
        (model, "--data", "nowhere.jsonl"): "nowhere.jsonl: no such file or folder",
        (model, "--few_shot", "2"): "few_shot needs rows to take the examples from; add --data",
        (model, "--data", data, "--few_shot", "8"): "few_shot 8: the data has 8 different rows, too few",
        (model, "--num_prompts", "0"): "num_prompts is 0; it has to be 1 or more",
        (model, "--max_new_tokens", "0"): "max_new_tokens is 0; it has to be 1 or more",
        (model, "--few_shot", "-1"): "few_shot is -1; it has to be 0 or more",
        (model, "--output", str(tmp_path / "file")): f"output {tmp_path / 'file'}: is a file; choose a folder",
        (model, "--tasks", str(tmp_path)): f"tasks {tmp_path}: no task in this folder; ",
        (model, "--limit", "2"): "limit is for tasks; add --tasks",
        (
            model,
            "--tasks",
            "configs/tasks",
            "--data",
            data,
            "--few_shot",
            "2",
        ): "few_shot is not for tasks; ",
        (model, model, "--tasks", "configs/tasks", "--judge_base_url", "http://x", "--judge_model", "m"): (
            "a judge compares answers to held-out prompts, not to tasks; add --data"
        ),
        (model, "--shots", "2"): "evaluate: unknown option --shots; `evaluate --help` lists them",
    }
    for words, message in cases.items():
        assert refusal(capsys, *words).startswith(message), words


def test_examples_that_do_not_fit_the_context(data, model_folder, capsys):
    message = refusal(capsys, str(model_folder), "--data", data, "--few_shot", "3", "--max_new_tokens", "4000")
    assert message.startswith("few_shot 3: with the examples a prompt of ")
    assert "and an answer of 4000 exceed the 4096 positions of" in message and message.endswith("use fewer examples")
