"""server/http/encodings.py: bodies that come compressed, on routes of every dialect."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from fake_backend import FakeBackend
from server_client import MESSAGES, connect

from sfumato.server.app import Limits, Settings
from sfumato.server.http import encodings

CHAT: dict[str, Any] = {"messages": MESSAGES, "seed": 1}
QUESTIONS = {"state": "x", "questions": {"q": {"type": "noul", "instructions": "x"}}}
PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/systemone": QUESTIONS,
    "/api/chat": {**CHAT, "model": "fake", "stream": False},
}
ENCODERS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}


def compress(name: str) -> Callable[[bytes], bytes]:
    if name == "zstd":
        module: Any = pytest.importorskip("backports.zstd", reason="needs the package backports.zstd")
        return lambda data: bytes(module.compress(data))
    return ENCODERS[name]


@pytest.mark.parametrize("name", ["gzip", "deflate", "zstd"])
def test_a_compressed_body_is_read(name: str) -> None:
    encode = compress(name)
    limits = Limits(max_body=4000, max_bodies=9000)
    with connect(FakeBackend(), Settings(limits=limits)) as client:

        def status(data: bytes, encoding: str = name, path: str = "/v1/systemone") -> int:
            headers = {"content-type": "application/json", "content-encoding": encoding}
            return int(client.post(path, content=data, headers=headers).status_code)

        for path, body in PATHS.items():
            body = {key: value for key, value in body.items() if key != "seed" or "api" not in path}
            data = encode(json.dumps(body).encode())
            assert status(data, path=path) == 200 == status(data, f" X-{name.upper()}, identity", path), path
        good = encode(json.dumps(QUESTIONS).encode())
        assert status(good[:-3]) == status(good[:9]) == status(b"") == status(good + b"x") == status(b"{}") == 422
        for _ in range(4):  # what one leaves behind would be too much for the next
            assert status(encode(b" " * 3000 + json.dumps(QUESTIONS).encode())) == 200
        assert status(encode(b" " * 4001)) == status(encode(b" " * 10**7)) == 413
        assert client.app.state.service.body_bytes == 0  # type: ignore[attr-defined]


def test_another_encoding_is_refused_by_its_name() -> None:
    with connect(FakeBackend()) as client:
        for encoding in ("br", "gzip, gzip", "x" * 1000):
            response = client.post("/v1/systemone", json=QUESTIONS, headers={"content-encoding": encoding})
            assert response.status_code == 415 and "send the body as it is" in response.json()["detail"]["message"]
            assert response.headers["accept-encoding"] == ", ".join(encodings.ENCODINGS)
        plain = client.post("/v1/systemone", json=QUESTIONS, headers={"content-encoding": "identity"})
        assert plain.status_code == 200
