"""Edits of a run's JSON files, and the points of a chart."""

import json
from pathlib import Path

from sft_pipeline.reports import charts


def edit(file: Path, change) -> None:
    """change(content) of a JSON file."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def chart(found: list[charts.Chart], title: str) -> dict[str, charts.Points]:
    [one] = [one for one in found if one.title == title]
    return {series.label: series.points for series in one.series}
