"""The judge against a real local server: that fails at first, prefers a place, repeats the key, or talks nonsense."""

import json
import logging
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import httpx
import pytest

from sft_pipeline.cli import main
from sft_pipeline.evaluation import judge as module
from sft_pipeline.evaluation.bootstrap import compute_paired_difference
from sft_pipeline.evaluation.judge import Judge, count_outcomes, judge_pairs, parse_verdict
from sft_pipeline.utils.errors import SFTError

KEY = "sk-secret-key"
NAMES = ("base", "tuned")


class Server(ThreadingHTTPServer):
    """Answers with `reply(a, b)`, or before that with the statuses in `failures`, and keeps what it was sent."""

    def __init__(self, reply: Callable[[str, str], str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.failures, self.seen, self.retry_after = reply, [], [], None
        self.lock = threading.Lock()

    def handle_error(self, *args: object) -> None:
        """A client that no longer waits is no error here."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, dict(self.headers), body))
            status = self.server.failures.pop(0) if self.server.failures else 200
        if status == "hang up":
            self.connection.close()
            return
        text = body["messages"][-1]["content"]
        a, b = (re.search(rf"\[start of answer {x}\]\n(.*)\n\[end", text)[1] for x in "AB")
        reply = {"choices": [{"message": {"role": "assistant", "content": self.server.reply(a, b)}}]}
        content = (json.dumps(reply) if status == 200 else f"no,\n {self.headers['Authorization']}").encode()
        self.send_response(status)
        if status == 429 and self.server.retry_after:
            self.send_header("Retry-After", self.server.retry_after)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def serve():
    """serve(reply) starts a server; all are stopped at the end."""
    servers = []

    def start(reply: Callable[[str, str], str]) -> Server:
        server = Server(reply)
        servers.append((server, threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})))
        servers[-1][1].start()
        return server

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


def better(a: str, b: str) -> str:
    """The longer answer is better."""
    return "Because. [[A]]" if len(a) > len(b) else "[[B]]" if len(a) < len(b) else "Equal: [[C]]"


def judged(server: Server, first: list[str], other: list[str], **settings):
    waits: list[float] = []
    judge = Judge(server.url, "m", KEY, sleep=waits.append, **settings)
    return judge_pairs(judge, [f"p{i}" for i in range(len(first))], first, other, NAMES), waits


def test_wins_ties_and_losses(serve):
    server = serve(better)
    found, waits = judged(server, ["aa", "a", "aa", "a"], ["b", "bb", "bb", "bbb"])
    assert found.outcomes == ["loss", "win", "tie", "win"] and waits == []
    assert (found.wins, found.ties, found.losses, found.malformed) == (2, 1, 1, 0)
    assert found.balance == compute_paired_difference([1, 0, 0, 0], [0, 1, 0, 1])
    assert str(found).startswith("tuned against base: 2 wins, 1 ties, 1 losses, balance +0.25 [")
    assert len(server.seen) == 8


def test_what_is_sent(serve):
    server = serve(better)
    judged(server, ["one"], ["other"])
    assert {path for path, _, _ in server.seen} == {"/v1/chat/completions"}
    assert all(headers["Authorization"] == f"Bearer {KEY}" for _, headers, _ in server.seen)
    first, second = (body for _, _, body in server.seen)
    assert first["model"] == "m" and first.keys() == {"model", "messages"}
    shown = first["messages"][1]["content"]
    assert "[start of request]\np0\n[end of request]" in shown
    assert shown.index("one") < shown.index("other")
    assert second["messages"][1]["content"].index("other") < second["messages"][1]["content"].index("one\n")


@pytest.mark.parametrize("place", ["[[A]]", "[[B]]"])
def test_a_judge_that_prefers_a_place_gives_ties_alone(place, serve):
    found, _ = judged(serve(lambda a, b: place), ["a"] * 6, ["b"] * 6)
    assert found.outcomes == ["tie"] * 6 and found.balance.low == found.balance.high == 0


def test_a_win_in_one_order_and_a_tie_in_the_other_is_a_tie(serve):
    found, _ = judged(serve(lambda a, b: "[[A]]" if a == "b" else "[[C]]"), ["a"], ["b"])
    assert found.outcomes == ["tie"]


def test_equal_answers_tie_unasked(serve):
    server = serve(better)
    assert judged(server, ["same", "a"], ["same", "bb"])[0].outcomes == ["tie", "win"]
    assert len(server.seen) == 2


def test_malformed_verdicts_are_counted_and_left_out(serve):
    server = serve(lambda a, b: "I like both" if "x" in a else better(a, b))
    found, _ = judged(server, ["x", "a", "a"], ["bb", "bb", "bb"])
    assert found.outcomes == ["malformed", "win", "win"] and found.malformed == 1 and found.balance.items == 2
    assert str(found).endswith("; 1 pairs without a readable verdict are left out")
    assert count_outcomes(["malformed", "win"], NAMES).balance is None


def test_the_last_verdict_counts():
    assert parse_verdict("[[A]] at first, but [[B]]") == "B"
    assert parse_verdict("[[D]] [A] A") is None


@pytest.mark.parametrize("failure", [429, 500, 503, "hang up"])
def test_failures_are_tried_again_after_growing_waits(failure, serve):
    server = serve(better)
    server.failures = [failure] * 3
    found, waits = judged(server, ["a"], ["bb"])
    assert found.outcomes == ["win"] and waits == [1, 2, 4]


@pytest.mark.parametrize(("asked", "waited"), [("3", 3.0), ("9999", module.LONGEST_WAIT), ("Wed, 21 Oct 2026", 1.0)])
def test_the_server_may_say_how_long_to_wait(asked, waited, serve):
    server = serve(better)
    server.failures, server.retry_after = [429], asked
    assert judged(server, ["a"], ["bb"])[1] == [waited]


def test_a_slow_judge_is_tried_again(serve):
    server = serve(better)
    slow, first = threading.Event(), [True]

    def reply(a: str, b: str) -> str:
        if first.pop() if first else False:
            slow.wait(5)
        return better(a, b)

    server.reply = reply
    found, waits = judged(server, ["a"], ["bb"], timeout=0.5)
    slow.set()
    assert found.outcomes == ["win"] and waits == [1]


def test_a_server_that_keeps_failing_is_named(serve):
    server = serve(better)
    server.failures = [503] * 99
    with pytest.raises(SFTError) as raised:
        judged(server, ["a"], ["bb"])
    assert str(raised.value) == (
        f"judge {server.url}/chat/completions: HTTP 503 no, Bearer *** after 5 attempts; try again later"
    )
    assert len(server.seen) == 5


def test_a_refused_key_is_not_tried_again_and_not_shown(serve):
    server = serve(better)
    server.failures = [401] * 99
    with pytest.raises(SFTError, match=r"HTTP 401 no, Bearer \*\*\*; check judge_base_url, judge_model and OPENAI_API"):
        judged(server, ["a"], ["bb"])
    assert len(server.seen) == 1
    assert KEY not in repr(Judge(server.url, "m", KEY))


NO_COMPLETIONS = ['{"choices": []}', "no json", '{"choices": [{"message": {"content": null}}]}', "[]"]


@pytest.mark.parametrize("content", NO_COMPLETIONS)
def test_what_is_no_chat_completion_is_malformed(content):
    assert module._reply(httpx.Response(200, text=content)) == ""


# Through the verb.


@pytest.fixture
def as_it_was():
    level = logging.getLogger("sft_pipeline").level
    yield
    logging.getLogger("sft_pipeline").setLevel(level)
    datasets.enable_progress_bars()


def test_the_verb_judges(serve, model_folder, tmp_path, capsys, monkeypatch, as_it_was, few_instructions):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(better)
    words = ["evaluate", str(model_folder), str(model_folder), "--max_new_tokens", "2", "--output", str(tmp_path)]
    main([*words, "--judge_base_url", server.url, "--judge_model", "m", "--json"])
    output = capsys.readouterr()
    [found] = json.loads(output.out)["judged"]
    assert (found["wins"], found["ties"], found["losses"]) == (0, 6, 0)
    assert json.loads((tmp_path / "evaluation.json").read_text())["judged"] == [found]
    assert KEY not in output.out + output.err + (tmp_path / "evaluation.json").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--judge_model", "m"], "judge_base_url and judge_model go together; give both or neither"),
        (["--judge_base_url", "http://x/v1"], "judge_base_url and judge_model go together; give both or neither"),
        (["--judge_base_url", "x", "--judge_model", "m"], "judge_base_url x: needs a URL such as https://api.openai"),
        (["--judge_base_url", "http://x/v1", "--judge_model", "m"], "a judge compares answers of two models; name "),
    ],
)
def test_refusals(words, message, model_folder, capsys, as_it_was):
    with pytest.raises(SystemExit) as exit:
        main(["evaluate", str(model_folder), *words])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith(f"sft-pipeline: {message}") and error.count("\n") == 1
