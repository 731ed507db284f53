"""The HTML report of a run, or of several runs side by side: one file without scripts, which loads nothing.

    write_report(["outputs/quickstart"])
    write_report(["outputs/a", "outputs/b"])

jinja2 escapes all text (autoescape), and the page's own Content-Security-Policy forbids scripts and network access.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sft_pipeline.arguments import SourceEntry
from sft_pipeline.evaluation.metrics.registry import METRICS, get_metric
from sft_pipeline.evaluation.step_results import AnswerRow, StepResults, compute_changes
from sft_pipeline.reports import charts, svg
from sft_pipeline.reports.run_results import RunResults, join_tables, read_run
from sft_pipeline.runs.output_dir import REPORT_FILE
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.sanitize import replace_control_characters

logger = logging.getLogger(__name__)

COMPARISON_FILE = "comparison.html"
# Counts of rows in results.json -> their titles.
ROW_COUNTS = {
    "rows": "rows",
    "kept": "kept",
    "truncated": "truncated, and kept",
    "sequences": "sequences",
    "dropped_sequences": "dropped sequences, longer than max_length",
    "tokens": "tokens",
    "computed_tokens": "tokens computed, of what a row's sequences share once",
    "supervised_tokens": "trained tokens",
}


def write_report(folders: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write the report of one run, or of several side by side, and return its file.

    Raises SFTError for a folder without a finished run, a file that cannot be read, and an output that is a folder.
    """
    paths = [Path(folder) for folder in folders]
    runs = [read_run(path) for path in paths]
    file = Path(output or paths[0] / (COMPARISON_FILE if len(runs) > 1 else REPORT_FILE))
    if file.is_dir():
        raise SFTError(f"output {file}: is a folder; name a file in it")
    page = render_comparison(runs) if len(runs) > 1 else render_run(runs[0])
    file.parent.mkdir(parents=True, exist_ok=True)
    # replace: an answer that was cut, or a data file, may hold half a surrogate pair, which has no UTF-8.
    file.write_text(page, encoding="utf-8", errors="replace")
    return file


def render_run(run: RunResults) -> str:
    """Render the report of one run. Answers are those of the first and the last evaluation, or of the only one."""
    evaluations = [evaluation for evaluation in (run.first_evaluation, run.last_evaluation) if evaluation]
    if len(evaluations) == 2 and evaluations[0] is evaluations[1]:
        evaluations.pop()
    return _render(
        "run.html",
        title=_get_name(run),
        run=run,
        charts=_draw_charts(charts.build_run_charts(run)),
        lengths=_draw_charts(charts.build_length_charts(run)),
        answer_titles=("before", "after")[-len(evaluations) :],
        answers=_group_by_set(join_tables(evaluations, instructions=False)),
        held_out_sides=[(f"held_out {name}", f"held out: {name}") for name in run.set_names],
        instructions=join_tables(evaluations, instructions=True),
        first_row=_split_first_row(run),
    )


def render_comparison(runs: list[RunResults]) -> str:
    """Render the report of several runs. Changes and answers are left out unless all runs have an evaluation."""
    names = _get_names(runs)
    evaluations = [run.last_evaluation for run in runs if run.last_evaluation]
    if len(evaluations) < len(runs):
        evaluations = []
    return _render(
        "comparison.html",
        title=" and ".join(names) if len(names) == 2 else f"{len(names)} runs",
        runs=runs,
        names=names,
        charts=_draw_charts(charts.build_comparison_charts(runs, names)),
        set_names=list(dict.fromkeys(name for run in runs for name in run.set_names)),
        changes=[_compute_changes(evaluations[0], evaluation) for evaluation in evaluations[1:]],
        has_different_rows=len({str(run.last_evaluation and run.last_evaluation.held_out["tokens"]) for run in runs})
        > 1,
        answers=join_tables(evaluations, instructions=False),
        config_differences=_find_config_differences([run.results["config"] for run in runs]),
    )


def _compute_changes(first: StepResults, last: StepResults) -> list[tuple[str, str, dict[str, Any]]]:
    """Return (held-out set, metric, change) of the changes between two runs; those of all held-out rows, without the
    name of a set, come first."""
    sets = {"": (first, last)}
    sets |= {name: (first.select_set(name), last.select_set(name)) for name in first.sets if name in last.sets}
    changes = {name: compute_changes(*pair) for name, pair in sets.items()}
    return [(name, metric, change) for name, metrics in changes.items() for metric, change in metrics.items()]


def _group_by_set(answers: list[tuple[AnswerRow, ...]]) -> dict[str | None, list[tuple[AnswerRow, ...]]]:
    """Return the rows of each held-out set by its name, in their order; None names rows without a set."""
    groups: dict[str | None, list[tuple[AnswerRow, ...]]] = {}
    for rows in answers:
        groups.setdefault(rows[0].get("set"), []).append(rows)
    return groups


def _get_names(runs: list[RunResults]) -> list[str]:
    """Return the folders' names, or their paths if two names are equal."""
    names = [_get_name(run) for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def _get_name(run: RunResults) -> str:
    return run.folder.resolve().name


def _draw_charts(run_charts: list[charts.Chart]) -> list[tuple[charts.Chart, str]]:
    return [(chart, svg.render_svg(chart)) for chart in run_charts] if svg.can_draw() else []


def _split_first_row(run: RunResults) -> list[list[tuple[str, list[str]]]]:
    """Return the sequences of the first training row as spans of (CSS class, tokens): trained, shared or neither."""
    sequences = run.preview["first_row"] if run.preview else []
    split = []
    for sequence in sequences:
        classes = [
            "trained" if trained else "shared" if position < sequence["shared"] else ""
            for position, trained in enumerate(sequence["trained"])
        ]
        spans = groupby(zip(classes, sequence["tokens"]), key=lambda pair: pair[0])
        split.append([(name, [token for _, token in pairs if token]) for name, pairs in spans])
    return split


def _find_config_differences(configs: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the keys whose values differ between the configs, except output_dir, with the value in each."""
    keys = dict.fromkeys(key for config in configs for key in config if key != "output_dir")
    values = {key: [config.get(key) for config in configs] for key in keys}
    return {key: column for key, column in values.items() if any(value != column[0] for value in column)}


def _render(template: str, **context: Any) -> str:
    no_charts = None if svg.can_draw() else svg.NO_CHARTS
    if no_charts:
        logger.warning(no_charts)
    return _build_environment().get_template(template).render(no_charts=no_charts, **context)


@cache
def _build_environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("sft_pipeline.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "visible": replace_control_characters,
        "to_text": _format_config_value,
        "to_labels": lambda entries: [SourceEntry.parse(entry).label for entry in entries],
    }
    environment.globals |= {
        "get_metric": get_metric,
        "metric_names": list(METRICS),
        "card_metrics": charts.ANSWER_METRICS,
        "row_counts": ROW_COUNTS,
    }
    return environment


def _format_config_value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
