"""The command `evaluate`: metrics equal those of plain forward passes and answers; errors are one line; tables fit."""

import json
import logging
import math
from pathlib import Path

import datasets
import pytest
import torch
from rich.console import Console

from sft_pipeline.cli import main
from sft_pipeline.commands.evaluate import (
    EvaluateOptions,
    evaluate_models,
    load_eval_conversations,
    load_prompt_set,
    run_model,
)
from sft_pipeline.data.chat_templates import build_template
from sft_pipeline.evaluation import plots, tables
from sft_pipeline.evaluation.bootstrap import compute_paired_difference
from sft_pipeline.evaluation.comparison import Comparison, compare_models
from sft_pipeline.evaluation.eval_loss import RowLoss
from sft_pipeline.evaluation.metrics.instruction_following import load_instructions
from sft_pipeline.evaluation.metrics.registry import INSTRUCTIONS_FOLLOWED, METRICS
from sft_pipeline.evaluation.model_results import ModelResults
from sft_pipeline.evaluation.prompt_set import PromptSet, add_examples, select_prompts
from sft_pipeline.inference.answers import Answer, answer_prompts
from sft_pipeline.model.loading import load_model, load_tokenizer
from sft_pipeline.runs.output_dir import TEMPLATE_FILE
from sft_pipeline.utils.errors import SFTError

ROWS = [{"instruction": f"Say {n} to the text.", "input": "", "output": f"the answer is {n}, 冬瓜"} for n in range(8)]
SYSTEM = "You are 冬瓜."

pytestmark = pytest.mark.usefixtures("few_instructions")


@pytest.fixture(autouse=True)
def as_it_was():
    """main() quietens the libraries for the whole process."""
    level = logging.getLogger("sft_pipeline").level
    yield
    logging.getLogger("sft_pipeline").setLevel(level)
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(file)


@pytest.fixture(scope="module")
def other_folder(model_folder, tmp_path_factory) -> Path:
    """The tiny model with other weights, saved as a run with the role template and a system prompt."""
    folder = tmp_path_factory.mktemp("other") / "run"
    model, tokenizer = load_model(str(model_folder)), load_tokenizer(str(model_folder))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / TEMPLATE_FILE).write_text(json.dumps({"template": "role", "system_prompt": SYSTEM}))
    return folder


@pytest.fixture(scope="module")
def evaluated(data, model_folder, other_folder, few_instructions) -> tuple[PromptSet, list[ModelResults]]:
    """Both models, without and with two examples."""
    request = EvaluateOptions(data, num_prompts=5, max_new_tokens=8, few_shot=2)
    questions = load_prompt_set(request)
    models = (model_folder, "first"), (other_folder, "second")
    return questions, [results for path, name in models for results in run_model(str(path), name, questions, request)]


@pytest.fixture(scope="module")
def comparison(evaluated) -> Comparison:
    questions, records = evaluated
    return compare_models(records, questions)


def row(text: str, reply: str, *earlier: dict) -> list[dict]:
    return [*earlier, {"role": "user", "content": text}, {"role": "assistant", "content": reply}]


# Selection of prompts.


def test_prompts_are_in_order_and_distinct_and_examples_are_other_rows():
    system = {"role": "system", "content": "s"}
    rows = [row("a", "1"), row("b", "2"), row("a", "3"), row("c", "4"), row("b", "5", system)]
    prompts = select_prompts(rows, 2, 1)
    assert prompts.rows == rows[:2] and prompts.references == ["1", "2"] and prompts.texts == ["a", "b"]
    assert prompts.examples == [row("c", "4")]
    assert select_prompts(rows, 50, 0).rows == [rows[0], rows[1], rows[3], rows[4]]


def test_an_example_is_the_first_exchange_of_a_row():
    system = {"role": "system", "content": "s"}
    long = row("more", "2", *row("first", "1", system))
    assert select_prompts([row("a", "0"), long], 1, 1).examples == [row("first", "1")]


def test_examples_follow_the_system_message():
    system = {"role": "system", "content": "s"}
    examples = [row("x", "y"), row("z", "w")]
    assert add_examples(row("a", "b", system), examples) == [system, *row("x", "y"), *row("z", "w"), *row("a", "b")]
    assert add_examples(row("a", "b"), []) == row("a", "b")


@pytest.mark.parametrize("few_shot", [3, 5])
def test_too_few_rows_for_the_examples(few_shot):
    with pytest.raises(SFTError, match=f"^few_shot {few_shot}: the data has 3 different rows, too few for prompts"):
        select_prompts([row(text, "1") for text in "abc"], 50, few_shot)


# Metrics.


def plain_losses(folder: Path, conversations: list[list[dict]], template_name: str) -> list[tuple[float, int, int]]:
    """Summed nll, tokens and hits of each conversation's last answer, from full logits of one row at a time."""
    model, template = load_model(str(folder)), build_template(template_name, load_tokenizer(str(folder)))
    losses = []
    for runs, conversation in zip(template.render(conversations), conversations):
        ids = torch.tensor([token for run in runs for token in run.ids])
        start = len(template.encode_prompt(conversation[:-1]))
        with torch.no_grad():
            logits = model(ids[None]).logits[0, start - 1 : -1].double()
        nll = -logits.log_softmax(-1).gather(1, ids[start:, None]).sum().item()
        losses.append((nll, len(ids) - start, (logits.argmax(-1) == ids[start:]).sum().item()))
    return losses


def build_conversations(questions: PromptSet, index: int) -> list[list[dict]]:
    """The conversations of result `index`: plain, with examples, and both after a system prompt."""
    examples = [message for example in questions.examples for message in example] if index % 2 else []
    system = [{"role": "system", "content": SYSTEM}] if index >= 2 else []
    return [system + examples + row for row in questions.rows]


@pytest.mark.parametrize("index", range(4))
def test_losses_equal_plain_forward_passes(index, evaluated, comparison, model_folder, other_folder):
    questions, records = evaluated
    folder, template = (model_folder, "chat") if index < 2 else (other_folder, "role")
    plain = plain_losses(folder, build_conversations(questions, index), template)
    for loss, (nll, tokens, correct) in zip(records[index].losses, plain, strict=True):
        assert loss.nll_nats == pytest.approx(nll, rel=1e-4) and (loss.tokens, loss.correct) == (tokens, correct)
    nll, tokens, correct = map(sum, zip(*plain))
    size = sum(len(reference.encode()) for reference in questions.references)
    metrics = comparison.entries[index].metrics
    assert metrics["nll_nats_per_token"] == pytest.approx(nll / tokens, rel=1e-4)
    assert metrics["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-3)
    assert metrics["bits_per_byte"] == pytest.approx(nll / math.log(2) / size, rel=1e-4)
    assert metrics["token_accuracy"] == correct / tokens


@pytest.mark.parametrize("index", range(4))
def test_answers_and_their_metrics(index, evaluated, comparison, model_folder, other_folder):
    questions, records = evaluated
    folder, name = (model_folder, "chat") if index < 2 else (other_folder, "role")
    model, template = load_model(str(folder)), build_template(name, load_tokenizer(str(folder)))
    expected = answer_prompts(model, template, [messages[:-1] for messages in build_conversations(questions, index)], 8)
    assert [answer.text for answer in records[index].answers] == [answer.text for answer in expected]
    metrics, texts = comparison.entries[index].metrics, [answer.text for answer in expected]
    assert metrics["stop_rate"] == sum(answer.stopped for answer in expected) / 5
    assert metrics["cap_rate"] == 1 - metrics["stop_rate"]
    columns = {"predictions": texts, "references": questions.references}
    for name in ("loop_rate", "bleu_percent"):
        assert metrics[name] == METRICS[name].compute(columns)


def test_names_have_the_number_of_examples(comparison):
    names = [entry.name for entry in comparison.entries]
    assert names == ["first", "first, 2 examples", "second", "second, 2 examples"]
    assert (comparison.rows, comparison.left_out) == (5, 0) and comparison.instructions == 6


def test_differences_are_those_of_the_metrics(comparison):
    first, *entries = comparison.entries
    assert first.differences == {}
    names = {"nll_nats_per_token", "bits_per_byte", "loop_rate", "answer_length_ratio", INSTRUCTIONS_FOLLOWED}
    for entry in entries:
        assert names <= set(entry.differences)
        for name, interval in entry.differences.items():
            assert interval.low <= interval.difference <= interval.high
            assert interval.difference == pytest.approx(entry.metrics[name] - first.metrics[name], abs=1e-9), name
    assert entries[1].differences["nll_nats_per_token"].difference != 0


def test_a_difference_is_paired_and_weighted(evaluated, comparison):
    _, records = evaluated
    sides = [[(loss.nll_nats, loss.tokens) for loss in records[index].losses] for index in (0, 2)]
    (a, a_weights), (b, b_weights) = (zip(*side) for side in sides)
    expected = compute_paired_difference(a, b, a_weights=a_weights, b_weights=b_weights)
    assert comparison.entries[2].differences["nll_nats_per_token"] == expected


def test_a_model_against_itself_differs_by_nothing(evaluated):
    questions, records = evaluated
    _, same = compare_models([records[0], records[0]], questions).entries
    assert same.differences
    for interval in same.differences.values():
        assert (interval.difference, interval.low, interval.high) == (0, 0, 0)


def make_results(name: str, texts: list[str], nll: float = 1.0, errors: tuple[int, ...] = ()) -> ModelResults:
    """A record of two rows; rows in `errors` could not be asked."""
    answers = [Answer(text, True, 1, "too long" if index in errors else None) for index, text in enumerate(texts)]
    losses = [RowLoss(nll, 2, 1, 4) for _ in texts]
    instruction_answers = [Answer(instruction.good, True, 1) for instruction in load_instructions()[:6]]
    return ModelResults(name, losses, answers, instruction_answers)


def test_a_prompt_with_an_error_is_left_out_for_all_models():
    questions = PromptSet([row(text, "yes", *[]) for text in "abc"], [])
    comparison = compare_models(
        [make_results("a", ["yes", "no", "no"]), make_results("b", ["no", "yes", "yes"], errors=(0,))], questions
    )
    assert [entry.metrics["exact_match_rate"] for entry in comparison.entries] == [0, 1]
    assert (comparison.rows, comparison.left_out) == (2, 1) and comparison.entries[0].metrics[
        INSTRUCTIONS_FOLLOWED
    ] == 1
    assert "2 held-out rows, 6 instructions, 1 excluded" in tables.format_markdown(comparison)


def test_a_loss_that_is_missing_leaves_the_row_out():
    questions = PromptSet([row(text, "yes") for text in "ab"], [])
    whole, cut = make_results("a", ["yes", "no"]), make_results("b", ["yes", "no"])
    cut.losses[0] = None
    assert compare_models([whole, cut], questions).rows == 1


def test_a_diverged_model_shows_its_nan_without_an_interval():
    questions = PromptSet([row(text, "yes") for text in "ab"], [])
    results = [make_results("a", ["yes", "no"]), make_results("b", ["yes", "no"], math.nan)]
    _, diverged = compare_models(results, questions).entries
    assert math.isnan(diverged.metrics["nll_nats_per_token"]) and "nll_nats_per_token" not in diverged.differences
    assert "word_f1" in diverged.differences


def test_references_without_words_are_left_out_of_the_length_ratio():
    questions = PromptSet([row("a", "yes"), row("b", "!"), row("c", "yes")], [])
    records = [make_results("a", ["yes", "!", "yes"]), make_results("b", ["yes yes", "!", "yes yes"])]
    assert compare_models(records, questions).entries[1].differences["answer_length_ratio"].difference == 1


def test_records_survive_json(evaluated):
    for record in evaluated[1]:
        assert ModelResults.from_json(json.loads(json.dumps(record.as_json()))) == record
    cut = make_results("a", ["yes", "no"])
    cut.losses[0] = None
    assert ModelResults.from_json(json.loads(json.dumps(cut.as_json()))) == cut


# Tables and pictures.


def printed(content, width: int = 80) -> list[str]:
    console = Console(record=True, width=width, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        tables.print_table(content, console)
    return console.export_text().splitlines()


@pytest.mark.parametrize(
    "make", [tables.format_details, lambda result: tables.format_overview(result, ["12.3 min, 6.4 GiB"] * 4)]
)
def test_tables_fit_80_columns_uncut(make, comparison):
    lines = printed(make(comparison))
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)


def test_every_metric_has_a_line(comparison):
    text = "\n".join(printed(tables.format_details(comparison)))
    assert "second against first" in text and "first, 2 examples against first" in text
    names = set(comparison.entries[0].metrics) - {name for name in comparison.entries[0].metrics if "rate_" in name}
    assert names == set(METRICS)
    markdown = tables.format_markdown(comparison)
    for name, metric in METRICS.items():
        assert text.count(metric.heading) == 3
        assert f"| {metric.heading} | {metric.format_number(comparison.entries[0].metrics[name])} |" in markdown


def test_intervals_are_spelled():
    metric = METRICS["stop_rate"]
    assert tables._format_interval(metric, None) == ""
    assert tables._format_interval(metric, compute_paired_difference([0, 0], [1, 1])) == "[+100.0, +100.0]"


def test_one_model_alone(evaluated):
    questions, records = evaluated
    text = "\n".join(printed(tables.format_details(compare_models(records[:1], questions))))
    assert text.split()[:3] == ["first", "metric", "value"] and "95% interval" not in text and "stop rate, %" in text


@pytest.mark.filterwarnings("error")
def test_the_picture_has_a_panel_for_each_metric_and_a_bar_for_each_model(comparison, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
    plots.draw_comparison(comparison, tmp_path / "x.png")
    panels = figures[0].axes
    assert [panel.get_title() for panel in panels][:3] == [
        "held-out loss, nats/token",
        "answers that end on their own, %",
        "answers in a loop, %",
    ]
    for axes, name in zip(panels, plots.PLOTTED_METRICS, strict=True):
        scale = 100 if METRICS[name].unit == "%" else 1
        dots = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
        assert dots == [scale * entry.metrics[name] for entry in comparison.entries]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == [entry.name for entry in comparison.entries]


def test_a_long_name_keeps_its_end():
    assert plots._shorten_name("outputs/" + "x" * 40 + "/run7").endswith("/run7")
    assert len(plots._shorten_name("y" * 99)) == plots.MAX_NAME_LENGTH


def test_without_matplotlib_all_other_files_are_written(data, model_folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    request = EvaluateOptions(data, num_prompts=2, max_new_tokens=2)
    evaluate_models([str(model_folder)], request, tmp_path / "out", False, Console(quiet=True))
    assert "no picture: it needs matplotlib; install it with `pip install 'sft_pipeline[plot]'`" in caplog.text
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"answers.jsonl", "evaluation.json", "evaluation.md"}


# The command.


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
    conversations = [[{"role": "system", "content": SYSTEM}, *row] for row in questions.rows]
    expected = plain_losses(model_folder, conversations, "role")
    assert [loss.nll_nats for loss in results.losses] == pytest.approx([nll for nll, _, _ in expected], rel=1e-4)
    by_run = [
        next(run_model(str(other_folder), "x", questions, options)) for options in (plain, EvaluateOptions(data, 2, 2))
    ]
    assert by_run[0] == by_run[1]


def test_the_data_of_a_runs_folder_are_its_held_out_rows(data, model_folder, tmp_path):
    keys = {"model_name_or_path": str(model_folder), "train_data": [data], "held_out": 3}
    (tmp_path / "run.yaml").write_text(json.dumps(keys))
    held = load_eval_conversations(str(tmp_path))
    assert len(held) == 3 and {messages[0]["content"] for messages in held} < {row["instruction"] for row in ROWS}
    (tmp_path / "run.yaml").write_text(json.dumps({**keys, "held_out": 0}))
    message = f"^{tmp_path}: this run has no held-out rows; give a file, folder or hub name of rows$"
    with pytest.raises(SFTError, match=message):
        load_eval_conversations(str(tmp_path))


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
        (model, "--shots", "2"): "evaluate: unknown option --shots; `evaluate --help` lists them",
    }
    for words, message in cases.items():
        assert refusal(capsys, *words).startswith(message), words


def test_examples_that_do_not_fit_the_context(data, model_folder, capsys):
    message = refusal(capsys, str(model_folder), "--data", data, "--few_shot", "3", "--max_new_tokens", "4000")
    assert message.startswith("few_shot 3: with the examples a prompt of ")
    assert "and an answer of 4000 exceed the 4096 positions of" in message and message.endswith("use fewer examples")
