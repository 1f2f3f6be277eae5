"""server/app.py, openai/ and canvas/: the routes over a fake backend, what each takes, refuses and answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from fake_backend import CARD, FakeBackend
from starlette.testclient import TestClient

from sfumato.errors import BusyError, CapacityError, InputError, WorkerError
from sfumato.options import OPTIONS, Options
from sfumato.server.app import Limits, Settings, create
from sfumato.server.http.options import SET_BY_OTHERS
from sfumato.server.openai.bodies import ChatRequest
from sfumato.templates.requests import Chat, Complete, Decide, Edit, Fill, Infill
from sfumato.templates.slots import Slot

MESSAGES = [{"role": "user", "content": "Hello there"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a place",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def client(backend: FakeBackend) -> Iterator[TestClient]:
    with connect(backend) as one:
        yield one


def connect(backend: FakeBackend, settings: Settings = Settings()) -> TestClient:  # noqa: B008 - frozen
    return TestClient(create(backend, settings), base_url="http://localhost")


def chats(backend: FakeBackend) -> list[Chat]:
    """The queries so far, which are all chats."""
    return [query for query in backend.queries if isinstance(query, Chat) or pytest.fail(repr(query))]


def prompts(backend: FakeBackend) -> list[str | Sequence[int]]:
    """The prompts of the queries so far, which are all completions."""
    queries = [query for query in backend.queries if isinstance(query, Complete) or pytest.fail(repr(query))]
    return [query.prompt for query in queries]


def chat(client: TestClient, **more: Any) -> Any:
    return client.post("/v1/chat/completions", json={"messages": MESSAGES, **more})


def events(response: Any) -> list[Any]:
    """The data of a stream, which ends as it should."""
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def refused(response: Any, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str) and "\n" not in body["error"]["message"]
    error: dict[str, Any] = body["error"]
    return error


# --- chat ----------------------------------------------------------------------------------------------------------


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
    assert usage["prompt_tokens_details"] == {"cached_tokens": 1} and "completion_tokens_details" not in usage
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
    assert chats(backend)[-1].messages[1] == {"role": "assistant", "tool_calls": [call]}


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


def test_every_option_has_its_field() -> None:
    names = {info.alias or name for name, info in ChatRequest.model_fields.items()}
    assert OPTIONS.keys() - names == {"must_call"} == set(SET_BY_OTHERS)


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
        ("store", True),
        ("service_tier", "flex"),
        ("prediction", {"type": "content", "content": "x"}),
        ("modalities", ["text", "audio"]),
        ("functions", [{"name": "f"}]),
        ("web_search_options", {}),
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
        ({"role": "user", "content": "x", "colour": 1}, "messages[0].colour"),
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


# --- completions ---------------------------------------------------------------------------------------------------


def complete(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/completions", json=body)


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


# --- responses -----------------------------------------------------------------------------------------------------


def respond(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/responses", json=body)


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
    user, called, result_message = chats(backend)[-1].messages
    assert user == {"role": "user", "content": "Weather?"} and called["reasoning_content"] == "Let me think."
    assert called["tool_calls"][0]["id"] == output[1]["call_id"] == result_message["tool_call_id"]
    third = respond(
        client, input=[{"role": "user", "content": "a"}, *again["output"], {"role": "user", "content": "b"}]
    )
    assert third.status_code == 200
    assert [m["role"] for m in chats(backend)[-1].messages] == ["user", "assistant", "user"]


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


# --- our own -------------------------------------------------------------------------------------------------------


def test_infill(client: TestClient, backend: FakeBackend) -> None:
    body = client.post("/v1/infill", json={"prefix": "a", "suffix": "b", "length": 4, "seed": 3, "max_steps": 5}).json()
    assert body["object"] == "infill" and body["text"] == "a middle b" and body["middle"] == " middle "
    assert body["length"] == 2 and body["seed"] == 3 and body["usage"]["canvases"] == 2
    assert backend.queries == [Infill("a", "b", 4, None, Options(seed=3, max_steps=5))]
    refused(client.post("/v1/infill", json={"prefix": "a", "suffix": "b", "length": 4, "at_most": 5}))
    assert refused(client.post("/v1/infill", json={"prefix": "a"}))["param"] == "suffix"
    more = {"prefix": "a", "suffix": "b", "max_tokens": 3}
    assert refused(client.post("/v1/infill", json=more))["param"] == "max_tokens"


def test_edit_streams_drafts_and_then_the_whole(client: TestClient, backend: FakeBackend) -> None:
    body = {"text": "ab", "spans": [[0, 1]], "instruction": "shout", "stream": True, "drafts": True, "seed": 1}
    *drafts, last = events(client.post("/v1/edit", json=body))
    assert len(drafts) == 3 and all(set(one) == {"object", "draft"} for one in drafts)
    assert last["object"] == "edit" and last["text"] == "AB" and "+AB" in last["diff"]
    assert backend.queries == [Edit("ab", "shout", [(0, 1)], None, Options(seed=1, drafts=True))]
    assert refused(client.post("/v1/edit", json={"text": "a", "spans": [[1]]}))["param"] == "spans[0]"
    body = {"text": "ab", "instruction": "shout", "stream": True}
    assert len(events(client.post("/v1/edit", json=body))) == 1


def test_fill(client: TestClient, backend: FakeBackend) -> None:
    template = [
        "Name: ",
        {"name": "who"},
        ", ",
        {"choices": ["yes", "no"]},
        {"name": "n", "schema": {"type": "integer"}},
    ]
    body = client.post("/v1/fill", json={"template": template, "messages": MESSAGES}).json()
    assert body["text"] == "Name: <who>, yes<n>" and body["values"]["who"] == "<who>" and body["lengths"]["n"] == 1
    [query] = backend.queries
    assert isinstance(query, Fill) and query.prompt == MESSAGES
    slots = [Slot("who"), Slot(choices=("yes", "no")), Slot("n", schema={"type": "integer"})]
    assert query.template == ["Name: ", slots[0], ", ", slots[1], slots[2]]
    assert refused(client.post("/v1/fill", json={"template": [{"colour": 1}]}))["param"] == "template[0].colour"
    refused(client.post("/v1/fill", json={"template": template, "messages": MESSAGES, "prompt": "x"}))


def test_decisions(client: TestClient, backend: FakeBackend) -> None:
    fields = {"mood": ["good", "bad"], "size": ["big", "small"]}
    body = client.post("/v1/decisions", json={"prompt": "Hm.", "fields": fields, "steps": 2}).json()
    assert body["decisions"]["mood"] == {"choice": "good", "probabilities": {"good": 0.5, "bad": 0.5}}
    assert backend.queries == [Decide("Hm.", fields, 2, Options(seed=0))]
    refused(client.post("/v1/decisions", json={"fields": fields}))
    assert refused(client.post("/v1/decisions", json={"prompt": "x", "fields": {}}))["param"] == "fields"


# --- what tells ----------------------------------------------------------------------------------------------------


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


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "type", "code"),
    [
        (InputError("stop is bad; mend it"), 400, "invalid_request_error", None),
        (CapacityError("too long; shorten it"), 400, "invalid_request_error", "context_length_exceeded"),
        (BusyError("full; wait"), 503, "overloaded_error", None),
        (WorkerError("died; again"), 503, "worker_error", None),
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


# --- the document --------------------------------------------------------------------------------------------------


def test_the_document_is_whole(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    text = json.dumps(document)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in schemas, name
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert "422" not in operation["responses"], path
            if method == "post":
                assert operation["requestBody"]["required"] and "503" in operation["responses"]
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
