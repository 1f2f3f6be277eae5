"""server/openai/responses.py, items.py, inputs.py, output.py, kept.py and server/http/seals.py: /v1/responses."""

from __future__ import annotations

import json
from typing import Any

import pytest
import server_client
from fake_backend import FakeBackend
from server_client import WEATHER, chats, connect, refused, respond
from starlette.testclient import TestClient

from sfumato.errors import WorkerError
from sfumato.server.app import Settings
from sfumato.server.http.seals import SEAL, sealed, unsealed
from sfumato.server.openai.kept import MOST_BYTES, KeptResponses

backend, client = server_client.backend, server_client.client


def test_responses(client: TestClient, backend: FakeBackend) -> None:
    body = respond(client, input="Hi", instructions="Be brief", seed=2, max_output_tokens=3, metadata={"a": "b"}).json()
    assert body["object"] == "response" and body["status"] == "incomplete"
    assert body["incomplete_details"] == {"reason": "max_output_tokens"} and body["metadata"] == {"a": "b"}
    assert body["output"][0]["content"][0]["text"] == "You said: Hi"
    assert body["usage"]["output_tokens"] == 3
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]
    assert chats(backend)[0].messages == messages


def test_a_refusal_in_a_conversation_is_kept(client: TestClient, backend: FakeBackend) -> None:
    refusal = {"role": "assistant", "content": [{"type": "refusal", "refusal": "I would rather not."}]}
    response = respond(client, input=[{"role": "user", "content": "Sing"}, refusal, {"role": "user", "content": "Hi"}])
    assert response.status_code == 200
    messages = [message for message in chats(backend)[0].messages if isinstance(message, dict)]
    assert messages[1] == {"role": "assistant", "content": "I would rather not."}


def test_responses_stream_what_they_end_with(client: TestClient) -> None:
    tool = {"type": "function", **WEATHER["function"]}  # type: ignore[dict-item]
    for more in ({"input": "Hi", "thinking": True, "seed": 3}, {"input": "twice", "tools": [tool], "thinking": True}):
        response = respond(client, **more, stream=True)
        sent = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]
        assert [one["sequence_number"] for one in sent] == list(range(len(sent)))
        names = [line[7:] for line in response.text.splitlines() if line.startswith("event: ")]
        assert names == [one["type"] for one in sent]
        assert names[:2] == ["response.created", "response.in_progress"] and names[-1] == "response.completed"
        output = sent[-1]["response"]["output"]
        done = [one["item"] for one in sent if one["type"] == "response.output_item.done"]
        assert done == output and [one["output_index"] for one in sent if "item" in one][-1] == len(output) - 1
        text = "".join(one["delta"] for one in sent if one["type"] == "response.output_text.delta")
        assert text == "".join(item["content"][0]["text"] for item in output if item["type"] == "message")
        kinds = [item["type"] for item in respond(client, **more).json()["output"]]
        assert kinds == [item["type"] for item in output] and kinds[0] == "reasoning"
    assert kinds == ["reasoning", "function_call", "function_call"]


def test_responses_conversation(client: TestClient, backend: FakeBackend) -> None:
    tool = {"type": "function", **WEATHER["function"]}  # type: ignore[dict-item]
    first = respond(
        client, input="Weather?", tools=[tool], thinking=True, tool_choice={"type": "function", "name": "weather"}
    )
    assert backend.queries[0].options.must_call and backend.queries[0].options.thinking
    output = first.json()["output"]
    result = {"type": "function_call_output", "call_id": output[1]["call_id"], "output": "rain"}
    again = respond(client, input=[{"role": "user", "content": "Weather?"}, *output, result], tools=[tool]).json()
    assert again["output"][0]["content"][0]["text"] == "The tool says rain"
    user, called, result_message = chats(backend)[-1].conversation
    assert user == {"role": "user", "content": "Weather?"} and called["reasoning_content"] == "Let me think."
    assert called["tool_calls"][0]["id"] == output[1]["call_id"] == result_message["tool_call_id"]
    third = respond(
        client, input=[{"role": "user", "content": "a"}, *again["output"], {"role": "user", "content": "b"}]
    )
    assert third.status_code == 200
    assert [m["role"] for m in chats(backend)[-1].conversation] == ["user", "assistant", "user"]


def test_responses_format(client: TestClient, backend: FakeBackend) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    form = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    body = respond(client, input="Hi", text=form).json()
    assert json.loads(body["output"][0]["content"][0]["text"]) == {"n": 7} and body["text"] == form
    assert backend.queries[0].options.schema == schema


@pytest.mark.parametrize("name", ["previous_response_id", "background", "conversation", "include", "nonsense"])
def test_responses_refuse(client: TestClient, name: str) -> None:
    value = {"background": True, "include": ["x"]}.get(name, "x")
    assert refused(respond(client, input="Hi", **{name: value}))["param"] == name
    assert refused(respond(client, input=[{"role": "user", "content": [{"type": "input_image"}]}]))["param"]
    assert refused(respond(client, input="Hi", stream=True, drafts=True))["param"] == "drafts"


def sent_by(response: Any) -> list[dict[str, Any]]:
    """The events of a stream."""
    return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]


FLAT: dict[str, Any] = {"type": "function", **WEATHER["function"]}  # type: ignore[dict-item]


def test_what_codex_sends(client: TestClient, backend: FakeBackend) -> None:
    """The fields of an agent that keeps its own history, and tools that run at a vendor's."""
    patch = {"type": "custom", "name": "apply_patch", "description": "Patch", "format": {"type": "text"}}
    more = {
        "instructions": "You are an agent.",
        "include": ["reasoning.encrypted_content"],
        "client_metadata": {"x": "y"},
        "truncation": "auto",
        "store": False,
        "prompt_cache_key": "k",
        "parallel_tool_calls": True,
        "reasoning": {"effort": "high", "summary": "auto"},
        "text": {"verbosity": "low"},
        "tools": [{"type": "web_search"}, {"type": "local_shell"}, patch, FLAT],
        "tool_choice": "auto",
        "stream": True,
    }
    response = respond(client, input=[{"type": "message", "role": "user", "content": "Hi"}], **more)
    names = set(response.headers["x-sfumato-ignored"].split(", "))
    assert names == {"client_metadata", "truncation", "text.verbosity", "tools[].web_search", "tools[].local_shell"}
    assert [tool["function"]["name"] for tool in chats(backend)[0].tools or []] == ["apply_patch", "weather"]
    *_, last = sent_by(response)
    thought, call = last["response"]["output"]
    assert thought["summary"] == [{"type": "summary_text", "text": "Let me think."}] and thought["content"] == []
    assert call["type"] == "custom_tool_call" and call["name"] == "apply_patch" and call["input"] == "text"
    result = {"type": "custom_tool_call_output", "call_id": call["call_id"], "output": "done"}
    history = [{"role": "user", "content": "Hi"}, {**thought, "summary": []}, call, result]
    assert respond(client, input=history, **more).status_code == 200
    _, _, called, returned = chats(backend)[-1].conversation
    assert called["reasoning_content"] == "Let me think." and returned["tool_call_id"] == call["call_id"]
    assert called["tool_calls"][0]["function"] == {"name": "apply_patch", "arguments": {"input": "text"}}


def test_the_events_of_a_summary_are_in_order(client: TestClient) -> None:
    response = respond(client, input="Hi", thinking=True, stream=True, seed=1)
    events = sent_by(response)
    names = [one["type"].removeprefix("response.") for one in events]
    thought = names[2 : names.index("output_item.done") + 1]
    assert thought == [
        "output_item.added",
        "reasoning_summary_part.added",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
        "output_item.done",
    ]
    assert all(one["summary_index"] == 0 for one in events if "reasoning_summary" in one["type"])
    custom = {"type": "custom", "name": "shell"}
    names = [one["type"] for one in sent_by(respond(client, input="Hi", tools=[custom], stream=True))]
    assert names[2:-1] == [
        "response.output_item.added",
        "response.custom_tool_call_input.delta",
        "response.custom_tool_call_input.done",
        "response.output_item.done",
    ]


@pytest.mark.parametrize("text", ["", "gAAAA", SEAL, SEAL + "!", SEAL + "AAA", SEAL + "_w==", SEAL + "a" * 9, "é"])
def test_what_others_sealed_is_no_thought(client: TestClient, backend: FakeBackend, text: str) -> None:
    item = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "brief"}], "encrypted_content": text}
    answered = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]}
    say = {"role": "user", "content": "b"}
    assert respond(client, input=[item, answered, say]).status_code == 200
    assert chats(backend)[0].conversation[0].get("reasoning_content", "") == ("" if text == SEAL else "brief")


def test_a_sealed_thought_is_read_back() -> None:
    for thought in ("a", "<|turn>ü\n", "x" * 10_000):
        assert unsealed(sealed(thought)) == thought
    assert unsealed(None) is None


def test_kept_answers(client: TestClient, backend: FakeBackend) -> None:
    first = respond(client, input="Hi", instructions="Be brief", seed=1).json()
    assert first["store"] is True
    again = respond(client, input="More", previous_response_id=first["id"], seed=2).json()
    spoken = chats(backend)[-1].conversation
    assert [message["role"] for message in spoken] == ["user", "assistant", "user"] and spoken[0]["content"] == "Hi"
    third = respond(client, input="Yet more", previous_response_id=again["id"], tools=[FLAT], thinking=True).json()
    assert [message["content"] for message in chats(backend)[-1].conversation][::2] == ["Hi", "More", "Yet more"]
    assert client.get(f"/v1/responses/{again['id']}").json() == again
    items = client.get(f"/v1/responses/{again['id']}/input_items").json()["data"]
    assert [item["content"] for item in items] == ["More"]
    thought, call = third["output"]
    references = [{"type": "item_reference", "id": thought["id"]}, {"id": call["id"]}]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}
    assert respond(client, input=[{"role": "user", "content": "Hi"}, *references, result]).status_code == 200
    assert chats(backend)[-1].conversation[1]["reasoning_content"] == "Let me think."
    assert client.delete(f"/v1/responses/{third['id']}").json()["deleted"] is True
    for method in ("GET", "DELETE"):
        assert refused(client.request(method, f"/v1/responses/{third['id']}"), 404)["code"] == "not_found"
    error = refused(respond(client, input="a", previous_response_id=third["id"]))
    assert error["param"] == "previous_response_id" and "whole conversation" in error["message"]
    assert refused(respond(client, input=references))["param"] == "input"
    hidden = respond(client, input="Hi", store=False).json()
    assert hidden["store"] is False
    refused(client.get(f"/v1/responses/{hidden['id']}"), 404)


def test_the_oldest_answers_go_first() -> None:
    with connect(FakeBackend(), Settings(kept_responses=2)) as client:
        ids = [respond(client, input="Hi").json()["id"] for _ in range(4)]
        assert [client.get(f"/v1/responses/{id}").status_code for id in ids] == [404, 404, 200, 200]
    with connect(FakeBackend(), Settings(kept_responses=0)) as client:
        answer = respond(client, input="Hi").json()
        assert answer["store"] is False and client.get(f"/v1/responses/{answer['id']}").status_code == 404
    kept = KeptResponses(1000)
    for number in range(8):
        kept.keep({"id": str(number), "output": [], "text": "x" * (MOST_BYTES // 3)}, None, [])
    assert [number for number in range(8) if str(number) in kept._kept] == [6, 7]
    kept.keep({"id": "8", "output": []}, kept.get("7"), [])  # what it goes on from counts with it
    assert list(kept._kept) == ["7", "8"]


def test_allowed_tools(client: TestClient, backend: FakeBackend) -> None:
    other = {**FLAT, "name": "other"}
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]}
    assert respond(client, input="Hi", tools=[other, FLAT], tool_choice=choice).json()["tool_choice"] == choice
    assert chats(backend)[0].tools == [WEATHER] and backend.queries[0].options.must_call
    assert refused(respond(client, input="Hi", tools=[FLAT], tool_choice={"type": "web_search"}))["param"]


def test_an_answer_that_fails_under_way_says_so_in_its_stream() -> None:
    with connect(FakeBackend(error=WorkerError("the worker died; send it again"), error_after=1)) as client:
        failed, error = sent_by(respond(client, input="Hi there, you", stream=True))[-2:]
    assert failed["type"] == "response.failed" and failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": "the worker died; send it again"}
    assert error["error"]["type"] == "worker_error"
