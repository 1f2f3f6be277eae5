"""cli/serve.py: its arguments, the errors that are one line, and how it comes up and goes down."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest

from sfumato import cli
from sfumato.engine.limits import BatchLimits
from sfumato.errors import InputError, SfumatoError
from sfumato.options import LoadOptions
from sfumato.server.http import listen
from sfumato.server.settings import Settings
from sfumato.server.worker.supervisor import Worker

Call = Callable[..., tuple[int, str, str]]
Serving = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["serve", *arguments])
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be served; nothing is."""
    arguments: list[Any] = []

    def run(backend: Worker, settings: Settings, port: int, ready: listen.OnReady) -> None:
        arguments.extend((backend, settings, port))

    monkeypatch.setattr(listen, "run", run)
    return arguments


def test_the_defaults_are_local_and_bounded(call: Call, served: list[Any]) -> None:
    assert call() == (0, "", "")
    worker, settings, port = served
    assert settings == Settings() and port == 8000
    assert worker.load == LoadOptions("nano", "auto", None, "auto", None, None) == LoadOptions()
    assert worker.limits == BatchLimits(rows=32, queue=256, stall=0.2, context=None, memory=None) == BatchLimits()


def test_silence_is_shorter_than_the_longest_request(call: Call, served: list[Any]) -> None:
    for flags, silence in (((), 300), (("--timeout", "100"), 50)):
        served.clear()
        assert call(*flags) == (0, "", "")
        assert served[0].silence == silence < served[1].limits.timeout


def test_options_reach_worker_and_settings(call: Call, served: list[Any], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# ours\nthree\n\n  four \n")
    limits = "--rows 4 --queue 5 --memory 1.5 --context 600 --stall 50 --max-body 0.5 --timeout 9 --drain 2".split()
    names = "--alias gpt --alias other --cors https://a.example --log-prompts --port 0 --host 0.0.0.0".split()
    limits += ["--max-connections", "64", "--unready-after", "3", "--max-questions", "9", "--max-options", "300"]
    keys = ["--api-key", "one", "--api-key", "two", "--api-key-file", str(tmp_path / "keys")]
    load = "-m some/where --device cpu --dtype float32 --ops fused --quantize int8 --memory-limit 2".split()
    names += ["--adapter", "mine=run/a", "--adapter", "runs/third", "--adapter-folder", str(tmp_path)]
    assert call(*limits, *names, *keys, *load)[0] == 0
    worker, settings, port = served
    assert settings.keys == ("one", "two", "three", "four") and port == 0 and settings.host == "0.0.0.0"
    assert settings.aliases == ("gpt", "other") and settings.cors == ("https://a.example",) and settings.log_prompts
    assert (settings.limits.max_body, settings.limits.timeout, settings.drain) == (1 << 19, 9, 2)
    assert (settings.limits.max_connections, settings.stall_limit) == (64, 3)
    assert (settings.limits.max_questions, settings.limits.max_options) == (9, 300)
    assert worker.limits == BatchLimits(rows=4, queue=5, stall=0.05, context=600, memory=1_500_000_000)
    folders = {"mine": "run/a", "third": "runs/third"}
    assert worker.load == LoadOptions("some/where", "cpu", "float32", "fused", "int8", 2_000_000_000, folders)
    assert settings.adapter_folder == str(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("--host 0.0.0.0", "give an API key, or bind to 127.0.0.1"),
        ("--replicas 2", "replicas is 2 without --ray"),
        ("--port 70000", "--port"),
        ("--rows 0", "--rows"),
        ("--max-body 0", "max-body is 0; give a number above 0"),
        ("--timeout nan", "timeout is nan"),
        ("--memory -1", "memory is -1"),
        ("--memory-limit 0", "memory-limit is 0"),
        ("--api-key-file /no/such/file", "cannot read /no/such/file"),
        ("--api-key-file /dev/null", "/dev/null holds no key"),
        ("--api-key", "--api-key"),
        ("--adapter a=b --alias a", "--alias and --adapter are both called 'a'"),
        ("--adapter nano=b", "--adapter has the model's own name 'nano'; give the adapter another one"),
        ("--adapter =b", "--adapter is '=b'; give NAME=DIR"),
        ("--adapter-folder /no/such", "--adapter-folder is /no/such, which is no folder"),
    ],
)
def test_a_wrong_argument_is_one_line_and_nothing_starts(
    call: Call, served: list[Any], arguments: str, part: str
) -> None:
    code, out, err = call(*arguments.split())
    assert (code, out, served) == (2, "", [])
    assert err.startswith("sfumato: ") and err.count("\n") == 1 and part in err


@pytest.mark.parametrize(("arguments", "extra"), [([], "serve"), (["--ray"], "ray")])
def test_a_missing_extra_is_named(
    call: Call, monkeypatch: pytest.MonkeyPatch, arguments: list[str], extra: str
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("http.listen", "cluster.launch"):
        monkeypatch.delitem(sys.modules, f"sfumato.server.{name}", raising=False)
    code, out, err = call(*arguments)
    assert (code, out) == (2, "") and err.count("\n") == 1 and f"pip install '.[{extra}]' in Sfumato's checkout" in err


def test_a_port_in_use_is_one_line_before_anything_is_loaded(call: Call) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, out, err = call("--port", str(port), "-m", "/no/such/model")
    assert (code, out) == (1, "")
    assert err == f"sfumato: port {port} on 127.0.0.1 is in use; give another with --port, or 0 for any that is free\n"


def test_addresses_that_cannot_be() -> None:
    with pytest.raises(InputError, match=r"host is 'no\.such\.host\.invalid'"):
        listen.listen("no.such.host.invalid", 0)
    with pytest.raises(SfumatoError, match=r"cannot listen on port 0 of 192\.0\.2\.1"):
        listen.listen("192.0.2.1", 0)
    with listen.listen("127.0.0.1", 0) as one:
        assert re.fullmatch(r"http://127\.0\.0\.1:[1-9][0-9]*", listen.address(one))


# ---- a server in a process of its own, around a backend without a model ----------------------------------------------

SERVER = """
import asyncio, json, sys
sys.path.insert(0, {tests!r})
from fake_backend import FakeBackend
from sfumato.cli.serve import tell
from sfumato.errors import InputError
from sfumato.server.http import listen
from sfumato.server.settings import Settings

backend = FakeBackend()
if {failing}:
    backend.start_error = InputError("there is no such model")
if {held}:
    backend.hold.clear()
try:
    listen.run(backend, Settings(drain={drain}), 0, tell)
except InputError as error:
    sys.exit(f"sfumato: {{error}}")
print("ended", backend.cancelled)
"""


@pytest.fixture
def serving() -> Iterator[Serving]:
    started: list[subprocess.Popen[str]] = []

    def start(failing: bool = False, held: bool = False, drain: float = 30) -> subprocess.Popen[str]:
        code = SERVER.format(tests=str(Path(__file__).parents[1]), failing=failing, held=held, drain=drain)
        pipe = subprocess.PIPE
        started.append(subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def address_of(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    line = server.stdout.readline()
    match = re.fullmatch(r"Sfumato serves fake on (http://127\.0\.0\.1:\d+) \(page, /v1, /metrics\); .*\n", line)
    assert match, line
    return match[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_where_it_is_and_ends_well_on_a_signal(serving: Serving, number: signal.Signals) -> None:
    server = serving()
    with urllib.request.urlopen(address_of(server) + "/ready", timeout=30) as answer:
        assert answer.status == 200
    server.send_signal(number)
    out, err = server.communicate(timeout=30)
    assert (server.returncode, out) == (0, "ended 0\n")
    assert "GET /ready 200" in err and "Traceback" not in err


def streaming(address: str) -> Any:
    """A chat that has begun, and is held after its first words."""
    body = b'{"messages": [{"role": "user", "content": "Hello, you"}], "stream": true}'
    request = urllib.request.Request(address + "/v1/chat/completions", body, {"content-type": "application/json"})
    answer = urllib.request.urlopen(request, timeout=30)
    assert answer.readline().startswith(b"data: ")
    return answer


def test_a_stop_tells_newcomers_and_waits_for_the_rest_until_its_time_is_up(serving: Serving) -> None:
    server = serving(held=True, drain=1)
    address = address_of(server)
    with streaming(address) as answer:
        server.send_signal(signal.SIGTERM)
        while True:
            try:
                urllib.request.urlopen(address + "/ready", timeout=30).close()
            except HTTPError as error:
                assert (error.code, b"draining" in error.read()) == (503, True)
                error.close()
                break
        assert b'"error"' in answer.read()
    out, err = server.communicate(timeout=30)
    assert (server.returncode, out) == (0, "ended 1\n") and "Traceback" not in err


def test_a_second_signal_does_not_wait(serving: Serving) -> None:
    server = serving(held=True, drain=600)
    address = address_of(server)
    with streaming(address) as answer:
        server.send_signal(signal.SIGINT)
        with pytest.raises(HTTPError) as refused:
            while True:
                urllib.request.urlopen(address + "/ready", timeout=30).close()
        refused.value.close()
        server.send_signal(signal.SIGINT)
        assert b'"error"' in answer.read()
    out, err = server.communicate(timeout=30)
    assert (server.returncode, out) == (0, "ended 1\n") and "Traceback" not in err


def test_a_model_that_cannot_be_loaded_ends_the_server(serving: Serving) -> None:
    server = serving(failing=True)
    out, err = server.communicate(timeout=30)
    assert (server.returncode, out) == (1, "") and "sfumato: there is no such model\n" in err
    assert "Traceback" not in err
