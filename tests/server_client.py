"""What the tests of routes share: an application over a fake backend, and ways to call it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fake_backend import FakeBackend
from starlette.testclient import TestClient

from sfumato.server.app import Settings, create
from sfumato.templates.requests import Chat, Complete

MESSAGES = [{"role": "user", "content": "Hello there"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a place",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def client(backend: FakeBackend) -> Iterator[TestClient]:
    with connect(backend) as one:
        yield one


def connect(backend: FakeBackend, settings: Settings = Settings()) -> TestClient:  # noqa: B008 - frozen
    return TestClient(create(backend, settings), base_url="http://localhost")


def chats(backend: FakeBackend) -> list[Chat]:
    """The queries so far, which are all chats."""
    return [query for query in backend.queries if isinstance(query, Chat) or pytest.fail(repr(query))]


def prompts(backend: FakeBackend) -> list[Any]:
    """The prompts of the queries so far, which are all completions."""
    queries = [query for query in backend.queries if isinstance(query, Complete) or pytest.fail(repr(query))]
    return [query.prompt for query in queries]


def chat(client: TestClient, **more: Any) -> Any:
    """The answer to a chat, whose messages are `MESSAGES` unless others are given."""
    return client.post("/v1/chat/completions", json={"messages": MESSAGES, **more})


def events(response: Any) -> list[Any]:
    """The data of a stream, which ends as it should."""
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def refused(response: Any, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str) and "\n" not in body["error"]["message"]
    error: dict[str, Any] = body["error"]
    return error


def complete(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/completions", json=body)


def respond(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/responses", json=body)
