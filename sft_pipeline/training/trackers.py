"""Log to the trackers named in `report_to`: one tracker run across resumes, and no tracker failure ends training.

    drop_missing_trackers(args)                             # before the trainer is created
    guard_trackers(trainer)
    with start_trackers(trainer, checkpoint, {"data": stats}):
        trainer.train(resume_from_checkpoint=checkpoint)

The callbacks of transformers log the metrics. They are wrapped here so that an exception in one only disables that
tracker. They get the name of the run from a state file in the output folder, and wandb starts without asking for login:

    trackers.json       run_name: the id at wandb, and the name at trackio if `run_name` is not set
                        last_step: the step up to which everything was logged when the run last ended without a kill

Trackers buffer what is logged. A killed run loses what was not yet written, so a resumed run logs again what lies
between `last_step` and its checkpoint.
"""

from __future__ import annotations

import importlib
import io
import json
import logging
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TrackioCallback, get_available_reporting_integrations, rewrite_logs
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from sft_pipeline.config import get_output_dir
from sft_pipeline.utils.errors import SFTError, format_error
from sft_pipeline.utils.files import write_json

logger = logging.getLogger(__name__)

TRACKERS_FILE = "trackers.json"
NO_STEP = -1  # nothing is logged yet, not even the evaluation at step 0
INSTALL = 'pip install -e ".[track]"'  # trackio
INIT_TIMEOUT = 30.0  # seconds to reach the server of wandb
FINISH_TIMEOUT = 120.0  # seconds to upload at the end of the run; `wandb sync` uploads what is missing then
# What transformers logs once at the end of a run and does not send to trackio, which has no summary of a run.
SUMMARY_METRICS = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")
TOKEN_OPTION = re.compile(r"(--[\w-]*token)(=.*)?")


def drop_missing_trackers(args: TrainingArguments) -> None:
    """Remove trackers that are not installed from `report_to`, with a warning. Raises SFTError for an unknown name."""
    names = get_trackers(args)
    for name in list(names):
        if name not in INTEGRATION_TO_CALLBACK:
            choices = ", ".join(INTEGRATION_TO_CALLBACK)
            raise SFTError(f"report_to: unknown tracker {name}; choose from {choices}, or none")
        if name not in get_available_reporting_integrations():
            remedy = INSTALL if name == "trackio" else f"pip install {name}"
            logger.warning("%s is not installed (%s); training continues without it", name, remedy)
            names.remove(name)
    if "wandb" in names:
        # Instead of wandb's own lines we log one with the address. wandb reads the variable at its first use.
        os.environ.setdefault("WANDB_SILENT", "true")


@contextmanager
def start_trackers(trainer: Trainer, checkpoint: str | None, config: dict[str, Any]) -> Iterator[None]:
    """Start the trackers, and finish them at the end. config: sent to wandb and trackio beside the arguments."""
    args, run_name = trainer.args, _resolve_run_name(trainer.args, checkpoint)
    args.run_name = args.run_name or run_name
    callbacks = list_guarded_callbacks(trainer)
    names = [callback.name for callback in callbacks]
    for callback in callbacks:
        callback.config = config
    wandb_run = None
    if "wandb" in names and trainer.is_world_process_zero():
        wandb_run = call_tracker("wandb", args, partial(_start_wandb, run_name, args))
    if "trackio" in names:
        logger.info("trackio: run %s, project %s; view it with ./launch.sh dashboard", args.run_name, args.project)
    status = 1
    try:
        yield
        status = 0
    finally:
        for callback in callbacks:
            callback.close()
        if wandb_run is not None:
            call_tracker("wandb", args, partial(_finish_wandb, wandb_run, status))
        _write_state(args, run_name, trainer.state.global_step)


def read_last_tracked_step(args: TrainingArguments) -> int:
    """Return the step up to which the trackers have everything, whatever has been killed since."""
    return _read_state(get_output_dir(args))["last_step"]


def get_trackers(args: TrainingArguments) -> list[str]:
    """Return the list `report_to` itself, from which a tracker that fails is removed."""
    assert isinstance(args.report_to, list)
    return args.report_to


def call_tracker(name: str, args: TrainingArguments, call: Callable[[], Any]) -> Any:
    """Return the result of the call; if it raises, warn, remove the tracker from `report_to` and return None."""
    if name not in get_trackers(args):
        return None
    try:
        # trackio prints in color, also to a file; what it prints is logged here.
        with redirect_stdout(io.StringIO()) if name == "trackio" else nullcontext():
            return call()
    except Exception as error:
        logger.warning("%s failed (%s); training continues without it", name, format_error(error))
        get_trackers(args).remove(name)
        return None


class GuardedCallback:
    """Wrap a tracker callback of transformers so that every event goes through `call_tracker`.

    Nothing is sent before `on_train_begin` and after `close`: an evaluation then starts no tracker. `on_train_end` is
    put off until `close`, since the last evaluation is logged after the end of training. `config` is sent to wandb and
    trackio beside the arguments.
    """

    def __init__(self, name: str, callback: TrainerCallback) -> None:
        self.name, self.callback, self.config, self.is_open = name, callback, dict[str, Any](), False
        self._call_train_end: Callable[[], Any] = lambda: None

    def __getattr__(self, event: str) -> Callable[..., None]:
        method = getattr(self.callback, event)

        def call(args: TrainingArguments, *more: Any, **kwargs: Any) -> None:
            if self.is_open:
                call_tracker(self.name, args, partial(method, args, *more, **kwargs))

        return call

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the tracker, send the config, and log again what a resumed run may have lost."""
        self.is_open = True
        call_tracker(self.name, args, partial(self.callback.on_train_begin, args, state, control, **kwargs))
        if not state.is_world_process_zero:
            return
        if self.name in ("wandb", "trackio"):
            call_tracker(self.name, args, self._send_config)
        last_step = read_last_tracked_step(args)
        for entry in state.log_history:
            if entry["step"] > last_step:
                logs = {name: value for name, value in entry.items() if name != "step"}
                self.on_log(args, replace(state, global_step=int(entry["step"])), control, logs=logs, **kwargs)

    def _send_config(self) -> None:
        importlib.import_module(self.name).config.update(self.config, allow_val_change=True)

    def on_train_end(self, args: TrainingArguments, *more: Any, **kwargs: Any) -> None:
        call = partial(self.callback.on_train_end, args, *more, **kwargs)
        self._call_train_end = partial(call_tracker, self.name, args, call)

    def close(self) -> None:
        """Call the `on_train_end` that was put off, if there was one."""
        self._call_train_end()
        self.is_open = False


def guard_trackers(trainer: Trainer) -> None:
    """Replace each tracker callback of the trainer by a guarded one."""
    names = {INTEGRATION_TO_CALLBACK[name]: name for name in get_trackers(trainer.args)}
    callbacks = trainer.callback_handler.callbacks
    for index, callback in enumerate(callbacks):
        if name := names.get(type(callback)):
            callbacks[index] = GuardedCallback(name, StepTrackioCallback() if name == "trackio" else callback)


def list_guarded_callbacks(trainer: Trainer) -> list[GuardedCallback]:
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, GuardedCallback)]


class StepTrackioCallback(TrackioCallback):
    """Log to trackio under the training step, where trackio would count the calls of `log`."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Log all but the summary of the run, as the library does, with a step."""
        self.on_train_begin(args, state, control, model=model)  # starts trackio unless it has been started
        if state.is_world_process_zero:
            metrics = {name: value for name, value in (logs or {}).items() if name not in SUMMARY_METRICS}
            log_to_trackio(rewrite_logs(metrics), state.global_step)


def log_to_trackio(metrics: dict[str, Any], step: int) -> None:
    importlib.import_module("trackio").log({**metrics, "train/global_step": step}, step=step)


def _resolve_run_name(args: TrainingArguments, checkpoint: str | None) -> str:
    """Return the run name of the checkpoint's state file, or a new one, and write it to the output folder."""
    folder = get_output_dir(args)
    # `secrets` does not draw from a random generator that training uses.
    run_name = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', folder.name)[:60]}-{secrets.token_hex(3)}"
    state = {"run_name": run_name} | _read_state(Path(checkpoint).parent if checkpoint else None)
    _write_state(args, state["run_name"], state["last_step"])
    return state["run_name"]


def _read_state(folder: Path | None) -> dict[str, Any]:
    """Read the state file of a run; without one there is no `run_name`, and `last_step` is NO_STEP."""
    file = folder / TRACKERS_FILE if folder else None
    return {"last_step": NO_STEP} | (json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else {})


def _write_state(args: TrainingArguments, run_name: str, last_step: int) -> None:
    if args.report_to and args.process_index == 0:
        write_json(get_output_dir(args) / TRACKERS_FILE, {"run_name": run_name, "last_step": last_step})


def _start_wandb(run_name: str, args: TrainingArguments) -> Any:
    """Start or resume the wandb run and log its address; offline without a login or a server.

    Returns None if the caller has started a run already, which is used and left open.
    """
    import wandb

    if wandb.run is not None:
        return None
    _hide_secrets(sys.argv)
    mode = wandb.setup().settings.mode
    reason = None if mode in ("offline", "dryrun", "disabled") else _get_login_error(wandb)
    try:
        run = _init_wandb(run_name, args, "offline" if reason else mode)
    except (wandb.Error, OSError) as error:
        reason = format_error(error)
        run = _init_wandb(run_name, args, "offline")
    if run.settings.mode in ("offline", "dryrun"):
        prefix = f"{reason}; " if reason else ""
        logger.info("wandb: %soffline; upload it with wandb sync %s", prefix, Path(run.dir).parent)
    elif run.url:
        logger.info("wandb: %s", run.url)
    return run


def _init_wandb(run_name: str, args: TrainingArguments, mode: Any) -> Any:
    import wandb

    return wandb.init(
        project=os.environ.get("WANDB_PROJECT", args.project),
        id=run_name,
        name=args.run_name,
        resume="allow",
        mode=mode,
        settings=wandb.Settings(init_timeout=INIT_TIMEOUT, finish_timeout=FINISH_TIMEOUT, finish_timeout_raises=True),
    )


def _finish_wandb(run: Any, status: int) -> None:
    """Upload what is left within FINISH_TIMEOUT, or log how to upload it later. status: the exit code to record."""
    try:
        run.finish(exit_code=status)
    except TimeoutError:
        folder = Path(run.dir).parent
        logger.warning("wandb: upload not finished in %.0f s; finish it with wandb sync %s", FINISH_TIMEOUT, folder)


def _get_login_error(wandb: Any) -> str | None:
    """Log in with a stored key and check it with the server, without a prompt; return why it fails, or None."""
    try:
        return None if wandb.login(prompt=False) else "not logged in: set WANDB_API_KEY or run `wandb login`"
    except wandb.Error as error:
        return format_error(error)


def _hide_secrets(argv: list[str]) -> None:
    """Mask tokens in the command line in place, since wandb uploads it."""
    for index, word in enumerate(argv):
        option = TOKEN_OPTION.fullmatch(word)
        if option and option[2]:
            argv[index] = f"{option[1]}=***"
        elif option and index + 1 < len(argv):
            argv[index + 1] = "***"


def send_table(rows: list[dict[str, Any]], trainer: Trainer, step: int) -> None:
    """Log a table to the trackers in use that support tables, at the step under which transformers logs metrics."""
    closed = [callback.name for callback in list_guarded_callbacks(trainer) if not callback.is_open]
    for name in ("wandb", "trackio"):
        if rows and name not in closed:
            call_tracker(name, trainer.args, partial(_log_table, name, rows, step))


def _log_table(name: str, rows: list[dict[str, Any]], step: int) -> None:
    tracker = importlib.import_module(name)
    # With dtype object, None in a column of strings or booleans does not become NaN.
    frame = pandas.DataFrame(rows, dtype=object)
    row = {"eval/table": tracker.Table(dataframe=frame)}
    if name == "trackio":
        log_to_trackio(row, step)
    else:
        tracker.log({**row, "train/global_step": step})
