"""server/openai/completions.py: what /v1/completions takes, refuses and answers."""

from __future__ import annotations

import pytest
import server_client
from fake_backend import FakeBackend
from server_client import complete, events, prompts, refused
from starlette.testclient import TestClient

from sfumato.templates.requests import Complete, Infill, Likelihood

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
        {"suffix": "x", "logprobs": 1},
        {"suffix": "x", "logprobs": 1, "echo": True},
    ):
        refused(complete(client, **({"prompt": "x"} | more)))


# ---- echo with logprobs ----------------------------------------------------------------------------------------------

SCORED = {"echo": True, "logprobs": 1, "seed": 1}


def test_echo_with_logprobs_scores_the_prompt(client: TestClient, backend: FakeBackend) -> None:
    """As lm-eval reads it: a value a token, null for the first, and the one token that is written last."""
    body = complete(client, prompt=["ab cd", "e"], max_tokens=1, **SCORED).json()
    text, other = body["choices"]
    assert text["text"] == "ab cd next" and text["finish_reason"] == "length"
    assert text["logprobs"] == {
        "tokens": ["<bos>", "ab", " cd", " next"],
        "token_logprobs": [None, -0.5, -1.5, -0.5],
        "top_logprobs": [None, {"ab": -0.25}, {"cd": -0.25}, {" next": -0.5}],
        "text_offset": [0, 0, 2, 5],
    }
    assert other["text"] == "e next" and other["index"] == 1
    assert body["usage"]["completion_tokens"] == 2 and body["usage"]["steps"] == 0
    assert [type(query) for query in backend.queries] == [Likelihood, Likelihood] and backend.queries[
        0
    ].options.seed == 1
    [one, two] = complete(client, prompt=[[5, 6], [7]], max_tokens=1, **SCORED).json()["choices"]
    assert (one["text"], two["text"]) == ("[5] [6] next", "[7] next")


def test_no_token_is_written_where_none_is_asked_for(client: TestClient) -> None:
    fields = SCORED | {"logprobs": 0, "max_tokens": 0, "n": 2}
    first, second = complete(client, prompt="ab", **fields).json()["choices"]
    assert first["logprobs"] == {
        "tokens": ["<bos>", "ab"],
        "token_logprobs": [None, -0.5],
        "top_logprobs": None,
        "text_offset": [0, 0],
    }
    assert first["text"] == "ab" and second == first | {"index": 1}
    assert complete(client, prompt="ab", **fields).json()["usage"]["completion_tokens"] == 0


def test_a_longer_answer_stands_behind_the_echo(client: TestClient) -> None:
    plain = complete(client, prompt="ab", logprobs=1, max_tokens=3, seed=1).json()["choices"][0]
    [whole] = complete(client, prompt="ab", max_tokens=3, **SCORED).json()["choices"]
    assert whole["text"] == "ab" + plain["text"] and whole["finish_reason"] == plain["finish_reason"]
    for name in ("tokens", "token_logprobs", "top_logprobs"):
        assert whole["logprobs"][name][2:] == plain["logprobs"][name]
    assert whole["logprobs"]["tokens"][:2] == ["<bos>", "ab"]
    assert whole["logprobs"]["text_offset"][2:] == [2 + at for at in plain["logprobs"]["text_offset"]]


@pytest.mark.parametrize("most", [0, 1, 3])
def test_a_stream_says_the_same(client: TestClient, most: int) -> None:
    fields = SCORED | {"prompt": [[7], [8, 9]], "max_tokens": most}
    whole = complete(client, **fields).json()
    chunks = events(complete(client, **fields, stream=True, stream_options={"include_usage": True}))
    for choice in whole["choices"]:
        own = [one for chunk in chunks for one in chunk["choices"] if one["index"] == choice["index"]]
        assert "".join(one["text"] for one in own) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [value for one in own if one["logprobs"] for value in one["logprobs"][name]] == values
        assert own[-1]["finish_reason"] == choice["finish_reason"]
    assert chunks[-1]["usage"] == whole["usage"]
