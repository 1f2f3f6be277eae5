"""What the tests of hostile clients share: a server behind a real socket, and bytes sent to it."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fake_backend import FakeBackend, Served, serving
from starlette.testclient import TestClient

from sfumato.server.app import Settings, create

CHAT = "/v1/chat/completions"
SAY = {"messages": [{"role": "user", "content": "Hello there"}]}


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


def post(port: int, path: str, body: bytes, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", path, body, {"content-type": "application/json", **headers})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()
