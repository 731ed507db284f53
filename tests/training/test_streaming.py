"""Runs with `streaming: true`: as with rows in memory, resumed with the same bits, on two processes as on one."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed
from datasets import Dataset
from rich.console import Console
from safetensors.torch import load_file
from support.processes import run_ranks
from support.training_runs import run_train

from sft_pipeline import cli
from sft_pipeline.commands.evaluate import load_eval_sets
from sft_pipeline.config import SFTConfig, parse_config
from sft_pipeline.data import pipeline, row_stream
from sft_pipeline.data.pipeline import load_one_row
from sft_pipeline.data.shards import write_shards
from sft_pipeline.data.streamed_sources import SourceMix
from sft_pipeline.train import rehearse_run
from sft_pipeline.training.sft_trainer import SFTTrainer
from sft_pipeline.utils.errors import SFTError

STEPS, ROWS = 10, 30  # of two micro-batches of two rows: the second epoch begins within step 8
KEYS = {
    "streaming": True,
    "max_steps": STEPS,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "num_answers": 0,
    "num_instructions": 0,
}
SAVED = ("--save_strategy", "steps", "--save_steps")


@pytest.fixture(scope="module")
def config(write_config, tmp_path_factory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"), rows=ROWS, **KEYS)


@pytest.fixture(scope="module", autouse=True)
def short_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_stream, "BLOCK_ROWS", 12)
        yield


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("whole") / "out"
    return folder, run_train(config, *SAVED, "1", "--output_dir", str(folder))


def curve(results: dict) -> list[tuple[float, float]]:
    return [(entry["loss"], entry["grad_norm"]) for entry in results["loss_curve"] if "loss" in entry]


def assert_same_model(folder: Path, expected: Path) -> None:
    weights, expected_weights = (load_file(path / "model.safetensors") for path in (folder, expected))
    assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)


def test_a_streamed_run_in_order_is_the_run_of_rows_in_memory(config, tmp_path):
    keys = ["--train_sampling_strategy", "sequential", "--max_steps", "7"]
    streamed = run_train(config, *keys, "--output_dir", str(tmp_path / "streamed"))
    keys += [*SAVED, "7"]
    mapped = run_train(config, *keys, "--streaming", "false", "--output_dir", str(tmp_path / "mapped"))
    assert curve(streamed) == curve(mapped) and len(set(curve(mapped))) == 7
    assert_same_model(tmp_path / "streamed", tmp_path / "mapped")
    assert not list((tmp_path / "mapped").glob("*/stream.json")), "rows in memory have no such state"


def test_the_account_is_in_the_results_and_the_report(whole):
    folder, results = whole
    train = results["rows"]["train"]
    assert (train["rows"], train["kept"], train["sequences"]) == (40, 40, 40)
    assert results["sources"] == {results["config"]["train_data"][0]: {"rows": train["rows"], "kept": train["kept"]}}
    assert train["supervised_tokens"] > 0 and results["unread"] == {results["config"]["train_data"][0]: {}}
    assert "waiting for rows" in results["seconds_by_part"]
    assert "40" in (folder / "report.html").read_text()


@pytest.mark.parametrize("step", [1, 8, 10])
def test_a_run_resumed_at_any_step_ends_with_the_same_bits(step, config, whole, tmp_path):
    folder, results = whole
    checkpoint = str(folder / f"checkpoint-{step}")
    resumed = run_train(config, "--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint", checkpoint)
    assert curve(resumed) == curve(results)
    assert [entry["epoch"] for entry in resumed["loss_curve"]] == [entry["epoch"] for entry in results["loss_curve"]]
    assert resumed["rows"] == results["rows"] and resumed["sources"] == results["sources"]
    assert resumed["unread"] == results["unread"]
    assert_same_model(tmp_path / "out", folder)


@pytest.mark.parametrize(
    "keys",
    [
        {"dataloader_num_workers": 1},
        {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 4},
        {"packing": False},
        {"packing": False, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
        {"share_prefixes": False},
        {"tokens_per_batch": 128, "max_length": 128},
    ],
    ids=str,
)
def test_the_rows_of_each_step_are_the_same(keys, config, whole, tmp_path):
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value).lower())]
    results = run_train(config, *words, "--output_dir", str(tmp_path / "out"))
    losses, expected = ([loss for loss, _ in curve(values)] for values in (results, whole[1]))
    assert losses == (expected if "dataloader_num_workers" in keys else pytest.approx(expected, rel=1e-5))
    if "dataloader_num_workers" in keys:
        assert_same_model(tmp_path / "out", whole[0])


def run_worker(process: int, config: str, folder: str, checkpoint: str) -> None:
    """Train in one of two processes, from the beginning and from a checkpoint of one process."""
    row_stream.BLOCK_ROWS = 12
    sizes = ["--gradient_accumulation_steps", "1", "--ddp_backend", "gloo"]
    run_train(Path(config), *sizes, *SAVED, "8", "--output_dir", f"{folder}/two")
    run_train(Path(config), *sizes, "--output_dir", f"{folder}/resumed", "--resume_from_checkpoint", checkpoint)
    torch.distributed.destroy_process_group()


def test_two_processes_train_like_one_and_resume_what_one_has_saved(config, whole, tmp_path):
    folder, expected = whole
    run_ranks(run_worker, 2, str(config), str(tmp_path), str(folder / "checkpoint-6"))
    for name in ("two", "resumed"):
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert [loss for loss, _ in curve(results)] == pytest.approx([loss for loss, _ in curve(expected)], rel=1e-5)
        assert results["rows"] == expected["rows"], "each process counts the rows of all"
    resumed = run_train(
        config,
        "--output_dir",
        str(tmp_path / "one"),
        "--resume_from_checkpoint",
        str(tmp_path / "two" / "checkpoint-8"),
    )
    assert [loss for loss, _ in curve(resumed)][-2:] == pytest.approx(
        [loss for loss, _ in curve(expected)][-2:], rel=1e-5
    )


def test_no_process_waits_for_the_encoding_of_all_rows(config, tmp_path, monkeypatch):
    """With many rows, processes that wait for the first one to encode run into NCCL's time-out."""
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"q {n}", "output": "a"}) + "\n" for n in range(5000)))
    read = []
    read_row = SourceMix.read_row
    monkeypatch.setattr(SourceMix, "read_row", lambda mix: read.append(1) or read_row(mix))
    args = parse_config(str(config), ["--train_data", str(path), "--output_dir", str(tmp_path / "out")])
    SFTTrainer(args=args)
    assert row_stream.SAMPLE_ROWS <= len(read) < row_stream.SAMPLE_ROWS + row_stream.ENCODED_TOGETHER


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_row_is_an_error_of_one_line_when_it_comes(workers, config, tmp_path, monkeypatch):
    monkeypatch.setattr(row_stream, "SAMPLE_ROWS", 4)
    monkeypatch.setattr(row_stream, "ENCODED_TOGETHER", 4)
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"q {n}", "output": "a"} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"instruction": "q", "output": 7}]))
    words = ["--train_data", str(path), "--output_dir", str(tmp_path / "out"), "--dataloader_num_workers", str(workers)]
    with pytest.raises(SFTError) as error:
        run_train(config, *words)
    assert str(error.value).startswith("rows.jsonl line 21: ") and str(error.value).endswith("skip_bad_rows: true")
    results = run_train(config, *words, "--skip_bad_rows", "true", "--overwrite_output_dir", "true")
    assert results["rows"]["train"]["dropped"] == {"bad rows": 2}, "in two epochs"


def test_held_out_rows_are_evaluated_and_not_trained(config, tmp_path):
    rows = json.loads((config.parent / "rows.json").read_text())
    (tmp_path / "held.json").write_text(json.dumps(rows[:5]))
    keys = ["--eval_data", str(tmp_path / "held.json"), "--eval_strategy", "steps", "--eval_steps", "5"]
    results = run_train(config, *keys, "--output_dir", str(tmp_path / "out"))
    assert results["rows"]["held_out"]["kept"] == 5
    assert results["rows"]["train"]["dropped"]["in the evaluation data too"] >= 5
    assert [entry["step"] for entry in results["loss_curve"] if "eval_loss" in entry] == [0, 5, 10]


def test_held_out_sets_have_their_own_losses_beside_a_stream(config, tmp_path):
    rows = json.loads((config.parent / "rows.json").read_text())
    for name, part in (("short", rows[:3]), ("long", rows[-4:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    sets = json.dumps({name: str(tmp_path / f"{name}.json") for name in ("short", "long")})
    results = run_train(config, "--eval_data", sets, "--max_steps", "2", "--output_dir", str(tmp_path / "out"))
    assert results["rows"]["held_out"]["kept"] == 7
    assert {"eval_short_loss", "eval_long_loss"} <= set().union(*results["loss_curve"])


def test_held_out_rows_are_loaded_without_the_training_rows(config, tmp_path, monkeypatch, caplog):
    (tmp_path / "held.json").write_text(json.dumps([{"instruction": "Who?", "output": "I."}]))
    words = ["--eval_data", str(tmp_path / "held.json"), "--output_dir", str(tmp_path / "out"), "--max_steps", "1"]
    caplog.set_level("INFO")
    run_train(config, *words)
    assert "eval_strategy: epoch evaluates a stream before and after training; set steps for more" in caplog.messages
    monkeypatch.setattr(pipeline, "load_splits", None)
    [[conversation]] = load_eval_sets(str(tmp_path / "out")).values()
    assert conversation["messages"][0]["content"] == "Who?"


def test_a_diverging_step_names_its_rows(config, tmp_path):
    with pytest.raises(SFTError, match=r"^step \d+: the loss .*, in training rows rows.json row \d+, rows.json row"):
        run_train(config, "--learning_rate", "1e9", "--max_grad_norm", "1e9", "--output_dir", str(tmp_path / "out"))
    assert not (tmp_path / "out" / "diverged.jsonl").exists()


def test_a_dry_run_tells_what_the_first_rows_tell(config, tmp_path, capsys):
    rehearse_run(parse_config(str(config), ["--output_dir", str(tmp_path / "out")]), Console())
    line = " ".join(capsys.readouterr().out.split()).partition("dry run: ")[2]
    assert line.startswith(f"{4 * STEPS} rows, {STEPS} steps, ") and f" (estimated from the first {ROWS} rows)" in line
    assert not (tmp_path / "out").exists()


def test_a_row_is_previewed_in_the_order_of_the_sources(config, write_config, tmp_path, capsys):
    cli.main(["preview", str(config), "--row", "3", "--json"])
    assert "Say 4." in json.loads(capsys.readouterr().out)["text"]
    args = parse_config(str(config))
    for row in (-1, ROWS):
        with pytest.raises(SFTError, match=f"^row {row}: out of range; "):
            load_one_row(args, None, row)


def test_checkpoints_of_the_other_kind_are_refused(config, whole, tmp_path):
    words = ["--resume_from_checkpoint", str(whole[0] / "checkpoint-2"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SFTError, match="checkpoint-2: of a run with streaming: true; set it so to resume$"):
        run_train(config, *words, "--streaming", "false")
    keys = ["--streaming", "false", "--max_steps", "1", *SAVED, "1"]
    run_train(config, *keys, "--output_dir", str(tmp_path / "mapped"))
    words = ["--resume_from_checkpoint", str(tmp_path / "mapped" / "checkpoint-1"), "--output_dir", str(tmp_path / "b")]
    with pytest.raises(SFTError, match="checkpoint-1: of a run with streaming: false; set it so to resume$"):
        run_train(config, *words)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"max_steps": -1}, "the end of an epoch is not known before it comes; set max_steps"),
        (
            {"num_train_epochs": 2},
            "num_train_epochs needs all rows before the first step; remove it, max_steps alone counts",
        ),
        ({"held_out": 5}, "held_out needs all rows before the first step; put the held-out rows into eval_data"),
        ({"max_train_rows": 9}, "max_train_rows needs all rows before the first step; lower max_steps"),
        (
            {"prepared_data": "p"},
            "prepared_data needs all rows before the first step; remove one of them, as prepared rows are mapped and "
            "not loaded",
        ),
        (
            {"train_sampling_strategy": "group_by_length"},
            "train_sampling_strategy group_by_length sorts all rows; use random",
        ),
        ({"save_strategy": "epoch"}, "save_strategy: epoch has no epochs to follow; use steps"),
        ({"logging_strategy": "epoch"}, "logging_strategy: epoch has no epochs to follow; use steps"),
        (
            {"dataloader_num_workers": 2},
            "each worker would read and encode all rows; set dataloader_num_workers to 1 or 0",
        ),
    ],
    ids=str,
)
def test_what_a_stream_cannot_do_is_refused(keys, message):
    with pytest.raises(SFTError) as error:
        SFTConfig(use_cpu=True, **({"streaming": True, "max_steps": 5} | keys))
    assert str(error.value) == f"streaming: {message}"


def test_nothing_is_prepared(config, tmp_path):
    with pytest.raises(SFTError, match="^streaming: rows are encoded as they come, and nothing is prepared; set"):
        write_shards(parse_config(str(config)), None, tmp_path / "shards")


def test_rows_in_memory_and_encoded_rows_are_refused(config, model_folder, tmp_path):
    args = parse_config(str(config), ["--output_dir", str(tmp_path)])
    row = {"instruction": "q", "output": "a"}
    with pytest.raises(
        SFTError, match="^train_dataset: rows in memory are not streamed; set streaming: false, or give"
    ):
        SFTTrainer(args=args, train_dataset=[row])
    stream = Dataset.from_list([row]).to_iterable_dataset()
    with pytest.raises(SFTError, match="it is of type IterableDataset; streaming: true reads training rows from it; "):
        SFTTrainer(args=parse_config(str(config), ["--streaming", "false"]), train_dataset=stream)
    encoded = [{"input_ids": [1, 2], "labels": [2, -100]}]
    with pytest.raises(SFTError, match="^eval_dataset: encoded already, and streamed rows are not; give rows, or set"):
        SFTTrainer(args=args, eval_dataset=encoded)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_iterable_dataset_is_streamed_and_resumed(workers, config, tmp_path):
    rows = json.loads((config.parent / "rows.json").read_text())
    words = ["--dataloader_num_workers", str(workers), *SAVED, "4", "--output_dir"]

    def build(folder: str) -> SFTTrainer:
        args = parse_config(str(config), [*words, str(tmp_path / folder)])
        return SFTTrainer(args=args, train_dataset=Dataset.from_list(rows).to_iterable_dataset(num_shards=3))

    whole = build("whole")
    whole.train()
    resumed = build("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    weights, expected = (trainer.model.state_dict() for trainer in (resumed, whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert resumed.data.train_stats == whole.data.train_stats and whole.data.train_stats.rows == 4 * STEPS
