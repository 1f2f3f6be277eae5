"""server/openai/unread.py and spellings.py: what clients send beside a request: left out, folded, or refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import server_client
from fake_backend import FakeBackend
from server_client import MESSAGES, WEATHER, chat, chats, complete, connect, refused, respond
from starlette.testclient import TestClient

from sfumato.options import OPTIONS, Options
from sfumato.server.app import Settings
from sfumato.server.http.bodies import MOST_IGNORED, BodyReading
from sfumato.server.openai.bodies import ChatRequest, CompletionRequest
from sfumato.server.openai.items import ResponsesRequest
from sfumato.server.openai.unread import CHAT_NEUTRAL, CHAT_UNREAD, NEUTRAL, RESPONSES_NEUTRAL, RESPONSES_UNREAD
from sfumato.server.settings import Limits

backend, client = server_client.backend, server_client.client
HEADER = "x-sfumato-ignored"
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}}


def ignored(response: Any) -> list[str]:
    """The fields that an answer says were left out."""
    assert response.status_code == 200, response.text
    return [name for name in response.headers.get(HEADER, "").split(", ") if name]


def test_no_field_is_both_read_and_unread() -> None:
    for body, unread, neutral in (
        (ChatRequest, CHAT_UNREAD, CHAT_NEUTRAL),
        (CompletionRequest, CHAT_UNREAD, NEUTRAL),
        (ResponsesRequest, RESPONSES_UNREAD, RESPONSES_NEUTRAL),
    ):
        assert body.unread is unread and not unread.keys() & body.names()
        assert neutral.keys() <= body.names() and not neutral.keys() & OPTIONS.keys()
        assert all(reason and reason[0].islower() and not reason.endswith(".") for reason in unread.values())
        properties = body.model_json_schema()["properties"]
        assert properties["service_tier"] == {"description": "Left out: there is one tier."}


@pytest.mark.parametrize("route", ["chat", "completion", "responses"])
def test_what_has_no_effect_is_left_out_and_said(client: TestClient, backend: FakeBackend, route: str) -> None:
    unread = sorted(RESPONSES_UNREAD if route == "responses" else CHAT_UNREAD)
    for names in (unread[:MOST_IGNORED], unread[MOST_IGNORED : 2 * MOST_IGNORED], unread[2 * MOST_IGNORED :]):
        more: dict[str, Any] = dict.fromkeys(names, "x") | {"seed": 1}
        if route == "chat":
            answer = chat(client, **more)
        else:
            answer = (
                complete(client, prompt="a", **more) if route == "completion" else respond(client, input="a", **more)
            )
        assert ignored(answer) == names
        assert backend.queries[-1].options == Options(seed=1)
    assert ignored(chat(client, store=None, cache_control={})) == []
    assert ignored(chat(client, store=True, stream=True)) == ["store"]


def test_a_strict_server_refuses_what_has_no_effect() -> None:
    backend = FakeBackend()
    with connect(backend, Settings(strict_params=True)) as client:
        for name, value in {"store": True, "service_tier": "flex", "verbosity": "low"}.items():
            error = refused(chat(client, **{name: value}))
            assert error["param"] == name and "no effect" in error["message"] and "strict" in error["message"]
        spoken = [{**MESSAGES[0], "cache_control": {"type": "ephemeral"}}]
        assert refused(chat(client, messages=spoken))["param"] == "messages[0].cache_control"
        assert refused(chat(client, tools=[{"type": "web_search"}]))["param"].startswith("tools[0]")
        assert refused(respond(client, input="a", include=["file_search_call.results"]))["param"] == "include"
        assert not backend.jobs
        assert chat(client, user="me", metadata={"a": "b"}, seed=1, store=None, service_tier=None).status_code == 200


def test_unknown_fields_are_refused_with_the_nearest_name(client: TestClient) -> None:
    error = refused(chat(client, max_token=3))
    assert error["param"] == "max_token" and "'max_tokens' meant" in error["message"]
    assert error["code"] == "unknown_parameter"
    assert "meant" not in refused(chat(client, zzz=1))["message"]
    assert refused(respond(client, input="a", max_tokens=3))["param"] == "max_tokens"
    assert refused(chat(client, tools=[{**WEATHER, "colour": 1}]))["param"] == "tools[0].colour"


def test_codes_are_openais(client: TestClient) -> None:
    assert refused(chat(client, max_tokens=0))["code"] == "integer_below_min_value"
    assert refused(chat(client, max_steps=1 << 40))["code"] == "integer_above_max_value"
    assert refused(chat(client, temperature=2.5))["code"] == "decimal_above_max_value"
    assert refused(client.post("/v1/chat/completions", json={}))["code"] == "missing_required_parameter"
    assert refused(chat(client, messages=[]))["code"] == "empty_array"
    assert refused(chat(client, stream_options={"include_usage": True}))["param"] == "stream_options"


@pytest.mark.parametrize(("name", "values"), CHAT_NEUTRAL.items())
def test_what_would_change_the_text_is_refused_unless_it_is_neutral(
    client: TestClient, name: str, values: tuple[Any, ...]
) -> None:
    for value in (None, *values):
        assert ignored(chat(client, **{name: value})) == []
    error = refused(chat(client, **{name: ["other"]}))
    assert error["param"] == name and "not supported" in error["message"]


def test_unknown_keys_of_messages_are_left_out(client: TestClient, backend: FakeBackend) -> None:
    spoken = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}],
            "name": "x",
            "timestamp": 3,
            "bad\r\nname": 1,
        },
        {"role": "assistant", "content": None, "refusal": "No.", "annotations": [], "audio": None, "reasoning": "hm"},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": "", "reasoning_content": "deep", "reasoning": {"not": "text"}},
        {"role": "user", "content": [{"type": "input_text", "text": "b"}]},
    ]
    names = set(ignored(chat(client, messages=spoken)))
    assert names == {"messages[].content[].cache_control", "messages[].timestamp", "?"}
    assert chats(backend)[0].conversation == [
        {"role": "user", "content": [{"type": "text", "text": "a"}], "name": "x"},
        {"role": "assistant", "content": "No.", "reasoning_content": "hm"},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": "", "reasoning_content": "deep"},
        {"role": "user", "content": [{"type": "text", "text": "b"}]},
    ]


def test_the_header_is_bounded() -> None:
    reading = BodyReading(Limits())
    for number in range(1000):
        reading.leave_out(f"messages[].a{number}")
        reading.leave_out("x" * 10_000 + "\r\nset-cookie: a")
    assert len(reading.ignored) == MOST_IGNORED
    assert all(re.fullmatch(r"\?|messages\[\]\.a\d+", name) for name in reading.ignored)


THINKING: list[tuple[dict[str, Any], bool]] = [
    ({"chat_template_kwargs": {"enable_thinking": True}}, True),
    ({"chat_template_kwargs": {"thinking": False, "add_generation_prompt": True}}, False),
    ({"chat_template_kwargs": {"reasoning_effort": "low"}}, True),
    ({"enable_thinking": True}, True),
    ({"think": True}, True),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, True),
    ({"thinking": {"type": "adaptive"}}, True),
    ({"thinking": {"type": "disabled"}}, False),
    ({"reasoning": {"effort": "high"}}, True),
    ({"reasoning": {"enabled": True, "max_tokens": 2000}}, True),
    ({"reasoning": {"effort": "none"}}, False),
    ({"enable_thinking": True, "thinking": True, "reasoning_effort": "low"}, True),
]


@pytest.mark.parametrize(("more", "is_thinking"), THINKING)
def test_thinking_by_other_names(
    client: TestClient, backend: FakeBackend, more: dict[str, Any], is_thinking: bool
) -> None:
    message = chat(client, **more).json()["choices"][0]["message"]
    assert backend.queries[0].options.thinking is is_thinking
    assert message.get("reasoning_content") == ("Let me think." if is_thinking else None)
    assert ("reasoning" in message) == (is_thinking and "reasoning" in more)


@pytest.mark.parametrize("more", [{"include_reasoning": False}, {"reasoning": {"exclude": True}}])
def test_thoughts_may_be_left_out_of_the_answer(client: TestClient, more: dict[str, Any]) -> None:
    answer = chat(client, thinking=True, **more).json()
    assert not {"reasoning", "reasoning_content"} & answer["choices"][0]["message"].keys()
    chunks = server_client.events(chat(client, thinking=True, stream=True, **more))
    assert not any("reasoning_content" in one["choices"][0]["delta"] for one in chunks)


CONSTRAINTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"guided_json": SCHEMA}, {"schema": SCHEMA}),
    ({"guided_json": '{"type": "object"}'}, {"schema": {"type": "object"}}),
    ({"structured_outputs": {"json": SCHEMA}}, {"schema": SCHEMA}),
    ({"structured_outputs": {"json_object": True}}, {"schema": {"type": "object"}}),
    ({"json_schema": SCHEMA}, {"schema": SCHEMA}),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, {"schema": SCHEMA}),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"strict": False, "schema": SCHEMA}}},
        {"schema": SCHEMA},
    ),
    ({"guided_regex": "a+"}, {"regex": "a+"}),
    ({"structured_outputs": {"regex": "a+", "choice": None}}, {"regex": "a+"}),
    ({"guided_choice": ["a", "b"]}, {"choices": ("a", "b")}),
    ({"structured_outputs": {"choice": ["a"]}}, {"choices": ("a",)}),
    ({"guided_grammar": 'start: "a"'}, {"grammar": 'start: "a"'}),
    ({"structured_outputs": {"grammar": 'start: "a"'}}, {"grammar": 'start: "a"'}),
    ({"n_predict": 7}, {"max_tokens": 7}),
    ({"n_predict": -1}, {}),
    ({"max_tokens": 7, "max_completion_tokens": 7, "n_predict": 7}, {"max_tokens": 7}),
]


@pytest.mark.parametrize(("more", "expected"), CONSTRAINTS)
def test_constraints_by_other_names(
    client: TestClient, backend: FakeBackend, more: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert chat(client, seed=1, **more).status_code == 200
    assert backend.queries[0].options == Options.from_dict({"seed": 1} | expected)
    if "response_format" not in more and "max_completion_tokens" not in more:
        assert complete(client, prompt="a", seed=1, **more).status_code == 200
        assert backend.queries[1].options == backend.queries[0].options


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "3"}, "guided_json"),
        ({"guided_json": SCHEMA, "schema": {"type": "array"}}, "schema"),
        ({"guided_regex": "a", "structured_outputs": {"regex": "b"}}, "guided_regex"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "regex"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"chat_template_kwargs": {"enable_thinking": True}, "thinking": False}, "thinking"),
        ({"chat_template_kwargs": {"colour": "red"}}, "chat_template_kwargs.colour"),
        ({"reasoning": {"effort": "high"}, "reasoning_effort": "low"}, "reasoning_effort"),
        ({"n_predict": 3, "max_tokens": 4}, "max_tokens"),
        ({"continue_final_message": True}, "continue_final_message"),
    ],
)
def test_what_contradicts_itself_is_refused_by_name(client: TestClient, more: dict[str, Any], param: str) -> None:
    assert refused(chat(client, **more))["param"] == param


def test_tools_that_are_no_functions_are_left_out(client: TestClient, backend: FakeBackend) -> None:
    tools = [{"type": "web_search"}, {**WEATHER, "cache_control": {"type": "ephemeral"}}, {"type": "mcp", "url": "x"}]
    assert ignored(chat(client, tools=tools)) == ["tools[].web_search", "tools[].cache_control", "tools[].mcp"]
    assert chats(backend)[0].tools == [WEATHER]
    assert refused(chat(client, tools=[{"type": "function"}]))["param"] == "tools[0].function"


def test_some_of_the_tools_are_allowed(client: TestClient, backend: FakeBackend) -> None:
    other = {"type": "function", "function": {"name": "other"}}
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "weather"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    assert chat(client, tools=[other, WEATHER], tool_choice=choice).status_code == 200
    assert chats(backend)[0].tools == [WEATHER] and backend.queries[0].options.must_call
    assert refused(chat(client, tools=[other], tool_choice=choice))["param"] == "tool_choice"


def test_functions_of_the_older_form(client: TestClient, backend: FakeBackend) -> None:
    fields: dict[str, Any] = {"functions": [WEATHER["function"]], "function_call": {"name": "weather"}}
    [choice] = chat(client, **fields).json()["choices"]
    assert choice["finish_reason"] == "function_call" and "tool_calls" not in choice["message"]
    call = choice["message"]["function_call"]
    assert call == {"name": "weather", "arguments": '{"place": "text"}'}
    assert chats(backend)[0].tools == [WEATHER] and backend.queries[0].options.must_call
    chunks = server_client.events(chat(client, **fields, stream=True))
    assert [
        one["choices"][0]["delta"]["function_call"]
        for one in chunks
        if "function_call" in str(one["choices"][0]["delta"])
    ] == [call]
    assert chunks[-1]["choices"][0]["finish_reason"] == "function_call"
    result = {"role": "function", "name": "weather", "content": "rain"}
    again = chat(client, functions=fields["functions"], messages=[*MESSAGES, choice["message"], result]).json()
    assert again["choices"][0]["message"]["content"] == "The tool says rain"
    _, called, returned = chats(backend)[-1].conversation
    assert called["tool_calls"][0]["id"] == returned["tool_call_id"] and called["tool_calls"][0]["function"] == call


def test_no_text_at_all(client: TestClient) -> None:
    """`max_tokens` 0 of the older route: the prompt is read, and echoed where that is asked for."""
    body = complete(client, prompt="Say", max_tokens=0, echo=True).json()
    assert body["choices"][0]["text"] == "Say" and body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 0 and body["usage"]["prompt_tokens"] > 0
    chunks = server_client.events(complete(client, prompt="Say", max_tokens=0, stream=True))
    assert "".join(one["choices"][0]["text"] for one in chunks) == ""
    assert refused(complete(client, prompt="a", suffix="b", max_tokens=0))["param"] == "max_tokens"
