"""Charts: the points of the series are the numbers of the results."""

from support.reports import chart

from sft_pipeline.reports import charts
from sft_pipeline.reports.run_results import RunResults, read_run


def logged(run: RunResults, key: str) -> charts.Points:
    return [(entry["step"], entry[key]) for entry in run.results["loss_curve"] if key in entry]


def test_the_charts_have_the_points_of_the_results(trained):
    run = read_run(trained[0])
    found = charts.build_run_charts(run)
    assert chart(found, "Loss, nats/token") == {"training": logged(run, "loss"), "held out": logged(run, "eval_loss")}
    assert len(logged(run, "loss")) == 4 and [step for step, _ in logged(run, "eval_loss")] == [0, 2, 4]
    assert chart(found, "Tokens per second") == {"": logged(run, "tokens_per_second")}
    assert chart(found, "Memory, GiB") == {"": logged(run, "peak_memory_gib")}
    assert chart(found, "Held-out token accuracy") == {"held out": logged(run, "eval_token_accuracy")}
    stops = chart(found, "Answers")["answers that end on their own"]
    assert stops[0] == (0, run.results["before_and_after"]["stop_rate"]["before"])
    assert stops[-1] == (4, run.results["before_and_after"]["stop_rate"]["after"])
    lengths = chart(charts.build_length_charts(run), "Training sequences by length")[""]
    assert sum(count for _, count in lengths) == run.results["rows"]["train"]["sequences"]


def test_their_loss_curves_are_laid_over_each_other(folder, other):
    runs = [read_run(folder), read_run(other)]
    found = chart(charts.build_comparison_charts(runs, ["a", "b"]), "Loss, nats/token")
    assert found["b: training"] == logged(runs[1], "loss") == [(x, y + 1) for x, y in found["a: training"]]
    assert found["a: held out"] == found["b: held out"] == logged(runs[0], "eval_loss")
