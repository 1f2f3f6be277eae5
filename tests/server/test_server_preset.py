"""server/http/options.py: a server's preset, below what a request says, above the checkpoint's own values."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_backend import FakeBackend
from server_client import MESSAGES, backend, chat, connect
from starlette.testclient import TestClient

from sfumato.server.settings import Settings

__all__ = ["backend"]

PRESET = {"max_steps": 8, "max_tokens": 12, "mode": "diffusion", "t_min": 0.5}


@pytest.fixture
def server(backend: FakeBackend) -> Iterator[TestClient]:
    with connect(backend, Settings(preset=PRESET)) as one:
        yield one


def test_what_a_request_leaves_open_is_the_presets(server: TestClient, backend: FakeBackend) -> None:
    chat(server)
    chat(server, max_steps=3, max_completion_tokens=4)
    first, second = (query.options for query in backend.queries)
    assert (first.max_steps, first.max_tokens, first.mode, first.t_min) == (8, 12, "diffusion", 0.5)
    assert (second.max_steps, second.max_tokens, second.mode) == (3, 4, "diffusion")


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 5}),
        ("/api/chat", {"model": "fake", "messages": MESSAGES}),
        ("/api/generate", {"model": "fake", "prompt": "a"}),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}),
        ("/api/generate", {"model": "fake", "prompt": "a", "suffix": "b"}),
        ("/v1/infill", {"prefix": "a", "suffix": "b"}),
        ("/v1/edit", {"text": "a", "instruction": "b"}),
        ("/v1/fill", {"template": ["a ", {"name": "x", "length": 2}]}),
    ],
)
def test_every_dialect_has_it(route: str, body: dict[str, object], server: TestClient, backend: FakeBackend) -> None:
    response = server.post(route, json=body)
    assert response.status_code == 200, response.text
    options = backend.queries[0].options
    assert options.max_steps == 8
    is_template = "suffix" in body or "template" in body or "text" in body
    assert options.mode == (None if is_template else "diffusion"), "a template has no mode"


def test_what_contradicts_a_request_is_left_out(server: TestClient, backend: FakeBackend) -> None:
    assert chat(server, min_tokens=20, t_max=0.3).status_code == 200
    options = backend.queries[0].options
    assert (options.max_steps, options.min_tokens, options.max_tokens) == (8, 20, None)
    assert (options.t_max, options.t_min) == (0.3, None)


@pytest.mark.parametrize("request_", [{}, {"t_max": 0.3}])
def test_the_order_of_a_preset_says_nothing(request_: dict[str, float], backend: FakeBackend) -> None:
    """`verify` needs `redos`, which stands behind it; with and without something that contradicts the request."""
    with connect(backend, Settings(preset={"t_min": 0.5, "verify": 4.0, "redos": 1})) as server:
        assert chat(server, **request_).status_code == 200
    options = backend.queries[0].options
    assert (options.redos, options.verify, options.t_min) == (1, 4.0, None if request_ else 0.5)


def test_a_template_with_a_grammar_has_no_redos_of_a_preset(backend: FakeBackend) -> None:
    slots: tuple[dict[str, object], ...] = {"name": "x", "regex": "[0-9]{3}"}, {"name": "x", "length": 2}
    with connect(backend, Settings(preset={"redos": 1})) as server:
        for slot in slots:
            assert server.post("/v1/fill", json={"template": ["a ", slot]}).status_code == 200
        server.post("/v1/fill", json={"template": ["a ", slots[0]], "redos": 2})
    assert [query.options.redos for query in backend.queries] == [0, 1, 2]


def test_clients_see_its_values_as_defaults(server: TestClient) -> None:
    options = {one["name"]: one["default"] for one in server.get("/v1/options").json()["options"]}
    assert (options["max_steps"], options["max_tokens"], options["t_max"]) == (8, 12, 0.7)
    shown = server.post("/api/show", json={"model": "fake"}).json()["parameters"]
    assert "max_steps 8" in shown and "t_max 0.7" in shown
