"""server/http/document.py: the OpenAPI document against the server, by schemathesis. No case may fail, or belie it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fake_backend import FakeBackend, Served, serving

from sfumato.server.app import Settings, create

schemathesis = pytest.importorskip("schemathesis", reason="needs the package schemathesis")
jsonschema = pytest.importorskip("jsonschema", reason="needs the package jsonschema")

PATIENCE = 10
"""Seconds in which every case must be answered, to the end of its stream."""
DOCUMENT = create(FakeBackend(), Settings()).openapi()


def wrong_data_is_refused(context: Any, response: Any, case: Any) -> bool | None:
    """The check of schemathesis, of what is wrong: data changed in one branch of an `anyOf` may fit another."""
    body = DOCUMENT["paths"][case.path][case.method.lower()].get("requestBody", {}).get("content", {})
    schema = body.get("application/json", {}).get("schema")
    is_of_body = schema is not None and not case.query and not case.path_parameters
    whole = {**(schema or {}), "components": DOCUMENT["components"]}
    if is_of_body and isinstance(case.body, dict) and jsonschema.Draft202012Validator(whole).is_valid(case.body):
        return None
    refused: bool | None = schemathesis.checks.negative_data_rejection(context, response, case)
    return refused


CHECKS = [
    schemathesis.checks.not_a_server_error,
    schemathesis.checks.status_code_conformance,
    schemathesis.checks.content_type_conformance,
    schemathesis.checks.response_schema_conformance,
    schemathesis.checks.response_headers_conformance,
    wrong_data_is_refused,
]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(create(FakeBackend(), Settings())) as one:
        yield one


def cases(examples: int, has_edges: bool) -> Any:
    """The document, as a source of so many random cases an operation, always the same; edges are what each field just
    allows and just forbids."""
    phases = {"examples": False, "coverage": has_edges, "fuzzing": True, "stateful": False}
    config = {
        "max-stream-events": 10_000,
        "phases": {name: {"enabled": is_on} for name, is_on in phases.items()},
        "generation": {"deterministic": True, "max-examples": examples},
    }
    config = schemathesis.config.SchemathesisConfig.from_dict(config)
    return schemathesis.openapi.from_dict(create(FakeBackend(), Settings()).openapi(), config=config)


def ask(case: Any, served: Served) -> None:
    response = case.call(base_url=served.url, timeout=PATIENCE)
    case.validate_response(response, checks=CHECKS)
    if response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
        check_stream(response.text)


def check_stream(text: str) -> None:
    """It ends as a stream of its kind does, and not with an error."""
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    if "event: response." in text:
        assert json.loads(events[-1])["type"] in ("response.completed", "response.incomplete")
    elif "event: message_start" in text:
        assert json.loads(events[-1])["type"] == "message_stop"
    else:
        assert events.pop() == "[DONE]" and events
    assert not any("error" in one and one["error"] for one in map(json.loads, events))


@cases(35, has_edges=False).parametrize()  # type: ignore[untyped-decorator]
def test_what_the_document_says_is_so(case: Any, served: Served) -> None:
    ask(case, served)


@pytest.mark.slow
@cases(260, has_edges=True).parametrize()  # type: ignore[untyped-decorator]
def test_what_the_document_says_is_so_in_thousands_of_cases(case: Any, served: Served) -> None:
    ask(case, served)


def test_a_value_may_fit_several_shapes() -> None:
    """A message with an id has all that a reference to an item needs, and is taken."""
    body = {"input": [{"type": None, "role": "user", "content": "Hi", "id": "msg_1"}]}
    content = DOCUMENT["paths"]["/v1/responses"]["post"]["requestBody"]["content"]
    schema = content["application/json"]["schema"] | {"components": DOCUMENT["components"]}
    jsonschema.Draft202012Validator(schema).validate(body)
