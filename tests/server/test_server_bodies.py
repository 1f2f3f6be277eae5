"""server/http/bodies.py: wrong and huge bodies, counts without end; each is refused, and a bystander is answered."""

from __future__ import annotations

import http.client
import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import raw_client
from fake_backend import CARD, FakeBackend
from raw_client import CHAT, SAY, post, refused, served
from starlette.testclient import TestClient

from sfumato.errors import SfumatoError
from sfumato.server.app import Settings, create
from sfumato.server.backend import Stats
from sfumato.server.canvas.bodies import DecisionsRequest, EditRequest, FillRequest, InfillRequest
from sfumato.server.http.bodies import Body, BodyReading, Most, read, schemas_in
from sfumato.server.openai.bodies import ChatRequest, CompletionRequest
from sfumato.server.openai.items import ResponsesRequest
from sfumato.server.settings import Limits
from sfumato.server.systemone.bodies import SystemOneRequest

client = raw_client.client

LARGE = 4 << 20
UNITS = [b"0", b"[]", b"{}", b'""', b"1.5", b"null", b'"\\ud83d\\ude00"', b"[[[[]]]]", b'{"a":{"a":0}}']


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


KINDS: dict[str, type[Body]] = {
    CHAT: ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/infill": InfillRequest,
    "/v1/edit": EditRequest,
    "/v1/fill": FillRequest,
    "/v1/decisions": DecisionsRequest,
    "/v1/systemone": SystemOneRequest,
}


def check_bodies(size: int, seconds: float, memory: int, names: tuple[str, ...] = ()) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kind in KINDS.values():
        for body in wrong_bodies(kind, size):
            if names and not any(body.startswith(b'{"' + name.encode()) for name in names):
                continue
            start = time.perf_counter()
            try:
                read(body, kind, BodyReading(Limits()))
            except SfumatoError as error:
                assert len(str(error)) < 2100
            took = time.perf_counter() - start
            assert took < seconds, (kind, body[:40], body[-10:], took)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    assert grown < memory, grown


@pytest.mark.parametrize(
    ("size", "names"),
    [
        (1 << 17, ("template", "prompt", "messages", "spans", "input", "fields", "questions", "state")),
        pytest.param(1 << 17, (), marks=pytest.mark.slow),
        pytest.param(LARGE, ("template", "prompt", "input", "fields"), marks=pytest.mark.slow),
    ],
)
def test_a_wrong_body_costs_little(size: int, names: tuple[str, ...]) -> None:
    """In a process of its own, whose memory is that of these bodies alone."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    code = f"import sys; sys.path[:0] = {paths!r}; import test_server_bodies as t\n"
    code += f"t.check_bodies({size}, 6, 400, {names!r})"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert child.returncode == 0, child.stderr[-2000:]


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
        assert waits == [400] * 4 and slowest < 10


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
        (CHAT, {**SAY, "functions": [{"name": "f"}] * 129}, 128, "functions"),
        (CHAT, {**SAY, "guided_choice": ["a"] * 1025}, 1024, "guided_choice"),
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
            if number == 0 and (name == "top_logprobs" or (path, len(body)) == ("/v1/completions", 1)):
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


def test_cards_of_other_sizes_bound_other_lengths() -> None:
    backend = FakeBackend(replace(CARD, max_position=100))
    with TestClient(create(backend, Settings()), base_url="http://localhost") as client:
        assert client.post("/v1/infill", json={"prefix": "a", "suffix": "b", "length": 100}).status_code == 200
        error = refused(client.post("/v1/infill", json={"prefix": "a", "suffix": "b", "length": 101}))
        assert error["code"] == "context_length_exceeded" and "100 tokens" in error["message"]
        assert error["param"] == "length"
