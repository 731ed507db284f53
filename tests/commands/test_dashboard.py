"""The command `dashboard`: the address it prints, and its errors."""

import sys
from types import SimpleNamespace

import pytest

from sft_pipeline.cli import main

PRIVATE = "http://127.0.0.1:7860/?project=sft_pipeline&write_token=secret"


class Trackio:
    """A stand-in that serves one project and knows one without runs; its page is interrupted at once."""

    def __init__(self) -> None:
        self.asked: dict = {}
        self.closed = False

    def Api(self) -> SimpleNamespace:
        return SimpleNamespace(runs=self.runs)

    def runs(self, project: str) -> list[str]:
        projects = {"sft_pipeline": ["a run"], "empty": []}
        if project not in projects:
            raise ValueError(f"Project '{project}' does not exist")  # the real one's words
        return projects[project]

    def show(self, project: str, **options) -> tuple:
        print("\x1b[1mcoloured, with the write token")
        self.asked = {"project": project, **options}
        return SimpleNamespace(close=lambda: setattr(self, "closed", True)), "http://127.0.0.1:7860/", None, PRIVATE


@pytest.mark.parametrize(
    ("arguments", "opened"),
    [(["--port", "8000", "--no_browser"], []), (["--port", "8000"], [f"{PRIVATE}&smoothing=0"])],
)
def test_the_dashboard_prints_its_address_until_interrupted(arguments, opened, monkeypatch, capsys):
    from sft_pipeline.commands import dashboard

    def interrupted(event: object) -> None:
        raise KeyboardInterrupt

    opened_urls: list[str] = []
    monkeypatch.setitem(sys.modules, "trackio", stand_in := Trackio())
    monkeypatch.setattr(dashboard.threading.Event, "wait", interrupted)
    monkeypatch.setattr(dashboard.webbrowser, "open", opened_urls.append)
    main(["dashboard", *arguments])
    assert capsys.readouterr().out == "http://127.0.0.1:7860/?project=sft_pipeline&smoothing=0 (Ctrl-C stops it)\n"
    assert opened_urls == opened  # with the token, which lets the page delete runs; it is never printed
    options = {"open_browser": False, "block_thread": False, "server_port": 8000}
    assert stand_in.asked == {"project": "sft_pipeline", **options} and stand_in.closed


@pytest.mark.parametrize(
    ("arguments", "trackio", "message"),
    [
        ([], None, 'dashboard: trackio is not installed; pip install -e ".[track]"'),
        *(
            (
                [name],
                Trackio(),
                f"dashboard: project {name} has no runs here; train with --report_to trackio, or name another project",
            )
            for name in ("other", "empty")
        ),
        (["--share"], Trackio(), "dashboard: unknown option --share; `dashboard --help` lists them"),
    ],
)
def test_errors_of_the_dashboard(arguments, trackio, message, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    with pytest.raises(SystemExit) as stopped:
        main(["dashboard", *arguments])
    assert (stopped.value.code, capsys.readouterr().err) == (2, f"sft-pipeline: {message}\n")
