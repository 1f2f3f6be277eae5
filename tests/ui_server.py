"""A server for the page's tests and pictures: the real files, and scripted answers that stop where a test says.

It speaks what of the HTTP contract the page uses. A script is a list of things to do in order: a dict is sent as one
server-sent event, a `threading.Event` is waited for, `CUT` ends the stream there, a `Refusal` is answered instead.
It lacks on purpose: a model, and every check of what it is sent; requests are kept for the test to look at.
"""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

UI = Path(__file__).parents[1] / "sfumato" / "server" / "ui"
KINDS = {"html": "text/html; charset=utf-8", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
CUT = "cut"
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync""".split()
"""For chromium: no sandbox in a container, and no traffic of its own."""

NAMES = ("name", "type", "default", "minimum", "maximum", "choices", "doc")
ROWS: list[tuple[Any, ...]] = [
    ("max_tokens", "integer", None, 1, None, None, "New tokens at most; none: up to the end of the context."),
    ("stop", "array", [], None, None, None, "Strings that end the answer, wherever they fall in a canvas."),
    ("seed", "integer", None, 0, None, None, "Same seed, same text; none: a fresh seed, reported in the result."),
    ("mode", "string", None, None, None, ["diffusion", "autoregressive"], "None: diffusion, if there is a canvas."),
    ("max_steps", "integer", 48, 1, 4096, None, "Cap on denoising steps a canvas."),
    ("t_max", "number", 0.8, 0.000001, 100, None, "The temperature of a canvas's first step."),
    ("entropy_bound", "number", 0.1, 0, 1e9, None, "Nats of joint entropy that one step may accept."),
    ("early", "boolean", False, None, None, None, "Answers that arrive early: a canvas commits what has settled."),
    ("schema", "object", None, None, None, None, "The answer is JSON that obeys this JSON Schema."),
    ("thinking", "boolean", False, None, None, None, "Chat only: ask the model to think before it answers."),
    ("drafts", "boolean", False, None, None, None, "Emit a Draft after every step (a device sync each)."),
    ("logprobs", "boolean", False, None, None, None, "Log-probability of every committed token."),
]
OPTIONS: list[dict[str, Any]] = [dict(zip(NAMES, row, strict=True)) for row in ROWS]


@dataclass
class Refusal:
    """An error instead of a stream."""

    status: int
    kind: str
    message: str
    headers: dict[str, str] = field(default_factory=dict)
    param: str | None = None


@dataclass
class Reply:
    """A JSON answer instead of a stream."""

    body: dict[str, Any]
    status: int = 200


def usage(tokens: int, steps: int, seconds: float = 1.24) -> dict[str, Any]:
    return {
        "prompt_tokens": 12,
        "completion_tokens": tokens,
        "total_tokens": 12 + tokens,
        "steps": steps,
        "passes": steps,
        "canvases": 1,
        "tokens_per_pass": tokens / steps,
        "seconds": seconds,
        "first_commit_seconds": seconds,
    }


def draft(pieces: list[str], entropies: list[float], step: int, canvas: int = 0, padding: int = 0) -> dict[str, Any]:
    """One draft; a place of no entropy counts as accepted."""
    return {
        "index": 0,
        "canvas": canvas,
        "step": step,
        "pieces": pieces + [""] * padding,
        "entropies": [round(entropy, 4) for entropy in entropies] + [0.0] * padding,
        "accepted": [entropy < 0.005 for entropy in entropies] + [True] * padding,
        "end": len(pieces),
    }


def drafts(text: str, steps: int, canvas: int = 0, fixed: range = range(0), padding: int = 4) -> list[dict[str, Any]]:
    """Drafts that end in `text`: places settle in a counted order, words of it stand wrongly until then."""
    pieces = re.findall(r"\s?\w+|\s|[^\w\s]", text)
    rng = random.Random(text)
    settles = [0.0 if at in fixed else rng.uniform(0.15, 1) ** 0.8 * (steps - 1) for at in range(len(pieces))]
    all_drafts = []
    for step in range(1, steps + 1):
        left = [at - step + 1 for at in settles]
        shown = [piece if far <= 0.6 else rng.choice(pieces) for piece, far in zip(pieces, left, strict=True)]
        entropies = [0.001 if far <= 0 else min(3.2, 0.12 + 0.42 * far * rng.uniform(0.6, 1.4)) for far in left]
        all_drafts.append(draft(shown, entropies, step, canvas, padding))
    return all_drafts


def chat(text: str, steps: int = 6, hold: threading.Event | None = None, hold_at: int = 3) -> list[Any]:
    """The script of one answer of one canvas; with `hold` it waits after that many drafts."""
    sent: list[Any] = [{"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]}]
    for one in drafts(text, steps):
        sent.append({"choices": [], "draft": one})
        if hold is not None and one["step"] == hold_at:
            sent.append(hold)
    tokens = len(re.findall(r"\s?\w+|\s|[^\w\s]", text))
    return [
        *sent,
        {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {"choices": [], "usage": usage(tokens, steps)},
    ]


Result = list[Any] | Refusal | Reply
Script = Result | Callable[[dict[str, Any]], Result]


class PageServer:
    """Serves on a free port until closed. `scripts[path]` is answered in order, its last again and again."""

    def __init__(self) -> None:
        self.scripts: dict[str, list[Script]] = {}
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.key: str | None = None
        self.purpose: dict[str, str] | None = None
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def bodies(self, path: str) -> list[dict[str, Any]]:
        """The bodies of the requests to a path, in order."""
        return [body for place, body in self.requests if place == path]

    def _next(self, path: str, body: dict[str, Any]) -> Result:
        scripts = self.scripts[path]
        script = scripts.pop(0) if len(scripts) > 1 else scripts[0]
        return script(body) if callable(script) else script

    def _handler(server: PageServer) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments: object) -> None: ...

            def _send(self, status: int, kind: str, data: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                policy = "default-src 'self'; base-uri 'none'; frame-ancestors 'none'"
                defaults = {"Content-Type": kind, "Content-Length": str(len(data)), "Content-Security-Policy": policy}
                for name, value in (defaults | (headers or {})).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def _json(self, value: object, status: int = 200) -> None:
                self._send(status, "application/json", json.dumps(value).encode())

            def _refuse(self, refusal: Refusal) -> None:
                error = {"message": refusal.message, "type": refusal.kind, "param": refusal.param, "code": None}
                self._send(refusal.status, "application/json", json.dumps({"error": error}).encode(), refusal.headers)

            def _is_known(self) -> bool:
                if server.key is None or self.headers.get("Authorization") == f"Bearer {server.key}":
                    return True
                self._refuse(Refusal(401, "authentication_error", "The API key is missing or wrong."))
                return False

            def do_GET(self) -> None:
                if self.path == "/":
                    self._send(200, KINDS["html"], (UI / "index.html").read_bytes())
                elif self.path.startswith("/ui/") and (UI / self.path[4:]).is_file():
                    self._send(200, KINDS[self.path.rsplit(".")[-1]], (UI / self.path[4:]).read_bytes())
                elif self.path in ("/v1/models", "/v1/options") and self._is_known():
                    model = {"id": "nano", "object": "model", "canvas_length": 82, "max_model_len": 4096}
                    model |= {} if server.purpose is None else {"purpose": server.purpose}
                    self._json({"data": [model]} if self.path == "/v1/models" else {"options": OPTIONS})
                elif not self.path.startswith("/v1/"):
                    self._refuse(Refusal(404, "invalid_request_error", f"There is no {self.path}."))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if not self._is_known():
                    return
                server.requests.append((self.path, body))
                script = server._next(self.path, body)
                if isinstance(script, Refusal):
                    return self._refuse(script)
                if isinstance(script, Reply):
                    return self._json(script.body, script.status)
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                try:
                    for line in _lines(script):
                        self.wfile.write(line)
                        self.wfile.flush()
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the page went away, as it may

        return Handler


def _lines(script: list[Any]) -> Iterator[bytes]:
    for thing in script:
        if isinstance(thing, threading.Event):
            thing.wait(20)
        elif thing == CUT:
            return
        else:
            yield f"data: {json.dumps(thing)}\n\n".encode()
    yield b"data: [DONE]\n\n"
