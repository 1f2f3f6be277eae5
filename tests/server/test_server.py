"""server/app.py and status.py: the routes that generate nothing, errors, and the OpenAPI document."""

from __future__ import annotations

import json

import pytest
import server_client
from fake_backend import FakeBackend
from server_client import WEATHER, chat, complete, connect, refused
from starlette.testclient import TestClient

from sfumato.errors import BusyError, CapacityError, InputError, NumericError, WorkerError
from sfumato.server.app import Limits, Settings

backend, client = server_client.backend, server_client.client


# --- the model and the server ----------------------------------------------------------------------------------------


def test_models(backend: FakeBackend) -> None:
    with connect(backend, Settings(name="mine", aliases=("gpt/x",))) as client:
        models = client.get("/v1/models").json()
        assert models["object"] == "list" and [one["id"] for one in models["data"]] == ["mine", "fake", "gpt/x"]
        one = client.get("/v1/models/gpt/x").json()
        assert one["canvas_length"] == 16 and one["max_model_len"] == 4096 and one["is_diffusion"] is True
        assert chat(client, model="gpt/x").json()["model"] == "mine"
        for response in (client.get("/v1/models/other"), chat(client, model="other")):
            assert refused(response, 404)["code"] == "model_not_found"


def test_options(client: TestClient) -> None:
    options = {one["name"]: one for one in client.get("/v1/options").json()["options"]}
    assert options["max_steps"] == {
        "name": "max_steps",
        "type": "integer",
        "default": 24,
        "minimum": 1,
        "maximum": 4096,
        "choices": None,
        "doc": "Denoising steps of a canvas at most.",
    }
    assert options["mode"]["choices"] == ["diffusion", "autoregressive"] and options["t_max"]["default"] == 0.7
    assert options["stop"]["type"] == "array" and options["schema"]["type"] == "object"
    assert options["temperature"]["maximum"] == 2 and "must_call" not in options


def test_health_and_ready(backend: FakeBackend, client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    backend.is_loaded = False
    response = client.get("/ready")
    assert (response.status_code, response.json()) == (503, {"status": "restarting"})
    assert client.get("/health").status_code == 200


def test_loading(backend: FakeBackend) -> None:
    backend.is_loaded = False
    with connect(backend) as client:
        assert client.get("/ready").json() == {"status": "loading"}


def test_a_model_that_cannot_be_loaded(backend: FakeBackend) -> None:
    backend.start_error, backend.is_loaded = InputError("there is no such model"), False
    with connect(backend) as client:
        for path in ("/health", "/ready"):
            response = client.get(path)
            assert (response.status_code, response.json()) == (503, {"status": "failed"})


def test_metrics(backend: FakeBackend, client: TestClient) -> None:
    chat(client)
    chat(client, temperature=9)
    client.get("/nowhere")
    text = client.get("/metrics").text
    assert 'sfumato_requests_total{route="/v1/chat/completions",status="200"} 1.0' in text
    assert 'sfumato_requests_total{route="/v1/chat/completions",status="400"} 1.0' in text
    assert 'sfumato_requests_total{route="other",status="404"} 1.0' in text
    assert "sfumato_tokens_total 6.0" in text and "sfumato_first_commit_seconds_count 1.0" in text
    assert 'sfumato_steps_per_canvas_bucket{le="2.0"} 0.0' in text
    assert 'sfumato_steps_per_canvas_bucket{le="4.0"} 1.0' in text
    names = "queue_jobs rows rows_max steps_total canvases_total passes_total tokens_per_pass prefix_hits_total"
    more = "prefix_tokens_total cache_bytes prefix_bytes memory_bytes worker_restarts_total request_seconds_count"
    for name in (names + " " + more).split():
        assert f"\nsfumato_{name} " in text, name


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "type", "code"),
    [
        (InputError("stop is bad; mend it"), 400, "invalid_request_error", None),
        (CapacityError("too long; shorten it"), 400, "invalid_request_error", "context_length_exceeded"),
        (CapacityError("no room; raise max_tokens", option="max_tokens"), 400, "invalid_request_error", None),
        (BusyError("full; wait"), 503, "overloaded_error", None),
        (WorkerError("died; again"), 503, "worker_error", None),
        (NumericError("the model's numbers are not finite; check it"), 500, "server_error", "numeric_error"),
        (RuntimeError("secret"), 500, "server_error", None),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_errors(error: Exception, status: int, type: str, code: str | None, is_stream: bool) -> None:
    with connect(FakeBackend(error=error)) as client:
        response = chat(client, stream=is_stream)
        body = refused(response, status)
        assert (body["type"], body["code"]) == (type, code) and "secret" not in body["message"]
        assert (response.headers.get("retry-after") == "1") is (status == 503)
        assert response.headers["x-request-id"]


def test_an_error_amid_a_stream_is_its_last_event() -> None:
    with connect(FakeBackend(error=WorkerError("died; again"), error_after=1)) as client:
        response = chat(client, stream=True)
        assert response.status_code == 200 and "[DONE]" not in response.text
        *_, last = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]
        assert last["error"]["type"] == "worker_error"
        assert refused(chat(client), 503)
    with connect(FakeBackend(error=NumericError("not finite"), error_after=1)) as client:
        for response in chat(client, stream=True), complete(client, prompt="a", stream=True):
            last = [line for line in response.text.splitlines() if line.startswith("data: ")][-1]
            assert json.loads(last[6:])["error"]["code"] == "numeric_error"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b'{"a": NaN}', "invalid_json"),
        (b'{"a": 1e999}', "invalid_json"),
        (b'{"a": ' + b"1" * 5000 + b"}", "invalid_json"),
        (b"[" * 65 + b"]" * 65, "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "invalid_json"),
        (b"[]", None),
        (b"null", None),
        (b"3", None),
    ],
)
def test_bodies_that_are_none(client: TestClient, body: bytes, code: str | None) -> None:
    for path in ("/v1/chat/completions", "/v1/fill", "/v1/responses"):
        response = client.post(path, content=body, headers={"content-type": "application/json"})
        assert refused(response)["code"] == code


def test_wrong_addresses_and_methods(client: TestClient) -> None:
    refused(client.get("/nothing/here"), 404)
    response = client.get("/v1/chat/completions")
    refused(response, 405)
    assert response.headers["allow"] == "POST"
    refused(client.post("/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"}), 415)
    refused(client.get("/ui/nothing.js"), 404)


# --- the document ----------------------------------------------------------------------------------------------------


def test_the_document_is_whole(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    text = json.dumps(document)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in schemas, name
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert ("422" in operation["responses"]) == (path == "/v1/systemone"), path
            if method == "post":
                assert operation["requestBody"]["required"] and {"503", "529"} & set(operation["responses"])
    stream = document["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert set(stream) == {"application/json", "text/event-stream"}
    assert schemas["ChatRequest"]["additionalProperties"] is False
    assert schemas["ChatRequest"]["properties"]["max_steps"]["anyOf"][0]["maximum"] == 4096


def test_limits_are_settings() -> None:
    settings = Settings(limits=Limits(max_n=2, max_stops=1, max_tools=1, max_prompts=3))
    with connect(FakeBackend(), settings) as client:
        assert refused(chat(client, n=3))["param"] == "n"
        assert refused(chat(client, stop=["a", "b"]))["param"] == "stop"
        assert refused(chat(client, tools=[WEATHER, WEATHER]))["param"] == "tools"
        assert refused(complete(client, prompt=["a", "b"], n=2))["param"] == "prompt"
