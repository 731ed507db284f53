"""Trackers: what wandb and trackio have is what the run logged, over a resume; whatever fails, the run goes on."""

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
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from sft_pipeline.commands.verify_resume import MEASURED, compare_checkpoints
from sft_pipeline.config import parse_config
from sft_pipeline.evaluation.step_results import get_step_file
from sft_pipeline.runs.output_dir import EVALUATION_DIR, REPORT_FILE, RESULTS_FILE, RUN_FILE
from sft_pipeline.train import train
from sft_pipeline.training import trackers
from sft_pipeline.training.builder import build_trainer
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
# transformers' callbacks put these into the summary, not into the history; trackio has no summary.
SUMMARY = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tracked")


@pytest.fixture(scope="module")
def offline(folder) -> Iterator[None]:
    """wandb without a network or an account, its files in `folder`."""
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
    """Two steps, then two more from the checkpoint: `logged` is what each part logged."""
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
        logged = [_train(folder / "tiny.yaml", out)]
        later = _train(folder / "tiny.yaml", out, "--max_steps", "4", "--resume_from_checkpoint", "true")
    kept = next(n for n, (one, other) in enumerate(zip(logged[0], later)) if one != other)
    results = json.loads((out / RESULTS_FILE).read_text(encoding="utf-8"))
    return SimpleNamespace(out=out, logged=[logged[0], later[kept:]], results=results)


def _train(config: Path, out: Path, *more: str) -> list[dict]:
    """What the trainer's history holds in the end."""
    train(*parse_config(str(config), ["--output_dir", str(out), *more]), Console(quiet=True))
    return json.loads((out / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["log_history"]


def expected(entries: list[dict]) -> list[dict]:
    """The rows a tracker should have of them."""
    rows = []
    for entry in entries:
        row = {"train/global_step": entry["step"]}
        for name, value in entry.items():
            if name not in ("step", *SUMMARY):
                row["eval/" + name[5:] if name.startswith("eval_") else "train/" + name] = value
        rows.append(row)
    return rows


def records(file: Path) -> Iterator:
    """The records of a .wandb file: LevelDB's log format behind a header of seven bytes, blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def items(update) -> dict:
    return {"/".join(one.nested_key) or one.key: json.loads(one.value_json) for one in update}


def wandb_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("DIR/wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)


def test_wandb_has_every_value_of_each_part(run, folder):
    for file, entries in zip(wandb_files(folder), run.logged, strict=True):
        history = [items(record.history.item) for record in records(file) if record.HasField("history")]
        metrics = [{name: value for name, value in row.items() if name[0] != "_"} for row in history]
        assert [row for row in metrics if "eval/table/nrows" not in row] == expected(entries)
        assert [row["_step"] for row in history] == list(range(len(history)))
        summary = {}
        for record in records(file):
            summary |= items(record.summary.update)
        last = {name: value for entry in entries for name, value in entry.items() if name in SUMMARY}
        assert last and {name: summary[name] for name in last} == last


def test_wandb_has_the_answers(run, folder):
    files = folder.glob("DIR/wandb/offline-run-*/files/media/table/eval/*.table.json")
    tables = [json.loads(file.read_text()) for file in files]
    rows = [dict(zip(one["columns"], line)) for one in tables for line in one["data"]]
    kept = [row for step in range(5) for row in _table(run.out, step)]
    assert len(rows) == len(kept) == 5 * 4
    assert all(row in rows for row in kept)


def _table(out: Path, step: int) -> list[dict]:
    return json.loads((out / EVALUATION_DIR / get_step_file(step)).read_text(encoding="utf-8"))["table"]


def test_wandb_goes_on_under_one_name(run, folder):
    names = set()
    for file in wandb_files(folder):
        [begun] = [record.run for record in records(file) if record.HasField("run")]
        names.add((begun.run_id, begun.display_name, begun.project))
    assert names == {(_name(run), _name(run), "sft_pipeline")}
    assert _name(run).startswith("out-")


def _name(run: SimpleNamespace) -> str:
    return json.loads((run.out / TRACKERS_FILE).read_text())["run"]


def test_wandb_has_the_config_and_the_data_account(run, folder):
    config = {}
    for record in records(wandb_files(folder)[-1]):
        config |= items(record.run.config.update) | items(record.config.update)
    assert config["data"] == run.results["rows"]
    account = config["data"]["train"]
    assert account["dropped"] and account["rows"] == account["kept"] + sum(account["dropped"].values())
    assert config["supervised_share"]["train"] == account["supervised_tokens"] / account["tokens"]
    assert (config["sft"]["max_length"], config["max_steps"], config["hub_token"]) == (80, 4, "<HUB_TOKEN>")


def trackio_rows(query: str) -> list[tuple]:
    with sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / "sft_pipeline.db") as base:
        return base.execute(query).fetchall()


def test_trackio_has_every_value_in_one_run(run):
    rows = trackio_rows("SELECT run_name, step, metrics FROM metrics ORDER BY id")
    assert {name for name, _, _ in rows} == {_name(run)}
    logged = [json.loads(metrics) for _, _, metrics in rows]
    entries = [entry for part in run.logged for entry in part]
    assert [row for row in logged if "eval/table" not in row] == expected(entries)
    assert [step for _, step, _ in rows] == [row["train/global_step"] for row in logged]
    tables = [row["eval/table"]["_value"] for row in logged if "eval/table" in row]
    assert tables == [_table(run.out, step) for step in range(5)]


def test_trackio_has_the_config_and_the_data_account(run):
    [(name, text)] = trackio_rows("SELECT run_name, config FROM configs")
    config = json.loads(text)
    assert (name, config["data"]) == (_name(run), run.results["rows"])
    assert (config["sft"]["max_length"], config["hub_token"]) == (80, "<HUB_TOKEN>")


def test_no_tracker_has_the_secret(run, folder):
    roots = (folder / "DIR", Path(os.environ["TRACKIO_DIR"]))
    files = [path for root in roots for path in root.rglob("*") if path.is_file()]
    files += [run.out / name for name in (TRACKERS_FILE, RESULTS_FILE, RUN_FILE, REPORT_FILE)]
    assert any(path.suffix == ".wandb" for path in files) and any(path.suffix == ".db" for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_an_overwritten_run_has_another_name(tmp_path):
    args = TrainingArguments(str(tmp_path / "out folder"), report_to="none", use_cpu=True)
    names = {trackers._run_name(args, None) for _ in range(5)}
    assert len(names) == 5 and all(name.startswith("out-folder-") for name in names)


def test_another_folder_goes_on_with_the_run_of_its_checkpoint(tmp_path):
    for name in ("old/checkpoint-2", "new"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "old" / TRACKERS_FILE).write_text('{"run": "old-123456"}')
    args = TrainingArguments(str(tmp_path / "new"), report_to=["wandb"], use_cpu=True)
    assert trackers._run_name(args, str(tmp_path / "old" / "checkpoint-2")) == "old-123456"
    assert json.loads((tmp_path / "new" / TRACKERS_FILE).read_text()) == {"run": "old-123456", "told": -1}
    (tmp_path / "old" / TRACKERS_FILE).write_text('{"run": "old-123456", "told": 7}')
    trackers._run_name(args, str(tmp_path / "old" / "checkpoint-2"))
    assert trackers.read_last_tracked_step(args) == 7


# Killed.


class Kill(TrainerCallback):
    """SIGKILL to this process when the event comes in a step."""

    def __init__(self, event: str, step: int) -> None:
        self.step = step
        setattr(self, event, self._kill)

    def _kill(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def killed(config: Path, out: Path, event: str, step: int) -> None:
    """The life of a process of its own, which starts or goes on and is killed."""

    def build(*args):
        trainer = build_trainer(*args)
        trainer.add_callback(Kill(event, step))
        return trainer

    os.environ.pop("WANDB_SERVICE", None)  # that of the tests' process, which outlives this one
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sft_pipeline.training.builder.build_trainer", build)
        _train(config, out)


def told(rows: list[dict]) -> list[str]:
    """Each row once, without what the clock and the machine decide and what a file is called."""
    others = (*MEASURED, "path", "client_id")
    kept = [{name: value for name, value in row.items() if not name.endswith(others)} for row in rows]
    return sorted({json.dumps(row, sort_keys=True) for row in kept})


def wandb_told(folder: Path, name: str) -> list[dict]:
    """All rows of the runs with this id."""
    found = []
    for file in wandb_files(folder):
        every = list(records(file))
        if [record.run.run_id for record in every if record.HasField("run")] == [name]:
            found += [items(record.history.item) for record in every if record.HasField("history")]
    return [{key: value for key, value in row.items() if key[0] != "_"} for row in found]


def trackio_told(name: str) -> list[dict]:
    rows = trackio_rows(f"SELECT step, metrics FROM metrics WHERE run_name = '{name}' ORDER BY id")
    assert [step for step, _ in rows] == [json.loads(metrics)["train/global_step"] for step, metrics in rows]
    return [json.loads(metrics) for _, metrics in rows]


def test_what_was_logged_before_a_kill_is_told_again_and_what_is_surely_known_is_not(tmp_path):
    args = TrainingArguments(str(tmp_path), report_to=["wandb", "trackio"], use_cpu=True)
    trackers._keep(args, "out-1", 4)
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
    GuardedCallback("mlflow", callback, {}).on_train_begin(args, state, TrainerControl())
    args.report_to.append("mlflow")
    GuardedCallback("mlflow", callback, {}).on_train_begin(args, state, TrainerControl())
    assert seen == [(6, {"loss": 1.0}), (6, {"eval_loss": 1.5})] and state.global_step == 6
    state.is_world_process_zero = False
    GuardedCallback("mlflow", callback, {}).on_train_begin(args, state, TrainerControl())
    assert len(seen) == 2


@pytest.mark.real
def test_trackers_of_a_run_that_is_killed_twice_have_what_those_of_an_undisturbed_one_have(run, folder, tmp_path):
    """Right after a checkpoint, and between two: a step that is trained again is told again, with the same values."""
    keys = yaml.safe_load((folder / "tiny.yaml").read_text()) | {"max_steps": 6, "eval_steps": 2}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(keys | {"resume_from_checkpoint": "auto"}))
    context = multiprocessing.get_context("spawn")
    for event, step in (("on_save", 2), ("on_step_begin", 5)):
        process = context.Process(target=killed, args=(tmp_path / "tiny.yaml", tmp_path / "killed", event, step))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    for name in ("killed", "whole"):
        _train(tmp_path / "tiny.yaml", tmp_path / name)
    _train(tmp_path / "tiny.yaml", tmp_path / "alone", "--report_to", "none")
    names = [json.loads((tmp_path / name / TRACKERS_FILE).read_text())["run"] for name in ("killed", "whole")]
    for found, expected in ([wandb_told(folder, name) for name in names], [trackio_told(name) for name in names]):
        assert told(found) == told(expected) and len(expected) > 15
    for name in ("killed", "whole"):
        assert compare_checkpoints(tmp_path / name / "checkpoint-6", tmp_path / "alone" / "checkpoint-6")[1] == []


# What fails.


def arguments(*report_to: str) -> SimpleNamespace:
    keys = {"report_to": list(report_to), "run_name": "out-1", "project": "sft_pipeline", "output_dir": "nowhere"}
    return SimpleNamespace(**keys)


def test_what_is_not_installed_is_left_out_in_a_line(monkeypatch, caplog):
    monkeypatch.setattr(trackers, "get_available_reporting_integrations", lambda: ["tensorboard"])
    args = arguments("wandb", "tensorboard", "mlflow")
    drop_missing_trackers(args)
    assert args.report_to == ["tensorboard"]
    assert caplog.messages == [
        f"wandb is not installed ({INSTALL}); the run goes on without it",
        "mlflow is not installed (pip install mlflow); the run goes on without it",
    ]
    with pytest.raises(SFTError, match="report_to: wand is no tracker; known are azure_ml, .*, or none"):
        drop_missing_trackers(arguments("wand"))


def test_a_tracker_that_fails_is_given_up_in_one_line(caplog):
    class Broken:
        def on_log(self, *args, **kwargs):
            raise RuntimeError("the server\nis down")

        on_train_begin = on_train_end = on_log

    args, state = arguments("trackio", "wandb"), TrainerState(is_world_process_zero=True)
    one = GuardedCallback("trackio", Broken(), {})
    for event in (one.on_train_begin, one.on_log, one.on_log, one.on_train_end):
        assert event(args, state, TrainerControl(), logs={}) is None
    one.close()
    assert args.report_to == ["wandb"]
    assert caplog.messages == ["trackio failed (the server is down); the run goes on without it"]


def test_a_tracker_that_could_not_begin_does_not_end_the_run(monkeypatch, tmp_path, caplog):
    """wandb's config is none before its run has begun; whoever asks for it gets an error."""
    wandb = SimpleNamespace(config=type("NoRun", (), {"__getattr__": lambda *args: 1 / 0})())
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    args = TrainingArguments(str(tmp_path), report_to=["wandb"], use_cpu=True)
    callback = SimpleNamespace(on_train_begin=lambda *args, **kwargs: None)
    state = TrainerState(is_world_process_zero=True)
    GuardedCallback("wandb", callback, {}).on_train_begin(args, state, TrainerControl())
    assert args.report_to == [] and caplog.messages == ["wandb failed (division by zero); the run goes on without it"]
    GuardedCallback("wandb", callback, {}).on_train_begin(args, state, TrainerControl())
    assert len(caplog.messages) == 1


def test_what_a_tracker_does_at_the_end_comes_after_the_last_evaluation():
    calls = []
    callback = SimpleNamespace(on_log=lambda *args: calls.append("log"), on_train_end=lambda *args: calls.append("end"))
    one = GuardedCallback("mlflow", callback, {})
    one.close()
    one.on_train_end(arguments("mlflow"), None, None)
    one.on_log(arguments("mlflow"), None, None)
    one.close()
    assert calls == ["log", "end"]


def test_tables_go_to_trackers_in_use_alone(monkeypatch, caplog):
    logged = []
    for name in ("wandb", "trackio"):
        stand_in = SimpleNamespace(
            Table=lambda dataframe: dataframe.to_dict("records"), log=lambda row, **more: logged.append((row, more))
        )
        monkeypatch.setitem(sys.modules, name, stand_in)
    rows = [{"answer": "a", "followed": None}, {"answer": "b", "followed": True}]
    send_table(rows, arguments("trackio"), 7)
    send_table(rows, arguments("mlflow"), 8)
    send_table([], arguments("wandb"), 9)
    send_table(rows, arguments("wandb"), 10)
    assert logged == [
        ({"eval/table": rows, "train/global_step": 7}, {"step": 7}),
        ({"eval/table": rows, "train/global_step": 10}, {}),
    ]
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    send_table(rows, args := arguments("wandb"), 7)
    assert args.report_to == [] and "the run goes on without it" in caplog.text


# wandb without an account.


class Wandb:
    """A stand-in for the module: an account, a server, or neither."""

    Error = type("Error", (Exception,), {})

    def __init__(self, mode: str = "online", account: bool | Exception = True, server: bool = True) -> None:
        self.mode, self.account, self.server, self.run = mode, account, server, None
        self.begun: list[dict] = []

    def setup(self) -> SimpleNamespace:
        return SimpleNamespace(settings=SimpleNamespace(mode=self.mode))

    def login(self, prompt: bool) -> bool:
        assert not prompt
        if isinstance(self.account, Exception):
            raise self.account
        return self.account

    def Settings(self, **given: float) -> dict:
        assert all(value > 0 for value in given.values())
        return given

    def init(self, **given) -> SimpleNamespace:
        self.begun.append(given)
        if given["mode"] == "online" and not self.server:
            raise TimeoutError("no answer in 30 s")
        url = "https://wandb.ai/me/sft_pipeline/runs/out-1" if given["mode"] == "online" else None
        return SimpleNamespace(url=url, dir="wandb/offline-run-1/files", settings=SimpleNamespace(mode=given["mode"]))


OFFLINE = "offline; wandb sync wandb/offline-run-1 sends it"


@pytest.mark.parametrize(
    ("wandb", "modes", "said"),
    [
        (Wandb(), ["online"], ["wandb: https://wandb.ai/me/sft_pipeline/runs/out-1"]),
        (Wandb("offline", account=False), ["offline"], [f"wandb: {OFFLINE}"]),
        (Wandb("disabled", account=False), ["disabled"], []),
        (
            Wandb(account=False),
            ["offline"],
            [f"wandb: no account here: set WANDB_API_KEY or run `wandb login`; {OFFLINE}"],
        ),
        (Wandb(account=Wandb.Error("no such\nkey")), ["offline"], [f"wandb: no such key; {OFFLINE}"]),
        (Wandb(server=False), ["online", "offline"], [f"wandb: no answer in 30 s; {OFFLINE}"]),
    ],
)
def test_wandb_begins_online_or_offline_and_never_asks(wandb, modes, said, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    caplog.set_level("INFO", "sft_pipeline")
    begun = call_tracker("wandb", args := arguments("wandb"), lambda: trackers._begin_wandb("out-1", args))
    assert [one["mode"] for one in wandb.begun] == modes and begun is not None
    assert {(one["id"], one["resume"], one["project"]) for one in wandb.begun} == {("out-1", "allow", "sft_pipeline")}
    assert caplog.messages == said


def test_a_run_of_the_callers_own_is_left_open(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb())
    wandb.run = object()
    assert trackers._begin_wandb("out-1", arguments("wandb")) is None and wandb.begun == []


@pytest.mark.parametrize("slow", [False, True])
def test_an_end_that_takes_too_long_is_told_with_what_sends_the_rest(slow, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb())
    begun = trackers._begin_wandb("out-1", arguments("wandb"))
    assert wandb.begun[0]["settings"]["finish_timeout_raises"]
    statuses = []

    def finish(exit_code: int) -> None:
        statuses.append(exit_code)
        if slow:
            raise TimeoutError("Timed out finishing run.")

    begun.finish = finish
    caplog.clear()
    trackers._end_wandb(begun, 1)
    said = ["wandb: not all was sent within 120 s; wandb sync wandb/offline-run-1 sends the rest"] if slow else []
    assert statuses == [1] and caplog.messages == said


@pytest.mark.real
def test_wandb_itself_gives_up_a_server_that_does_not_answer(monkeypatch, tmp_path, offline, caplog):
    wandb = pytest.importorskip("wandb")
    caplog.set_level("INFO", "sft_pipeline")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        wandb.teardown()
        started = time.monotonic()
        begun = trackers._begin_wandb("out-1", arguments("wandb"))
        assert begun.settings.mode == "offline" and time.monotonic() - started < 2 * trackers.BEGIN_SECONDS
        begun.finish()
    wandb.teardown()
    [line] = [record.message for record in caplog.records if record.name == "sft_pipeline.training.trackers"]
    assert re.fullmatch(r"wandb: .* did not respond in time.*; offline; wandb sync \S+ sends it", line)


def test_wandb_itself_does_not_ask_in_a_terminal(monkeypatch, tmp_path, offline):
    """No key anywhere, and a terminal to ask in: the real `login` says no."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(wandb.sdk.lib.wbauth.prompt, "prompt_and_save_api_key", pytest.fail)
    wandb.teardown()
    reason = trackers._why_not_online(wandb)
    wandb.teardown()
    assert reason == "no account here: set WANDB_API_KEY or run `wandb login`"
