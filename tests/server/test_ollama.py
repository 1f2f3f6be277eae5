"""server/ollama/: /api/chat, /api/generate and what Ollama's clients ask about the model."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_backend import CARD, FakeBackend
from server_client import backend as backend
from server_client import chats, connect
from server_client import client as client
from starlette.testclient import TestClient

from sfumato.errors import BusyError, InputError
from sfumato.server.app import Settings
from sfumato.server.ollama.context import read_context, written_context
from sfumato.templates.requests import Chat, Complete, Infill
from sfumato.text.replies import Reply

MESSAGES = [{"role": "user", "content": "Hello there"}]
PARAMETERS = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": PARAMETERS}}
COSTS = {"total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration"}


def post(client: TestClient, route: str, **body: Any) -> Any:
    return client.post(f"/api/{route}", json={"model": "fake"} | body)


def whole(client: TestClient, route: str = "chat", **body: Any) -> dict[str, Any]:
    if route == "chat":
        body.setdefault("messages", MESSAGES)
    response = post(client, route, stream=False, **body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def lines(client: TestClient, route: str = "chat", **body: Any) -> list[dict[str, Any]]:
    if route == "chat":
        body.setdefault("messages", MESSAGES)
    response = post(client, route, **body)
    assert response.status_code == 200 and response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


def refused(response: Any, status: int = 400) -> str:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and "\n" not in body["error"]
    return str(body["error"])


# --- chats ---------------------------------------------------------------------------------------------------------


def test_a_chat_is_lines_by_default(client: TestClient) -> None:
    *parts, last = lines(client, options={"seed": 3})
    assert "".join(part["message"]["content"] for part in parts) == "You said: Hello there (seed 3)."
    assert all(
        part["message"]["role"] == "assistant" and part["model"] == "fake" and not part["done"] for part in parts
    )
    assert last["done"] and last["done_reason"] == "stop" and last.keys() > COSTS and last["message"]["content"] == ""
    assert last["total_duration"] == 500_000_000 and last["eval_count"] == 6 and last["created_at"].endswith("Z")
    assert (last["prompt_eval_duration"], last["eval_duration"]) == (0, last["total_duration"])


@pytest.mark.parametrize("body", [{}, {"think": True}, {"tools": [WEATHER]}, {"logprobs": True, "top_logprobs": 2}])
def test_a_stream_adds_up_to_the_whole(client: TestClient, body: dict[str, Any]) -> None:
    answer = whole(client, options={"seed": 3}, **body)
    parts = lines(client, options={"seed": 3}, **body)
    assert answer["done"] and answer.keys() > COSTS
    for name in ("content", "thinking"):
        assert "".join(part["message"].get(name, "") for part in parts) == answer["message"].get(name, "")
    calls = [call["function"] for part in parts for call in part["message"].get("tool_calls", [])]
    assert calls == [call["function"] for call in answer["message"].get("tool_calls", [])]
    assert [one for part in parts for one in part.get("logprobs", [])] == answer.get("logprobs", [])


def test_thoughts(client: TestClient, backend: FakeBackend) -> None:
    for think, is_thinking in ((True, True), ("high", True), (False, False), (None, False)):
        message = whole(client, think=think)["message"]
        assert message.get("thinking") == ("Let me think." if is_thinking else None)
        assert chats(backend)[-1].options.thinking is is_thinking


def test_calls_and_their_results(client: TestClient, backend: FakeBackend) -> None:
    message = whole(client, tools=[WEATHER])["message"]
    [call] = message["tool_calls"]
    assert call["function"] == {"index": 0, "name": "weather", "arguments": {"place": "text"}}
    result = {"role": "tool", "tool_name": "weather", "content": "rain"}
    assert (
        whole(client, tools=[WEATHER], messages=[*MESSAGES, message, result])["message"]["content"]
        == "The tool says rain"
    )
    assert chats(backend)[-1].conversation[-1]["tool_call_id"] == call["id"]


def test_results_find_their_calls_by_id_by_name_or_in_order(client: TestClient, backend: FakeBackend) -> None:
    calls: list[dict[str, Any]] = [{"function": {"name": name, "arguments": {}}} for name in ("a", "b", "a")]
    spoken = {"role": "assistant", "tool_calls": [*calls, {"id": "mine", "function": {"name": "c"}}]}
    results = [
        {"role": "tool", "content": "1", "tool_name": "b"},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "3", "tool_call_id": "mine"},
        {"role": "tool", "content": "4", "tool_name": "a"},
        {"role": "tool", "content": "5"},
    ]
    whole(client, messages=[*MESSAGES, spoken, *results])
    conversation = chats(backend)[-1].conversation
    ids = [call["id"] for call in conversation[1]["tool_calls"]]
    assert [one.get("tool_call_id") for one in conversation[2:]] == [ids[1], ids[0], "mine", ids[2], None]
    assert len(set(ids)) == 4


def test_a_message_of_the_history_keeps_its_thought(client: TestClient, backend: FakeBackend) -> None:
    whole(client, messages=[*MESSAGES, {"role": "assistant", "content": "Hi.", "thinking": "Say hi."}, *MESSAGES])
    assert chats(backend)[-1].conversation[1]["reasoning_content"] == "Say hi."


def test_formats(client: TestClient, backend: FakeBackend) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    assert json.loads(whole(client, format=schema)["message"]["content"]) == {"n": 7}
    assert json.loads(whole(client, format="json")["message"]["content"]) == {}
    assert whole(client, format="")["message"]["content"].startswith("You said")
    assert [query.options.schema for query in chats(backend)] == [schema, {"type": "object"}, None]


def test_options(client: TestClient, backend: FakeBackend) -> None:
    more = {"keep_alive": "5m", "truncate": True}
    neutral = {"typical_p": 1.0, "tfs_z": 1, "mirostat": 0, "min_p": 0.0, "repeat_penalty": 1.0, "presence_penalty": 0}
    options = {"num_predict": 5.0, "temperature": 0.5, "seed": 4, "stop": "zz", "max_steps": 6, **neutral}
    response = post(
        client, "chat", messages=MESSAGES, options=options | {"num_ctx": 8192, "num_gpu": 1, "top_p": None}, **more
    )
    assert response.headers["x-sfumato-ignored"] == "truncate, options.num_ctx, options.num_gpu"
    chosen = chats(backend)[-1].options
    assert (chosen.max_tokens, chosen.temperature, chosen.seed, chosen.stop, chosen.max_steps) == (
        5,
        0.5,
        4,
        ("zz",),
        6,
    )
    for unlimited in (-1, -2):
        whole(client, options={"num_predict": unlimited})
        assert chats(backend)[-1].options.max_tokens is None
    whole(client, options={"temperature": 0})
    assert chats(backend)[-1].options.seed == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"typical_p": 0.5}, "typical_p"),
        ({"mirostat": 2}, "mirostat"),
        ({"temprature": 1}, "is 'temperature' meant"),
        ({"temperature": "hot"}, "temperature"),
        ({"num_predict": 0}, "max_tokens"),
        ({"num_predict": 1 << 40}, "max_tokens"),
        ({"num_predict": 0.5}, "max_tokens"),
        ({"drafts": True}, "drafts"),
        ({"schema": {}}, "schema"),
        ({"seed": -1}, "seed"),
        ({"stop": 5}, "stop"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(client: TestClient, options: Any, words: str) -> None:
    assert words in refused(post(client, "chat", messages=MESSAGES, options=options))


def test_cut_and_stopped(client: TestClient) -> None:
    assert whole(client, options={"num_predict": 2})["done_reason"] == "length"
    assert whole(client, options={"stop": [" said"]})["message"]["content"] == "You"


# --- prompts -------------------------------------------------------------------------------------------------------


def test_a_prompt_is_a_message_behind_its_system(client: TestClient, backend: FakeBackend) -> None:
    answer = whole(client, "generate", prompt="One", system="Be brief.", options={"seed": 1})
    assert answer["response"] == "You said: One (seed 1)." and answer.keys() > COSTS
    assert [message["role"] for message in chats(backend)[-1].conversation] == ["system", "user"]
    *parts, last = lines(client, "generate", prompt="One", system="Be brief.", options={"seed": 1})
    assert "".join(part["response"] for part in parts) == answer["response"] and last["context"] == answer["context"]


def test_context_goes_on_from_an_answer(client: TestClient, backend: FakeBackend) -> None:
    first = whole(client, "generate", prompt="Eins, ü?", system="Kurz.")
    second = whole(client, "generate", prompt="Two", context=first["context"])
    assert list(chats(backend)[-1].conversation) == [
        {"role": "system", "content": "Kurz."},
        {"role": "user", "content": "Eins, ü?"},
        {"role": "assistant", "content": first["response"]},
        {"role": "user", "content": "Two"},
    ]
    whole(client, "generate", prompt="Three", system="Lang.", context=second["context"])
    conversation = chats(backend)[-1].conversation
    assert [one["role"] for one in conversation].count("system") == 1 and conversation[0]["content"] == "Lang."


def test_raw_text_and_text_between_two(client: TestClient, backend: FakeBackend) -> None:
    answer = whole(client, "generate", prompt="Once", raw=True, logprobs=True)
    assert answer["response"].startswith(" one two") and "context" not in answer and len(answer["logprobs"]) == 7
    assert isinstance(backend.queries[-1], Complete)
    assert whole(client, "generate", prompt="a", suffix="b", options={"num_predict": 9})["response"] == " middle "
    assert isinstance(query := backend.queries[-1], Infill) and (query.prefix, query.suffix, query.at_most) == (
        "a",
        "b",
        9,
    )
    *_, middle, last = lines(client, "generate", prompt="a", suffix="b")
    assert middle["response"] == " middle " and last["done_reason"] == "stop"
    assert "context" in refused(post(client, "generate", prompt="a", raw=True, context=[1]))


def test_a_model_without_a_chat_template_goes_on_from_the_prompt() -> None:
    from dataclasses import replace

    backend = FakeBackend(replace(CARD, has_chat=False))
    with connect(backend) as client:
        assert whole(client, "generate", prompt="Once")["response"].startswith(" one")
        assert "chat template" in refused(post(client, "chat", messages=MESSAGES))
        assert client.post("/api/show", json={"model": "fake"}).json()["capabilities"] == ["completion", "insert"]


@pytest.mark.parametrize("body", [{}, {"messages": []}, {"keep_alive": 0}])
def test_nothing_asked_is_a_loaded_model(client: TestClient, backend: FakeBackend, body: dict[str, Any]) -> None:
    for route in ("chat", "generate"):
        answer = post(client, route, **body).json()
        assert answer["done"] and answer["done_reason"] == ("unload" if body.get("keep_alive") == 0 else "load")
    assert backend.queries == []


# --- context -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "a", "abcdef", "ü" * 100, "\x01", "\x00\x00", "😀 end\n"])
def test_a_context_comes_back_as_it_went(text: str) -> None:
    messages = [{"role": role, "content": text} for role in ("system", "user", "assistant")]
    numbers = written_context(messages)
    assert read_context(numbers) == messages and all(0 <= number < 1 << 53 for number in numbers)


@pytest.mark.parametrize(
    "numbers",
    [
        [1],
        [-1],
        [1 << 60],
        [105, 2364, 107],
        [int.from_bytes(b'[[9,""', "big"), int.from_bytes(b"]]\x01\0\0\0", "big")],
        [int.from_bytes(b"[" * 6, "big")] * 100_000,
        [int.from_bytes(part, "big") for part in (b'[[1,"\\', b'ud800"', b"]]\x01\0\0\0")],
    ],
)
def test_a_context_of_others_is_refused(numbers: list[int]) -> None:
    with pytest.raises(InputError, match="context is not what an answer of this server gave"):
        read_context(numbers)


# --- the model -----------------------------------------------------------------------------------------------------


def test_the_model_as_ollama_lists_it() -> None:
    with connect(FakeBackend(), Settings(aliases=("gpt:big",))) as client:
        first, second = client.get("/api/tags").json()["models"]
        assert (first["name"], first["model"], second["name"]) == ("fake:latest", "fake:latest", "gpt:big")
        assert len(first["digest"]) == 64 and first["digest"] != second["digest"]
        assert first["details"]["parameter_size"] == "1.2K" and first["details"]["quantization_level"] == "F32"
        [running] = client.get("/api/ps").json()["models"]
        assert running["name"] == "fake:latest" and running["context_length"] == 4096 and running["expires_at"] > "2100"
        assert int(client.get("/api/version").json()["version"].split(".")[1]) >= 6
        for name in ("fake", "fake:latest", "gpt:big"):
            shown = client.post("/api/show", json={"model": name}).json()
            assert shown["capabilities"] == ["completion", "tools", "thinking", "insert"]
            assert shown["model_info"]["diffusion-gemma.context_length"] == 4096
            assert client.post("/api/show", json={"name": name}).json() == shown
        assert "other" in refused(client.post("/api/show", json={"model": "other"}), 404)
        assert client.head("/").status_code == 200


def test_a_tag_may_be_left_out_or_given(client: TestClient) -> None:
    assert whole(client, model="fake:latest")["model"] == "fake:latest"
    refused(post(client, "chat", model="fake:7b", messages=MESSAGES), 404)


def test_what_makes_or_removes_models_is_refused(client: TestClient) -> None:
    for route in ("pull", "push", "create", "copy", "embed", "embeddings"):
        assert refused(post(client, route), 501)
    assert refused(client.request("DELETE", "/api/delete", json={"model": "fake"}), 501)
    assert refused(client.get("/api/none"), 404)


@pytest.mark.parametrize(
    ("route", "body", "words"),
    [
        ("chat", {"messages": [{"role": "user", "content": "a", "images": ["AAAA"]}]}, "images"),
        ("chat", {"messages": [{"role": "robot"}]}, "role"),
        ("chat", {"messages": MESSAGES, "think": "much"}, "think"),
        ("chat", {"messages": MESSAGES, "format": "yaml"}, "format"),
        ("chat", {"messages": MESSAGES, "tools": [{"type": "function"}]}, "function"),
        ("generate", {"prompt": "a", "images": ["AAAA"]}, "images"),
        ("generate", {"prompt": "a", "template": "{{ .Prompt }}"}, "template"),
        ("generate", {"prompt": "a", "context": [5]}, "context"),
        ("show", {"model": None}, "model"),
    ],
)
def test_what_cannot_be_is_refused(client: TestClient, route: str, body: dict[str, Any], words: str) -> None:
    assert words in refused(post(client, route, **body))


def test_a_strict_server_refuses_what_has_no_effect() -> None:
    with connect(FakeBackend(), Settings(strict_params=True)) as client:
        for more in (
            {"options": {"num_ctx": 5}},
            {"truncate": True},
            {"messages": [{"role": "user", "content": "", "x": 1}]},
        ):
            assert refused(post(client, "chat", **{"messages": MESSAGES} | more))


def test_errors_within_a_stream_are_its_last_line() -> None:
    with connect(FakeBackend(error=BusyError("full"))) as client:
        assert refused(post(client, "chat", messages=MESSAGES), 503) == "full"
    with connect(FakeBackend(error=BusyError("full"), error_after=1)) as client:
        assert lines(client)[-1] == {"error": "full"}


def test_silence_is_an_empty_part() -> None:
    with connect(FakeBackend(pause=0.1), Settings(keep_alive=0.02)) as client:
        first, *_ = lines(client)
    assert first["message"] == {"role": "assistant", "content": ""} and not first["done"]


def test_curl_without_a_header(client: TestClient) -> None:
    body = json.dumps({"model": "fake", "prompt": "a", "stream": False})
    for media in ("application/x-www-form-urlencoded", "application/json; charset=utf-8"):
        assert client.post("/api/generate", content=body, headers={"content-type": media}).status_code == 200
    refused(client.post("/api/generate", content=body, headers={"content-type": "text/plain"}), 415)
    foreign = {"origin": "http://elsewhere.example", "content-type": "application/x-www-form-urlencoded"}
    refused(client.post("/api/generate", content=body, headers=foreign), 403)


def test_a_scripted_tool_loop() -> None:
    def script(query: Any) -> Reply | None:
        assert isinstance(query, Chat)
        done = sum(message["role"] == "tool" for message in query.conversation)
        return (
            Reply(f"{done} results")
            if done == 2
            else Reply("", None, [{"name": "weather", "arguments": {"place": str(done)}}])
        )

    with connect(FakeBackend(script=script)) as client:
        messages: list[dict[str, Any]] = list(MESSAGES)
        while calls := (message := whole(client, messages=messages, tools=[WEATHER])["message"]).get("tool_calls"):
            messages += [
                message,
                *({"role": "tool", "tool_name": call["function"]["name"], "content": "x"} for call in calls),
            ]
    assert message["content"] == "2 results" and len(messages) == 5
