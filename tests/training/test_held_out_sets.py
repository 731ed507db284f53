"""Held-out sets with names: each has the metrics of a run with it alone, and all together those of one set."""

import json
import os
import re
import shutil
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from rich.cells import cell_len
from rich.console import Console
from support.processes import run_ranks
from support.reports import chart, edit
from support.training_runs import EVALUATED_RUN
from transformers.integrations import rewrite_logs

from sft_pipeline.config import SFTConfig, build_config_record, parse_config
from sft_pipeline.data.pipeline import load_splits
from sft_pipeline.data.splits import parse_sets
from sft_pipeline.evaluation.metrics.registry import METRICS
from sft_pipeline.evaluation.step_results import StepResults, compute_changes
from sft_pipeline.reports.charts import build_run_charts
from sft_pipeline.reports.console_summary import print_results
from sft_pipeline.reports.html import write_report
from sft_pipeline.reports.model_card import build_model_card
from sft_pipeline.reports.run_results import read_run
from sft_pipeline.runs.output_dir import RUN_FILE
from sft_pipeline.train import train
from sft_pipeline.training.held_out_sets import OTHER_NAMES
from sft_pipeline.training.sft_trainer import SFTTrainer
from sft_pipeline.utils.errors import SFTError

SETS = {"en": "en.json", "zh-CN": ["zh.json", {"path": "more.json"}]}
NUM_ANSWERS, NUM_INSTRUCTIONS = 2, 3
# The metrics of a set that the trainer logs, as the library names them.
LOGGED = ("loss", "perplexity", "token_accuracy")


def make_rows(start: int, stop: int, *words: str) -> list[dict[str, str]]:
    return [
        {"instruction": f"Say {word} {count} times.", "output": " ".join([word] * count) + "."}
        for count in range(start, stop)
        for word in words
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder of the rows: 24 to train on, 6 English and 5 + 2 Chinese ones held out, of different lengths."""
    folder = tmp_path_factory.mktemp("rows")
    files = {"rows": make_rows(1, 9, "text", "答", "the"), "en": make_rows(3, 9, "question")}
    files |= {"zh": make_rows(2, 7, "问"), "more": make_rows(4, 6, "在")}
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def config(folder, model_folder) -> Path:
    """Config with two sets, and evaluations at steps 0, 2 and 4 that ask every question."""
    keys = {
        **EVALUATED_RUN,
        "model_name_or_path": str(model_folder),
        "train_data": "rows.json",
        "eval_data": SETS,
        "num_answers": NUM_ANSWERS,
        "num_instructions": NUM_INSTRUCTIONS,
        "max_new_tokens": 5,
        "eval_answer_share": 1000,
        "max_steps": 4,
        "num_proc": 1,
    }
    (folder / "sets.yaml").write_text(yaml.safe_dump(keys))
    return folder / "sets.yaml"


@pytest.fixture(autouse=True)
def current_folder(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)


def run_train(config: Path, output: Path, *overrides: str) -> dict:
    return train(parse_config(str(config), ["--output_dir", str(output), *overrides]), Console(quiet=True))


@pytest.fixture(scope="module")
def runs(config, folder, tmp_path_factory):
    """runs(name) is the output folder of the run with the two sets, with one of them alone, or with all as one set."""
    base, done = tmp_path_factory.mktemp("runs"), {}
    data = {"sets": None, "en": ["en.json"], "zh-CN": ["zh.json", "more.json"]}
    data["joined"] = data["en"] + data["zh-CN"]

    def runs(name: str) -> Path:
        if name not in done:
            overrides = ["--save_strategy", "no", "--eval_data", *data[name]] if data[name] else []
            done[name] = run_train(config, base / name, *overrides)
        return base / name

    return runs


def load_evaluations(folder: Path) -> list[StepResults]:
    return [StepResults(**json.loads(file.read_text())) for file in sorted((folder / "evaluation").iterdir())]


def load_history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


# Metrics.


@pytest.mark.parametrize("name", ["en", "zh-CN"])
def test_loss_per_held_out_set(name, runs):
    """As asked for in axolotl's issue 1360: each set has the loss, perplexity and accuracy of a run with it alone."""
    logged = [
        {entry["step"]: entry for entry in load_history(runs(run)) if "eval_loss" in entry} for run in ("sets", name)
    ]
    assert list(logged[0]) == list(logged[1]) == [0, 2, 4]
    for step, expected in logged[1].items():
        for metric in LOGGED:
            assert logged[0][step][f"eval_{name}_{metric}"] == pytest.approx(expected[f"eval_{metric}"], rel=1e-6)


def test_the_loss_of_all_sets_is_that_of_their_rows_as_one_set(runs):
    """Each token counts once, so it is not the mean of the sets' losses, and what is trained does not change."""
    sets, joined = (load_history(runs(name)) for name in ("sets", "joined"))
    keys = [[(entry["step"], key) for entry in history for key in entry] for history in (sets, joined)]
    assert set(keys[1]) < set(keys[0])  # the names of a run with one set stay
    for entry, expected in zip(sets, joined, strict=True):
        metrics = ("loss", "eval_loss", "eval_perplexity", "eval_token_accuracy", "eval_bits_per_byte")
        for metric in [metric for metric in metrics if metric in expected]:
            assert entry[metric] == pytest.approx(expected[metric], rel=1e-6)
        if "eval_loss" in entry:
            assert entry["eval_loss"] != pytest.approx((entry["eval_en_loss"] + entry["eval_zh-CN_loss"]) / 2, rel=1e-5)


def test_one_set_without_a_name_has_no_other_names_than_before(runs):
    for evaluation in (runs("joined") / "evaluation").iterdir():
        results = json.loads(evaluation.read_text())
        assert list(results) == ["step", "complete", "seconds", "metrics", "held_out", "utf8_bytes", "table"]
        assert all("set" not in row for row in results["table"])
    results = json.loads((runs("joined") / "results.json").read_text())
    assert "sets" not in results and list(results["rows"]) == ["train", "held_out"]
    assert all("set" not in row for row in results["answers"])
    assert not [key for entry in load_history(runs("joined")) for key in entry if "en_" in key.replace("token", "")]


def test_the_metrics_of_a_set_are_those_of_its_rows_and_answers(runs):
    """The file of an evaluation has what a run with the set alone has, but for the order of the rows and the steps."""
    for name in SETS:
        for results, expected in zip(load_evaluations(runs("sets")), load_evaluations(runs(name)), strict=True):
            part = results.select_set(name)
            assert part.held_out["tokens"] == expected.held_out["tokens"] and part.utf8_bytes == expected.utf8_bytes
            asked = [row for row in expected.table if row["instruction"] is None]
            assert [row | {"set": name} for row in asked] == part.table and len(asked) == NUM_ANSWERS
            own = {key: value for key, value in expected.metrics.items() if "instructions" not in key}
            assert part.metrics == pytest.approx(own, rel=1e-6)


def test_the_metrics_of_a_set_are_logged_under_its_name(runs):
    folder = runs("sets")
    history = [entry for entry in load_history(folder) if any(key.startswith("eval_") for key in entry)]
    for evaluation in load_evaluations(folder):
        logged = {key: value for entry in history if entry["step"] == evaluation.step for key, value in entry.items()}
        for name in SETS:
            metrics = dict(evaluation.sets[name]["metrics"])
            for metric, own_name in zip(LOGGED, ("nll_nats_per_token", "perplexity", "token_accuracy")):
                assert logged[f"eval_{name}_{metric}"] == pytest.approx(metrics.pop(own_name), rel=1e-12)
            assert {f"eval_{name}_{metric}": value for metric, value in metrics.items()}.items() <= logged.items()
        # A tracker has a chart for each of them: nothing after the first slash is shared.
        assert {"eval/en_loss", "eval/zh-CN_loss", "eval/en_stop_rate", "eval/loss"} <= rewrite_logs(logged).keys()


# Answers.


def test_each_set_is_asked_and_the_instructions_once(runs):
    for results in load_evaluations(runs("sets")):
        sets = [row["set"] for row in results.table]
        assert sets == ["en", "zh-CN"] * NUM_ANSWERS + [None] * NUM_INSTRUCTIONS
        assert all(("question" in row["prompt"]) == (row["set"] == "en") for row in results.table[: 2 * NUM_ANSWERS])
        assert results.metrics["answers"] == 2 * NUM_ANSWERS
    answers = json.loads((runs("sets") / "results.json").read_text())["answers"]
    assert [row["set"] for row in answers] == ["en", "zh-CN"] * NUM_ANSWERS


def test_the_changes_of_a_set_have_their_intervals(runs):
    results = json.loads((runs("sets") / "results.json").read_text())
    for name in SETS:
        first, *_, last = load_evaluations(runs(name))
        changes = results["sets"][name]["before_and_after"]
        expected = compute_changes(first, last)
        del expected["instructions_followed_rate"]
        assert changes.keys() == expected.keys()
        for metric, change in changes.items():
            assert change == pytest.approx(expected[metric], rel=1e-5, abs=1e-7)
        assert changes["nll_nats_per_token"]["items"] == {"en": 6, "zh-CN": 7}[name]


# Names and the best model.


def fails(call, *parts: str) -> None:
    """The call raises SFTError, in one line that has all the parts."""
    with pytest.raises(SFTError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("eval_data", "parts"),
    [
        ({"a b": "en.json"}, ["eval_data: 'a b' cannot be the name of a held-out set; use letters, digits, _ and -"]),
        ({"": "en.json"}, ["eval_data: '' cannot be the name of a held-out set"]),
        ({"en": []}, ["eval_data: the set en has no source; give a path, or {path: ..., split: ...}"]),
        ({"en": None}, ["eval_data: the set en has no source"]),
        ({"en": ["en.json", 7]}, ["eval_data: the set en has no source"]),
        ({"en": {"path": "en.json", "weight": 2}}, ["eval_data: en.json has a weight, and each held-out row counts"]),
        ({"en": {"path": "en.json", "slit": "x"}}, ["eval_data en: an entry has the unknown key slit"]),
        ({"en": "en.json", "name": "zh.json"}, ["eval_data: an entry has the unknown key en; it may have path, name"]),
        (["zh.json", {"en": "en.json"}], ["eval_data: a mapping of names to sources stands alone; write every source"]),
        ('{"en": "en.json", "en": "zh.json"}', ["en is given twice; all but the last would be lost"]),
    ],
)
def test_a_mapping_that_cannot_be_read_is_one_line(eval_data, parts, config):
    items = eval_data if isinstance(eval_data, list) else [eval_data]
    overrides = ["--eval_data", *(item if isinstance(item, str) else json.dumps(item) for item in items)]
    fails(lambda: parse_config(str(config), overrides), *parts)


@pytest.mark.parametrize("name", ["loss", "runtime", "stop_rate", "eval", "eval_zh", "answers"])
def test_a_set_cannot_have_the_name_of_a_metric(name, config, tiny_model):
    args = parse_config(str(config), ["--eval_data", json.dumps({name: "en.json"})])
    reason = "begins like a metric, with eval" if name.startswith("eval") else f"the name {name} of a metric"
    fails(lambda: SFTTrainer(tiny_model, args), "eval_data: ", reason, "; choose another")
    args = parse_config(str(config), [])
    fails(lambda: SFTTrainer(tiny_model, args, eval_dataset={name: "en.json"}), "eval_dataset: ", reason)


def test_no_two_names_of_metrics_are_joined_to_the_same():
    """NAME_METRIC is ambiguous only where a metric's name ends with _ and that of another."""
    names = {*METRICS, *OTHER_NAMES}
    assert not [(name, other) for name in names for other in names if name.endswith(f"_{other}")]


@pytest.mark.parametrize(
    ("eval_data", "parts"),
    [
        ({"en": []}, ["eval_dataset en: no rows"]),
        ({}, ["eval_dataset: a mapping without a held-out set; give it names and rows, or leave it out"]),
        ({"e n": "en.json"}, ["eval_dataset: 'e n' cannot be the name of a held-out set"]),
        ({"en": "en.json", "zh": "nowhere.json"}, ["nowhere.json: no such file"]),
        ({"en": [{"instruction": "Say it.", "output": "text " * 900}]}, ["eval_data en: no row is left", "max_length"]),
        (
            {"en": "en.json", "zh": [{"input_ids": [5, 6], "labels": [6, -100]}]},
            ["train_dataset and eval_dataset: one of them is encoded"],
        ),
    ],
)
def test_sets_of_a_program_that_cannot_be_read_are_one_line(eval_data, parts, config, tiny_model, make_tokenizer):
    args = parse_config(str(config), ["--report_to", "none"])
    fails(lambda: SFTTrainer(tiny_model, args, eval_dataset=eval_data, processing_class=make_tokenizer()), *parts)


def test_the_best_model_is_that_of_the_metric_of_a_set(config, tmp_path):
    # A greater loss counts as better, so that the best model is not the last.
    keys = ["--load_best_model_at_end", "true", "--greater_is_better", "true", "--num_answers", "0"]
    run_train(config, tmp_path / "out", *keys, "--metric_for_best_model", "eval_zh-CN_loss", "--num_instructions", "0")
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_zh-CN_loss"] for entry in state["log_history"] if entry.get("step")
              and "eval_loss" in entry}  # fmt: skip
    best = max((step for step in losses if step), key=losses.get)
    assert state["best_metric"] == losses[best] and state["best_global_step"] == best == 2


def test_a_metric_that_no_set_has_is_refused_with_those_that_exist(config, tiny_model):
    known = "loss, perplexity, token_accuracy, en_loss, en_perplexity, en_token_accuracy, zh-CN_loss"
    for metric in ("eval_fr_loss", "eval_en_bleu", "zh_loss"):
        name = metric.removeprefix("eval_")
        keys = ["--metric_for_best_model", metric]
        fails(lambda: parse_config(str(config), keys), f"metric_for_best_model is {name}; choose {known}, ")  # noqa: B023
    # The sets of a program are known to the trainer alone.
    args = SFTConfig("out", use_cpu=True, train_data=["rows.json"], metric_for_best_model="eval_fr_loss")
    message = "metric_for_best_model is fr_loss; choose loss, perplexity, token_accuracy, en_loss"
    fails(lambda: SFTTrainer(tiny_model, args, eval_dataset={"en": "en.json"}), message)
    fails(lambda: SFTConfig("out", use_cpu=True, metric_for_best_model="eval_fr_bleu"), "is fr_bleu; choose loss")
    assert SFTConfig("out", use_cpu=True, metric_for_best_model="eval_zh_perplexity").greater_is_better is False
    assert SFTConfig("out", use_cpu=True, metric_for_best_model="token_accuracy").greater_is_better is True


# Config, rows and programs.


def test_a_mapping_is_recorded_and_read_again(config, tmp_path):
    args = parse_config(str(config), [])
    assert args.eval_data == [json.dumps({"en": "en.json", "zh-CN": ["zh.json", "more.json"]})]
    record = build_config_record(args)
    assert record["eval_data"] == {"en": "en.json", "zh-CN": ["zh.json", "more.json"]}
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(record))
    assert parse_config(str(tmp_path / "again.yaml"), []).eval_data == args.eval_data
    assert parse_config(str(config), ["--eval_data", json.dumps(SETS)]).eval_data == args.eval_data
    assert SFTConfig("out", use_cpu=True, eval_data=SETS).eval_data == args.eval_data


def test_the_account_of_rows_is_of_each_set(config, tmp_path, caplog, runs):
    """Also of the training rows that are dropped because a set has them, and of the held-out ones that are too long."""
    (tmp_path / "both.json").write_text(json.dumps([*make_rows(1, 3, "text"), *make_rows(80, 82, "answer")]))
    sets = json.dumps({"en": "en.json", "both": str(tmp_path / "both.json")})
    args = parse_config(str(config), ["--eval_data", sets, "--max_length", "120"])
    with caplog.at_level("INFO", "sft_pipeline"):
        trainer = SFTTrainer(args=args)
    assert "dropped 2 training rows that are in the evaluation data both too" in caplog.text
    data = trainer.data
    assert [(name, stats.rows, stats.kept) for name, stats in data.held_out_sets.items()] == [
        ("en", 6, 6),
        ("both", 4, 2),
    ]
    assert (data.held_out_stats.rows, data.held_out_stats.kept, data.held_out_stats.dropped) == (
        10, 8, data.held_out_sets["both"].dropped,
    )  # fmt: skip
    for name, stats in data.held_out_sets.items():
        assert f"held-out rows of {name}: {stats}" in caplog.text
    rows = json.loads((runs("sets") / "results.json").read_text())["rows"]
    joined = json.loads((runs("joined") / "results.json").read_text())["rows"]
    assert rows["held_out"] | {"cached": None} == joined["held_out"] | {"cached": None}
    alone = json.loads((runs("zh-CN") / "results.json").read_text())["rows"]["held_out"]
    assert rows["held_out zh-CN"] | {"cached": None} == alone | {"cached": None}


@pytest.mark.parametrize("encoded", [False, True])
def test_a_program_gives_sets_as_the_library_takes_them(encoded, config, tmp_path, tiny_model, make_tokenizer, runs):
    args = parse_config(str(config), ["--output_dir", str(tmp_path / "out"), "--report_to", "none"])
    rows = {"train": "rows.json", "en": "en.json", "zh": json.loads(Path("zh.json").read_text())}
    if encoded:
        trainer = SFTTrainer(tiny_model, args, processing_class=make_tokenizer())
        args.eval_data, rows["train"] = [], trainer.data.train
        sets = trainer.data.held_out
        rows |= {name: sets.filter(lambda row: row["held_out_set"] == index) for index, name in enumerate(("en", "zh"))}  # noqa: B023
    given = datasets.DatasetDict({name: rows[name] for name in ("en", "zh")}) if encoded else {
        name: rows[name] for name in ("en", "zh")
    }  # fmt: skip
    trainer = SFTTrainer(
        tiny_model, args, train_dataset=rows["train"], eval_dataset=given, processing_class=make_tokenizer()
    )
    metrics = trainer.evaluate()
    [first, *_] = load_history(runs("sets"))
    assert metrics["eval_en_loss"] == pytest.approx(first["eval_en_loss"], rel=1e-6)
    assert ("eval_zh_loss" in metrics) and list(trainer.evaluation.evaluations[0].sets) == ["en", "zh"]
    asked = [row["set"] for row in trainer.evaluation.evaluations[0].table if row["set"]]
    assert asked == ([] if encoded else ["en", "zh"] * NUM_ANSWERS)


def test_encoded_sets_have_the_same_columns(config, tiny_model, make_tokenizer):
    rows = [{"input_ids": [5, 6], "labels": [6, -100]}]
    sets = {"en": rows, "zh": datasets.Dataset.from_list(rows)}
    args = SFTConfig("out", use_cpu=True)
    trainer = lambda: SFTTrainer(  # noqa: E731
        tiny_model, args, train_dataset=rows, eval_dataset=sets, processing_class=make_tokenizer()
    )
    fails(trainer, "eval_dataset: only some of its sets have sequence_lengths or computed_tokens; give all of them")


def test_sets_keep_their_order_and_their_rows(config):
    args = parse_config(str(config), ["--eval_data", '{"zh": ["zh.json", "more.json"], "en": "en.json"}'])
    _, held_out = load_splits(args)
    sets = parse_sets(held_out)
    assert {name: len(rows) for name, rows in sets.items()} == {"zh": 7, "en": 6} and list(sets) == ["zh", "en"]
    assert all("question" in row["messages"][0]["content"] for row in sets["en"])


# Several processes and resuming.


def evaluate_in_process(process: int, config: str, folder: str) -> None:
    """Evaluate in one of two processes, before the first step, when the model is that of one process."""
    os.chdir(Path(config).parent)
    keys = ["--per_device_train_batch_size", "2", "--num_answers", "1", "--num_instructions", "0"]
    trainer = SFTTrainer(args=parse_config(config, [*keys, "--ddp_backend", "gloo", "--output_dir", folder]))
    trainer.evaluate()
    if process == 0:
        trainer.state.save_to_json(f"{folder}/trainer_state.json")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_losses_of_one(runs, config, tmp_path):
    run_ranks(evaluate_in_process, 2, str(config), str(tmp_path / "out"))
    [first, *_], [expected, *_] = load_history(tmp_path / "out"), load_history(runs("sets"))
    for key, value in expected.items():
        if key.endswith(LOGGED):
            assert first[key] == pytest.approx(value, rel=1e-6)
    [results, *_], [alone, *_] = load_evaluations(tmp_path / "out"), load_evaluations(runs("sets"))
    assert results.table == [alone.table[0], alone.table[1]]
    assert {name: part["rows"] for name, part in results.sets.items()} == {
        name: part["rows"] for name, part in alone.sets.items()
    }


def test_a_run_killed_within_an_evaluation_is_resumed(runs, config, tmp_path):
    """As if killed between the losses of step 4, which no file has yet, and its checkpoint."""
    old = shutil.copytree(runs("sets"), tmp_path / "old")
    shutil.rmtree(old / "checkpoint-4")
    for file in [*old.iterdir(), old / "evaluation" / "step_000004.json"]:
        if file.is_file() and file.name != RUN_FILE:
            file.unlink()
    resumed = run_train(config, old, "--resume_from_checkpoint", "auto")
    expected = json.loads((runs("sets") / "results.json").read_text())
    assert resumed["sets"] == expected["sets"] and resumed["before_and_after"] == expected["before_and_after"]
    for results, whole in zip(load_evaluations(old), load_evaluations(runs("sets")), strict=True):
        assert (results.table, results.sets) == (whole.table, whole.sets)
    losses = [
        [(entry["step"], entry["eval_en_loss"]) for entry in load_history(folder) if "eval_en_loss" in entry]
        for folder in (old, runs("sets"))
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3


# Reports.


def test_the_page_has_every_number_of_each_set(runs):
    folder = runs("sets")
    page = (folder / "report.html").read_text()
    results = json.loads((folder / "results.json").read_text())
    pointers = set(re.findall(r'data-source="[^"#]*#([^"]*)"', page))
    for name in SETS:
        part = results["sets"][name]
        assert {f"/sets/{name}/metrics/{metric}" for metric in part["metrics"]} <= pointers
        for metric, change in part["before_and_after"].items():
            shown = [key for key, value in change.items() if value is not None]
            assert {f"/sets/{name}/before_and_after/{metric}/{key}" for key in shown} <= pointers
        counts = results["rows"][f"held_out {name}"]
        assert {f"/rows/held_out {name}/{key}" for key in ("kept", "tokens", "supervised_tokens")} <= pointers
        assert {f"/rows/held_out {name}/length_quantiles/{key}" for key in counts["length_quantiles"]} <= pointers
        assert f"<h3>{name}</h3>" in page and f"<th>held out: {name}</th>" in page
    assert page.index("<h3>en</h3>") < page.index("Say question 3 times.") < page.index("<h3>zh-CN</h3>")


def test_the_charts_have_a_series_for_each_set(runs):
    run = read_run(runs("sets"))
    found = build_run_charts(run)
    losses = chart(found, "Loss, nats/token")
    assert list(losses) == ["training", "held out", "en", "zh-CN"]
    history = [entry for entry in load_history(run.folder) if "eval_loss" in entry]
    assert losses["zh-CN"] == [(entry["step"], entry["eval_zh-CN_loss"]) for entry in history]
    accuracies = chart(found, "Held-out token accuracy")
    assert accuracies["en"] == [(entry["step"], entry["eval_en_token_accuracy"]) for entry in history]
    stops = chart(found, "Answers that end on their own")
    assert list(stops) == list(SETS)
    assert [x for x, _ in stops["en"]] == [0, 2, 4]


def test_runs_with_the_same_sets_are_compared_by_set(runs, tmp_path):
    other = shutil.copytree(runs("sets"), tmp_path / "other", ignore=shutil.ignore_patterns("*.safetensors", "ch*"))
    edit(other / "evaluation" / "step_000004.json", lambda one: one["held_out"].update(
        nll_nats=[value / 2 for value in one["held_out"]["nll_nats"]]))  # fmt: skip
    page = write_report([runs("sets"), other], tmp_path / "page.html").read_text()
    assert "#/sets/en/metrics/nll_nats_per_token" in page and "held-out loss, nats/token, zh-CN" in page
    last, changed = (read_run(folder).last_evaluation for folder in (runs("sets"), other))
    for name in SETS:
        change = compute_changes(last.select_set(name), changed.select_set(name))["nll_nats_per_token"]
        assert change["after"] == pytest.approx(change["before"] / 2) and f">{change['difference']:+.3f}</td>" in page
    # With a run without sets, what both have.
    write_report([runs("sets"), runs("joined")], tmp_path / "page.html")


def test_the_terminal_and_the_card_have_each_set(runs, capsys):
    results = json.loads((runs("sets") / "results.json").read_text())
    print_results(results, "out", Console(width=80))
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if cell_len(line) > 80] == []
    assert [line.split()[-1] for line in lines if line.strip().startswith("held out ")] == ["en", "zh-CN"] * NUM_ANSWERS
    change = results["sets"]["zh-CN"]["before_and_after"]["nll_nats_per_token"]
    start = lines.index(next(line for line in lines if line.strip() == "zh-CN"))
    cells = [f"{change['before']:.3f}", f"{change['after']:.3f}", f"{change['difference']:+.3f}"]
    assert lines[start + 1].split()[3:6] == cells and lines[start + 1].startswith("held-out loss")

    card = build_model_card(results, "ours", "float32", None)
    assert "| zh-CN |  |  |  |  |  |\n| held-out loss, nats/token | " + " | ".join(cells) in card.text
    assert "- held out zh-CN: 7 of 7 rows" in card.text and "- held out: 13 of 13 rows" in card.text
    losses = {
        (one.dataset_config, one.dataset_name): one.metric_value
        for one in card.data.eval_results
        if one.metric_type == "loss"
    }
    assert losses == {
        (None, "held-out rows of rows.json, en.json, zh.json, more.json"): round(results["eval_loss"]["after"], 4),
        ("en", "held-out rows of en.json"): round(results["sets"]["en"]["metrics"]["nll_nats_per_token"], 4),
        ("zh-CN", "held-out rows of zh.json, more.json"): round(change["after"], 4),
    }


def test_the_lines_of_an_evaluation_have_each_set(config, tmp_path, capsys):
    keys = ["--disable_tqdm", "false", "--max_steps", "1", "--save_strategy", "no", "--eval_on_start", "false"]
    run_train(config, tmp_path / "out", *keys)
    output = capsys.readouterr().out
    logged = {key: value for entry in load_history(tmp_path / "out") for key, value in entry.items()}
    for name in SETS:
        loss, accuracy = logged[f"eval_{name}_loss"], logged[f"eval_{name}_token_accuracy"]
        assert f"step 1, {name}: held-out loss {loss:.4f}, token accuracy {accuracy:.1%}" in output
        assert f"step 1, {name}: {NUM_ANSWERS} answers, " in output
    assert f"step 1: held-out loss {logged['eval_loss']:.4f}, " in output and "step 1: 4 answers, " in output
