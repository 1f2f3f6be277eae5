"""server/openai/completions.py: what /v1/completions takes, refuses and answers."""

from __future__ import annotations

import server_client
from fake_backend import FakeBackend
from server_client import complete, events, prompts, refused
from starlette.testclient import TestClient

from sfumato.templates.requests import Complete, Infill

backend, client = server_client.backend, server_client.client


def test_completions(client: TestClient, backend: FakeBackend) -> None:
    body = complete(client, prompt="Once", seed=1, best_of=1, max_tokens=3, echo=True).json()
    assert body["object"] == "text_completion"
    assert body["choices"] == [
        {"index": 0, "text": "Once one two three", "finish_reason": "length", "stop_reason": None, "logprobs": None}
    ]
    [query] = backend.queries
    assert isinstance(query, Complete) and query.prompt == "Once"


def test_several_prompts(client: TestClient, backend: FakeBackend) -> None:
    choices = complete(client, prompt=["a", "b"], n=2, seed=1).json()["choices"]
    assert [c["index"] for c in choices] == [0, 1, 2, 3]
    assert prompts(backend) == ["a", "a", "b", "b"]
    assert [query.options.seed for query in backend.queries] == [1, 2, 1, 2]
    complete(client, prompt=[1, 2])
    assert prompts(backend)[-1] == [1, 2]
    complete(client, prompt=[[1, 2], [3]])
    assert prompts(backend)[-2:] == [[1, 2], [3]]
    assert refused(complete(client, prompt=["a"] * 33, n=2))["param"] == "prompt"
    assert refused(complete(client, prompt=[]))["param"] == "prompt"


def test_completion_logprobs(client: TestClient) -> None:
    [choice] = complete(client, prompt="x", logprobs=2, seed=1).json()["choices"]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert [choice["text"][at : at + 4] for at in logprobs["text_offset"][:2]] == [" one", " two"]
    assert logprobs["token_logprobs"][:2] == [-0.5, -1.0] and logprobs["top_logprobs"][0] == {
        " one": -0.5,
        " other": -9999.0,
    }
    chunks = [
        one["choices"][0]["logprobs"] for one in events(complete(client, prompt="x", logprobs=2, seed=1, stream=True))
    ]
    for name in ("tokens", "text_offset"):
        assert [value for one in chunks if one for value in one[name]] == logprobs[name]
    [choice] = complete(client, prompt="x", logprobs=0).json()["choices"]
    assert choice["logprobs"]["top_logprobs"] is None
    assert refused(complete(client, prompt="x", logprobs=6))["param"] == "logprobs"


def test_completions_stream(client: TestClient) -> None:
    usage_options = {"include_usage": True}
    chunks = events(complete(client, prompt=["a", "b"], seed=1, stream=True, echo=True, stream_options=usage_options))
    texts = {0: "", 1: ""}
    for one in chunks[:-1]:
        texts[one["choices"][0]["index"]] += one["choices"][0]["text"]
    answer = " one two three four five (seed 1)."
    assert texts == {0: "a" + answer, 1: "b" + answer}
    assert chunks[-1]["usage"]["completion_tokens"] == 14


def test_suffix_is_an_infill(client: TestClient, backend: FakeBackend) -> None:
    [choice] = complete(client, prompt="a", suffix="b", max_tokens=9).json()["choices"]
    assert choice["text"] == " middle " and choice["finish_reason"] == "stop"
    [query] = backend.queries
    assert isinstance(query, Infill) and query.options.max_tokens is None
    assert (query.prefix, query.suffix, query.length, query.at_most) == ("a", "b", None, 9)
    assert (
        "".join(one["choices"][0]["text"] for one in events(complete(client, prompt="a", suffix="b", stream=True)))
        == " middle "
    )
    assert refused(complete(client, prompt=["a", "b"], suffix="c"))["param"] == "suffix"
    for more in (
        {"best_of": 2},
        {"prompt": [1], "echo": True},
        {"echo": True, "logprobs": 1},
        {"suffix": "x", "logprobs": 1},
    ):
        refused(complete(client, **({"prompt": "x"} | more)))
