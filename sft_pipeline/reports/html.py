"""The page of a run, and the page that compares runs: one HTML file, no script, nothing fetched.

    write_report(["outputs/quickstart"])
    write_report(["outputs/a", "outputs/b"])

All text goes through jinja2's autoescape, and the page's own Content-Security-Policy forbids scripts and the network.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sft_pipeline.evaluation.step_results import compute_changes
from sft_pipeline.evaluation.tables import FIGURES
from sft_pipeline.reports import charts, svg
from sft_pipeline.reports.run_results import ABSENT, RunResults, join_tables, read_run
from sft_pipeline.runs.output_dir import REPORT_FILE
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.sanitize import replace_control_characters

logger = logging.getLogger(__name__)

COMPARISON_FILE = "comparison.html"
# What happened to the rows, as `data.encode.Account` calls it.
COUNTS = {"rows": "rows", "kept": "kept", "truncated": "truncated, and kept", "tokens": "tokens",
          "supervised_tokens": "trained tokens"}  # fmt: skip


def write_report(folders: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write the page of one run, or of several side by side, and return its file.

    Raises SFTError for a folder without a finished run, unreadable files, and an output that is a folder.
    """
    paths = [Path(folder) for folder in folders]
    runs = [read_run(path) for path in paths]
    file = Path(output or paths[0] / (COMPARISON_FILE if len(runs) > 1 else REPORT_FILE))
    if file.is_dir():
        raise SFTError(f"output {file}: is a folder; name a file in it")
    page = render_comparison(runs) if len(runs) > 1 else render_run(runs[0])
    file.parent.mkdir(parents=True, exist_ok=True)
    # Half a character from an answer cut off, or from a data file, is no reason to have no page.
    file.write_text(page, encoding="utf-8", errors="replace")
    return file


def render_run(run: RunResults) -> str:
    known = [one for one in (run.before, run.after) if one]
    evaluations = known if len(known) == 2 and known[0] is not known[1] else known[-1:]
    return _render(
        "run.html",
        title=_name(run),
        run=run,
        charts=_drawn(charts.build_run_charts(run)),
        lengths=_drawn(charts.build_length_charts(run)),
        asked=("before", "after")[-len(evaluations) :],
        answers=join_tables(evaluations, instructions=False),
        instructions=join_tables(evaluations, instructions=True),
        first_row=_first_row(run),
    )


def render_comparison(runs: list[RunResults]) -> str:
    names = _names(runs)
    evaluations = [run.after for run in runs if run.after]
    everywhere = len(evaluations) == len(runs)
    against = [compute_changes(evaluations[0], one) for one in evaluations[1:]] if everywhere else []
    return _render(
        "comparison.html",
        title=" and ".join(names) if len(names) == 2 else f"{len(names)} runs",
        runs=runs,
        names=names,
        charts=_drawn(charts.build_comparison_charts(runs, names)),
        against=against,
        other_rows=len({str(run.after and run.after.held_out["tokens"]) for run in runs}) > 1,
        answers=join_tables(evaluations, instructions=False) if everywhere else [],
        differing=_differing([run.results["config"] for run in runs]),
    )


def _names(runs: list[RunResults]) -> list[str]:
    """The folders' own names, and their paths where these are alike."""
    short = [_name(run) for run in runs]
    return short if len(set(short)) == len(short) else [str(run.folder) for run in runs]


def _name(run: RunResults) -> str:
    return run.folder.resolve().name


def _drawn(found: list[charts.Chart]) -> list[tuple[charts.Chart, str]]:
    return [(chart, svg.render_svg(chart)) for chart in found] if svg.can_draw() else []


def _first_row(run: RunResults) -> list[tuple[bool, list[str]]]:
    """The first training row as runs of tokens that are trained or given."""
    if run.preview is None:
        return []
    row = run.preview["first_row"]
    runs = groupby(zip(row["trained"], row["tokens"]), key=lambda pair: pair[0])
    return [(trained, [token for _, token in pairs if token]) for trained, pairs in runs]


def _differing(configs: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The keys that are not alike in all configs, the place of the output aside, with the value of each."""
    keys = dict.fromkeys(key for config in configs for key in config if key != "output_dir")
    values = {key: [config.get(key) for config in configs] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def _render(template: str, **context: Any) -> str:
    environment = Environment(
        loader=PackageLoader("sft_pipeline.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"visible": replace_control_characters, "written": _written, "titled": _titled}
    environment.globals |= {
        "form": _form,
        "row_counts": COUNTS,
        "known_metrics": FIGURES,
        "shown_as": _shown_as,
        "no_charts": None if svg.can_draw() else svg.NO_CHARTS,
    }
    if not svg.can_draw():
        logger.warning(svg.NO_CHARTS)
    return environment.get_template(template).render(**context)


def _titled(name: str) -> str:
    """A figure's title; its unit stands at the value."""
    return FIGURES[name].title.removesuffix(", %") if name in FIGURES else name.replace("_", " ")


def _form(name: str, sign: str = "") -> str:
    """How a figure is written, as a format; `sign` is "+" for a difference."""
    if name in FIGURES:
        shown = FIGURES[name]
        return f"{{:{sign}.{shown.decimals}{'%' if shown.percent else 'f'}}}"
    return f"{{:{sign}.1%}}" if "_rate" in name or "_share" in name else f"{{:{sign}.6g}}"


def _shown_as(name: str, value: float | None, sign: str = "") -> str:
    return ABSENT if value is None else _form(name, sign).format(value)


def _written(value: Any) -> str:
    """A value of the config."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
