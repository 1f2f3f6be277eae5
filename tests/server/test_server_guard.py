"""server/http/: who may call and how much may be sent; what becomes of jobs whose client leaves, and of a stop."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from fake_backend import FakeBackend, Served, serving
from fastapi import FastAPI
from starlette.testclient import TestClient
from starlette.types import Message

from sfumato.errors import InputError
from sfumato.server import status as status_routes
from sfumato.server.app import Limits, Settings, create

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello there you"}], "seed": 5}
PATH = "/v1/chat/completions"


@contextmanager
def connect(settings: Settings, host: str = "http://localhost") -> Iterator[TestClient]:
    with TestClient(create(FakeBackend(), settings), base_url=host) as client:
        yield client


def status(response: Any) -> int:
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return int(response.status_code)


# --- keys, hosts, origins ------------------------------------------------------------------------------------------


def test_keys() -> None:
    with connect(Settings(host="0.0.0.0", keys=("one", "two")), "http://example.com") as client:
        for key in ("one", "two"):
            assert status(client.post(PATH, json=BODY, headers={"authorization": f"Bearer {key}"})) == 200
        for header in ("", "Bearer", "Bearer three", "Bearer on", "Basic one", "one", "Bearer öne"):
            response = client.post(PATH, json=BODY, headers=[(b"authorization", header.encode("latin-1"))])
            assert status(response) == 401 and response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.json()["error"]["type"] == "authentication_error"
        for path in ("/v1/models", "/v1/options", "/metrics", "/openapi.json", "/v1/nothing"):
            assert status(client.get(path)) == 401, path
        for path in ("/health", "/ready", "/", "/ui/index.html"):
            assert client.get(path).status_code in (200, 404), path


def test_open_to_others_only_with_a_key() -> None:
    with pytest.raises(InputError, match="API key"):
        Settings(host="0.0.0.0")
    for key in ("", "a b", "ü"):
        with pytest.raises(InputError, match="API key"):
            Settings(keys=(key,))


def test_hosts() -> None:
    with connect(Settings()) as client:
        for host in ("localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "[::1]"):
            assert status(client.get("/v1/models", headers={"host": host})) == 200, host
        for host in ("evil.example", "localhost.evil.example", "evil.example:8000", "", "[::2]"):
            assert status(client.get("/v1/models", headers={"host": host})) == 403, host
            assert status(client.get("/", headers={"host": host})) == 403, host
    with connect(Settings(host="0.0.0.0", keys=("k",))) as client:
        headers = {"host": "example.com", "authorization": "Bearer k"}
        assert status(client.get("/v1/models", headers=headers)) == 200


def test_origins() -> None:
    with connect(Settings(cors=("https://app.example",))) as client:
        for origin in ("http://localhost", None):
            response = client.post(PATH, json=BODY, headers={"origin": origin} if origin else {})
            assert status(response) == 200 and "access-control-allow-origin" not in response.headers
        for origin in ("http://localhost:99", "https://evil.example", "null", "https://app.example.evil"):
            response = client.post(PATH, json=BODY, headers={"origin": origin})
            assert status(response) == 403 and "access-control-allow-origin" not in response.headers
        for body, expected in ((BODY, 200), ({}, 400)):
            response = client.post(PATH, json=body, headers={"origin": "https://app.example"})
            assert status(response) == expected and response.headers["vary"] == "Origin"
            assert response.headers["access-control-allow-origin"] == "https://app.example"
        headers = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        response = client.options(PATH, headers={"origin": "https://app.example", **headers})
        assert response.status_code == 204 and response.headers["access-control-allow-headers"] == "authorization"
        assert status(client.options(PATH, headers={"origin": "https://evil.example", **headers})) == 403
    with connect(Settings(cors=("*",), keys=("k",))) as client:
        response = client.post(PATH, json=BODY, headers={"origin": "null"})
        assert status(response) == 401 and response.headers["access-control-allow-origin"] == "null"
        assert client.options(PATH, headers={"origin": "null", **headers}).status_code == 204


# --- ids, the log, the page ----------------------------------------------------------------------------------------


def test_request_ids() -> None:
    with connect(Settings()) as client:
        assert client.get("/health", headers={"x-request-id": "my-id_1"}).headers["x-request-id"] == "my-id_1"
        for wrong in ("a b", "x" * 65, "a\tb", ""):
            id = client.get("/nothing", headers={"x-request-id": wrong}).headers["x-request-id"]
            assert id != wrong and id.startswith("req_")


def test_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sfumato.server")
    with connect(Settings()) as client:
        client.post(PATH, json=BODY, headers={"x-request-id": "abc"})
        client.get("/no%0Ahow?secret=1")
    lines = [record.getMessage() for record in caplog.records if record.name == "sfumato.server"]
    assert lines[0].startswith(f"abc POST {PATH} 200 tokens=7 ms=") and lines[0].endswith(" testclient")
    assert " GET /no%0Ahow 404 tokens=0 " in lines[1] and "secret" not in lines[1]
    assert not any("Hello" in line for line in lines)
    caplog.clear()
    with connect(Settings(log_prompts=True)) as client:
        client.post(PATH, json=BODY, headers={"x-request-id": "abc"})
    assert any("abc says" in record.getMessage() and "Hello" in record.getMessage() for record in caplog.records)


def test_the_page(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_routes, "UI", tmp_path)
    with connect(Settings()) as client:
        assert status(client.get("/")) == 404
        (tmp_path / "index.html").write_text("<p>hello")
        (tmp_path / "a.js").write_text("1")
        for path, kind in (("/", "text/html"), ("/ui/a.js", "text/javascript")):
            response = client.get(path)
            assert response.status_code == 200 and response.headers["content-type"].startswith(kind)
            policy = response.headers["content-security-policy"]
            assert "default-src 'self'" in policy and "img-src 'self' data:" in policy and "unsafe" not in policy
            assert response.headers["x-content-type-options"] == "nosniff"
        assert status(client.get("/ui/..%2f..%2fapp.py")) == 404


# --- in one loop: plain ASGI, a client made by hand ----------------------------------------------------------------


class Caller:
    """Speaks ASGI to the application: sends a body, reads, leaves when `gone` is set, and may not read at all."""

    def __init__(self, body: Any, path: str = PATH) -> None:
        self.body = body if isinstance(body, list) else [json.dumps(body).encode()]
        self.path, self.gone = path, asyncio.Event()
        self.sent: list[Message] = []
        self.read = asyncio.Event()
        self.read.set()

    async def receive(self) -> Message:
        if self.body:
            part = self.body.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(self.body)}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        await self.read.wait()

    async def call(self, app: FastAPI) -> None:
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "headers": headers,
        }
        scope |= {"path": self.path, "raw_path": self.path.encode(), "query_string": b"", "client": ("here", 1)}
        await app(scope | {"root_path": "", "scheme": "http", "server": ("localhost", 80)}, self.receive, self.send)

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()


@asynccontextmanager
async def running(backend: FakeBackend, settings: Settings = Settings()) -> AsyncIterator[FastAPI]:  # noqa: B008
    app = create(backend, settings)
    async with app.router.lifespan_context(app), asyncio.timeout(20):
        yield app


CASES = [
    (PATH, BODY | {"n": 3}, 3),
    (PATH, BODY | {"n": 3, "stream": True}, 3),
    ("/v1/completions", {"prompt": ["a", "b"]}, 2),
    ("/v1/completions", {"prompt": "a", "suffix": "b", "stream": True}, 1),
    ("/v1/responses", {"input": "Hello there you two"}, 1),
    ("/v1/responses", {"input": "Hello there you two", "stream": True}, 1),
    ("/v1/infill", {"prefix": "a", "suffix": "b"}, 1),
    ("/v1/edit", {"text": "a", "instruction": "b", "stream": True, "drafts": True}, 1),
    ("/v1/decisions", {"prompt": "a", "fields": {"b": ["c", "d"]}}, 1),
    ("/v1/systemone", {"state": "a", "questions": {"b": {"type": "noul", "instructions": "c"}}}, 1),
]


@pytest.mark.parametrize(("path", "body", "jobs"), CASES)
def test_who_leaves_takes_the_jobs_along(path: str, body: Any, jobs: int) -> None:
    async def main() -> None:
        backend = FakeBackend()
        backend.hold.clear()
        async with running(backend) as app:
            caller = Caller(body, path)
            task = asyncio.create_task(caller.call(app))
            await backend.until("running", jobs)
            await asyncio.sleep(0)
            caller.gone.set()
            await task
            assert (backend.cancelled, backend.finished, backend.running) == (jobs, 0, 0)
            assert 'status="499"' in app.state.service.metrics.page().decode()

    asyncio.run(main())


def test_who_does_not_read_is_cut_off() -> None:
    async def main() -> None:
        backend = FakeBackend(text="word " * 300)
        async with running(backend, Settings(write_timeout=0.05)) as app:
            caller = Caller(BODY | {"stream": True})
            caller.read.clear()
            await caller.call(app)
            assert backend.cancelled == 1 and backend.running == 0
            assert len(caller.sent) == 1

    asyncio.run(main())


def test_who_does_not_finish_the_body_is_cut_off() -> None:
    async def main() -> None:
        async with running(FakeBackend(), Settings(write_timeout=0.05)) as app:
            caller = Caller([b'{"messages":'])

            async def receive() -> dict[str, Any]:
                await asyncio.sleep(60)
                return {}

            caller.receive = receive  # type: ignore[method-assign]
            await caller.call(app)
            assert caller.status == 408 and json.loads(caller.text)["error"]["type"] == "timeout_error"

    asyncio.run(main())


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_request_has_its_time(is_stream: bool) -> None:
    async def main() -> None:
        backend = FakeBackend()
        backend.hold.clear()
        async with running(backend, Settings(limits=Limits(timeout=0.05))) as app:
            caller = Caller(BODY | {"stream": is_stream})
            await caller.call(app)
            assert caller.status == (200 if is_stream else 504)
            assert '"type":"timeout_error"' in caller.text and "[DONE]" not in caller.text
            assert backend.cancelled == 1

    asyncio.run(main())


def test_a_silent_stream_says_that_it_lives() -> None:
    async def main() -> None:
        backend = FakeBackend()
        backend.hold.clear()
        async with running(backend, Settings(keep_alive=0.01)) as app:
            caller = Caller({"prefix": "a", "suffix": "b", "stream": True}, "/v1/infill")
            task = asyncio.create_task(caller.call(app))
            while ": keep-alive\n\n" not in caller.text:
                await asyncio.sleep(0.005)
            backend.hold.set()
            await task
            assert caller.text.endswith("data: [DONE]\n\n") and caller.status == 200 and backend.finished == 1

    asyncio.run(main())


def test_a_body_is_counted_while_it_is_read() -> None:
    async def main() -> None:
        backend = FakeBackend()
        async with running(backend, Settings(limits=Limits(max_body=1000))) as app:
            parts = [b"x" * 400] * 100
            caller = Caller(parts)
            await caller.call(app)
            assert caller.status == 413 and len(parts) == 97 and not backend.jobs
            assert (b"connection", b"close") in caller.sent[0]["headers"]

    asyncio.run(main())


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("is_in_time", [False, True])
def test_a_server_that_stops(is_stream: bool, is_in_time: bool) -> None:
    async def main() -> None:
        backend = FakeBackend()
        backend.hold.clear()
        async with running(backend) as app:
            service = app.state.service
            caller = Caller(BODY | {"stream": is_stream})
            task = asyncio.create_task(caller.call(app))
            await backend.until("running", 1)
            drain = asyncio.create_task(service.drain(20 if is_in_time else 0.05))
            await asyncio.sleep(0)
            late = Caller(BODY)
            await late.call(app)
            assert late.status == 503 and "draining" in late.text and service.state() == "draining"
            if is_in_time:
                backend.hold.set()
            await drain
            await task
            if is_in_time:
                assert caller.status == 200 and backend.finished == 1
            else:
                assert caller.status == (200 if is_stream else 503) and backend.cancelled == 1
                assert '"type":"overloaded_error"' in caller.text

    asyncio.run(main())


# --- over a socket -------------------------------------------------------------------------------------------------


@contextmanager
def served(backend: FakeBackend, settings: Settings = Settings()) -> Iterator[Served]:  # noqa: B008 - frozen
    with serving(create(backend, settings)) as one:
        yield one


def request(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    fields = ["host: localhost", "content-type: application/json", f"content-length: {len(data)}"]
    return "\r\n".join([f"POST {PATH} HTTP/1.1", *fields, "", ""]).encode() + data


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_closed_connection_frees_its_rows(is_stream: bool) -> None:
    backend = FakeBackend()
    backend.hold.clear()
    with served(backend) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(request(BODY | {"n": 2, "stream": is_stream}))
            server.ask(backend.until("running", 2))
        server.ask(backend.until("cancelled", 2))
        server.ask(backend.until("running", 0))


def test_a_client_that_does_not_read_frees_its_row() -> None:
    backend = FakeBackend(text=("x" * 100_000 + " ") * 400)  # more than the buffers of two sockets hold
    with served(backend, Settings(write_timeout=0.3)) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(request(BODY | {"stream": True}))
            server.ask(backend.until("cancelled", 1))
        server.ask(backend.until("running", 0))


@pytest.mark.parametrize("has_length", [False, True])
def test_an_oversized_body_is_refused(has_length: bool) -> None:
    with served(FakeBackend(), Settings(limits=Limits(max_body=1000))) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        connection.putrequest("POST", PATH)
        connection.putheader("content-type", "application/json")
        connection.putheader(*(("content-length", "2000") if has_length else ("transfer-encoding", "chunked")))
        connection.endheaders()
        if not has_length:
            connection.send(b"7d0\r\n" + b"x" * 2000 + b"\r\n")  # and no last chunk: nobody waits for it
        response = connection.getresponse()
        assert response.status == 413 and json.loads(response.read())["error"]["type"] == "invalid_request_error"
        assert response.getheader("connection") == "close"
        connection.close()
