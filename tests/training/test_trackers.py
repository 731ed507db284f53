"""Trackers: wandb and trackio get what the run logged, across a resume; no failure of a tracker ends args."""

import json
import logging
import multiprocessing
import os
import re
import signal
import socket
import sqlite3
import struct
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console
from support.processes import call_in_process
from support.training_runs import list_imports_of_train
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from sft_pipeline.commands.verify_resume import MEASURED, compare_checkpoints
from sft_pipeline.config import parse_config
from sft_pipeline.evaluation.step_results import get_step_file
from sft_pipeline.runs.output_dir import EVALUATION_DIR, REPORT_FILE, RESULTS_FILE, RUN_FILE
from sft_pipeline.train import train
from sft_pipeline.training import trackers
from sft_pipeline.training.sft_trainer import SFTTrainer
from sft_pipeline.training.trackers import (
    INSTALL,
    TRACKERS_FILE,
    GuardedCallback,
    call_tracker,
    drop_missing_trackers,
    send_table,
)
from sft_pipeline.utils.errors import SFTError

SECRET = "hf_SeCrEtOfTheHub"
# The callbacks of transformers log these to the summary, not to the history; trackio has no summary.
SUMMARY = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tracked")


@pytest.fixture(scope="module")
def offline(folder) -> Iterator[None]:
    """Run wandb without network or login, with its files in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        for key in [key for key in os.environ if key.startswith("WANDB_")]:
            patch.delenv(key)
        patch.setenv("WANDB_MODE", "offline")
        for name in ("DIR", "CACHE_DIR", "DATA_DIR", "CONFIG_DIR"):
            (folder / name).mkdir(exist_ok=True)
            patch.setenv(f"WANDB_{name}", str(folder / name))
        patch.setenv("WANDB_SILENT", "true")
        yield
    logging.getLogger("wandb").handlers.clear()


@pytest.fixture(scope="module")
def run(model_folder, folder, offline) -> SimpleNamespace:
    """Train two steps, then two more from the checkpoint; `logged` is what each part logged."""
    rows = [{"instruction": f"Say {n}.", "input": "", "output": "the answer " * n} for n in range(1, 25)]
    (folder / "rows.json").write_text(json.dumps(rows))
    keys = {
        "model_name_or_path": str(model_folder),
        "train_data": str(folder / "rows.json"),
        "held_out": 5,
        "max_length": 80,
        "num_answers": 2,
        "num_instructions": 2,
        "max_new_tokens": 4,
        "eval_answer_share": 1000,
        "max_steps": 2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": ["wandb", "trackio"],
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(keys))
    out = folder / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", SECRET)
        patch.setattr(sys, "argv", ["sft-pipeline", "train", "--hub_token", SECRET, f"--hub-token={SECRET}"])
        logged = [run_training(folder / "tiny.yaml", out)]
        later = run_training(folder / "tiny.yaml", out, "--max_steps", "4", "--resume_from_checkpoint", "true")
    num_equal = next(n for n, (entry, resumed) in enumerate(zip(logged[0], later)) if entry != resumed)
    results = json.loads((out / RESULTS_FILE).read_text(encoding="utf-8"))
    return SimpleNamespace(out=out, logged=[logged[0], later[num_equal:]], results=results)


def run_training(config: Path, out: Path, *overrides: str) -> list[dict]:
    """Train, and return the log history of the trainer."""
    train(parse_config(str(config), ["--output_dir", str(out), *overrides]), Console(quiet=True))
    return json.loads((out / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["log_history"]


def build_expected_rows(entries: list[dict]) -> list[dict]:
    """Return the rows a tracker should have of the entries."""
    rows = []
    for entry in entries:
        row = {"train/global_step": entry["step"]}
        for name, value in entry.items():
            if name not in ("step", *SUMMARY):
                row["eval/" + name[5:] if name.startswith("eval_") else "train/" + name] = value
        rows.append(row)
    return rows


def read_wandb_records(file: Path) -> Iterator:
    """Read a .wandb file: a header of seven bytes, then the log format of LevelDB in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, offset, parts = file.read_bytes(), 7, b""
    while offset + 7 <= len(data):
        space = 32768 - offset % 32768
        if space < 7:
            offset += space
            continue
        length, kind = struct.unpack("<HB", data[offset + 4 : offset + 7])
        parts += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # complete, or the last part
            yield Record.FromString(parts)
            parts = b""


def decode_items(update) -> dict:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in update}


def find_wandb_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("DIR/wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)


def test_wandb_has_every_logged_value(run, folder):
    for file, entries in zip(find_wandb_files(folder), run.logged, strict=True):
        records = [record for record in read_wandb_records(file) if record.HasField("history")]
        history = [decode_items(record.history.item) for record in records]
        metrics = [{name: value for name, value in row.items() if name[0] != "_"} for row in history]
        assert [row for row in metrics if "eval/table/nrows" not in row] == build_expected_rows(entries)
        assert [row["_step"] for row in history] == list(range(len(history)))
        summary = {}
        for record in read_wandb_records(file):
            summary |= decode_items(record.summary.update)
        last = {name: value for entry in entries for name, value in entry.items() if name in SUMMARY}
        assert last and {name: summary[name] for name in last} == last


def test_wandb_has_the_answers(run, folder):
    files = folder.glob("DIR/wandb/offline-run-*/files/media/table/eval/*.table.json")
    tables = [json.loads(file.read_text()) for file in files]
    rows = [dict(zip(table["columns"], line)) for table in tables for line in table["data"]]
    expected = [row for step in range(5) for row in load_table(run.out, step)]
    assert len(rows) == len(expected) == 5 * 4
    assert all(row in rows for row in expected)


def load_table(out: Path, step: int) -> list[dict]:
    return json.loads((out / EVALUATION_DIR / get_step_file(step)).read_text(encoding="utf-8"))["table"]


def test_wandb_keeps_the_run_name_after_a_resume(run, folder):
    names = set()
    for file in find_wandb_files(folder):
        [wandb_run] = [record.run for record in read_wandb_records(file) if record.HasField("run")]
        names.add((wandb_run.run_id, wandb_run.display_name, wandb_run.project))
    assert names == {(get_run_name(run), get_run_name(run), "sft_pipeline")}
    assert get_run_name(run).startswith("out-")


def get_run_name(run: SimpleNamespace) -> str:
    return json.loads((run.out / TRACKERS_FILE).read_text())["run_name"]


def test_wandb_has_the_config_and_the_data_statistics(run, folder):
    config = {}
    for record in read_wandb_records(find_wandb_files(folder)[-1]):
        config |= decode_items(record.run.config.update) | decode_items(record.config.update)
    assert config["data"] == run.results["rows"]
    stats = config["data"]["train"]
    assert stats["dropped"] and stats["rows"] == stats["kept"] + sum(stats["dropped"].values())
    assert config["supervised_share"]["train"] == stats["supervised_tokens"] / stats["tokens"]
    assert (config["max_length"], config["max_steps"], config["hub_token"]) == (80, 4, "<HUB_TOKEN>")


def query_trackio(query: str) -> list[tuple]:
    with sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / "sft_pipeline.db") as base:
        return base.execute(query).fetchall()


def test_trackio_has_every_logged_value_in_one_run(run):
    rows = query_trackio("SELECT run_name, step, metrics FROM metrics ORDER BY id")
    assert {name for name, _, _ in rows} == {get_run_name(run)}
    logged = [json.loads(metrics) for _, _, metrics in rows]
    entries = [entry for part in run.logged for entry in part]
    assert [row for row in logged if "eval/table" not in row] == build_expected_rows(entries)
    assert [step for _, step, _ in rows] == [row["train/global_step"] for row in logged]
    tables = [row["eval/table"]["_value"] for row in logged if "eval/table" in row]
    assert tables == [load_table(run.out, step) for step in range(5)]


def test_trackio_has_the_config_and_the_data_statistics(run):
    [(name, text)] = query_trackio("SELECT run_name, config FROM configs")
    config = json.loads(text)
    assert (name, config["data"]) == (get_run_name(run), run.results["rows"])
    assert (config["max_length"], config["hub_token"]) == (80, "<HUB_TOKEN>")


def test_no_tracker_has_the_token(run, folder):
    roots = (folder / "DIR", Path(os.environ["TRACKIO_DIR"]))
    files = [path for root in roots for path in root.rglob("*") if path.is_file()]
    files += [run.out / name for name in (TRACKERS_FILE, RESULTS_FILE, RUN_FILE, REPORT_FILE)]
    assert any(path.suffix == ".wandb" for path in files) and any(path.suffix == ".db" for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_each_new_run_has_its_own_name(tmp_path):
    args = TrainingArguments(str(tmp_path / "out folder"), report_to="none", use_cpu=True)
    names = {trackers._resolve_run_name(args, None) for _ in range(5)}
    assert len(names) == 5 and all(name.startswith("out-folder-") for name in names)


def test_a_run_in_a_new_folder_takes_the_name_from_its_checkpoint(tmp_path):
    for name in ("old/checkpoint-2", "new"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "old" / TRACKERS_FILE).write_text('{"run_name": "old-123456"}')
    args = TrainingArguments(str(tmp_path / "new"), report_to=["wandb"], use_cpu=True)
    assert trackers._resolve_run_name(args, str(tmp_path / "old" / "checkpoint-2")) == "old-123456"
    assert json.loads((tmp_path / "new" / TRACKERS_FILE).read_text()) == {"run_name": "old-123456", "last_step": -1}
    (tmp_path / "old" / TRACKERS_FILE).write_text('{"run_name": "old-123456", "last_step": 7}')
    trackers._resolve_run_name(args, str(tmp_path / "old" / "checkpoint-2"))
    assert trackers.read_last_tracked_step(args) == 7


# A run that is killed.


class KillCallback(TrainerCallback):
    """Kill this process with SIGKILL at an event of a step."""

    def __init__(self, event: str, step: int) -> None:
        self.step = step
        setattr(self, event, self._kill)

    def _kill(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(config: Path, out: Path, event: str, step: int) -> None:
    """Train in this process, which is killed at the event."""

    def build(args):
        trainer = SFTTrainer(args=args)
        trainer.add_callback(KillCallback(event, step))
        return trainer

    os.environ.pop("WANDB_SERVICE", None)  # the service of the parent process
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sft_pipeline.train.SFTTrainer", build)
        run_training(config, out)


def normalize_rows(rows: list[dict]) -> list[str]:
    """Return each row once as JSON, without values that depend on the clock or the machine, and without file names."""
    ignored = (*MEASURED, "path", "client_id")
    compared = [{name: value for name, value in row.items() if not name.endswith(ignored)} for row in rows]
    return sorted({json.dumps(row, sort_keys=True) for row in compared})


def read_wandb_rows(folder: Path, name: str) -> list[dict]:
    """Return all rows of the runs with this id."""
    rows_of_run = []
    for file in find_wandb_files(folder):
        run_records = list(read_wandb_records(file))
        if [record.run.run_id for record in run_records if record.HasField("run")] == [name]:
            rows_of_run += [decode_items(record.history.item) for record in run_records if record.HasField("history")]
    return [{key: value for key, value in row.items() if key[0] != "_"} for row in rows_of_run]


def read_trackio_rows(name: str) -> list[dict]:
    rows = query_trackio(f"SELECT step, metrics FROM metrics WHERE run_name = '{name}' ORDER BY id")
    assert [step for step, _ in rows] == [json.loads(metrics)["train/global_step"] for step, metrics in rows]
    return [json.loads(metrics) for _, metrics in rows]


def test_only_entries_after_the_last_step_are_logged_again(tmp_path):
    args = TrainingArguments(str(tmp_path), report_to=["wandb", "trackio"], use_cpu=True)
    trackers._write_state(args, "out-1", 4)
    seen = []
    callback = SimpleNamespace(
        on_train_begin=lambda *args, **kwargs: None,
        on_log=lambda args, state, control, logs, **kwargs: seen.append((state.global_step, logs)),
    )
    history = [
        {"loss": 3.0, "step": 2},
        {"loss": 2.0, "step": 4},
        {"loss": 1.0, "step": 6},
        {"eval_loss": 1.5, "step": 6},
    ]
    state = TrainerState(global_step=6, is_world_process_zero=True, log_history=history)
    GuardedCallback("mlflow", callback).on_train_begin(args, state, TrainerControl())
    args.report_to.append("mlflow")
    GuardedCallback("mlflow", callback).on_train_begin(args, state, TrainerControl())
    assert seen == [(6, {"loss": 1.0}), (6, {"eval_loss": 1.5})] and state.global_step == 6
    state.is_world_process_zero = False
    GuardedCallback("mlflow", callback).on_train_begin(args, state, TrainerControl())
    assert len(seen) == 2


@pytest.mark.real
def test_trackers_of_a_run_killed_twice_have_the_rows_of_an_uninterrupted_one(run, folder, tmp_path):
    """Killed right after a checkpoint, and between two: steps trained again are logged again with the same values."""
    keys = yaml.safe_load((folder / "tiny.yaml").read_text()) | {"max_steps": 6, "eval_steps": 2}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(keys | {"resume_from_checkpoint": "auto"}))
    context = multiprocessing.get_context("spawn")
    for event, step in (("on_save", 2), ("on_step_begin", 5)):
        args = (tmp_path / "tiny.yaml", tmp_path / "killed", event, step)
        process = context.Process(target=train_until_killed, args=args)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    for name in ("killed", "whole"):
        run_training(tmp_path / "tiny.yaml", tmp_path / name)
    run_training(tmp_path / "tiny.yaml", tmp_path / "alone", "--report_to", "none")
    names = [json.loads((tmp_path / name / TRACKERS_FILE).read_text())["run_name"] for name in ("killed", "whole")]
    for read_rows in (partial(read_wandb_rows, folder), read_trackio_rows):
        killed, whole = (read_rows(name) for name in names)
        assert normalize_rows(killed) == normalize_rows(whole) and len(whole) > 15
    for name in ("killed", "whole"):
        assert compare_checkpoints(tmp_path / name / "checkpoint-6", tmp_path / "alone" / "checkpoint-6")[1] == []


# Failing trackers.


def make_arguments(*report_to: str) -> SimpleNamespace:
    keys = {"report_to": list(report_to), "run_name": "out-1", "project": "sft_pipeline", "output_dir": "nowhere"}
    return SimpleNamespace(**keys)


def test_trackers_that_are_not_installed_are_removed_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(trackers, "get_available_reporting_integrations", lambda: ["tensorboard"])
    args = make_arguments("trackio", "tensorboard", "mlflow")
    drop_missing_trackers(args)
    assert args.report_to == ["tensorboard"]
    assert caplog.messages == [
        f"trackio is not installed ({INSTALL}); training continues without it",
        "mlflow is not installed (pip install mlflow); training continues without it",
    ]
    with pytest.raises(SFTError, match="report_to: unknown tracker wand; choose from azure_ml, .*, or none"):
        drop_missing_trackers(make_arguments("wand"))


def test_a_run_without_report_to_imports_no_tracker(write_config, tmp_path):
    config = write_config(tmp_path, 2, max_steps=1, output_dir=str(tmp_path / "out"))
    lines = config.read_text().splitlines()
    config.write_text("\n".join(line for line in lines if not line.startswith("report_to")))
    imported = call_in_process(list_imports_of_train, str(config))
    assert "transformers" in imported and not {"wandb", "trackio"} & imported


def test_a_tracker_that_fails_is_removed_with_one_warning(caplog):
    class Broken:
        def on_log(self, *args, **kwargs):
            raise RuntimeError("the server\nis down")

        on_train_begin = on_train_end = on_log

    args, state = make_arguments("trackio", "wandb"), TrainerState(is_world_process_zero=True)
    guarded = GuardedCallback("trackio", Broken())
    for event in (guarded.on_train_begin, guarded.on_log, guarded.on_log, guarded.on_train_end):
        assert event(args, state, TrainerControl(), logs={}) is None
    guarded.close()
    assert args.report_to == ["wandb"]
    assert caplog.messages == ["trackio failed (the server is down); training continues without it"]


def test_a_tracker_that_cannot_start_does_not_end_training(monkeypatch, tmp_path, caplog):
    """Before its run has started, wandb.config raises an error on any access."""
    wandb = SimpleNamespace(config=type("NoRun", (), {"__getattr__": lambda *args: 1 / 0})())
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    args = TrainingArguments(str(tmp_path), report_to=["wandb"], use_cpu=True)
    callback = SimpleNamespace(on_train_begin=lambda *args, **kwargs: None)
    state = TrainerState(is_world_process_zero=True)
    GuardedCallback("wandb", callback).on_train_begin(args, state, TrainerControl())
    assert args.report_to == [] and caplog.messages == [
        "wandb failed (division by zero); training continues without it"
    ]
    GuardedCallback("wandb", callback).on_train_begin(args, state, TrainerControl())
    assert len(caplog.messages) == 1


def test_on_train_end_is_called_after_the_last_evaluation():
    calls = []
    callback = SimpleNamespace(on_log=lambda *args: calls.append("log"), on_train_end=lambda *args: calls.append("end"))
    callback.on_train_begin = lambda *args: None
    guarded = GuardedCallback("mlflow", callback)
    guarded.close()
    guarded.on_log(make_arguments("mlflow"), None, None)
    guarded.on_train_begin(make_arguments("mlflow"), TrainerState(is_world_process_zero=False), None)
    guarded.on_train_end(make_arguments("mlflow"), None, None)
    guarded.on_log(make_arguments("mlflow"), None, None)
    guarded.close()
    guarded.on_log(make_arguments("mlflow"), None, None)  # an evaluation before or after training is not tracked
    assert calls == ["log", "end"]


def build_trainer_with(args, *callbacks) -> SimpleNamespace:
    return SimpleNamespace(args=args, callback_handler=SimpleNamespace(callbacks=callbacks))


def test_tables_go_only_to_trackers_in_use(monkeypatch, caplog):
    logged = []
    for name in ("wandb", "trackio"):
        stand_in = SimpleNamespace(
            Table=lambda dataframe: dataframe.to_dict("records"), log=lambda row, **kwargs: logged.append((row, kwargs))
        )
        monkeypatch.setitem(sys.modules, name, stand_in)
    rows = [{"answer": "a", "followed": None}, {"answer": "b", "followed": True}]
    send_table(rows, build_trainer_with(make_arguments("trackio")), 7)
    send_table(rows, build_trainer_with(make_arguments("mlflow")), 8)
    send_table([], build_trainer_with(make_arguments("wandb")), 9)
    send_table(rows, build_trainer_with(make_arguments("wandb")), 10)
    send_table(rows, build_trainer_with(make_arguments("wandb"), GuardedCallback("wandb", None)), 11)  # not open
    assert logged == [
        ({"eval/table": rows, "train/global_step": 7}, {"step": 7}),
        ({"eval/table": rows, "train/global_step": 10}, {}),
    ]
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    args = make_arguments("wandb")
    send_table(rows, build_trainer_with(args), 7)
    assert args.report_to == [] and "training continues without it" in caplog.text


# wandb without login.


class Wandb:
    """A stand-in for the module, with or without login and server."""

    Error = type("Error", (Exception,), {})

    def __init__(self, mode: str = "online", account: bool | Exception = True, server: bool = True) -> None:
        self.mode, self.account, self.server, self.run = mode, account, server, None
        self.init_calls: list[dict] = []

    def setup(self) -> SimpleNamespace:
        return SimpleNamespace(settings=SimpleNamespace(mode=self.mode))

    def login(self, prompt: bool) -> bool:
        assert not prompt
        if isinstance(self.account, Exception):
            raise self.account
        return self.account

    def Settings(self, **settings: float) -> dict:
        assert all(value > 0 for value in settings.values())
        return settings

    def init(self, **kwargs) -> SimpleNamespace:
        self.init_calls.append(kwargs)
        if kwargs["mode"] == "online" and not self.server:
            raise TimeoutError("no answer in 30 s")
        url = "https://wandb.ai/me/sft_pipeline/runs/out-1" if kwargs["mode"] == "online" else None
        return SimpleNamespace(url=url, dir="wandb/offline-run-1/files", settings=SimpleNamespace(mode=kwargs["mode"]))


OFFLINE_MESSAGE = "offline; upload it with wandb sync wandb/offline-run-1"


@pytest.mark.parametrize(
    ("wandb", "modes", "messages"),
    [
        (Wandb(), ["online"], ["wandb: https://wandb.ai/me/sft_pipeline/runs/out-1"]),
        (Wandb("offline", account=False), ["offline"], [f"wandb: {OFFLINE_MESSAGE}"]),
        (Wandb("disabled", account=False), ["disabled"], []),
        (
            Wandb(account=False),
            ["offline"],
            [f"wandb: not logged in: set WANDB_API_KEY or run `wandb login`; {OFFLINE_MESSAGE}"],
        ),
        (Wandb(account=Wandb.Error("no such\nkey")), ["offline"], [f"wandb: no such key; {OFFLINE_MESSAGE}"]),
        (Wandb(server=False), ["online", "offline"], [f"wandb: no answer in 30 s; {OFFLINE_MESSAGE}"]),
    ],
)
def test_wandb_starts_online_or_offline_without_a_prompt(wandb, modes, messages, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    caplog.set_level("INFO", "sft_pipeline")
    args = make_arguments("wandb")
    args.run_name = "mine"
    wandb_run = call_tracker("wandb", args, lambda: trackers._start_wandb("out-1", args))
    assert [call["mode"] for call in wandb.init_calls] == modes and wandb_run is not None
    names = {(call["id"], call["name"], call["resume"], call["project"]) for call in wandb.init_calls}
    assert names == {("out-1", "mine", "allow", "sft_pipeline")}
    assert caplog.messages == messages


def test_a_wandb_run_started_by_the_caller_is_used_and_left_open(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb())
    wandb.run = object()
    assert trackers._start_wandb("out-1", make_arguments("wandb")) is None and wandb.init_calls == []


@pytest.mark.parametrize("slow", [False, True])
def test_an_upload_that_takes_too_long_ends_with_a_warning(slow, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb())
    wandb_run = trackers._start_wandb("out-1", make_arguments("wandb"))
    assert wandb.init_calls[0]["settings"]["finish_timeout_raises"]
    statuses = []

    def finish(exit_code: int) -> None:
        statuses.append(exit_code)
        if slow:
            raise TimeoutError("Timed out finishing run.")

    wandb_run.finish = finish
    caplog.clear()
    trackers._finish_wandb(wandb_run, 1)
    messages = ["wandb: upload not finished in 120 s; finish it with wandb sync wandb/offline-run-1"] if slow else []
    assert statuses == [1] and caplog.messages == messages


@pytest.mark.real
def test_the_real_wandb_goes_offline_if_the_server_does_not_respond(monkeypatch, tmp_path, offline, caplog):
    import wandb

    caplog.set_level("INFO", "sft_pipeline")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        wandb.teardown()
        started = time.monotonic()
        wandb_run = trackers._start_wandb("out-1", make_arguments("wandb"))
        assert wandb_run.settings.mode == "offline" and time.monotonic() - started < 2 * trackers.INIT_TIMEOUT
        wandb_run.finish()
    wandb.teardown()
    [line] = [record.message for record in caplog.records if record.name == "sft_pipeline.training.trackers"]
    assert re.fullmatch(r"wandb: .* did not respond in time.*; offline; upload it with wandb sync \S+", line)


def test_the_real_wandb_does_not_prompt_in_a_terminal(monkeypatch, tmp_path, offline):
    """Without a key, and with a terminal, the real `login` returns False."""
    import wandb

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(wandb.sdk.lib.wbauth.prompt, "prompt_and_save_api_key", pytest.fail)
    wandb.teardown()
    reason = trackers._get_login_error(wandb)
    wandb.teardown()
    assert reason == "not logged in: set WANDB_API_KEY or run `wandb login`"
