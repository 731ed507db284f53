"""The page of a run: every number is that of results.json, text stays text, nothing is fetched, a browser shows it."""

import functools
import json
import math
import re
import shlex
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.reports import edit

from sft_pipeline.cli import main
from sft_pipeline.config import build_config_record, parse_config
from sft_pipeline.data.messages import parse_conversation
from sft_pipeline.data.pipeline import load_splits
from sft_pipeline.data.preview import BARS, build_preview
from sft_pipeline.evaluation.step_results import compute_changes
from sft_pipeline.reports import charts, svg
from sft_pipeline.reports.html import write_report
from sft_pipeline.reports.run_results import read_run
from sft_pipeline.utils.sanitize import replace_control_characters

HOSTILE = '</pre></title></style><script>alert(1)</script><img src="http://x.test/" onerror=alert(1)>&amp;{{ 7*7 }}'
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


class Page(HTMLParser):
    """Elements with their attributes, text outside <style>, the text of each <pre>, of each trained token, of what
    is shared, and of each number."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.texts, self.numbers = "", {"pre": [], "trained": [], "shared": []}, []
        self._open: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.elements.append((tag, found))
        if tag == "data":
            self.numbers.append([found["data-source"], found["value"], ""])
        for name in {tag, found.get("class")} & self.texts.keys():
            self.texts[name].append("")
        if tag not in ("meta", "link", "use", "path"):
            self._open.append(found["class"] if found.get("class") in ("trained", "shared") else tag)

    def handle_endtag(self, tag):
        if tag not in ("path", "use"):
            self._open.pop()

    def handle_data(self, data):
        if "style" in self._open:
            return
        self.text += data
        if "data" in self._open:
            self.numbers[-1][2] += data
        for name in self.texts.keys() & set(self._open):
            self.texts[name][-1] += data


def everywhere(content, change):
    """The content with change(text) for every text in it, names aside."""
    if isinstance(content, dict):
        return {key: everywhere(value, change) for key, value in content.items()}
    if isinstance(content, list):
        return [everywhere(value, change) for value in content]
    return change(content) if isinstance(content, str) else content


def at(content, pointer: str):
    for key in pointer.split("/")[1:]:
        content = content[int(key) if isinstance(content, list) else key.replace("~1", "/").replace("~0", "~")]
    return content


def numbers_below(content, pointer: str = ""):
    """The pointer of every number."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from numbers_below(value, f"{pointer}/{key.replace('~', '~0').replace('/', '~1')}")
    elif isinstance(content, (int, float)) and not isinstance(content, bool):
        yield pointer


def check_numbers(page: Page) -> set[str]:
    """Each number is the file's, and its text is it rounded; returns their sources."""
    for source, value, text in page.numbers:
        file, pointer = source.rsplit("#", 1)
        expected = at(json.loads(Path(file).read_text()), pointer)
        if expected is None:
            assert text == "–"
            continue
        assert float(value) == expected
        bare = text.replace(",", "").rstrip("%")
        step = 10.0 ** -len(bare.partition(".")[2])
        assert float(bare) == pytest.approx(expected * (100 if "%" in text else 1), abs=0.5001 * step), source
    return {source for source, _, _ in page.numbers}


# What the page says.


def test_a_run_ends_with_its_page(trained):
    folder, shown = trained
    assert f"report: {folder / 'report.html'}" in shown.replace("\n", " ")
    before = (folder / "report.html").read_bytes()
    assert write_report([folder]) == folder / "report.html"
    assert (folder / "report.html").read_bytes() == before


def test_every_number_is_that_of_the_results(trained):
    folder, _ = trained
    sources = check_numbers(Page(folder / "report.html"))
    results = json.loads((folder / "results.json").read_text())
    told = {key: value for key, value in results.items() if key not in ("config", "seed", "loss_curve")}
    expected = {f"{folder / 'results.json'}#{pointer}" for pointer in numbers_below(told)}
    assert sources == expected and len(expected) > 60
    assert results["rows"]["train"]["dropped"] == {"longer than max_length": 1}


def test_what_of_the_rows_nothing_read_is_listed(trained, config):
    results = json.loads((trained[0] / "results.json").read_text())
    rows = str(config.parent / "rows.json")
    assert results["unread"] == {rows: {"<id>": 1}, str(config.parent / "held.json"): {}}
    page = (trained[0] / "report.html").read_text()
    assert f"<p>{rows}: not read: <code>&lt;id&gt;</code> in " in page and page.count("not read: <code>") == 1


def test_a_number_that_is_not_shown_right_is_seen(folder):
    """The check above would pass on anything if it read nothing."""
    page = Page(write_report([folder]))
    edit(folder / "results.json", lambda results: results.update(steps=5))
    with pytest.raises(AssertionError):
        check_numbers(page)


def test_answers_stand_before_and_after_in_their_order(trained):
    folder, _ = trained
    results = json.loads((folder / "results.json").read_text())
    names = ("prompt", "before", "after", "reference")
    expected = [replace_control_characters(one[name]) for one in results["answers"] for name in names]
    page = Page(folder / "report.html")
    assert page.texts["pre"][: len(expected)] == expected and len(results["answers"]) == 3
    ended = sum(one["stopped"] + one["stopped_before"] for one in results["answers"])
    both = [json.loads((folder / "evaluation" / f"step_00000{step}.json").read_text()) for step in (0, 4)]
    told = [row for one in both for row in one["table"] if row["instruction"]]
    tags = [attrs["class"] for tag, attrs in page.elements if attrs.get("class") in ("tag good", "tag bad")]
    assert len(told) == 4 and all(replace_control_characters(row["answer"]) in page.texts["pre"] for row in told)
    # Whether an instruction was followed stands at its answer and, to be seen while that is closed, at the question.
    good = ended + sum(row["stopped"] + 2 * row["followed"] for row in told) + 1  # the heading of the first row
    assert tags.count("tag good") == good and len(tags) == 6 + 3 * 4 + 1


def test_the_first_row_shows_what_is_trained(trained, config):
    folder, _ = trained
    conversation = parse_conversation(load_splits(parse_config(str(config), []))[0][0]["conversation"])["messages"]
    page = Page(folder / "report.html")
    assert "".join(page.texts["trained"]) == conversation[-1]["content"] + "<|im_end|>"
    [row] = [text for text in page.texts["pre"] if text.startswith("<|im_start|>")]
    assert row == f"<|im_start|>\n#USER:{conversation[0]['content']}\n#ASSISTANT:{''.join(page.texts['trained'])}"


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=30))
def test_the_histogram_counts_every_row_once(lengths, tokenizer):
    rows = Dataset.from_dict({"input_ids": [[5] * n for n in lengths], "labels": [[-100] * n for n in lengths]})
    found = build_preview(rows, tokenizer)["lengths"]
    edges = found["edges"]
    assert found["rows"] == [sum(a <= n < b for n in lengths) for a, b in pairwise(edges)]
    assert sum(found["rows"]) == len(lengths) and 1 <= len(found["rows"]) <= BARS
    assert len({b - a for a, b in pairwise(edges)}) == 1


def test_the_config_the_versions_and_the_command_that_repeats_the_run(trained):
    folder, _ = trained
    page, run = Page(folder / "report.html"), read_run(folder)
    for key, value in run.results["config"].items():
        assert key in page.text and (value if isinstance(value, str) else json.dumps(value)) in page.text
    assert all(f"{name} {version}" in page.text for name, version in run.results["versions"].items())
    assert run.command in page.texts["pre"]
    launch, verb, file, *overrides = shlex.split(run.command)
    assert (launch, verb) == ("./launch.sh", "train")
    again = build_config_record(parse_config(file, overrides))
    assert again == yaml.safe_load((folder / "run.yaml").read_text()) | {"output_dir": f"{folder}-again"}


# Runs that lack something.


def test_a_run_that_diverged_has_a_page(folder):
    def diverge(results):
        for entry in results["loss_curve"][-3:]:
            entry |= {key: math.nan for key in entry if key in ("loss", "eval_loss")}
        results["eval_loss"]["after"] = math.nan
        results["metrics"]["perplexity"] = math.inf
        results["before_and_after"]["nll_nats_per_token"] |= {"after": math.nan, "low": None, "high": None}

    edit(folder / "results.json", diverge)
    page = Page(write_report([folder]))
    assert [text for source, _, text in page.numbers if source.endswith("#/eval_loss/after")] == ["nan"]
    assert all(
        math.isfinite(y) for one in charts.build_run_charts(read_run(folder)) for s in one.series for _, y in s.points
    )


def test_without_held_out_rows_and_without_a_preview(folder):
    def forget(results):
        results |= {"metrics": None, "before_and_after": {}, "answers": []}
        results["eval_loss"] = {"before": None, "after": None}
        results["rows"]["held_out"] = None
        results["loss_curve"] = [entry for entry in results["loss_curve"] if "loss" in entry]

    edit(folder / "results.json", forget)
    shutil.rmtree(folder / "evaluation")
    (folder / "preview.json").unlink()
    page = Page(write_report([folder]))
    check_numbers(page)
    assert "held out" not in page.text and "Answers" not in page.text and "first training row" not in page.text
    assert [tag for tag, _ in page.elements].count("svg") == 3
    check_numbers(Page(write_report([folder, folder])))


def test_without_matplotlib_the_page_says_so_once(folder, monkeypatch, caplog):
    find = svg.importlib.util.find_spec
    monkeypatch.setattr(svg.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    for folders in ([folder], [folder, folder]):
        caplog.clear()
        page = Page(write_report(folders))
        assert "svg" not in {tag for tag, _ in page.elements}
        assert page.text.count(svg.NO_CHARTS) == 1
        assert [record.getMessage() for record in caplog.records] == [svg.NO_CHARTS]
        check_numbers(page)


# Text of the data.


@pytest.fixture
def hostile(folder) -> Path:
    """Every text in the run's files is hostile, and so is the folder's name."""
    for file in folder.rglob("*.json"):
        if file.name in ("results.json", "preview.json") or file.parent.name == "evaluation":
            file.write_text(json.dumps(everywhere(json.loads(file.read_text()), lambda text: text + HOSTILE)))
    edit(folder / "results.json", lambda results: results["rows"]["train"]["dropped"].update({HOSTILE[8:14]: 3}))
    edit(folder / "results.json", lambda results: results["config"].update({"<b>": "\u0000\ud800"}))
    return folder.rename(folder.parent / '"><img src=x onerror=alert(1)>')


def test_text_of_the_data_stays_text(hostile, trained):
    known = {tag for tag, _ in Page(trained[0] / "report.html").elements}
    for folders in ([hostile], [hostile, trained[0]]):
        page = Page(write_report(folders))
        assert {tag for tag, _ in page.elements} <= known and not known & {"script", "img", "iframe", "object"}
        assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
        assert page.text.count(HOSTILE) > 5 and hostile.name in page.text
        check_numbers(page)


def test_nothing_is_fetched(trained, hostile):
    for file in (trained[0] / "report.html", write_report([hostile]), write_report([hostile, trained[0]])):
        page = Page(file)
        for _, attributes in page.elements:
            for name in ("src", "href", "xlink:href", "srcset", "action"):
                assert (attributes.get(name) or "#").startswith(("#", "data:"))
            for value in attributes.values():
                assert not re.search(r"url\((?!#)", value or "")
        styles = "".join(re.findall(r"<style>.*?</style>", file.read_text(), flags=re.DOTALL))
        assert "--series-0" in styles and not re.search(r"@import|url\(|http", styles)
        [policy] = [found["content"] for tag, found in page.elements if found.get("http-equiv")]
        assert policy.startswith("default-src 'none';") and "script" not in policy


# Several runs.


def test_runs_are_compared(folder, other, capsys):
    main(["report", str(folder), str(other)])
    assert capsys.readouterr().out == f"{folder / 'comparison.html'}\n"
    page = Page(folder / "comparison.html")
    sources = check_numbers(page)
    for one in (folder, other):
        assert (
            f"{one / 'results.json'}#/eval_loss/after" in sources
            and f"{one / 'results.json'}#/metrics/loop_rate" in sources
        )
    runs = [read_run(folder), read_run(other)]
    found = compute_changes(runs[0].last_evaluation, runs[1].last_evaluation)["nll_nats_per_token"]
    assert found["after"] == pytest.approx(found["before"] / 2)
    assert f"{found['difference']:+.3f}" in page.text and f"{found['low']:+.3f} to {found['high']:+.3f}" in page.text
    assert (
        "learning_rate" in page.text and "weight_decay" not in page.text and "held out different rows" not in page.text
    )
    answers = [row["answer"] for row in runs[0].last_evaluation.table if row["instruction"] is None]
    expected = [text for one in answers for text in (replace_control_characters(one), "other")]
    assert [text for text in page.texts["pre"] if text in expected] == expected
    assert all(run.command in page.texts["pre"][-1].splitlines() for run in runs)


def test_runs_with_other_held_out_rows_are_not_taken_for_comparable(folder, other):
    edit(other / "evaluation" / "step_000004.json", lambda one: one["held_out"]["tokens"].reverse())
    edit(other / "evaluation" / "step_000004.json", lambda one: [row.update(prompt="else") for row in one["table"]])
    page = Page(write_report([folder, other]))
    assert "The runs held out different rows" in page.text and "on the same prompts" not in page.text


def test_runs_of_one_name_are_told_apart(folder, tmp_path):
    twin = shutil.copytree(folder, tmp_path / "deeper" / "out")
    page = Page(write_report([folder, twin], tmp_path / "pages" / "both.html"))
    assert str(folder) in page.text and str(twin) in page.text and "None." in page.text


# What is refused.


def test_an_unknown_option_is_refused(folder, capsys):
    with pytest.raises(SystemExit):
        main(["report", str(folder), "--colour"])
    assert capsys.readouterr().err == "sft-pipeline: report: unknown option --colour; `report --help` lists them\n"


# In a browser.

PROBE = """<!doctype html><link rel="icon" href="data:,"><body><script>
function probe(frame) {
  const page = frame.contentDocument, root = page.documentElement, box = one => one.getBoundingClientRect();
  const charts = [...page.querySelectorAll(".chart svg")].map(one => [box(one).width, box(one).height]);
  const lines = [...page.querySelectorAll(".chart svg path")].filter(one => one.getTotalLength() > 0).length;
  document.body.dataset.found = JSON.stringify({widths: [root.scrollWidth, root.clientWidth], charts, lines});
  console.info("probed");
}
</script><iframe width="390" height="844" src="report.html" onload="probe(this)"></iframe>"""


@pytest.fixture
def served(folder):
    """The address of a server of the run's folder with the probe in it, and the paths that it was asked for."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    write_report([folder])
    (folder / "probe.html").write_text(PROBE)
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def browse(address: str, profile: Path, *options: str) -> subprocess.CompletedProcess:
    quiet = ("background-networking", "component-update", "sync", "gpu")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    command += ["--no-proxy-server", "--enable-logging=stderr", f"--user-data-dir={profile}", *options, address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@needs_chromium
def test_a_phone_shows_the_page_and_fetches_nothing_else(served, tmp_path):
    address, asked = served
    shown = browse(f"{address}/probe.html", tmp_path / "profile", "--dump-dom")
    (tmp_path / "dom.html").write_text(shown.stdout)
    [body] = [found for tag, found in Page(tmp_path / "dom.html").elements if tag == "body"]
    found = json.loads(body["data-found"])
    needed, given = found["widths"]
    assert needed == given and 360 < given <= 390
    assert len(found["charts"]) == 6 and all(width > 300 and height > 150 for width, height in found["charts"])
    assert found["lines"] > 20
    assert set(asked) == {"/probe.html", "/report.html"}
    said = [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
    assert len(said) == 1 and "probed" in said[0]


@needs_chromium
@pytest.mark.parametrize(("scheme", "back", "colour"), [(1, "fbfbfa", "2f6fd0"), (0, "141517", "78aaf2")])
def test_charts_are_drawn_in_light_and_dark(scheme, back, colour, folder, tmp_path):
    picture = tmp_path / "page.png"
    options = ("--window-size=1100,4000", f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={picture}")
    browse(write_report([folder]).as_uri(), tmp_path / "profile", *options)
    with Image.open(picture) as image:
        colours = {color: count for count, color in image.convert("RGB").getcolors(1 << 24)}
    assert max(colours, key=colours.get) == tuple(bytes.fromhex(back))
    assert colours.get(tuple(bytes.fromhex(colour)), 0) > 100


def test_the_sequences_of_the_first_row_are_shown(trained, tmp_path):
    """Trained tokens in color, and what an earlier sequence begins with in grey."""
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    first_row = [
        {"tokens": ["a<", "b", "", "冬"], "trained": [False, False, True, True], "shared": 0},
        {"tokens": ["a<", "b", "c", "d"], "trained": [False, True, False, True], "shared": 2},
    ]
    edit(folder / "preview.json", lambda preview: preview.update(first_row=first_row))
    page = Page(write_report([folder]))
    assert page.texts["pre"][-3:-1] == ["a<b冬", "a<bcd"] and "First training row and its 2 sequences" in page.text
    assert page.texts["trained"] == ["冬", "b", "d"] and page.texts["shared"] == ["a<"]
