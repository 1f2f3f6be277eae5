"""server/anthropic/: /v1/messages and /v1/messages/count_tokens: what they take, what they answer, their errors."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from fake_backend import FakeBackend
from server_client import backend as backend
from server_client import chats, connect
from server_client import client as client
from starlette.testclient import TestClient

from sfumato.errors import BusyError, CapacityError, NumericError
from sfumato.server.app import Settings
from sfumato.server.http.seals import SEAL
from sfumato.templates.requests import Chat, CountTokens
from sfumato.text.replies import Reply

HELLO: dict[str, Any] = {"model": "fake", "max_tokens": 100, "messages": [{"role": "user", "content": "Hello there"}]}
WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "The weather in a place",
    "input_schema": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"place": "Oslo"}}
PNG = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}


def ask(client: TestClient, **more: Any) -> Any:
    return client.post("/v1/messages", json=HELLO | more)


def answer(client: TestClient, **more: Any) -> dict[str, Any]:
    response = ask(client, **more)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def events(client: TestClient, **more: Any) -> list[dict[str, Any]]:
    """The events of a stream, each under the name that its data has."""
    response = ask(client, stream=True, **more)
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    parts = [part.split("\n") for part in response.text.removesuffix("\n\n").split("\n\n")]
    values = [json.loads(data.removeprefix("data: ")) for _, data in parts]
    assert [name.removeprefix("event: ") for name, _ in parts] == [one["type"] for one in values]
    return values


def added(stream: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that the events add up to, as Anthropic's SDKs add them."""
    message: dict[str, Any] = {}
    for event in stream:
        match event["type"]:
            case "message_start":
                message = event["message"]
            case "content_block_start":
                assert event["index"] == len(message["content"])
                message["content"].append(event["content_block"] | {"json": ""})
            case "content_block_delta":
                delta, block = dict(event["delta"]), message["content"][event["index"]]
                kind = delta.pop("type")
                if kind == "input_json_delta":
                    block["json"] += delta["partial_json"]
                else:
                    [(name, text)] = delta.items()
                    assert kind == f"{name}_delta"
                    block[name] += text
            case "content_block_stop":
                block = message["content"][event["index"]]
                if text := block.pop("json"):
                    block["input"] = json.loads(text)
            case "message_delta":
                message |= event["delta"] | {"usage": message["usage"] | event["usage"]}
    return message


def refused(response: Any, status: int, kind: str) -> str:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"type", "error"} and body["type"] == "error" and set(body["error"]) == {"type", "message"}
    assert body["error"]["type"] == kind and "\n" not in body["error"]["message"]
    assert response.headers["request-id"] == response.headers["x-request-id"]
    return str(body["error"]["message"])


def last_chat(backend: FakeBackend) -> Chat:
    return chats(backend)[-1]


# --- answers -------------------------------------------------------------------------------------------------------


def test_an_answer(client: TestClient) -> None:
    body = answer(client, seed=3)
    assert body["id"].startswith("msg_") and (body["type"], body["role"], body["model"]) == (
        "message",
        "assistant",
        "fake",
    )
    assert body["content"] == [{"type": "text", "text": "You said: Hello there (seed 3)."}]
    assert (body["stop_reason"], body["stop_sequence"]) == ("end_turn", None)
    usage = body["usage"]
    assert usage["output_tokens"] == 6 and usage["cache_creation_input_tokens"] == 0
    assert usage["input_tokens"] > 0 and usage["cache_read_input_tokens"] == 1


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"tools": [WEATHER]},
        {"tools": [WEATHER], "thinking": {"type": "adaptive"}},
        {"stop_sequences": [" said"]},
        {"max_tokens": 2},
        {"max_tokens": 0, "tools": [WEATHER], "tool_choice": {"type": "any"}},
        {"thinking": {"type": "enabled", "display": "omitted"}},
    ],
)
def test_a_stream_adds_up_to_the_whole(client: TestClient, more: dict[str, Any]) -> None:
    whole, stream = answer(client, seed=1, **more), events(client, seed=1, **more)
    kinds = [event["type"] for event in stream]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    streamed = added(stream)
    for message in (whole, streamed):
        message.pop("id")
        for block in message["content"]:
            block.pop("id", None)
    assert streamed == whole


def test_a_thought_comes_first_and_is_signed(client: TestClient, backend: FakeBackend) -> None:
    thought, text = answer(client, thinking={"type": "enabled", "budget_tokens": 1024})["content"]
    assert thought["thinking"] == "Let me think." and len(thought["signature"]) == 44 and text["type"] == "text"
    assert last_chat(backend).options.thinking
    assert [one["type"] for one in answer(client, thinking={"type": "disabled"})["content"]] == ["text"]
    assert not last_chat(backend).options.thinking


def test_a_thought_that_is_not_shown_comes_back_with_its_signature(client: TestClient, backend: FakeBackend) -> None:
    thought, text = answer(client, thinking={"type": "adaptive", "display": "omitted"})["content"]
    assert thought["thinking"] == "" and "think" not in thought["signature"]
    turns = [*HELLO["messages"], {"role": "assistant", "content": [thought, text]}, {"role": "user", "content": "On."}]
    answer(client, messages=turns)
    assert last_chat(backend).conversation[1]["reasoning_content"] == "Let me think."
    for signature in (SEAL + "!", SEAL + base64.b64encode(b"\xff").decode(), "x", None):
        turns[1] = {"role": "assistant", "content": [thought | {"signature": signature}, text]}
        answer(client, messages=turns)
        assert last_chat(backend).conversation[1]["reasoning_content"] == ""


def test_calls(client: TestClient, backend: FakeBackend) -> None:
    body = answer(client, tools=[WEATHER], tool_choice={"type": "any"})
    [call] = body["content"]
    assert call["id"].startswith("toolu_") and (call["name"], call["input"]) == ("weather", {"place": "text"})
    assert body["stop_reason"] == "tool_use" and last_chat(backend).options.must_call
    assert last_chat(backend).tools == [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "description": "The weather in a place",
                "parameters": WEATHER["input_schema"],
            },
        }
    ]


@pytest.mark.parametrize(
    ("choice", "shown", "must_call"),
    [
        ({"type": "auto"}, ["weather", "clock"], False),
        ({"type": "any"}, ["weather", "clock"], True),
        ({"type": "tool", "name": "clock"}, ["clock"], True),
        ({"type": "none"}, [], False),
    ],
)
def test_tool_choice(client: TestClient, backend: FakeBackend, choice: Any, shown: list[str], must_call: bool) -> None:
    answer(client, tools=[WEATHER, WEATHER | {"name": "clock"}], tool_choice=choice)
    query = last_chat(backend)
    assert [tool["function"]["name"] for tool in query.tools or []] == shown and query.options.must_call is must_call


def test_one_call_where_several_are_not_wanted(client: TestClient) -> None:
    fields = {"tools": [WEATHER], "messages": [{"role": "user", "content": "twice"}]}
    assert len(answer(client, **fields)["content"]) == 2
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    assert len(answer(client, tool_choice=choice, **fields)["content"]) == 1


def test_text_between_calls_keeps_its_order() -> None:
    reply = Reply("I look.", "Hm.", [{"name": "weather", "arguments": {}}])
    with connect(FakeBackend(script=lambda query: reply)) as client:
        body = answer(client, tools=[WEATHER], thinking={"type": "enabled"})
    assert [block["type"] for block in body["content"]] == ["thinking", "text", "tool_use"]


def test_tools_that_are_no_functions_are_left_out_and_said(client: TestClient, backend: FakeBackend) -> None:
    tools = [WEATHER, {"type": "bash_20250124", "name": "bash"}, {"type": "web_search_20250305", "name": "w"}]
    response = ask(client, tools=tools)
    assert response.headers["x-sfumato-ignored"] == "tools[].bash_20250124, tools[].web_search_20250305"
    assert [tool["function"]["name"] for tool in last_chat(backend).tools or []] == ["weather"]
    counted = client.post("/v1/messages/count_tokens", json={"messages": HELLO["messages"], "tools": tools})
    assert counted.headers["x-sfumato-ignored"] == "tools[].bash_20250124, tools[].web_search_20250305"
    forced = ask(client, tools=tools[1:], tool_choice={"type": "any"})
    assert "tools" in refused(forced, 400, "invalid_request_error")


def test_strict_tools_and_a_format(client: TestClient, backend: FakeBackend) -> None:
    answer(client, tools=[WEATHER | {"strict": True}])
    assert last_chat(backend).options.strict
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    form = {"type": "json_schema", "schema": schema}
    for fields in ({"output_config": {"format": form, "effort": "high"}}, {"output_format": form}):
        assert json.loads(answer(client, **fields)["content"][0]["text"]) == {"n": 7}
        assert last_chat(backend).options.schema == schema
    assert "constraint" in refused(ask(client, output_format=form, regex="a"), 400, "invalid_request_error")


def test_options(client: TestClient, backend: FakeBackend) -> None:
    answer(client, temperature=0.5, stop_sequences=["zz"], max_tokens=7, seed=9, max_steps=5)
    options = last_chat(backend).options
    assert (options.temperature, options.stop, options.max_tokens) == (0.5, ("zz",), 7)
    assert (options.seed, options.max_steps) == (9, 5)
    answer(client, max_tokens=1 << 40)
    assert last_chat(backend).options.max_tokens == backend.model.max_position


def test_reasons_to_stop(client: TestClient, backend: FakeBackend) -> None:
    body = answer(client, stop_sequences=[" said"])
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", " said")
    assert body["content"] == [{"type": "text", "text": "You"}]
    assert answer(client, max_tokens=2)["stop_reason"] == "max_tokens"
    body = answer(client, max_tokens=0, tools=[WEATHER], tool_choice={"type": "any"})
    assert not last_chat(backend).options.must_call
    assert (body["content"], body["stop_reason"], body["usage"]["output_tokens"]) == ([], "max_tokens", 0)


# --- conversations -------------------------------------------------------------------------------------------------


def test_a_conversation_as_the_template_takes_it(client: TestClient, backend: FakeBackend) -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    turns = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "What weather"}, {"type": "text", "text": "in Oslo?", **mark}],
        },
        {"role": "system", "content": "Be brief."},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "A call.", "signature": "any"},
                {"type": "redacted_thinking", "data": "any"},
                {"type": "text", "text": "I look."},
                CALL,
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_1",
                    "content": [{"type": "text", "text": "rain"}],
                    **mark,
                },
                {"type": "tool_result", "tool_use_id": "toolu_2", "content": "no place", "is_error": True},
                {"type": "tool_result", "tool_use_id": "toolu_3"},
                {"type": "text", "text": "And then?"},
            ],
        },
        {"role": "user", "content": "Please."},
    ]
    answer(
        client, system=[{"type": "text", "text": "You know."}, {"type": "text", "text": "All.", **mark}], messages=turns
    )
    assert list(last_chat(backend).conversation) == [
        {"role": "system", "content": "You know.\nAll."},
        {"role": "user", "content": "What weather\nin Oslo?"},
        {"role": "system", "content": "Be brief."},
        {
            "role": "assistant",
            "reasoning_content": "A call.",
            "content": "I look.",
            "tool_calls": [
                {
                    "id": "toolu_1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": {"place": "Oslo"}},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "rain"},
        {"role": "tool", "tool_call_id": "toolu_2", "content": "Error: no place"},
        {"role": "tool", "tool_call_id": "toolu_3", "content": ""},
        {"role": "user", "content": "And then?\nPlease."},
    ]
    assert not last_chat(backend).is_continued


def test_turns_of_the_assistant_that_follow_one_another_are_one(client: TestClient, backend: FakeBackend) -> None:
    turns = [
        *HELLO["messages"],
        {"role": "assistant", "content": "I look."},
        {"role": "assistant", "content": [CALL]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "rain"}]},
    ]
    answer(client, messages=turns)
    _, spoken, _ = last_chat(backend).conversation
    assert spoken["content"] == "I look." and len(spoken["tool_calls"]) == 1


def test_documents_and_results_of_a_search_are_text(client: TestClient, backend: FakeBackend) -> None:
    blocks = [
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "Facts."}, "title": "T"},
        {"type": "search_result", "source": "a.txt", "title": "S", "content": [{"type": "text", "text": "More."}]},
        {"type": "text", "text": "Sum up."},
    ]
    answer(client, messages=[{"role": "user", "content": blocks}])
    assert last_chat(backend).conversation[0]["content"] == "T\nFacts.\nS (a.txt)\nMore.\nSum up."


def test_a_last_message_of_the_assistant_is_continued(client: TestClient, backend: FakeBackend) -> None:
    opened = [*HELLO["messages"], {"role": "assistant", "content": "The answer is ("}]
    answer(client, messages=opened)
    assert last_chat(backend).is_continued and last_chat(backend).conversation[-1]["content"] == "The answer is ("
    answer(client, messages=[*HELLO["messages"], {"role": "assistant", "content": []}])
    assert not last_chat(backend).is_continued and len(last_chat(backend).conversation) == 1
    unanswered = [*HELLO["messages"], {"role": "assistant", "content": [CALL]}]
    assert "tool_result" in refused(ask(client, messages=unanswered), 400, "invalid_request_error")


# --- counting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"system": "Be brief."},
        {"tools": [WEATHER, WEATHER | {"name": "b"}], "tool_choice": {"type": "tool", "name": "b"}},
        {"thinking": {"type": "adaptive"}},
    ],
)
def test_the_count_is_of_the_prompt_that_is_answered(
    client: TestClient, backend: FakeBackend, more: dict[str, Any]
) -> None:
    usage = answer(client, **more)["usage"]
    counted = client.post("/v1/messages/count_tokens", json={"model": "fake", "messages": HELLO["messages"], **more})
    assert counted.json() == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}
    first, second = backend.queries
    assert isinstance(first, Chat) and isinstance(second, CountTokens) and isinstance(second.query, Chat)
    assert (first.messages, first.tools) == (second.query.messages, second.query.tools)
    assert first.options.thinking == second.query.options.thinking


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [PNG]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content[0].text is missing"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [CALL]}]}, "only the assistant's may"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "messages hold no text"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [PNG]}]}
                ]
            },
            "image",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "document", "source": {"type": "url", "url": "http://x"}}]}
                ]
            },
            "nothing is fetched",
        ),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"tools": [{"name": "a"}]}, "input_schema"),
        ({"tool_choice": {"type": "tool", "name": "b"}, "tools": [WEATHER]}, "'b'"),
        ({"tool_choice": {"type": "tool"}, "tools": [WEATHER]}, "needs a name"),
        ({"mcp_servers": [{"name": "x"}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
        ({"stop_sequences": ["a"] * 17}, "stop_sequences"),
        ({"thinking": {"type": "maybe"}}, "thinking.type"),
    ],
)
def test_what_cannot_be_is_refused_by_name(client: TestClient, fields: dict[str, Any], words: str) -> None:
    assert words in refused(ask(client, **fields), 400, "invalid_request_error")


LEFT_OUT: dict[str, Any] = {
    "metadata": {"user_id": "u"},
    "service_tier": "auto",
    "context_management": {"edits": []},
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "output_config": {"effort": "low"},
    "of_next_year": True,
    "tools": [WEATHER | {"defer_loading": False}, {"type": "bash_20250124", "name": "bash"}],
}


def test_what_has_no_effect_is_left_out_and_said() -> None:
    with connect(FakeBackend()) as client:
        assert "x-sfumato-ignored" not in ask(client, cache_control={"type": "ephemeral"}).headers
        ignored = ask(client, **LEFT_OUT).headers["x-sfumato-ignored"].split(", ")
    assert {"metadata", "service_tier", "context_management", "of_next_year"} < set(ignored)
    assert {"thinking.budget_tokens", "output_config.effort", "tools[].defer_loading", "tools[].bash_20250124"} < set(
        ignored
    )
    with connect(FakeBackend(), Settings(strict_params=True)) as client:
        assert ask(client, cache_control={"type": "ephemeral"}).status_code == 200
        for name, value in LEFT_OUT.items():
            refused(ask(client, **{name: value}), 400, "invalid_request_error")


def test_other_errors_have_anthropics_form(client: TestClient) -> None:
    refused(ask(client, model="other"), 404, "not_found_error")
    refused(client.post("/v1/messages/none", json={}), 404, "not_found_error")
    refused(client.get("/v1/messages"), 405, "invalid_request_error")
    refused(client.post("/v1/messages", content=b"{"), 415, "invalid_request_error")
    large = client.post("/v1/messages", json=HELLO | {"system": "a" * (5 << 20)})
    refused(large, 413, "request_too_large")


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (BusyError("too many"), 529, "overloaded_error"),
        (NumericError("not finite"), 500, "api_error"),
        (CapacityError("too long"), 400, "invalid_request_error"),
        (RuntimeError("inside"), 500, "api_error"),
    ],
)
def test_errors_of_the_model(error: Exception, status: int, kind: str) -> None:
    with connect(FakeBackend(error=error)) as client:
        for is_stream in (False, True):
            message = refused(ask(client, stream=is_stream), status, kind)
            assert "inside" not in message and message.startswith("prompt is too long") == (str(error) == "too long")
    with connect(FakeBackend(error=error, error_after=1)) as client:
        last = events(client)[-1]
        assert last["type"] == "error" and last["error"]["type"] == kind


def test_either_header_may_hold_the_key() -> None:
    with connect(FakeBackend(), Settings(keys=("one", "two"))) as client:
        for headers in (
            {"x-api-key": "two"},
            {"authorization": "Bearer one"},
            {"x-api-key": "no", "authorization": "bearer two"},
        ):
            assert client.post("/v1/messages", json=HELLO, headers=headers).status_code == 200
        for headers in ({}, {"x-api-key": ""}, {"x-api-key": "no"}, {"authorization": "Basic one"}):
            refused(client.post("/v1/messages", json=HELLO, headers=headers), 401, "authentication_error")


def test_silence_is_a_ping() -> None:
    with connect(FakeBackend(pause=0.1), Settings(keep_alive=0.02)) as client:
        kinds = [event["type"] for event in events(client)]
    assert kinds[0] == "ping" and next(kind for kind in kinds if kind != "ping") == "message_start"


def test_models_are_for_both_kinds_of_clients(client: TestClient) -> None:
    models = client.get("/v1/models", headers={"anthropic-version": "2023-06-01"}).json()
    [model] = models["data"]
    assert (models["has_more"], models["first_id"], models["last_id"]) == (False, "fake", "fake")
    assert (model["type"], model["object"], model["display_name"]) == ("model", "model", "fake")
    assert model["created_at"].endswith("Z") and model["max_input_tokens"] == 4096
    assert client.get("/v1/models/fake").json() == model


def test_it_is_counted_and_logged(client: TestClient) -> None:
    answer(client)
    figures = client.get("/metrics").text
    assert 'sfumato_requests_total{route="/v1/messages",status="200"} 1.0' in figures
