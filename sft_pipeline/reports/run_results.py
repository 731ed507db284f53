"""A run's output folder, read for its report. Whatever a number on the page is, it stands in one of these files."""

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

NEEDED = (
    "eval_loss", "train_loss", "trainable_parameters", "steps", "tokens_per_second", "peak_memory_gib", "seconds",
    "metrics", "before_and_after", "answers", "rows", "loss_curve", "versions", "config",
)  # fmt: skip
ABSENT = "–"


@dataclass(frozen=True)
class SourcedNumber:
    """A number as it is shown. source: the file that has it and the JSON pointer (RFC 6901) to it."""

    source: str
    value: float | None
    text: str


@dataclass(frozen=True)
class RunResults:
    """evaluations: in order; where the best model was brought back, the last one is of that. preview: see
    `preview.record`; None for a run that left none."""

    folder: Path
    results: dict[str, Any]
    evaluations: list[StepResults]
    preview: dict[str, Any] | None

    @property
    def before(self) -> StepResults | None:
        """The evaluation at step 0."""
        return next((one for one in self.evaluations if one.step == 0), None)

    @property
    def after(self) -> StepResults | None:
        """That of the saved model."""
        return self.evaluations[-1] if self.evaluations else None

    @property
    def command(self) -> str:
        """What repeats the run, into a folder of its own."""
        words = ["./launch.sh", "train", str(self.folder / RUN_FILE), "--output_dir", f"{self.folder}-again"]
        return shlex.join(words)

    def number(self, *keys: str | int, form: str | Callable[[Any], str] = "{}") -> SourcedNumber:
        """The number of results.json under these keys, one inside the other; one that is not there is ABSENT."""
        found: Any = self.results
        for key in keys:
            found = found[key] if isinstance(key, int) else (found or {}).get(key)
        pointer = "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in keys)
        written = form.format if isinstance(form, str) else form
        return SourcedNumber(
            f"{self.folder / RESULTS_FILE}#{pointer}", found, ABSENT if found is None else written(found)
        )


def read_run(folder: Path) -> RunResults:
    """Raises SFTError for a folder that is not of a finished run, and for a file that cannot be read."""
    if not folder.is_dir():
        raise SFTError(f"{folder}: no such folder; give the output folder of a run")
    if not (folder / RESULTS_FILE).is_file():
        raise SFTError(
            f"{folder}: no {RESULTS_FILE}, which a run leaves at its end; give a finished run's output folder"
        )
    results = _read(folder / RESULTS_FILE)
    missing = [key for key in NEEDED if key not in results]
    if missing:
        raise SFTError(f"{folder / RESULTS_FILE}: no {missing[0]}; it is of another release, train again with this one")
    preview = _read(folder / PREVIEW_FILE) if (folder / PREVIEW_FILE).is_file() else None
    return RunResults(folder, results, _evaluations(folder / EVALUATION_DIR), preview)


def join_tables(evaluations: list[StepResults], instructions: bool) -> list[tuple[AnswerRow, ...]]:
    """What each evaluation has at the questions that all of them were asked; see `history.table_row`."""
    tables = [[row for row in one.table if (row["instruction"] is not None) == instructions] for one in evaluations]
    return [rows for rows in zip(*tables) if len({row["prompt"] for row in rows}) == 1]


def _evaluations(folder: Path) -> list[StepResults]:
    files = [*sorted(folder.glob("step_*.json")), *folder.glob(BEST_FILE)]
    try:
        return [StepResults(**_read(file)) for file in files]
    except TypeError as error:
        raise SFTError(f"{folder}: holds a file that is no evaluation ({error}); take it away") from error


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SFTError(f"{file}: not readable as JSON ({error}); train again, or give another folder") from error
    if not isinstance(content, dict):
        raise SFTError(f"{file}: holds no JSON object; train again, or give another folder")
    return content
