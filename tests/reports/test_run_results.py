"""Reading a run's folder: the evaluation of the saved model, and errors in one line."""

import json
import shutil

import pytest
from support.reports import chart, edit

from sft_pipeline.cli import main
from sft_pipeline.reports import charts
from sft_pipeline.reports.run_results import read_run


def test_the_best_model_stands_for_its_step(folder):
    """best.json is of the saved model, and its step has an evaluation of fewer questions."""
    best = json.loads((folder / "evaluation" / "step_000002.json").read_text())
    best["metrics"]["stop_rate"] = 0.625
    (folder / "evaluation" / "best.json").write_text(json.dumps(best))
    run = read_run(folder)
    assert run.last_evaluation.metrics["stop_rate"] == 0.625
    assert dict(chart(charts.build_run_charts(run), "Answers")["answers that end on their own"])[2] == 0.625


REFUSALS = {
    "nowhere": (lambda folder: shutil.rmtree(folder), "{0}: no such folder; give the output folder of a run"),
    "unfinished": (lambda folder: (folder / "results.json").unlink(), "{0}: no results.json, which a run writes at"),
    "cut off": (lambda folder: (folder / "results.json").write_text('{"a'), "{0}/results.json: not readable as JSON ("),
    "a list": (lambda folder: (folder / "results.json").write_text("[]"), "{0}/results.json: holds no JSON object"),
    "older": (
        lambda folder: edit(folder / "results.json", lambda results: results.pop("metrics")),
        "{0}/results.json: no metrics: written by another release",
    ),
    "no evaluation": (
        lambda folder: (folder / "evaluation" / "step_000002.json").write_text('{"a": 1}'),
        "{0}/evaluation: holds a file that is not an evaluation (",
    ),
    "a folder there": (lambda folder: (folder / "report.html").mkdir(), "output {0}/report.html: is a folder; name a "),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_one_line(case, folder, capsys):
    damage, message = REFUSALS[case]
    damage(folder)
    with pytest.raises(SystemExit) as exit:
        main(["report", str(folder)])
    output = capsys.readouterr()
    assert exit.value.code == 2 and output.out == "" and output.err.count("\n") == 1
    assert output.err.startswith(f"sft-pipeline: {message.format(folder)}")
