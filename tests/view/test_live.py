"""`batchnorm serve` in a real browser, against a run that a real process writes: growing, killed, resumed, ended."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from reading import check_table
from view.growing import STOP

from batchnorm.runs import open_run

pytestmark = pytest.mark.processes

GROWING = Path(__file__).with_name("growing.py")
TOKEN = "a-token-for-the-tests_0123456789"


class Programs:
    """Processes that end with the test."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[str]] = []

    def start(self, *arguments: Any, **options: Any) -> subprocess.Popen[str]:
        command = [sys.executable, *map(str, arguments)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
        self._started.append(process)
        return process

    def train(self, path: Path, *numbers: int) -> subprocess.Popen[str]:
        return self.start(GROWING, path, *numbers)

    def serve(self, path: Path, port: int = 0, token: str = TOKEN) -> tuple[subprocess.Popen[str], str]:
        """The server, and the address that it prints."""
        environment = {**os.environ, "BATCHNORM_TOKEN": token}
        server = self.start("-m", "batchnorm", "serve", path, "--port", port, env=environment)
        assert server.stdout is not None
        return server, server.stdout.readline().strip()

    def end(self) -> None:
        for process in self._started:
            process.kill()
            process.communicate()


@pytest.fixture
def programs() -> Iterator[Programs]:
    programs = Programs()
    yield programs
    programs.end()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[[str], Any]]:
    """Opens a served page; in the end nothing may have gone wrong in it but that the server was away."""
    contexts, problems = [], []

    def visit(url: str) -> Any:
        context = browser.new_context(viewport={"width": 1280, "height": 800})
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("console", lambda said: "net::ERR_" in said.text or problems.append(f"console: {said.text}"))
        page.on("request", lambda request: request.url.startswith(url) or problems.append(f"request: {request.url}"))
        page.goto(url, timeout=120_000)  # milliseconds; the first page waits for Vega to be bundled
        return page

    yield visit
    for context in contexts:
        context.close()
    assert [problem for problem in problems if "data:," not in problem] == []


def there(page: Any, condition: str) -> None:
    """Wait for a condition, over reloads of the page too."""
    end = time.monotonic() + 180
    while time.monotonic() < end:
        try:
            if page.evaluate(f"Boolean({condition})"):
                return
        except Exception as error:  # between two documents
            if "Execution context was destroyed" not in str(error):
                raise
        page.wait_for_timeout(50)
    raise AssertionError(f"never came true: {condition}; {page.inner_text('header')}")


LAST = "batchnorm.run.steps.at(-1)"


@pytest.mark.browser
def test_a_training_watched_from_before_its_beginning_to_its_end(programs, visit, tmp_path):
    path = tmp_path / "run"
    _, url = programs.serve(path)
    page = visit(url)
    assert "Nothing is recorded" in page.inner_text("#live")
    training = programs.train(path, 0, 100_000, 20)
    there(page, f"globalThis.batchnorm && {LAST} > 8 && document.querySelectorAll('#panels svg.marks').length === 2")
    # The reader is taken along at the end, until they look back.
    there(page, "batchnorm.state.at === batchnorm.run.steps.length - 1")
    there(page, f"batchnorm.run.layers.length === 2 && {LAST} > 25")
    assert "is running" in page.inner_text("#live")
    assert page.inner_text("#alerts").startswith("first: batch_mean not finite in 1 recorded step, first at step 20")
    assert "ill" in page.get_attribute("#health", "class")
    page.select_option("#layer", "1")
    assert page.locator("#layer option").nth(1).inner_text() == "<b>second</b>"
    page.select_option("#channel", "1")
    channel = page.evaluate("batchnorm.run.layers[1].channels[1]")
    page.evaluate("batchnorm.go(7)")
    wanted, seen = page.evaluate(f"[batchnorm.run.steps[batchnorm.state.at], {LAST}]")
    # The run becomes twice as long, so that other channels are chosen: the reader's own stays.
    there(page, f"{LAST} > {2 * seen}")
    layer, step, shown = page.evaluate("(({state, run}) => [state.layer, run.steps[state.at], run.steps])(batchnorm)")
    # The page of a long run shows some of its steps: the reader's own, or the nearest to it.
    assert (layer, abs(step - wanted)) == (1, min(abs(each - wanted) for each in shown))
    assert page.evaluate("batchnorm.run.layers[1].channels[batchnorm.state.place]") == channel
    # The chart has the new steps, too.
    there(page, f"batchnorm.views.get('learned').data('trace').length === batchnorm.run.steps.length && {LAST} > 120")
    (tmp_path / STOP).touch()
    there(page, "document.querySelector('#live').textContent.includes('has finished')")
    assert training.wait() == 0
    run = open_run(path)
    last = int(run.steps[-1])
    there(page, f"{LAST} === {last}")
    check_table(page, run)
    assert page.inner_text("#where").endswith(f" of {last:,}")
    assert "finished" in page.inner_text("#run")
    assert page.is_hidden("#hearing")


@pytest.mark.browser
def test_killed_resumed_and_the_server_gone_for_a_while(programs, visit, tmp_path):
    path = tmp_path / "run"
    training = programs.train(path, 0, 100_000)
    server, url = programs.serve(path)
    page = visit(url)
    there(page, f"globalThis.batchnorm && {LAST} > 20")
    training.kill()
    there(page, "document.querySelector('#live').textContent.includes('was interrupted')")
    assert page.is_visible("#live")
    assert "interrupted" in page.inner_text("#run")
    reached = page.evaluate(LAST)
    assert reached == open_run(path).steps[-1]
    # A recorder that resumes cuts the run.
    training = programs.train(path, 10, 100_000)
    there(page, "document.querySelector('#live').textContent.includes('is running')")
    there(page, f"{LAST} < {reached}")

    server.kill()
    server.wait()
    there(page, "!document.querySelector('#hearing').hidden")
    assert "No word from the server since" in page.inner_text("#hearing")
    cut = page.evaluate(LAST)
    port = int(url.split(":")[2].split("/")[0])
    assert programs.serve(path, port)[1] == url
    there(page, f"document.querySelector('#hearing').hidden && {LAST} > {cut}")


@pytest.fixture(scope="module")
def served(run_path: Path) -> Iterator[tuple[int, str]]:
    """The port of a server of a finished run."""
    programs = Programs()
    _, url = programs.serve(run_path)
    yield int(url.split(":")[2].split("/")[0]), url
    programs.end()


def ask(port: int, path: str, method: str = "GET", host: str | None = None) -> tuple[int, dict[str, str], bytes]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request(method, path, headers={"Host": host or f"127.0.0.1:{port}"})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


def test_only_who_knows_the_address_gets_the_page(served):
    port, url = served
    assert url == f"http://127.0.0.1:{port}/{TOKEN}/"
    status, headers, body = ask(port, f"/{TOKEN}/")
    assert status == 200
    assert b"Each batch is measured" in body
    assert headers["cache-control"] == "no-store"
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in headers["content-security-policy"]
    assert "access-control-allow-origin" not in headers
    for name in ("localhost", f"localhost:{port}"):
        assert ask(port, f"/{TOKEN}/", host=name)[0] == 200
    wrong = [TOKEN[:-1], TOKEN[:-1] + "0", TOKEN + "0", TOKEN.upper(), "", "%00", "é".encode().hex()]
    for token in wrong:
        for rest in ("", "news", "events"):
            status, _, body = ask(port, f"/{token}/{rest}")
            assert status == 404, token
            assert b"measured" not in body


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil", "", "[::]"]
)
def test_a_site_whose_name_was_made_to_point_here_gets_nothing(served, host):
    """DNS rebinding: the browser sends the site's name as Host."""
    port, _ = served
    for path in ("", "news", "events"):
        with closing(socket.create_connection(("127.0.0.1", port), 60)) as connection:
            connection.sendall(f"GET /{TOKEN}/{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 400")
        assert b"measured" not in answer


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_no_method_writes(served, run_path, method):
    port, _ = served
    before = {path: path.read_bytes() for path in run_path.iterdir()}
    for path in ("", "news", "events", "run.json"):
        assert ask(port, f"/{TOKEN}/{path}", method)[0] in (404, 405)
    assert {path: path.read_bytes() for path in run_path.iterdir()} == before


@pytest.mark.parametrize(
    "path",
    [
        "run.json",
        "../run.json",
        "..%2frun.json",
        "%2e%2e/run.json",
        "/etc/passwd",
        "../../../../etc/passwd",
        "news/../run.json",
    ],
)
def test_no_file_is_served(served, path):
    port, _ = served
    for address in (f"/{TOKEN}/{path}", f"/{path}"):
        status, _, body = ask(port, address)
        assert status == 404
        assert b"root:" not in body
        assert b'"format"' not in body


def test_odd_questions_are_answered_like_any(served):
    port, _ = served
    for question in (
        "layer=&channel=",
        "layer=x&channel=1",
        "channel=-1",
        "channel=" + "9" * 5000,
        "layer=net.bn1&channel=99",
    ):
        status, _, body = ask(port, f"/{TOKEN}/news?{question}")
        assert status == 200
        assert json.loads(body)["data"]["layers"][0]["name"] == "net.bn1"


def test_it_listens_on_loopback_alone(served):
    port, _ = served
    listening = [
        line.split()[1]
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and int(line.split()[1].split(":")[1], 16) == port
    ]
    assert [place.split(":")[0] for place in listening] == ["0100007F"]


def test_many_pages_cost_one(run_path):
    """However many ask, each version is made once."""
    import asyncio

    from batchnorm.view.feed import Feed

    async def ask_at_once() -> int:
        feed = Feed(run_path)
        made = []
        news = feed._news
        feed._news = lambda version: made.append(version) or news(version)
        answers = await asyncio.gather(*(feed.news() for _ in range(20)))
        feed.close()
        assert len(set(answers)) == 1
        return len(made)

    with ThreadPoolExecutor(1) as thread:  # this one may run the browser's loop
        assert thread.submit(lambda: asyncio.run(ask_at_once())).result() == 1


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--port", "99999"], {}, "--port must be from 0 to 65535"),
        ([], {"BATCHNORM_TOKEN": "short"}, "BATCHNORM_TOKEN must be 16 or more letters"),
    ],
    ids=["port", "token"],
)
def test_errors_are_one_line(programs, run_path, arguments, environment, said):
    server = programs.start("-m", "batchnorm", "serve", run_path, *arguments, env={**os.environ, **environment})
    assert server.wait(60) == 1
    assert said in server.stderr.read()


def test_a_port_that_is_taken(programs, served, run_path):
    port, _ = served
    server = programs.start("-m", "batchnorm", "serve", run_path, "--port", port)
    assert server.wait(60) == 1
    assert server.stderr.read() == (
        f"batchnorm: port {port} of 127.0.0.1: Address already in use; another one: --port 0 takes any that is free\n"
    )


def test_ctrl_c_ends_the_server(programs, run_path):
    import signal

    server, url = programs.serve(run_path)
    port = int(url.split(":")[2].split("/")[0])
    with closing(socket.create_connection(("127.0.0.1", port), 60)) as connection:
        connection.sendall(f"GET /{TOKEN}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert b"200 OK" in connection.recv(65536)  # somebody still listens
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
    assert server.stderr.read() == ""


def test_without_the_extra_it_says_what_to_install(run_path):
    program = (
        f"import sys; sys.modules['uvicorn'] = None\nfrom batchnorm.cli import app\napp(['serve', {str(run_path)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "batchnorm: serve needs uvicorn: pip install 'batchnorm[live]'\n"


def test_a_file_asks_nobody(run_path, tmp_path):
    """What is served alone is not in the page that is a file."""
    import batchnorm as bn

    content = bn.report(run_path, tmp_path / "report.html").read_text()
    for word in ("connect-src", "EventSource(", 'id="live"', 'id="hearing"'):
        assert word not in content
