"""The trackers that `report_to` names: one run over every resume, told all there is to tell, never in the way.

    keep_usable(training)                                   # before the trainer is made
    with tracked(trainer, checkpoint, {"data": accounts}):
        trainer.train(resume_from_checkpoint=checkpoint)

transformers' own callbacks log the metrics. Here they are kept from ending the run when they fail, get the run's
name, which is kept in the output folder, and wandb is begun without ever asking for an account:

    trackers.json       the run's name (its id at wandb, and without a `run_name` its name at trackio), and the step
                        up to which they were told all in good order

Trackers keep what they are told in memory for a while. Of a run that was killed they lack what is not on the disk, so
the run that goes on tells again what was logged between that step and its checkpoint.
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
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from sft_pipeline.config import get_output_dir
from sft_pipeline.utils.errors import SFTError, format_error
from sft_pipeline.utils.files import write_json

logger = logging.getLogger(__name__)

TRACKERS_FILE = "trackers.json"
NOTHING = -1  # is before step 0, at which a model is evaluated
INSTALL = 'pip install -e ".[track]"'  # wandb and trackio
BEGIN_SECONDS = 30.0  # to reach wandb's server
END_SECONDS = 120.0  # for what is not sent yet when the run ends; `wandb sync` sends the rest
SECRET = re.compile(r"(--[\w-]*token)(=.*)?")


def drop_missing_trackers(training: TrainingArguments) -> None:
    """Take what is not installed out of `report_to`, in one line each; raises SFTError for what is no tracker."""
    used = get_trackers(training)
    for name in list(used):
        if name not in INTEGRATION_TO_CALLBACK:
            raise SFTError(f"report_to: {name} is no tracker; known are {', '.join(INTEGRATION_TO_CALLBACK)}, or none")
        if name not in get_available_reporting_integrations():
            remedy = INSTALL if name in ("wandb", "trackio") else f"pip install {name}"
            logger.warning("%s is not installed (%s); the run goes on without it", name, remedy)
            used.remove(name)
    if "wandb" in used:
        # Its lines go; ours say where the run is. wandb reads this when it is first used.
        os.environ.setdefault("WANDB_SILENT", "true")


@contextmanager
def start_trackers(trainer: Trainer, checkpoint: str | None, facts: dict[str, Any]) -> Iterator[None]:
    """While it is entered, the trackers follow the trainer; `facts` goes to their config beside the arguments."""
    args, run = trainer.args, _run_name(trainer.args, checkpoint)
    args.run_name = args.run_name or run
    guards = _guard(trainer, facts)
    begun = None
    if "wandb" in guards and trainer.is_world_process_zero():
        begun = call_tracker("wandb", args, partial(_begin_wandb, run, args))
    if "trackio" in guards:
        logger.info("trackio: %s, project %s; look at it: ./launch.sh dashboard", args.run_name, args.project)
    status = 1
    try:
        yield
        status = 0
    finally:
        for one in guards.values():
            one.close()
        if begun is not None:
            call_tracker("wandb", args, partial(_end_wandb, begun, status))
        _keep(args, run, trainer.state.global_step)


def read_last_tracked_step(args: TrainingArguments) -> int:
    """The step up to which the trackers have been told all, whatever was killed since."""
    return _kept(get_output_dir(args))["told"]


def get_trackers(args: TrainingArguments) -> list[str]:
    """`report_to` as TrainingArguments leaves it: the list itself, which a tracker that fails is taken out of."""
    assert isinstance(args.report_to, list)
    return args.report_to


def call_tracker(name: str, args: TrainingArguments, call: Callable[[], Any]) -> Any:
    """What the tracker's call returns; None if it fails, which takes the tracker out of use in one line."""
    if name not in get_trackers(args):
        return None
    try:
        # trackio prints in colour, to whatever it is; what it says is said here.
        with redirect_stdout(io.StringIO()) if name == "trackio" else nullcontext():
            return call()
    except Exception as error:
        logger.warning("%s failed (%s); the run goes on without it", name, format_error(error))
        get_trackers(args).remove(name)
        return None


class GuardedCallback:
    """A tracker's callback of transformers': called like it, through `attempt`.

    What it does at the end of training waits for `close`: the last evaluation comes after that.
    """

    def __init__(self, name: str, callback: TrainerCallback, facts: dict[str, Any]) -> None:
        self.name, self.callback, self.facts = name, callback, facts
        self._end: Callable[[], Any] = lambda: None

    def __getattr__(self, event: str) -> Callable[..., None]:
        method = getattr(self.callback, event)
        return lambda args, *rest, **kwargs: call_tracker(self.name, args, partial(method, args, *rest, **kwargs))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        call_tracker(self.name, args, partial(self.callback.on_train_begin, args, state, control, **kwargs))
        if not state.is_world_process_zero:
            return
        if self.name in ("wandb", "trackio"):
            call_tracker(self.name, args, self._tell_facts)
        told = read_last_tracked_step(args)
        for entry in state.log_history:
            if entry["step"] > told:
                logs = {name: value for name, value in entry.items() if name != "step"}
                self.on_log(args, replace(state, global_step=int(entry["step"])), control, logs=logs, **kwargs)

    def _tell_facts(self) -> None:
        importlib.import_module(self.name).config.update(self.facts, allow_val_change=True)

    def on_train_end(self, args: TrainingArguments, *rest: Any, **kwargs: Any) -> None:
        self._end = partial(call_tracker, self.name, args, partial(self.callback.on_train_end, args, *rest, **kwargs))

    def close(self) -> None:
        self._end()


def _guard(trainer: Trainer, facts: dict[str, Any]) -> dict[str, GuardedCallback]:
    """Put a guard in the place of each tracker's callback."""
    names = {INTEGRATION_TO_CALLBACK[name]: name for name in get_trackers(trainer.args)}
    callbacks = trainer.callback_handler.callbacks
    guards = {}
    for at, one in enumerate(callbacks):
        if name := names.get(type(one)):
            guards[name] = callbacks[at] = GuardedCallback(name, one, facts)
            if name == "trackio":
                one._trackio = TrackioWithSteps(one._trackio)
    return guards


class TrackioWithSteps:
    """The trackio module, but that a row stands at its training step, where trackio would count the rows."""

    def __init__(self, trackio: Any) -> None:
        self.trackio = trackio

    def __getattr__(self, name: str) -> Any:
        return getattr(self.trackio, name)

    def log(self, metrics: dict[str, Any]) -> None:
        self.trackio.log(metrics, step=metrics["train/global_step"])


def _run_name(args: TrainingArguments, checkpoint: str | None) -> str:
    """The name of the run that the checkpoint is of, or a new one; kept in the output folder."""
    folder = get_output_dir(args)
    # Not drawn from a generator that training draws from.
    name = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', folder.name)[:60]}-{secrets.token_hex(3)}"
    kept = {"run": name} | _kept(Path(checkpoint).parent if checkpoint else None)
    _keep(args, kept["run"], kept["told"])
    return kept["run"]


def _kept(folder: Path | None) -> dict[str, Any]:
    """What a run's folder keeps of its trackers: `run`, where it has one, and `told`."""
    file = folder / TRACKERS_FILE if folder else None
    return {"told": NOTHING} | (json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else {})


def _keep(args: TrainingArguments, run: str, told: int) -> None:
    if args.report_to and args.process_index == 0:
        write_json(get_output_dir(args) / TRACKERS_FILE, {"run": run, "told": told})


def _begin_wandb(run: str, args: TrainingArguments) -> Any:
    """Begin the run, or go on with it; offline where there is no account or no server. Says where it is.

    None where the caller has begun a run, which is used then, and left open.
    """
    import wandb

    if wandb.run is not None:
        return None
    _hide_secrets(sys.argv)
    chosen = wandb.setup().settings.mode
    reason = None if chosen in ("offline", "dryrun", "disabled") else _why_not_online(wandb)
    try:
        begun = _init_wandb(run, args, "offline" if reason else chosen)
    except (wandb.Error, OSError) as error:
        reason = format_error(error)
        begun = _init_wandb(run, args, "offline")
    if begun.settings.mode in ("offline", "dryrun"):
        why = f"{reason}; " if reason else ""
        logger.info("wandb: %soffline; wandb sync %s sends it", why, Path(begun.dir).parent)
    elif begun.url:
        logger.info("wandb: %s", begun.url)
    return begun


def _init_wandb(run: str, args: TrainingArguments, mode: Any) -> Any:
    import wandb

    return wandb.init(
        project=os.environ.get("WANDB_PROJECT", args.project),
        id=run,
        name=args.run_name,
        resume="allow",
        mode=mode,
        settings=wandb.Settings(init_timeout=BEGIN_SECONDS, finish_timeout=END_SECONDS, finish_timeout_raises=True),
    )


def _end_wandb(begun: Any, status: int) -> None:
    try:
        begun.finish(exit_code=status)
    except TimeoutError:
        folder = Path(begun.dir).parent
        logger.warning("wandb: not all was sent within %.0f s; wandb sync %s sends the rest", END_SECONDS, folder)


def _why_not_online(wandb: Any) -> str | None:
    """Looks for an account, and asks the server whether it is one; never a person."""
    try:
        return None if wandb.login(prompt=False) else "no account here: set WANDB_API_KEY or run `wandb login`"
    except wandb.Error as error:
        return format_error(error)


def _hide_secrets(words: list[str]) -> None:
    """wandb keeps the command line."""
    for at, word in enumerate(words):
        found = SECRET.fullmatch(word)
        if found and found[2]:
            words[at] = f"{found[1]}=***"
        elif found and at + 1 < len(words):
            words[at + 1] = "***"


def send_table(rows: list[dict[str, Any]], args: TrainingArguments, step: int) -> None:
    """To the trackers that take tables and are in use, under the step that transformers' own callbacks give metrics."""
    for name in ("wandb", "trackio"):
        if rows:
            call_tracker(name, args, partial(_log_table, name, rows, step))


def _log_table(name: str, rows: list[dict[str, Any]], step: int) -> None:
    tracker = importlib.import_module(name)
    # As objects, for a column of texts or truth values would turn None into NaN.
    frame = pandas.DataFrame(rows, dtype=object)
    row = {"eval/table": tracker.Table(dataframe=frame), "train/global_step": step}
    (TrackioWithSteps(tracker) if name == "trackio" else tracker).log(row)
