"""server/openai/chat.py: what /v1/chat/completions takes, refuses and answers, whole and as a stream."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import server_client
from fake_backend import CARD, FakeBackend
from server_client import FORMAT, MESSAGES, WEATHER, chat, chats, connect, events, refused
from starlette.testclient import TestClient

from sfumato.options import Options
from sfumato.templates.requests import Chat

backend, client = server_client.backend, server_client.client


def test_chat(client: TestClient, backend: FakeBackend) -> None:
    body = chat(client, seed=5, model="fake", max_steps=7).json()
    assert body["object"] == "chat.completion" and body["model"] == "fake" and body["seed"] == 5
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "You said: Hello there (seed 5).", "refusal": None},
            "finish_reason": "stop",
            "stop_reason": None,
            "logprobs": None,
        }
    ]
    usage = body["usage"]
    assert usage["completion_tokens"] == 6 and usage["total_tokens"] == usage["prompt_tokens"] + 6
    assert usage["prompt_tokens_details"] == {"cached_tokens": 1}
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 0}
    assert (usage["steps"], usage["canvases"], usage["passes"], usage["tokens_per_pass"]) == (6, 2, 7, 0.8571)
    assert backend.queries == [Chat(MESSAGES, None, Options(seed=5, max_steps=7))]


def test_chat_streams(client: TestClient) -> None:
    chunks = events(chat(client, seed=5, stream=True, stream_options={"include_usage": True}))
    assert len({one["id"] for one in chunks}) == 1
    assert {one["object"] for one in chunks} == {"chat.completion.chunk"} and {one["seed"] for one in chunks} == {5}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    texts = [one["choices"][0]["delta"].get("content", "") for one in chunks[:-1]]
    assert texts == ["", "You said: Hello", " there (seed 5).", ""]
    assert [one["choices"][0]["finish_reason"] for one in chunks[:-1]] == [None, None, None, "stop"]
    assert [one["usage"] for one in chunks[:-1]] == [None] * 4
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 6


def test_chat_stream_without_usage(client: TestClient) -> None:
    assert all("usage" not in one for one in events(chat(client, stream=True)))


def test_drafts(client: TestClient) -> None:
    chunks = events(chat(client, seed=5, stream=True, drafts=True))
    drafts = [one["draft"] for one in chunks if "draft" in one]
    assert all(one["choices"] == [] for one in chunks if "draft" in one)
    assert len(drafts) == 6 and drafts[0] == {
        "index": 0,
        "canvas": 0,
        "step": 0,
        "pieces": ["You", " ?", " ?"],
        "entropies": [0.01, 1.2346, 1.2346],
        "accepted": [True, False, False],
        "end": 3,
    }
    assert refused(chat(client, drafts=True))["param"] == "drafts"


def test_choices_run_side_by_side_each_with_its_seed(backend: FakeBackend, client: TestClient) -> None:
    body = chat(client, seed=5, n=3).json()
    assert [c["message"]["content"][-3:-2] for c in body["choices"]] == ["5", "6", "7"]
    assert [c["index"] for c in body["choices"]] == [0, 1, 2] and body["seed"] == 5
    assert backend.most_running == 3
    assert body["usage"]["completion_tokens"] == 18 and body["usage"]["prompt_tokens"] < 18
    streamed: dict[int, str] = {}
    for one in events(chat(client, seed=5, n=3, stream=True)):
        [choice] = one["choices"]
        streamed[choice["index"]] = streamed.get(choice["index"], "") + choice["delta"].get("content", "")
    assert streamed == {c["index"]: c["message"]["content"] for c in body["choices"]}


def test_a_job_has_one_id_which_begins_with_the_requests(backend: FakeBackend, client: TestClient) -> None:
    id = chat(client).headers["x-request-id"]
    assert [job.id for job in backend.jobs] == [id]
    id = chat(client, n=2).headers["x-request-id"]
    assert [job.id for job in backend.jobs[1:]] == [f"{id}/0", f"{id}/1"]
    body, headers = {"messages": MESSAGES, "n": 2}, {"x-request-id": "mine"}
    for _ in range(3):  # a client may send the same again, while the worker still ends the one before
        assert client.post("/v1/chat/completions", json=body, headers=headers).headers["x-request-id"] == "mine"
    assert len({job.id for job in backend.jobs}) == 9
    assert [job.request for job in backend.jobs[3:]] == ["mine"] * 6 and backend.jobs[1].request == id


def test_seeds(client: TestClient) -> None:
    drawn = {chat(client).json()["seed"] for _ in range(3)}
    assert len(drawn) > 1
    assert chat(client, temperature=0).json()["seed"] == 0
    assert chat(client, temperature=0, seed=4).json()["seed"] == 4
    assert refused(chat(client, seed=-1))["param"] == "seed"
    assert "seed" in refused(chat(client, seed=1 << 62, n=2))["message"]


def test_stop_and_length(client: TestClient, backend: FakeBackend) -> None:
    [choice] = chat(client, seed=5, stop=" there").json()["choices"]
    assert choice["message"]["content"] == "You said: Hello" and choice["finish_reason"] == "stop"
    [choice] = chat(client, seed=5, max_completion_tokens=2).json()["choices"]
    assert choice["message"]["content"] == "You said:" and choice["finish_reason"] == "length"
    assert backend.queries[-1].options.max_tokens == 2
    assert refused(chat(client, max_tokens=2, max_completion_tokens=3))["param"] == "max_tokens"


def test_logprobs(client: TestClient) -> None:
    [choice] = chat(client, seed=5, logprobs=True, top_logprobs=2).json()["choices"]
    content = choice["logprobs"]["content"]
    assert "".join(one["token"] for one in content) == choice["message"]["content"]
    assert content[1]["logprob"] == -1.0 and bytes(content[1]["bytes"]).decode() == content[1]["token"] == " said:"
    assert [one["logprob"] for one in content[1]["top_logprobs"]] == [-0.5, -9999.0]
    streamed = [
        entry
        for one in events(chat(client, seed=5, logprobs=True, top_logprobs=2, stream=True))
        for entry in (one["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == content
    assert "logprobs" in refused(chat(client, top_logprobs=2))["message"]


@pytest.mark.parametrize(
    ("more", "is_thinking"),
    [
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "low"}, True),
        ({"thinking": True}, True),
        ({}, False),
    ],
)
def test_thinking(client: TestClient, backend: FakeBackend, more: dict[str, Any], is_thinking: bool) -> None:
    message = chat(client, **more).json()["choices"][0]["message"]
    assert backend.queries[0].options.thinking is is_thinking
    assert message.get("reasoning_content") == ("Let me think." if is_thinking else None)
    thoughts = [
        one["choices"][0]["delta"].get("reasoning_content") for one in events(chat(client, stream=True, **more))
    ]
    assert ("Let me think." in thoughts) is is_thinking


def test_thinking_two_ways(client: TestClient) -> None:
    assert refused(chat(client, thinking=True, reasoning_effort="none"))["param"] == "thinking"


def test_tools(client: TestClient, backend: FakeBackend) -> None:
    [choice] = chat(client, tools=[WEATHER]).json()["choices"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    [call] = choice["message"]["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert call["function"] == {"name": "weather", "arguments": '{"place": "text"}'}
    assert chats(backend)[0].tools == [WEATHER] and not backend.queries[0].options.must_call
    chunks = events(chat(client, tools=[WEATHER], stream=True))
    [[delta]] = [
        one["choices"][0]["delta"]["tool_calls"] for one in chunks if "tool_calls" in one["choices"][0]["delta"]
    ]
    assert delta["index"] == 0 and delta["function"] == call["function"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"

    after = [*MESSAGES, choice["message"], {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}]
    [last] = client.post("/v1/chat/completions", json={"messages": after, "tools": [WEATHER]}).json()["choices"]
    assert last["message"]["content"] == "The tool says sunny" and last["finish_reason"] == "stop"
    assert chats(backend)[-1].conversation[1] == {"role": "assistant", "tool_calls": [call]}


def test_parallel_calls(client: TestClient) -> None:
    twice = [{"role": "user", "content": "twice"}]
    for is_parallel, count in ((True, 2), (False, 1)):
        body = {"messages": twice, "tools": [WEATHER], "parallel_tool_calls": is_parallel}
        message = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
        assert len(message["tool_calls"]) == count and len({call["id"] for call in message["tool_calls"]}) == count
        deltas = [
            one["choices"][0]["delta"]
            for one in events(client.post("/v1/chat/completions", json=body | {"stream": True}))
        ]
        indices = [call["index"] for delta in deltas for call in delta.get("tool_calls", [])]
        assert indices == list(range(count))


def test_tool_choice(client: TestClient, backend: FakeBackend) -> None:
    other = {"type": "function", "function": {"name": "other", "strict": True}}
    chat(client, tools=[WEATHER, other], tool_choice="required")
    named = {"type": "function", "function": {"name": "weather"}}
    chat(client, tools=[WEATHER, other], tool_choice=named)
    chat(client, tools=[WEATHER], tool_choice="none")
    chat(client, tools=[WEATHER], tool_choice="auto")
    required, one, none, auto = chats(backend)
    assert required.options.must_call and required.options.strict
    assert required.tools is not None and len(required.tools) == 2
    assert one.options.must_call and one.tools == [WEATHER]
    assert none.tools is None and not none.options.must_call
    assert not auto.options.must_call and not auto.options.strict
    assert refused(chat(client, tool_choice="required"))["param"] == "tool_choice"
    assert refused(chat(client, tools=[other], tool_choice=named))["param"] == "tool_choice"
    assert refused(chat(client, tools=[WEATHER], response_format=FORMAT))["param"] == "response_format"
    assert refused(chat(client, tools=[WEATHER] * 129))["param"] == "tools"


def test_response_format(client: TestClient, backend: FakeBackend) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    [choice] = chat(client, response_format=form).json()["choices"]
    assert json.loads(choice["message"]["content"]) == {"n": 7}
    assert backend.queries[-1].options.schema == schema
    chat(client, response_format={"type": "json_object"})
    assert backend.queries[-1].options.schema == {"type": "object"}
    chat(client, response_format={"type": "text"})
    assert backend.queries[-1].options.schema is None
    assert refused(chat(client, response_format={"type": "json_schema"}))["param"] == "response_format.json_schema"
    assert refused(chat(client, response_format=form, regex="a"))["param"] == "response_format"
    assert chat(client, regex="a+").status_code == 200 and backend.queries[-1].options.regex == "a+"


NEUTRAL = {
    "frequency_penalty": 0.0,
    "presence_penalty": 0,
    "logit_bias": {},
    "store": False,
    "service_tier": "auto",
    "parallel_tool_calls": True,
    "user": "me",
    "metadata": {"a": "b"},
    "prediction": None,
    "modalities": ["text"],
    "top_p": 1,
    "top_k": 0,
    "tools": [],
    "functions": None,
    "seed": None,
    "max_tokens": None,
    "stop": None,
    "min_tokens": None,
    "stream": False,
    "mode": None,
    "schema": None,
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_asks_for_nothing_is_taken(client: TestClient, name: str) -> None:
    assert chat(client, **{name: NEUTRAL[name]}).status_code == 200


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("frequency_penalty", 0.5),
        ("presence_penalty", 1),
        ("logit_bias", {"5": 1}),
        ("modalities", ["text", "audio"]),
        ("unheard_of", 1),
        ("must_call", True),
        ("temperature", 2.5),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0.5),
        ("top_k", 40),
        ("n", 0),
        ("n", 17),
        ("stop", ["a"] * 17),
        ("stop", 3),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_steps", 5000),
        ("mode", "magic"),
        ("t_max", 0),
        ("model", 3),
        ("messages", []),
        ("messages", "hello"),
        ("stream_options", {"include_usage": True}),
        ("stream", "yes"),
    ],
)
def test_what_is_refused_is_named(client: TestClient, backend: FakeBackend, name: str, value: Any) -> None:
    error = refused(chat(client, **{name: value}))
    assert error["param"] == name and error["type"] == "invalid_request_error" and name in error["message"]
    assert not backend.jobs


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "wizard", "content": "x"}, "messages[0].role"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "user", "content": 3}, "messages[0].content"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]},
            "messages[0].content[0].type",
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio"}]},
            "messages[0].content[1].type",
        ),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "messages[0].tool_calls[0].function.name"),
    ],
)
def test_what_is_wrong_in_a_message_is_named(client: TestClient, message: dict[str, Any], param: str) -> None:
    assert refused(client.post("/v1/chat/completions", json={"messages": [message]}))["param"] == param


def test_sampling_applies_where_there_is_no_canvas() -> None:
    backend = FakeBackend(replace(CARD, is_diffusion=False))
    with connect(backend) as client:
        assert chat(client, top_p=0.5, top_k=3).status_code == 200
    with connect(FakeBackend()) as client:
        assert chat(client, top_p=0.5, mode="autoregressive").status_code == 200
    with connect(FakeBackend(replace(CARD, has_chat=False))) as client:
        assert "/v1/completions" in refused(chat(client))["message"]


def test_parts_of_text(client: TestClient, backend: FakeBackend) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"messages": [{"role": "developer", "content": parts}, {"role": "user", "content": parts, "name": "x"}]}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert chats(backend)[0].messages == body["messages"]
