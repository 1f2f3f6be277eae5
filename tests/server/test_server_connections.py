"""server/http/connections.py: silence, drips, connections without number; each is refused, and a bystander answered."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import raw_client
from fake_backend import FakeBackend, Served
from raw_client import CHAT, SAY, post, refused, served
from starlette.testclient import TestClient

from sfumato.server.app import Limits
from sfumato.server.http import limits as http_limits

client = raw_client.client


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
            assert is_closed(silent) and time.monotonic() - start < 20
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
