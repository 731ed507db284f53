"""Read the output folder of a finished run for its report. Every number of a report comes from one of its files."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_pipeline.evaluation.step_results import BEST_FILE, AnswerRow, StepResults
from sft_pipeline.runs.output_dir import EVALUATION_DIR, PREVIEW_FILE, RESULTS_FILE, RUN_FILE
from sft_pipeline.utils.errors import SFTError

REQUIRED_KEYS = (
    "eval_loss", "train_loss", "trainable_parameters", "steps", "tokens_per_second", "peak_memory_gib", "seconds",
    "seconds_by_part", "metrics", "before_and_after", "answers", "tasks", "rows", "loss_curve", "versions", "config",
)  # fmt: skip
ABSENT = "–"


@dataclass(frozen=True)
class SourcedNumber:
    """A number and its text in the report. source: its file and the JSON pointer (RFC 6901) to it."""

    source: str
    value: float | None
    text: str


@dataclass(frozen=True)
class RunResults:
    """results: of results.json. evaluations: in order of steps; the last one is of the best model if that was restored.
    preview: of `build_preview`; None for a run without one."""

    folder: Path
    results: dict[str, Any]
    evaluations: list[StepResults]
    preview: dict[str, Any] | None

    @property
    def first_evaluation(self) -> StepResults | None:
        """The evaluation at step 0."""
        return next((evaluation for evaluation in self.evaluations if evaluation.step == 0), None)

    @property
    def last_evaluation(self) -> StepResults | None:
        """The evaluation of the saved model."""
        return self.evaluations[-1] if self.evaluations else None

    @property
    def set_names(self) -> list[str]:
        """The names of the held-out sets, if there are several with names."""
        return list(self.results.get("sets", {}))

    @property
    def command(self) -> str:
        """The command that repeats the run in another output folder."""
        words = ["./launch.sh", "train", str(self.folder / RUN_FILE), "--output_dir", f"{self.folder}-again"]
        return shlex.join(words)

    @property
    def tasks_command(self) -> str:
        """The command that asks the saved model the tasks of `eval_tasks`."""
        tasks = ",".join(self.results["config"]["eval_tasks"])
        return shlex.join(["./launch.sh", "evaluate", str(self.folder), "--tasks", tasks])

    def get_number(self, *keys: str | int, form: str | Callable[[Any], str] = "{}") -> SourcedNumber:
        """Return the number of results.json under these nested keys; its text is ABSENT if it is missing or null.

        form: a format string, or a function that returns the text.
        """
        value: Any = self.results
        for key in keys:
            value = value[key] if isinstance(key, int) else (value or {}).get(key)
        pointer = "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in keys)
        format_value = form.format if isinstance(form, str) else form
        text = ABSENT if value is None else format_value(value)
        return SourcedNumber(f"{self.folder / RESULTS_FILE}#{pointer}", value, text)


def read_run(folder: Path) -> RunResults:
    """Read a run's output folder. Raises SFTError if the run is not finished or a file cannot be read."""
    if not folder.is_dir():
        raise SFTError(f"{folder}: no such folder; give the output folder of a run")
    if not (folder / RESULTS_FILE).is_file():
        raise SFTError(
            f"{folder}: no {RESULTS_FILE}, which a run writes at its end; give a finished run's output folder"
        )
    results = _read_json(folder / RESULTS_FILE)
    missing = [key for key in REQUIRED_KEYS if key not in results]
    if missing:
        raise SFTError(
            f"{folder / RESULTS_FILE}: no {missing[0]}: written by another release; train again with this one"
        )
    preview = _read_json(folder / PREVIEW_FILE) if (folder / PREVIEW_FILE).is_file() else None
    return RunResults(folder, results, _read_evaluations(folder / EVALUATION_DIR), preview)


def join_tables(evaluations: list[StepResults], instructions: bool) -> list[tuple[AnswerRow, ...]]:
    """Return, for each prompt that all evaluations have, its row in each table (`build_table_row`)."""
    tables = [
        [row for row in evaluation.table if (row["instruction"] is not None) == instructions]
        for evaluation in evaluations
    ]
    return [rows for rows in zip(*tables) if len({row["prompt"] for row in rows}) == 1]


def _read_evaluations(folder: Path) -> list[StepResults]:
    files = [*sorted(folder.glob("step_*.json")), *folder.glob(BEST_FILE)]
    try:
        return [StepResults(**_read_json(file)) for file in files]
    except TypeError as error:
        raise SFTError(f"{folder}: holds a file that is not an evaluation ({error}); remove it") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SFTError(f"{file}: not readable as JSON ({error}); train again, or give another folder") from error
    if not isinstance(content, dict):
        raise SFTError(f"{file}: holds no JSON object; train again, or give another folder")
    return content
