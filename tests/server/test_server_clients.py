"""server/openai/: other people's clients over a real socket: openai's, litellm, and an agent of pydantic-ai.

Every test takes its server from the fixture `server`, and asserts of the text only what any model would give.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from fake_backend import FakeBackend, serving

os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION", "DO_NOT_TRACK": "1"}

openai = pytest.importorskip("openai", reason="needs the package openai")

KEY = "test-key"
MESSAGES: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"place": {"type": "string"}},
    "required": ["place"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather in a place", "parameters": PARAMETERS},
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "mood": {"enum": ["good", "bad"]}},
    "required": ["n", "mood"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Server:
    url: str
    """With /v1."""
    model: str


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    from sfumato.server.app import Settings, create

    with serving(create(FakeBackend(), Settings(keys=(KEY,)))) as one:
        yield Server(f"{one.url}/v1", "fake")


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0, timeout=60) as one:
        yield one


# --- openai --------------------------------------------------------------------------------------------------------


def test_chat(client: Any, server: Server) -> None:
    answer = client.chat.completions.create(
        model=server.model, messages=MESSAGES, seed=3, max_tokens=32, temperature=0.7
    )
    assert answer.object == "chat.completion" and answer.seed == 3
    assert answer.choices[0].message.role == "assistant" and answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert 0 < answer.usage.completion_tokens <= 32 and answer.usage.steps > 0


def test_the_same_seed_is_the_same_text_streamed_or_not(client: Any, server: Server) -> None:
    fields: dict[str, Any] = {"model": server.model, "messages": MESSAGES, "seed": 3, "max_tokens": 32}
    whole = client.chat.completions.create(**fields)
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == whole.choices[0].finish_reason


def test_drafts_pass_a_client_that_does_not_know_them(client: Any, server: Server) -> None:
    fields: dict[str, Any] = {"model": server.model, "messages": MESSAGES, "stream": True, "max_tokens": 16}
    chunks = list(client.chat.completions.create(**fields, extra_body={"drafts": True}))
    drafts = [chunk.draft for chunk in chunks if not chunk.choices]
    assert drafts and all(len(d["pieces"]) == len(d["entropies"]) == len(d["accepted"]) for d in drafts)


def test_n_and_extra_options(client: Any, server: Server) -> None:
    more = {"max_steps": 8, "early": True}
    answer = client.chat.completions.create(
        model=server.model, messages=MESSAGES, n=3, seed=1, max_tokens=16, extra_body=more
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    second = client.chat.completions.create(
        model=server.model, messages=MESSAGES, seed=2, max_tokens=16, extra_body=more
    )
    assert answer.choices[1].message.content == second.choices[0].message.content


@pytest.mark.parametrize("is_stream", [False, True])
def test_tools_over_two_rounds(client: Any, server: Server, is_stream: bool) -> None:
    fields: dict[str, Any] = {"model": server.model, "tools": [WEATHER], "seed": 1, "max_tokens": 128}
    if is_stream:
        with client.chat.completions.stream(messages=MESSAGES, tool_choice="required", **fields) as stream:
            first = stream.get_final_completion()
    else:
        first = client.chat.completions.create(messages=MESSAGES, tool_choice="required", **fields)
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls"
    call = message.tool_calls[0]
    assert call.function.name == "weather" and isinstance(json.loads(call.function.arguments)["place"], str)
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    conversation = [*MESSAGES, message.model_dump(exclude={"parsed"}), result]
    for spoken in conversation[1].get("tool_calls") or []:
        spoken["function"].pop("parsed_arguments", None)
    conversation[1].pop("parsed", None)
    last = client.chat.completions.create(messages=conversation, tool_choice="none", **fields)
    assert last.choices[0].message.content and not last.choices[0].message.tool_calls


def test_json_schema(client: Any, server: Server) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "mood", "strict": True, "schema": SCHEMA}}
    answer = client.chat.completions.create(
        model=server.model, messages=MESSAGES, response_format=form, seed=1, max_tokens=64
    )
    value = json.loads(answer.choices[0].message.content)
    assert set(value) == {"n", "mood"} and isinstance(value["n"], int) and value["mood"] in ("good", "bad")


def test_parse_with_a_model_of_pydantic(client: Any, server: Server) -> None:
    from pydantic import BaseModel

    class Mood(BaseModel):
        n: int
        is_good: bool

    answer = client.chat.completions.parse(
        model=server.model, messages=MESSAGES, response_format=Mood, seed=1, max_tokens=64
    )
    assert isinstance(answer.choices[0].message.parsed, Mood)


def test_stop_and_logprobs(client: Any, server: Server) -> None:
    fields: dict[str, Any] = {"model": server.model, "messages": MESSAGES, "seed": 3, "max_tokens": 32}
    whole = client.chat.completions.create(**fields, logprobs=True, top_logprobs=2)
    text = whole.choices[0].message.content
    content = whole.choices[0].logprobs.content
    assert content and all(one.logprob <= 0 and len(one.top_logprobs) == 2 for one in content)
    stop = text[len(text) // 2 :][:3]
    answer = client.chat.completions.create(**fields, stop=[stop])
    assert answer.choices[0].message.content == text[: text.index(stop)] and answer.choices[0].finish_reason == "stop"


def test_completions(client: Any, server: Server) -> None:
    fields: dict[str, Any] = {"model": server.model, "seed": 1, "max_tokens": 16}
    answer = client.completions.create(prompt=["Once", "Twice"], logprobs=2, **fields)
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == len(choice.logprobs.text_offset)
    chunks = client.completions.create(prompt="Once", stream=True, **fields)
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
    assert client.completions.create(prompt="def f():", suffix="return x", **fields).choices[0].text is not None


def test_models(client: Any, server: Server) -> None:
    [models] = client.models.list().data
    assert models.id == server.model and models.canvas_length > 0
    assert client.models.retrieve(server.model).id == server.model


def test_responses(client: Any, server: Server) -> None:
    fields: dict[str, Any] = {
        "model": server.model,
        "temperature": 0.5,
        "max_output_tokens": 64,
        "extra_body": {"seed": 1},
    }
    answer = client.responses.create(input="What is the weather?", instructions="Be brief.", **fields)
    assert answer.status in ("completed", "incomplete") and answer.output_text and answer.usage.output_tokens > 0
    with client.responses.stream(input="What is the weather?", instructions="Be brief.", **fields) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        last = stream.get_final_response() if answer.status == "completed" else None
    assert text == answer.output_text and (last is None or last.output_text == text)


def test_responses_with_tools(client: Any, server: Server) -> None:
    tool: Any = {"type": "function", "strict": True, **WEATHER["function"]}
    fields: dict[str, Any] = {
        "model": server.model,
        "tools": [tool],
        "max_output_tokens": 128,
        "extra_body": {"seed": 1},
    }
    conversation: list[Any] = list(MESSAGES)
    first = client.responses.create(input=conversation, tool_choice="required", **fields)
    [call] = [item for item in first.output if item.type == "function_call"]
    assert call.name == "weather" and isinstance(json.loads(call.arguments)["place"], str)
    conversation += [*first.output, {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}]
    assert client.responses.create(input=conversation, tool_choice="none", **fields).output_text


def test_errors(client: Any, server: Server) -> None:
    fields: dict[str, Any] = {"messages": MESSAGES}
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=server.model, modalities=["audio"], **fields)
    assert bad.value.param == "modalities" and bad.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", **fields)
    assert missing.value.code == "model_not_found" and missing.value.request_id
    stranger = client.with_options(api_key="no")
    with pytest.raises(openai.AuthenticationError) as unknown:
        stranger.models.list()
    assert unknown.value.code == "invalid_api_key"


# --- litellm -------------------------------------------------------------------------------------------------------


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = pytest.importorskip("litellm", reason="needs the package litellm")
    monkeypatch.setattr(module, "telemetry", False, raising=False)
    monkeypatch.setattr(module, "suppress_debug_info", True)
    return module


@pytest.mark.usefixtures("untidy")
@pytest.mark.filterwarnings("ignore")
def test_litellm(litellm: Any, client: Any, server: Server) -> None:
    fields: dict[str, Any] = {"model": f"openai/{server.model}", "client": client, "api_key": KEY}
    fields |= {"messages": MESSAGES, "seed": 3, "max_tokens": 64}
    whole = litellm.completion(**fields)
    chunks = list(litellm.completion(**fields, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and whole.usage.completion_tokens > 0
    called = litellm.completion(**fields, tools=[WEATHER], tool_choice="required")
    [call] = called.choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["place"] is not None
    message = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    fields["messages"] = [*MESSAGES, called.choices[0].message.model_dump(), message]
    assert litellm.completion(**fields, tools=[WEATHER], tool_choice="none").choices[0].message.content
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**fields, extra_body={"nonsense": 1})


# --- an agent ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("untidy")
@pytest.mark.filterwarnings("ignore")
def test_an_agent_calls_a_tool_and_answers(server: Server) -> None:
    pytest.importorskip("pydantic_ai", reason="needs the package pydantic-ai-slim[openai]")
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    places: list[str] = []

    def weather(place: str) -> str:
        """The weather in a place."""
        places.append(place)
        return "rain"

    async def ask() -> Any:
        async with httpx.AsyncClient() as http:
            provider = OpenAIProvider(base_url=server.url, api_key=KEY, http_client=http)
            model = OpenAIChatModel(server.model, provider=provider)
            agent = Agent(model, tools=[weather], model_settings={"seed": 1, "max_tokens": 128})
            return await agent.run("What is the weather in Oslo?")

    result = asyncio.run(ask())
    assert places and isinstance(result.output, str) and result.output
    assert result.usage.requests >= 2
