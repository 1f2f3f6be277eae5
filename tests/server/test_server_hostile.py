"""server/http/: what one client sends to stop the others.

Wrong and huge bodies, counts and numbers without end, silence, drips, connections without number: each gets a clear
refusal, and a bystander's requests are answered meanwhile."""

from __future__ import annotations

import http.client
import json
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_backend import CARD, FakeBackend, Served, serving
from starlette.testclient import TestClient

from sfumato.errors import SfumatoError
from sfumato.server.app import Limits, Settings, create
from sfumato.server.backend import Stats
from sfumato.server.canvas.bodies import DecisionsRequest, EditRequest, FillRequest, InfillRequest
from sfumato.server.http import limits as http_limits
from sfumato.server.http.bodies import Body, Most, read, schemas_in
from sfumato.server.openai.bodies import ChatRequest, CompletionRequest
from sfumato.server.openai.items import ResponsesRequest

CHAT = "/v1/chat/completions"
SAY = {"messages": [{"role": "user", "content": "Hello there"}]}
KINDS: dict[str, type[Body]] = {
    CHAT: ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/infill": InfillRequest,
    "/v1/edit": EditRequest,
    "/v1/fill": FillRequest,
    "/v1/decisions": DecisionsRequest,
}
LARGE = 4 << 20


@contextmanager
def served(backend: FakeBackend | None = None, **settings: Any) -> Iterator[Served]:
    with serving(create(backend or FakeBackend(), Settings(**settings))) as one:
        yield one


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(create(FakeBackend(), Settings()), base_url="http://localhost") as one:
        yield one


def refused(response: Any, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text[:500]
    error: dict[str, Any] = response.json()["error"]
    assert len(error["message"]) <= 2001 and len(error["param"] or "") <= 201
    return error


# --- bodies --------------------------------------------------------------------------------------------------------


def every_request() -> list[type[Body]]:
    requests, left = [], [Body]
    while left:
        kind = left.pop()
        requests.append(kind)
        left += kind.__subclasses__()
    return requests


@pytest.mark.parametrize("kind", every_request(), ids=lambda kind: kind.__name__)
def test_no_field_of_a_request_is_without_bounds(kind: type[Body]) -> None:
    """Lists stop at the first fault and are counted before they are looked at; numbers have a most."""
    counted = []
    for inner in schemas_in(kind.__pydantic_core_schema__):
        if inner["type"] == "function-before" and isinstance(
            getattr(inner["function"]["function"], "__self__", None), Most
        ):
            counted += [id(one) for one in schemas_in(inner["schema"])]
        is_typed = inner["type"] == "dict" and inner.get("values_schema", {"type": "any"})["type"] != "any"
        if inner["type"] == "list" or is_typed:
            assert id(inner) in counted or "max_length" in inner, inner
        if inner["type"] == "list":
            assert inner["fail_fast"], inner
        if inner["type"] in ("int", "float"):
            assert "le" in inner and "ge" in inner, inner


UNITS = [b"0", b"[]", b"{}", b'""', b"1.5", b"null", b'"\\ud83d\\ude00"', b"[[[[]]]]", b'{"a":{"a":0}}']


def wrong_bodies(kind: type[Body], size: int) -> Iterator[bytes]:
    """Bodies of about this size: each field as a list of every unit, unknown names, a long one, and depth."""
    for name, info in kind.model_fields.items():
        for unit in UNITS:
            many = b",".join([unit] * (size // (len(unit) + 1)))
            yield b'{"' + (info.alias or name).encode() + b'":[' + many + b"]}"
    yield b"{" + b",".join(b'"a%d":0' % number for number in range(size // 12)) + b"}"
    yield b'{"' + b"a" * size + b'":0}'
    yield b"[" * size
    yield b'{"x":' * (size // 5)
    yield b'{"messages":[' + b",".join([b"[" * 60 + b"]" * 60] * (size // 121)) + b"]}"
    yield b'{"fields":{' + b",".join(b'"a%d":0' % number for number in range(size // 12)) + b"}}"
    yield b'{"a":"' + b"\\ud83d\\ude00" * (size // 12) + b'\\ud800"}'


def check_bodies(size: int, seconds: float, memory: int, names: tuple[str, ...] = ()) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kind in KINDS.values():
        for body in wrong_bodies(kind, size):
            if names and not any(body.startswith(b'{"' + name.encode()) for name in names):
                continue
            start = time.perf_counter()
            try:
                read(body, kind, Limits())
            except SfumatoError as error:
                assert len(str(error)) < 2100
            took = time.perf_counter() - start
            assert took < seconds, (kind, body[:40], body[-10:], took)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    assert grown < memory, grown


@pytest.mark.parametrize(
    ("size", "names"),
    [
        (1 << 17, ("template", "prompt", "messages", "spans", "input", "fields")),
        pytest.param(1 << 17, (), marks=pytest.mark.slow),
        pytest.param(LARGE, ("template", "prompt", "input", "fields"), marks=pytest.mark.slow),
    ],
)
def test_a_wrong_body_costs_little(size: int, names: tuple[str, ...]) -> None:
    """In a process of its own, whose memory is that of these bodies alone."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    code = f"import sys; sys.path[:0] = {paths!r}; import test_server_hostile as t\n"
    code += f"t.check_bodies({size}, 2, 400, {names!r})"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert child.returncode == 0, child.stderr[-2000:]


def post(port: int, path: str, body: bytes, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", path, body, {"content-type": "application/json", **headers})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def test_wrong_bodies_do_not_hold_up_a_bystander() -> None:
    bodies = [
        ("/v1/fill", b'{"template":[' + b",".join([b"0"] * (LARGE // 2 - 10)) + b"]}"),
        ("/v1/completions", b'{"prompt":[' + b",".join([b"[]"] * (LARGE // 3 - 10)) + b"]}"),
        (CHAT, b'{"messages":[' + b",".join([b"0"] * (LARGE // 2 - 10)) + b"]}"),
        (CHAT, b"{" + b",".join(b'"a%d":0' % number for number in range(LARGE // 13)) + b"}"),
    ]
    with served() as server:
        waits: list[int] = []
        attackers = [
            threading.Thread(target=lambda path=path, body=body: waits.append(post(server.port, path, body)[0]))
            for path, body in bodies
        ]
        for one in attackers:
            one.start()
        slowest = 0.0
        while any(one.is_alive() for one in attackers):
            start = time.perf_counter()
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            connection.request("GET", "/health")
            assert connection.getresponse().read() == b'{"status":"ok"}'
            connection.close()
            slowest = max(slowest, time.perf_counter() - start)
            time.sleep(0.01)
        assert waits == [400] * 4 and slowest < 3


# --- counts and numbers --------------------------------------------------------------------------------------------

TEXT = {"type": "text", "text": "a"}
CALL = {"function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("path", "body", "limit", "param"),
    [
        (CHAT, {"messages": SAY["messages"] * 4097}, 4096, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [TEXT] * 1025}]}, 1024, "messages[0].content"),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [CALL] * 129}]}, 128, "messages[0].tool_calls"),
        (CHAT, {**SAY, "stop": ["a"] * 17}, 16, "stop"),
        (CHAT, {**SAY, "tools": [TOOL] * 129}, 128, "tools"),
        (CHAT, {**SAY, "choices": ["a"] * 1025}, 1024, "choices"),
        (CHAT, {**SAY, "metadata": {str(number): "" for number in range(65)}}, 64, "metadata"),
        ("/v1/completions", {"prompt": ["a"] * 65}, 64, "prompt"),
        ("/v1/completions", {"prompt": [[1]] * 65}, 64, "prompt"),
        ("/v1/completions", {"prompt": [1] * 4097}, 4096, None),
        ("/v1/completions", {"prompt": [[1], [1] * 4097]}, 4096, None),
        ("/v1/responses", {"input": [{"role": "user", "content": "a"}] * 4097}, 4096, "input"),
        ("/v1/responses", {"input": [{"role": "user", "content": [TEXT] * 1025}]}, 1024, "input[0].content"),
        ("/v1/responses", {"input": "a", "tools": [{"type": "function", "name": "f"}] * 129}, 128, "tools"),
        ("/v1/edit", {"text": "ab", "spans": [[0, 1]] * 1025}, 1024, "spans"),
        ("/v1/fill", {"template": ["a"] * 4097}, 4096, "template"),
        ("/v1/fill", {"template": [{}] * 1025}, 1024, "template"),
        ("/v1/fill", {"template": [{"choices": ["a"] * 1025}]}, 1024, "template[0].choices"),
        ("/v1/decisions", {"prompt": "a", "fields": {str(n): ["a", "b"] for n in range(257)}}, 256, "fields"),
        ("/v1/decisions", {"prompt": "a", "fields": {"a": ["a"] * 1025}}, 1024, "fields.a"),
    ],
)
def test_counts_have_a_limit_that_the_refusal_names(path: str, body: Any, limit: int, param: str | None) -> None:
    backend = FakeBackend()
    with TestClient(create(backend, Settings()), base_url="http://localhost") as client:
        error = refused(client.post(path, json=body))
    assert str(limit) in error["message"] and not backend.jobs
    assert error["param"] == param or param is None


@pytest.mark.parametrize("number", [200_000_000, 1 << 62, 1 << 63, 10**30, 10**4000, -1, 0, 1.5, 1e300])
def test_lengths_beyond_the_context_are_refused_before_there_is_a_job(number: float) -> None:
    backend = FakeBackend()
    slot = {"name": "x", "regex": "a*"}
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("/v1/infill", {"prefix": "a", "suffix": "b"}, "length"),
        ("/v1/infill", {"prefix": "a", "suffix": "b"}, "at_most"),
        ("/v1/completions", {"prompt": "a"}, "max_tokens"),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, "max_tokens"),
        (CHAT, SAY, "max_completion_tokens"),
        (CHAT, SAY, "n"),
        ("/v1/responses", {"input": "a"}, "max_output_tokens"),
        ("/v1/decisions", {"prompt": "a", "fields": {"a": ["b", "c"]}}, "steps"),
        (CHAT, SAY, "max_steps"),
        (CHAT, SAY, "top_logprobs"),
        ("/v1/completions", {"prompt": "a"}, "best_of"),
    ]
    with TestClient(create(backend, Settings()), base_url="http://localhost") as client:
        for path, body, name in cases:
            text = json.dumps(body | {name: number})
            if name == "top_logprobs" and number == 0:
                continue
            error = refused(client.post(path, content=text, headers={"content-type": "application/json"}))
            assert name.removesuffix("s") in error["message"] or "max_tokens" in error["message"], error
        for name in ("length", "at_most"):
            error = refused(client.post("/v1/fill", json={"template": ["a", {**slot, name: number}]}))
            assert f"template[1].{name}" in error["message"], error
    assert not backend.jobs


@pytest.mark.parametrize("number", [1 << 63, 10**30, -1, 1.5, True])
def test_other_numbers_have_their_range_too(client: TestClient, number: Any) -> None:
    call = {**CALL, "index": number}
    assert refused(client.post(CHAT, json={"messages": [{"role": "assistant", "tool_calls": [call]}]}))["param"]
    assert refused(client.post(CHAT, json={**SAY, "seed": number}))["param"] == "seed"
    assert refused(client.post("/v1/edit", json={"text": "ab", "spans": [[0, number]]}))["param"] == "spans[0][1]"
    assert refused(client.post("/v1/completions", json={"prompt": [1, number]}))["param"] == "prompt[1]"


def test_what_is_repeated_of_a_request_is_short(client: TestClient) -> None:
    long = "a" * 100_000
    for body in ({long: 1}, {**SAY, "model": long}, {**SAY, "temperature": long}, {**SAY, "stop": [[long]]}):
        refused(client.post(CHAT, json=body), 404 if "model" in body else 400)
    refused(client.get("/v1/models/" + long[:20_000]), 404)


# --- readiness -----------------------------------------------------------------------------------------------------


def test_a_worker_that_prepares_for_too_long_is_not_ready() -> None:
    class Slow(FakeBackend):
        seconds = 0.0

        def stats(self) -> Stats:
            return replace(super().stats(), stalled=self.seconds)

    backend = Slow()
    with TestClient(create(backend, Settings(stall_limit=2)), base_url="http://localhost") as client:
        for seconds, status, word in ((1.5, 200, "ready"), (2.5, 503, "stalled"), (0.0, 200, "ready")):
            backend.seconds = seconds
            response = client.get("/ready")
            assert (response.status_code, response.json()) == (status, {"status": word})
            assert client.get("/health").status_code == 200
            assert f"\nsfumato_stalled_seconds {seconds}\n" in client.get("/metrics").text


# --- connections ---------------------------------------------------------------------------------------------------


def connected(server: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def head(*lines: str, method: str = "POST", path: str = CHAT) -> bytes:
    fields = ["host: localhost", "content-type: application/json", *lines]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *fields, "", ""]).encode()


HEALTH = head(method="GET", path="/health")


def answer_of(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, json.loads(response.read())


def is_closed(connection: socket.socket) -> bool:
    """Whether the server ends it, without another word."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_connection_has_its_time_for_every_head() -> None:
    with served(head_timeout=0.4) as server:
        start = time.monotonic()
        with connected(server) as silent:
            assert is_closed(silent) and time.monotonic() - start < 5
        for first in (b"", HEALTH):
            with connected(server) as dripping:
                dripping.sendall(first)
                if first:
                    assert answer_of(dripping)[0] == 200
                for byte in HEALTH[:20]:
                    dripping.sendall(bytes([byte]))
                    time.sleep(0.05)
                    if time.monotonic() - start > 30:
                        break
                status, body = answer_of(dripping)
                assert status == 408 and "within 0.4 seconds" in body["error"]["message"]
                assert is_closed(dripping)


@pytest.mark.parametrize("in_pieces", [False, True])
def test_a_head_has_its_size(in_pieces: bool) -> None:
    with served() as server, connected(server) as connection:
        lines = [f"x-{number}: {'a' * 1000}" for number in range(200)]
        data = head(*lines, method="GET", path="/health")
        for start in range(0, len(data), 8192 if in_pieces else len(data)):
            connection.sendall(data[start : start + (8192 if in_pieces else len(data))])
        status, body = answer_of(connection)
        assert status == 431 and "32768 bytes" in body["error"]["message"]
        assert is_closed(connection)


def test_a_body_has_its_time_however_it_drips() -> None:
    with served(body_timeout=0.5) as server, connected(server) as connection:
        connection.sendall(head("content-length: 1000"))
        for _ in range(20):
            connection.sendall(b" ")
            time.sleep(0.05)
        status, body = answer_of(connection)
        assert status == 408 and "too slowly" in body["error"]["message"]


def test_bodies_of_all_requests_have_a_limit_together() -> None:
    backend = FakeBackend()
    backend.hold.clear()
    body = json.dumps({**SAY, "user": "a" * 3000}).encode()
    with served(backend, limits=Limits(max_bodies=5000)) as server, connected(server) as connection:
        connection.sendall(head(f"content-length: {len(body)}") + body)
        server.ask(backend.until("running", 1))
        status, error = post(server.port, CHAT, body)
        assert status == 503 and "memory" in error["error"]["message"]
        server.loop.call_soon_threadsafe(backend.hold.set)
        assert answer_of(connection)[0] == 200
        assert post(server.port, CHAT, body)[0] == 200


FRAMES = [
    head("content-length: 2", "transfer-encoding: chunked") + b"2\r\n{}\r\n0\r\n\r\n",
    head("content-length: 2", "content-length: 3") + b"{} ",
    head("content-length: +2") + b"{}",
    head("content-length: -1"),
    head("content-length: 1" + "0" * 30),
    head("content-length: \xb2"),
    head("transfer-encoding: gzip") + b"{}",
    head("transfer-encoding: chunked, chunked") + b"0\r\n\r\n",
    head("transfer-encoding : chunked") + b"0\r\n\r\n",
    head("transfer-encoding: chunked") + b"zz\r\n{}\r\n0\r\n\r\n",
    head("transfer-encoding: chunked") + b"-2\r\n{}\r\n0\r\n\r\n",
    head("transfer-encoding: chunked") + b"2\r\n{}XX0\r\n\r\n",
    head("transfer-encoding: chunked") + b"1\r\n \r\n" * 40_000,
    head("transfer-encoding: chunked") + b"1" * 30 + b"\r\n",
    head("host: other") + b"{}",
    head("x y: z"),
    head("x: a\x00b"),
    b"GET / HTTP/1.1\r\nbad\r\n\r\n",
    b"GET  / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
]


@pytest.mark.parametrize("number", range(len(FRAMES)))
def test_a_request_that_can_be_read_in_two_ways_is_refused(number: int, caplog: pytest.LogCaptureFixture) -> None:
    with served() as server, connected(server) as connection:
        try:
            connection.sendall(FRAMES[number] + HEALTH)
            status, body = answer_of(connection)
            assert status in (400, 431, 501) and body["error"]["message"]
        except (ConnectionResetError, BrokenPipeError, http.client.BadStatusLine):
            pass
        assert is_closed(connection)  # what stands behind it is never a request
        assert post(server.port, CHAT, json.dumps(SAY).encode())[0] == 200
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


def test_requests_behind_one_another_are_answered_in_turn() -> None:
    body = json.dumps({**SAY, "seed": 5}).encode()
    chunked = head("transfer-encoding: chunked") + b"%x;ext=1\r\n%s\r\n0\r\ntrailer: 1\r\n\r\n" % (len(body), body)
    with served() as server, connected(server) as connection:
        connection.sendall((head(f"content-length: {len(body)}") + body + chunked + HEALTH) * 5)
        reader = connection.makefile("rb")
        for number in range(15):
            assert reader.readline() == b"HTTP/1.1 200 OK\r\n"
            length = 0
            while (line := reader.readline().lower()) != b"\r\n":
                if line.startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            assert ("status" in json.loads(reader.read(length))) is (number % 3 == 2)


def test_a_new_connection_takes_the_place_of_the_longest_idle() -> None:
    with served(limits=Limits(max_connections=8)) as server, ExitStack() as stack:
        idle = [stack.enter_context(connected(server)) for _ in range(8)]
        for one in idle:
            one.sendall(HEALTH)
            assert answer_of(one)[0] == 200
        for _ in range(3):
            with connected(server) as fresh:
                fresh.sendall(HEALTH)
                assert answer_of(fresh)[0] == 200
                time.sleep(0.05)
        assert is_closed(idle[0])
        idle[-1].sendall(HEALTH)
        assert answer_of(idle[-1])[0] == 200


def test_where_none_is_idle_a_new_connection_is_refused() -> None:
    backend = FakeBackend()
    backend.hold.clear()
    body = json.dumps(SAY).encode()
    with served(backend, limits=Limits(max_connections=8)) as server, ExitStack() as stack:
        busy = [stack.enter_context(connected(server)) for _ in range(8)]
        for one in busy:
            one.sendall(head(f"content-length: {len(body)}") + body)
        server.ask(backend.until("running", 8))
        with connected(server) as late:
            late.sendall(HEALTH)
            status, error = answer_of(late)
            assert status == 503 and "8 connections" in error["error"]["message"]
        server.loop.call_soon_threadsafe(backend.hold.set)
        for one in busy:
            assert answer_of(one)[0] == 200
        with connected(server) as late:
            late.sendall(HEALTH)
            assert answer_of(late)[0] == 200


FEW_FILES = """
import asyncio, os, resource, sys
sys.path.insert(0, {tests!r})
from fake_backend import FakeBackend
from sfumato.cli.serve import tell
from sfumato.server.http import listen as http
from sfumato.server.settings import Settings
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
held = [os.open(os.devnull, os.O_RDONLY) for _ in range({held})]
http.run(FakeBackend(), Settings(), 0, tell)
"""


@pytest.mark.parametrize(
    ("soft", "hard", "held", "clients"), [(256, 256, 0, 300), (64, 256, 0, 300), (128, 128, 80, 100)]
)
def test_without_files_the_server_waits_and_says_it_once(soft: int, hard: int, held: int, clients: int) -> None:
    """With `held` the limit on connections is beyond what is left, so that accept itself fails."""
    code = FEW_FILES.format(tests=str(Path(__file__).parents[1]), soft=soft, hard=hard, held=held)
    pipe = subprocess.PIPE
    server = subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True)
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline().split("127.0.0.1:")[1].split()[0])
        with ExitStack() as stack:
            for _ in range(clients):
                stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
            time.sleep(1.5)
            start = time.monotonic()
            with socket.create_connection(("127.0.0.1", port), timeout=20) as bystander:
                bystander.sendall(HEALTH)
                assert answer_of(bystander)[0] == 200
            assert time.monotonic() - start < 10
    finally:
        server.terminate()
        _, err = server.communicate(timeout=30)
    assert "Traceback" not in err and err.count("no more connections") == (1 if held else 0), err[-2000:]


# --- answers before the body's end ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "status"), [({}, 413), ({"keys": ("key",)}, 401)])
def test_an_answer_that_comes_early_reaches_a_client_that_still_sends(settings: dict[str, Any], status: int) -> None:
    with served(**settings) as server:
        for _ in range(5):
            answer_status, body = post(server.port, CHAT, b" " * (24 << 20))
            assert answer_status == status and body["error"]["message"]


def test_who_sends_on_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits, "REMAINDER", 1 << 20)
    with served() as server, connected(server) as connection:
        connection.sendall(head("content-length: 1000000000"))
        assert answer_of(connection)[0] == 413
        with pytest.raises(OSError):
            for _ in range(2000):
                connection.sendall(b" " * (1 << 20))


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["http://[::1", "http://]", "http://[x]", "//", "null", "", "http://a b", "\xff"])
def test_an_origin_that_is_none_is_refused(client: TestClient, origin: str) -> None:
    for host in ("localhost", "localhost:1"):
        headers = [(b"origin", origin.encode("latin-1")), (b"host", host.encode())]
        refused(client.post(CHAT, json=SAY, headers=headers), 403)
        refused(client.options(CHAT, headers=headers), 403)


@pytest.mark.parametrize(
    "host", ["[::1", "[::1x", "[", "]", "[]", ":", "localhost@evil", "localhost/", "\xff", "[::1]x"]
)
def test_a_host_that_is_none_is_refused(host: str) -> None:
    with served() as server, connected(server) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nhost: " + host.encode("latin-1") + b"\r\n\r\n")
        assert answer_of(connection)[0] in (400, 403)


HEADERS = [
    (name, value)
    for name in "content-type authorization x-request-id access-control-request-headers range if-none-match".split()
    + "if-modified-since cookie accept expect connection upgrade te accept-encoding content-encoding".split()
    for value in (b"", b"\xff\xfe", b"a" * 8000, b"[::1", b"%", b"=?x?=", b"1" * 5000, b"bytes=-,-", b"100-continue")
]


def test_no_value_of_a_header_is_a_failure() -> None:
    with served() as server:
        for name, value in HEADERS:
            for path, method in ((CHAT, "POST"), ("/ui/app.js", "GET"), ("/v1/models", "OPTIONS")):
                with connected(server) as connection:
                    line = b"%s: %s\r\n" % (name.encode(), value)
                    lines = head("connection: close", method=method, path=path)[:-2]
                    connection.sendall(lines + line + b"\r\n")
                    response = http.client.HTTPResponse(connection)
                    response.begin()
                    assert response.status < 500, (name, value, path)


def test_cards_of_other_sizes_bound_other_lengths() -> None:
    backend = FakeBackend(replace(CARD, max_position=100))
    with TestClient(create(backend, Settings()), base_url="http://localhost") as client:
        assert client.post("/v1/infill", json={"prefix": "a", "suffix": "b", "length": 100}).status_code == 200
        error = refused(client.post("/v1/infill", json={"prefix": "a", "suffix": "b", "length": 101}))
        assert error["code"] == "context_length_exceeded" and "100 tokens" in error["message"]
        assert error["param"] == "length"
