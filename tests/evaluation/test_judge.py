"""The judge against a local server that fails, favors a position, repeats the key or sends malformed replies."""

import json
import logging
import re
import sys
import threading
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import pytest

from sft_pipeline.cli import main
from sft_pipeline.evaluation.bootstrap import compute_paired_difference
from sft_pipeline.evaluation.judge import Judge, JudgeResults, count_outcomes, judge_pairs, parse_verdict
from sft_pipeline.utils.errors import SFTError

KEY = "sk-secret-key"
NAMES = ("base", "tuned")


class Server(ThreadingHTTPServer):
    """Fails with the statuses in `failures`, then replies with `reply(a, b)`, or `content`; records the requests."""

    def __init__(self, reply: Callable[[str, str], str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.content, self.failures, self.requests, self.retry_after = reply, None, [], [], None
        self.lock = threading.Lock()

    def handle_error(self, *args: object) -> None:
        """Ignore clients that closed the connection after a timeout."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, self.headers, body))
            status = self.server.failures.pop(0) if self.server.failures else 200
        if status == "hang up":
            self.connection.close()
            return
        text = body["messages"][-1]["content"]
        a, b = (re.search(rf"\[start of answer {x}\]\n(.*)\n\[end", text)[1] for x in "AB")
        reply = {"choices": [{"message": {"role": "assistant", "content": self.server.reply(a, b)}}]}
        content = self.server.content or json.dumps(reply)
        content = (content if status == 200 else f"no,\n {self.headers['Authorization']}").encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
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


@pytest.fixture(autouse=True)
def waits(monkeypatch) -> list[float]:
    """The seconds that the client would have waited before its retries."""
    seconds: list[float] = []
    monkeypatch.setattr("time.sleep", seconds.append)
    return seconds


def prefer_longer(a: str, b: str) -> str:
    return "Because. [[A]]" if len(a) > len(b) else "[[B]]" if len(a) < len(b) else "Equal: [[C]]"


def run_judge(server: Server, first: list[str], second: list[str], key: str | None = KEY, **settings) -> JudgeResults:
    judge = Judge(server.url, "m", key, **settings)
    return judge_pairs(judge, [f"p{i}" for i in range(len(first))], first, second, NAMES)


def test_wins_ties_and_losses(serve, waits):
    server = serve(prefer_longer)
    results = run_judge(server, ["aa", "a", "aa", "a"], ["b", "bb", "bb", "bbb"])
    assert results.outcomes == ["loss", "win", "tie", "win"] and waits == []
    assert (results.wins, results.ties, results.losses, results.malformed) == (2, 1, 1, 0)
    assert results.balance == compute_paired_difference([1, 0, 0, 0], [0, 1, 0, 1])
    assert str(results).startswith("tuned against base: 2 wins, 1 ties, 1 losses, balance +0.25 [")
    assert len(server.requests) == 8


def test_what_is_sent(serve):
    server = serve(prefer_longer)
    run_judge(server, ["one"], ["other"])
    assert {path for path, _, _ in server.requests} == {"/v1/chat/completions"}
    assert all(headers["Authorization"] == f"Bearer {KEY}" for _, headers, _ in server.requests)
    first, second = (body for _, _, body in server.requests)
    assert first["model"] == "m" and first.keys() == {"model", "messages"}
    shown = first["messages"][1]["content"]
    assert "[start of request]\np0\n[end of request]" in shown
    assert shown.index("one") < shown.index("other")
    assert second["messages"][1]["content"].index("other") < second["messages"][1]["content"].index("one\n")


def test_a_server_without_keys(serve):
    server = serve(prefer_longer)
    assert run_judge(server, ["a"], ["bb"], key=None).outcomes == ["win"]
    assert all(headers["Authorization"] == "Bearer none" for _, headers, _ in server.requests)


@pytest.mark.parametrize("verdict", ["[[A]]", "[[B]]"])
def test_a_judge_that_favors_a_position_gives_only_ties(verdict, serve):
    results = run_judge(serve(lambda a, b: verdict), ["a"] * 6, ["b"] * 6)
    assert results.outcomes == ["tie"] * 6 and results.balance.low == results.balance.high == 0


def test_a_win_in_one_order_and_a_tie_in_the_other_is_a_tie(serve):
    results = run_judge(serve(lambda a, b: "[[A]]" if a == "b" else "[[C]]"), ["a"], ["b"])
    assert results.outcomes == ["tie"]


def test_equal_answers_tie_without_a_request(serve):
    server = serve(prefer_longer)
    assert run_judge(server, ["same", "a"], ["same", "bb"]).outcomes == ["tie", "win"]
    assert len(server.requests) == 2


def test_malformed_verdicts_are_counted_and_left_out(serve):
    server = serve(lambda a, b: "I like both" if "x" in a else prefer_longer(a, b))
    results = run_judge(server, ["x", "a", "a"], ["bb", "bb", "bb"])
    assert results.outcomes == ["malformed", "win", "win"] and results.malformed == 1 and results.balance.items == 2
    assert str(results).endswith("; 1 pairs without a readable verdict are left out")
    assert count_outcomes(["malformed", "win"], NAMES).balance is None


def test_the_last_verdict_counts():
    assert parse_verdict("[[A]] at first, but [[B]]") == "B"
    assert parse_verdict("[[D]] [A] A") is None


@pytest.mark.parametrize("failure", [408, 409, 429, 500, 502, 503, 504, "hang up"])
def test_failures_are_retried_after_growing_waits(failure, serve, waits):
    server = serve(prefer_longer)
    server.failures = [failure] * 3
    assert run_judge(server, ["a"], ["bb"]).outcomes == ["win"]
    assert len(waits) == 3 and 0 < waits[0] < waits[1] < waits[2] <= 8


@pytest.mark.parametrize("seconds", ["3", "0.5", "60"])
def test_retry_after_sets_the_wait(seconds, serve, waits):
    server = serve(prefer_longer)
    server.failures, server.retry_after = [429], seconds
    assert run_judge(server, ["a"], ["bb"]).outcomes == ["win"] and waits == [float(seconds)]


def test_retry_after_in_the_past_is_ignored(serve, waits):
    server = serve(prefer_longer)
    server.failures, server.retry_after = [429], "Wed, 21 Oct 2015 07:28:00 GMT"
    assert run_judge(server, ["a"], ["bb"]).outcomes == ["win"] and len(waits) == 1 and 0 < waits[0] <= 1


def test_a_server_that_asks_for_a_very_long_wait_is_not_waited_for(serve, waits):
    server = serve(prefer_longer)
    server.failures, server.retry_after = [429] * 9, "9999"
    with pytest.raises(SFTError, match=r"HTTP 429 .* \(up to 5 attempts\); try again later"):
        run_judge(server, ["a"], ["bb"])
    assert waits == []


def test_a_timeout_is_retried(serve, waits):
    server = serve(prefer_longer)
    slow, first = threading.Event(), [True]

    def reply(a: str, b: str) -> str:
        if first.pop() if first else False:
            slow.wait(5)
        return prefer_longer(a, b)

    server.reply = reply
    results = run_judge(server, ["a"], ["bb"], timeout=0.5)
    slow.set()
    assert results.outcomes == ["win"] and len(waits) == 1


def test_a_server_that_keeps_failing_is_named(serve):
    server = serve(prefer_longer)
    server.failures = [503] * 99
    with pytest.raises(SFTError) as raised:
        run_judge(server, ["a"], ["bb"])
    assert str(raised.value) == (
        f"judge {server.url}/chat/completions: HTTP 503 no, Bearer *** (up to 5 attempts); try again later"
    )
    assert len(server.requests) == 5


def test_a_server_that_closes_the_connection_is_named(serve):
    server = serve(prefer_longer)
    server.failures = ["hang up"] * 99
    with pytest.raises(SFTError) as raised:
        run_judge(server, ["a"], ["bb"], max_retries=1)
    message = str(raised.value)
    assert message.startswith(f"judge {server.url}/chat/completions: Re") and "Error: " in message
    assert message.endswith(" (up to 2 attempts); try again later")
    assert len(server.requests) == 2


def test_a_rejected_key_is_not_retried_and_not_shown(serve):
    server = serve(prefer_longer)
    server.failures = [401] * 99
    with pytest.raises(
        SFTError, match=r"HTTP 401 no, Bearer \*\*\*; check judge_base_url, judge_model and OPENAI_API"
    ) as e:
        run_judge(server, ["a"], ["bb"])
    assert len(server.requests) == 1
    assert KEY not in "".join(traceback.format_exception(e.value)) + repr(Judge(server.url, "m", KEY))


NO_COMPLETIONS = ['{"choices": []}', "no json", '{"choices": [{"message": {"content": null}}]}', "[]"]


@pytest.mark.parametrize("content", NO_COMPLETIONS)
def test_a_response_that_is_no_chat_completion_is_malformed(content, serve):
    server = serve(prefer_longer)
    server.content = content
    assert run_judge(server, ["a"], ["bb"]).outcomes == ["malformed"]


def test_a_missing_client_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(
        SFTError, match=r"judge_model needs openai; install it with `pip install 'sft_pipeline\[judge\]'`"
    ):
        Judge("http://x/v1", "m")


# Through the command line.


@pytest.fixture
def restore_logging():
    level = logging.getLogger("sft_pipeline").level
    yield
    logging.getLogger("sft_pipeline").setLevel(level)
    datasets.enable_progress_bars()


def test_evaluate_judges(serve, model_folder, tmp_path, capsys, monkeypatch, restore_logging, few_instructions):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(prefer_longer)
    arguments = ["evaluate", str(model_folder), str(model_folder), "--max_new_tokens", "2", "--output", str(tmp_path)]
    main([*arguments, "--judge_base_url", server.url, "--judge_model", "m", "--json"])
    output = capsys.readouterr()
    [results] = json.loads(output.out)["judged"]
    assert (results["wins"], results["ties"], results["losses"]) == (0, 6, 0)
    assert json.loads((tmp_path / "evaluation.json").read_text())["judged"] == [results]
    assert KEY not in output.out + output.err + (tmp_path / "evaluation.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--judge_model", "m"], "judge_base_url and judge_model go together; give both or neither"),
        (["--judge_base_url", "http://x/v1"], "judge_base_url and judge_model go together; give both or neither"),
        (["--judge_base_url", "x", "--judge_model", "m"], "judge_base_url x: needs a URL such as https://api.openai"),
        (["--judge_base_url", "http://x/v1", "--judge_model", "m"], "a judge compares answers of two models; name "),
    ],
)
def test_refusals(arguments, message, model_folder, capsys, restore_logging):
    with pytest.raises(SystemExit) as exit:
        main(["evaluate", str(model_folder), *arguments])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith(f"sft-pipeline: {message}") and error.count("\n") == 1
