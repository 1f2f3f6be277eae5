"""server/openai/responses.py and items.py: what /v1/responses takes, refuses and answers."""

from __future__ import annotations

import json

import pytest
import server_client
from fake_backend import FakeBackend
from server_client import WEATHER, chats, refused, respond
from starlette.testclient import TestClient

backend, client = server_client.backend, server_client.client


def test_responses(client: TestClient, backend: FakeBackend) -> None:
    body = respond(client, input="Hi", instructions="Be brief", seed=2, max_output_tokens=3, metadata={"a": "b"}).json()
    assert body["object"] == "response" and body["status"] == "incomplete"
    assert body["incomplete_details"] == {"reason": "max_output_tokens"} and body["metadata"] == {"a": "b"}
    assert body["output"][0]["content"][0]["text"] == "You said: Hi"
    assert body["usage"]["output_tokens"] == 3
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]
    assert chats(backend)[0].messages == messages


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


@pytest.mark.parametrize("name", ["previous_response_id", "background", "conversation", "include", "store", "nonsense"])
def test_responses_refuse(client: TestClient, name: str) -> None:
    value = {"background": True, "include": ["x"], "store": True}.get(name, "x")
    assert refused(respond(client, input="Hi", **{name: value}))["param"] == name
    assert refused(respond(client, input=[{"role": "user", "content": [{"type": "input_image"}]}]))["param"]
    assert refused(respond(client, input="Hi", stream=True, drafts=True))["param"] == "drafts"
