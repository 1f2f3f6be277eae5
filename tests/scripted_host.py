"""A host that answers by a script: it plays a Sfumato server or another one, over real HTTP.

`ours` and `theirs` are its fixtures; `tests/remote/conftest.py` names them.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

KEY = "sk-very-secret-0123"
USER = [{"role": "user", "content": "Hello?"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
USAGE = {
    **{"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12, "prompt_tokens_details": {"cached_tokens": 3}},
    **{"steps": 4, "passes": 5, "canvases": 1, "tokens_per_pass": 1.0, "seconds": 0.5, "first_commit_seconds": 0.4},
}
DRAFT = {
    **{"index": 0, "canvas": 0, "step": 2, "pieces": ["Gr", "ün", "", "x"]},
    **{"entropies": [0.0, 0.5, 1.0, 3.0], "accepted": [True, True, False, False], "end": 2},
}


Script = Callable[[BaseHTTPRequestHandler, Any], object]
"""Answers a request, of which it gets the body, by itself."""


@dataclass
class Reply:
    """What one request is answered. A list goes out as chunks; `is_cut`: the connection ends in the middle."""

    body: bytes | list[bytes] = b""
    status: int = 200
    kind: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)
    is_cut: bool = False


@dataclass
class Scripted:
    url: str
    replies: dict[str, list[Reply | Script]] = field(default_factory=dict)
    """Path -> what comes, one after the other; the last one again and again."""
    requests: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)
    """Path, headers, body."""

    @property
    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = self.requests[-1][2]
        return body

    def says(self, path: str, *replies: Reply | Script) -> None:
        self.replies[f"/v1{path}"] = list(replies)


def as_json(body: Any, status: int = 200, **headers: str) -> Reply:
    return Reply(json.dumps(body).encode(), status, headers={k.replace("_", "-"): v for k, v in headers.items()})


def stream(*payloads: Any, end: bytes = b"data: [DONE]\n\n", is_cut: bool = False) -> Reply:
    pieces = [b"data: " + json.dumps(one, ensure_ascii=False).encode() + b"\n\n" for one in payloads]
    return Reply([*pieces, end] if end else pieces, kind="text/event-stream", is_cut=is_cut)


def delta(finish_reason: str | None = None, logprobs: Any = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "logprobs": logprobs, "finish_reason": finish_reason}]}


@pytest.fixture
def server() -> Iterator[Scripted]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            with lock:
                scripted.requests.append((self.path, dict(self.headers), body))
                waiting = scripted.replies.get(self.path) or [as_json({"detail": "Not Found"}, 404)]
                reply = waiting.pop(0) if len(waiting) > 1 else waiting[0]
            self.close_connection = True
            if not isinstance(reply, Reply):
                reply(self, body)
                return
            self.send_response(reply.status)
            self.send_header("Content-Type", reply.kind)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            is_chunked = isinstance(reply.body, list)
            self.send_header(
                *(("Transfer-Encoding", "chunked") if is_chunked else ("Content-Length", str(len(reply.body))))
            )
            self.end_headers()
            for piece in reply.body if isinstance(reply.body, list) else []:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            if isinstance(reply.body, bytes):
                self.wfile.write(reply.body)
            elif not reply.is_cut:
                self.wfile.write(b"0\r\n\r\n")

        do_POST = do_GET

        def log_message(self, *_: Any) -> None: ...

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None: ...  # a client that goes away is part of the script

    httpd = Server(("127.0.0.1", 0), Handler)
    scripted = Scripted(f"http://127.0.0.1:{httpd.server_port}")
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield scripted
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture
def ours(server: Scripted) -> Scripted:
    card = {"id": "nano", "object": "model", "owned_by": "sfumato", "canvas_length": 16, "max_model_len": 512}
    server.says("/models", as_json({"object": "list", "data": [card | {"is_diffusion": True}]}))
    return server


@pytest.fixture
def theirs(server: Scripted) -> Scripted:
    server.says("/models", as_json({"data": [{"id": "gemma", "owned_by": "vllm", "max_model_len": 4096}]}))
    return server


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits before a request is sent again, which here take no time."""
    waits: list[float] = []
    monkeypatch.setattr("sfumato.remote.host.time.sleep", waits.append)
    return waits


def hello(**last_fields: Any) -> Reply:
    last = {"choices": [], "usage": USAGE}
    return stream(delta(role="assistant", content=""), delta(content="Hello"), delta("stop") | last_fields, last)


def refused(message: str, status: int, kind: str = "", code: Any = None, **headers: str) -> Reply:
    return as_json({"error": {"message": message, "type": kind, "param": None, "code": code}}, status, **headers)
