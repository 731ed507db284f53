"""Tasks of lm-evaluation-harness (gsm8k, ifeval, own YAML files): which are asked, and a model's scores.

    tasks = load_tasks(TaskOptions(("gsm8k", "configs/tasks")))
    scores, samples = run_tasks(tasks, model, template, system_prompt)

The harness makes the questions and the metrics; the model is asked through `HarnessLM` (harness_model.py). The package
is the extra `harness`, and imported only here and there.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedModel

from sft_pipeline.data.template import Template
from sft_pipeline.evaluation.metrics.registry import Metric
from sft_pipeline.utils.errors import SFTError, format_error

logger = logging.getLogger(__name__)

BOOTSTRAP_ITERS = 1000  # resamples for the standard errors that have no formula, such as that of F1
FEWSHOT_SEED = 1234  # the harness' own
NO_FILTER = "none"  # the harness' name


@dataclass(frozen=True)
class TaskOptions:
    """Which tasks are asked, in the harness' words.

    tasks: names of tasks, groups or tags, patterns of names (`mmlu_*`), YAML files, or folders of such files.
    include_path: a folder of YAML files whose tasks are known by their names. limit: questions of each task, or below
    1 their share. num_fewshot: examples in each prompt, for tasks that do not set them to 0.
    """

    tasks: tuple[str, ...]
    include_path: str | None = None
    limit: float | None = None
    num_fewshot: int | None = None

    @classmethod
    def parse(
        cls, tasks: str | None, include_path: str | None, limit: float | None, num_fewshot: int | None
    ) -> TaskOptions | None:
        """Return the options of a command line, where commas separate the tasks; None without tasks.

        Raises SFTError for an option of tasks without tasks.
        """
        options = {"include_path": include_path, "limit": limit, "num_fewshot": num_fewshot}
        names = tuple(filter(None, map(str.strip, (tasks or "").split(","))))
        if not names and (given := [name for name, value in options.items() if value is not None]):
            raise SFTError(f"{given[0]} is for tasks; add --tasks")
        if not names and tasks is not None:
            raise SFTError("tasks: names no task; give names with commas between, such as gsm8k,ifeval")
        return cls(names, include_path, limit, num_fewshot) if names else None

    def __post_init__(self) -> None:
        if self.limit is not None and (self.limit <= 0 or (self.limit > 1 and self.limit != int(self.limit))):
            raise SFTError(f"limit is {self.limit}; give a number of questions, or a share between 0 and 1")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise SFTError(f"num_fewshot is {self.num_fewshot}; it has to be 0 or more")


@dataclass(frozen=True)
class TaskScore:
    """One metric of a task, or of a group of tasks, whose `values` are empty.

    filter: how the answer is read from the text, in the harness' word. standard_error: None where the harness has none.
    values: one per question, if `value` is their mean.
    """

    task: str
    metric: str
    filter: str
    value: float
    standard_error: float | None
    questions: int
    num_fewshot: int
    version: str
    values: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.task} {self.metric}" + (f", {self.filter}" if self.filter != NO_FILTER else "")

    def as_json(self) -> dict[str, Any]:
        """Return all but the values, of which a task may have thousands."""
        return {name: value for name, value in asdict(self).items() if name != "values"}

    def as_metric(self) -> Metric:
        """Return the title and format of this score for tables."""
        return Metric(name=self.name, title=self.name, decimals=3)


@dataclass(frozen=True)
class LoadedTasks:
    """tasks: what `TaskManager.load` of the harness returns."""

    tasks: dict[str, Any]
    limit: float | None


def load_tasks(options: TaskOptions) -> LoadedTasks:
    """Load the tasks and their rows.

    Raises SFTError: the extra is missing, an unknown name, rows that cannot be read, a task that needs a package, runs
    code of the model or has `generation_kwargs` that generation does not know.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise SFTError("tasks need lm-evaluation-harness; install it with `pip install 'sft_pipeline[harness]'`")
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    manager, names = _find_tasks(options)
    for name in names:
        try:
            with _keep_quiet(disable_tqdm=False):
                content = manager.load([name])
        except Exception as error:  # the code of a task, or a library that reads its rows
            raise SFTError(f"task {name}: {_describe_load_error(error)}") from error
        if repeated := sorted(loaded["tasks"].keys() & content["tasks"].keys()):
            raise SFTError(f"task {repeated[0]}: asked for twice, the second time by {name}; remove one")
        for key, values in loaded.items():
            values.update(content.get(key, {}))
    for name, task in loaded["tasks"].items():
        _check_task(name, task)
        _name_scoring_errors(name, task)
        if options.num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=options.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return LoadedTasks(loaded, options.limit)


def run_tasks(
    tasks: LoadedTasks,
    model: PreTrainedModel,
    template: Template,
    system_prompt: str | None,
    disable_tqdm: bool = False,
    collate: Callable[..., dict[str, Any]] | None = None,
) -> tuple[list[TaskScore], list[dict[str, Any]]]:
    """Ask a model all questions; return its scores, and a record of each question and answer.

    `model` must have been through `patch_loss_forward`. collate: as for `HarnessLM`. Raises SFTError for a task that
    the model cannot be asked.
    """
    import lm_eval

    from sft_pipeline.evaluation.harness_model import HarnessLM

    for task in tasks.tasks["tasks"].values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)  # every model gets the same examples
    with _keep_quiet(disable_tqdm):
        results: Any = lm_eval.evaluate(
            HarnessLM(model, template, system_prompt, disable_tqdm=disable_tqdm, collate=collate),
            tasks.tasks,
            limit=tasks.limit,
            bootstrap_iters=BOOTSTRAP_ITERS,
            apply_chat_template=True,
            fewshot_as_multiturn=True,
        )
    samples = [
        {"task": name, **{key: sample[key] for key in ("doc_id", "filter", "target", "arguments", "resps")}}
        | {"metrics": {metric: sample[metric] for metric in sample["metrics"]}}
        for name, task_samples in results["samples"].items()
        for sample in task_samples
    ]
    return list(_build_scores(results)), samples


def _find_tasks(options: TaskOptions) -> tuple[Any, list[str]]:
    """Return the harness' TaskManager that knows all tasks of the options, and their names and files.

    Its own 14,000 tasks, which take some seconds to read, are left out where no name is one of them.
    """
    from lm_eval.tasks import TaskManager

    folders = [options.include_path] if options.include_path else []
    if options.include_path and not Path(options.include_path).is_dir():
        raise SFTError(f"include_path {options.include_path}: no such folder; give one of task files (YAML)")
    names: list[str] = []
    for name in options.tasks:
        if Path(name).is_dir():
            in_folder = TaskManager(include_path=name, include_defaults=False).all_subtasks
            if not in_folder:
                raise SFTError(f"tasks {name}: no task in this folder; give a folder of task files (YAML)")
            folders.append(name)
            names += in_folder
        else:
            names.append(name)
    manager = TaskManager(include_path=folders or None, include_defaults=False)
    if not all(Path(name).is_file() or manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=folders or None)
    task_names: list[str] = []
    for name in names:
        matches = [name] if Path(name).is_file() else sorted(manager.match_tasks([name]))
        if not matches:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {near[0]}?" if near else "a YAML file of your own is given by its path"
            raise SFTError(f"tasks: no task is named {name}; {hint} `lm-eval ls tasks` lists them")
        task_names += matches
    return manager, task_names


def _describe_load_error(error: Exception) -> str:
    """Describe why a task cannot be loaded, with the remedy."""
    if isinstance(error, ModuleNotFoundError):
        return f"needs a package ({error}); install it with `pip install {error.name}`"
    if isinstance(error, ConnectionError):
        return f"its rows cannot be downloaded ({format_error(error)}); connect to the hub once, or give a local task"
    return f"cannot be loaded ({type(error).__name__}: {format_error(error)}); check its YAML file and its rows"


def _check_task(name: str, task: Any) -> None:
    """Raise SFTError for a task that is not asked here, before a model is loaded or trained for it."""
    from sft_pipeline.evaluation.harness_model import read_generation_kwargs

    if getattr(task, "UNSAFE_CODE", False):
        raise SFTError(
            f"task {name}: runs code that the model writes, which is not done here; use lm_eval in a sandbox"
        )
    if getattr(task, "MULTIMODAL", False):
        raise SFTError(f"task {name}: has images or audio; remove it")
    try:
        read_generation_kwargs(task.get_config("generation_kwargs") or {})
    except SFTError as error:
        raise SFTError(f"task {name}: {error}") from error


def _name_scoring_errors(name: str, task: Any) -> None:
    """Let an error of the task's code that scores an answer end with one line, after hours of answers."""
    process_results = task.process_results

    def score(*args: Any) -> Any:
        try:
            return process_results(*args)
        except Exception as error:
            reason = f"{type(error).__name__}: {format_error(error)}"
            raise SFTError(f"task {name}: an answer cannot be scored ({reason}); mend or remove the task") from error

    task.process_results = score


@contextlib.contextmanager
def _keep_quiet(disable_tqdm: bool) -> Iterator[None]:
    """Within this block the harness prints nothing on the standard output, and starts no processes for standard errors.

    disable_tqdm: it also shows no bars of its own, which have no option.
    """
    bars: Any = tqdm
    init, processes = bars.__init__, os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    if disable_tqdm:
        bars.__init__ = partialmethod(init, disable=True)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        bars.__init__ = init
        os.environ.pop("DISABLE_MULTIPROC")
        if processes is not None:
            os.environ["DISABLE_MULTIPROC"] = processes


def _build_scores(results: Any) -> Iterator[TaskScore]:
    """Yield the scores of all tasks and groups, from the harness' results."""
    for task, metrics in results["results"].items():
        samples: Sequence[dict[str, Any]] = results["samples"].get(task, ())
        for key, value in metrics.items():
            metric, _, filter_key = key.partition(",")
            if not filter_key or metric.endswith("_stderr") or not isinstance(value, (int, float, np.number)):
                continue
            error = metrics.get(f"{metric}_stderr,{filter_key}")
            yield TaskScore(
                task,
                metric,
                filter_key,
                float(value),
                float(error) if isinstance(error, (int, float)) else None,
                int(metrics["sample_len"]),
                results["n-shot"].get(task, 0),
                str(results["versions"].get(task)),
                _select_values(samples, metric, filter_key, float(value)),
            )


def _select_values(samples: Sequence[dict[str, Any]], metric: str, filter_key: str, mean: float) -> list[float]:
    """Return the value of each question, or nothing if the metric is not their mean."""
    chosen = [sample for sample in samples if sample["filter"] == filter_key]
    values = [sample.get(metric) for sample in sorted(chosen, key=lambda sample: sample["doc_id"])]
    if not values or not all(isinstance(value, (int, float, np.number)) for value in values):
        return []
    numbers = [float(value) for value in values]  # type: ignore[arg-type]
    return numbers if np.isclose(np.mean(numbers), mean) else []
