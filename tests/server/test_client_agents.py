"""server/openai/: agents over a real socket: openai-agents, instructor, LangChain, litellm, pydantic-ai and llm.

Each calls a tool and answers, streams, fills a schema beside a tool, shows thoughts, and sends a preset of sampling.
They are the extra `clients`; a test skips where its package is absent.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
from fake_backend import FakeBackend, serving
from pydantic import BaseModel

from sfumato.server.app import Settings, create
from sfumato.templates.requests import AnswerQuery, Chat
from sfumato.text.replies import Reply

os.environ |= {
    "DO_NOT_TRACK": "1",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_MODE": "PRODUCTION",
}
pytestmark = [pytest.mark.clients, pytest.mark.usefixtures("untidy"), pytest.mark.filterwarnings("ignore")]

KEY = "test-key"
QUESTION = "What is the weather in Oslo?"
SAYS = "The tool says rain"
PRESET: dict[str, Any] = {"temperature": 0.7, "top_p": 0.95, "presence_penalty": 0.5, "frequency_penalty": 0.25}
VENDORS: dict[str, Any] = {"top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1}


class Mood(BaseModel):
    """How somebody feels."""

    n: int
    is_good: bool


GOOD = Mood(n=7, is_good=True)


def script(query: AnswerQuery) -> Reply | None:
    """JSON where it is asked for in words; else what the fake backend says."""
    text = str(query.conversation) if isinstance(query, Chat) and not query.tools else ""
    is_free = query.options.schema in (None, {"type": "object"})
    return Reply(GOOD.model_dump_json(), None, []) if "properties" in text and is_free else None


@pytest.fixture(scope="module")
def backend() -> FakeBackend:
    return FakeBackend(script=script)


@pytest.fixture(scope="module")
def url(backend: FakeBackend) -> Iterator[str]:
    with serving(create(backend, Settings(keys=(KEY,)))) as one:
        yield f"{one.url}/v1"


def weather(place: str) -> str:
    """The weather in a place."""
    return "rain" if place else "?"


# --- openai-agents -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["chat", "responses"])
def ask_agent(request: pytest.FixtureRequest, url: str) -> Callable[..., Any]:
    """Runs an agent of openai-agents with the tool `weather`: its final output, and the kinds of its events."""
    agents: Any = pytest.importorskip("agents", reason="needs the package openai-agents")
    import openai

    agents.set_tracing_disabled(True)
    kind = agents.OpenAIChatCompletionsModel if request.param == "chat" else agents.OpenAIResponsesModel

    async def ask(output: Any, is_stream: bool, settings: dict[str, Any], more: dict[str, Any]) -> Any:
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            agent = agents.Agent(
                name="agent",
                instructions="Be brief.",
                model=kind(model="fake", openai_client=client),
                tools=[agents.function_tool(weather)],
                output_type=output,
                model_settings=agents.ModelSettings(**settings),
            )
            if not is_stream:
                return (await agents.Runner.run(agent, QUESTION, **more)).final_output, set()
            run = agents.Runner.run_streamed(agent, QUESTION, **more)
            kinds = {event.name for event in [one async for one in run.stream_events()] if hasattr(event, "name")}
            return run.final_output, kinds

    def run(output: Any = None, is_stream: bool = False, settings: Any = None, **more: Any) -> Any:
        return asyncio.run(ask(output, is_stream, settings or {}, more))

    return run


@pytest.mark.parametrize("is_stream", [False, True])
def test_openai_agents(ask_agent: Callable[..., Any], is_stream: bool) -> None:
    output, kinds = ask_agent(is_stream=is_stream)
    assert output == SAYS and (not is_stream or {"tool_called", "tool_output", "message_output_created"} <= kinds)


def test_openai_agents_structured(ask_agent: Callable[..., Any]) -> None:
    assert ask_agent(Mood)[0] == GOOD


def test_openai_agents_thoughts(ask_agent: Callable[..., Any]) -> None:
    from openai.types.shared import Reasoning

    settings = {
        "reasoning": Reasoning(effort="high", summary="auto"),
        "response_include": ["reasoning.encrypted_content"],
        "truncation": "auto",
        "store": True,
        "verbosity": "low",
        "tool_choice": "required",
    }
    output, kinds = ask_agent(is_stream=True, settings=settings)
    assert output == SAYS and "reasoning_item_created" in kinds


def test_openai_agents_preset(ask_agent: Callable[..., Any]) -> None:
    shared = {name: PRESET[name] for name in ("temperature", "top_p")}
    assert ask_agent(settings=shared | {"extra_body": VENDORS})[0] == SAYS


def test_openai_agents_go_on_from_a_kept_answer(ask_agent: Callable[..., Any]) -> None:
    assert ask_agent(auto_previous_response_id=True)[0] == SAYS


# --- instructor ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON", "JSON_SCHEMA", "MD_JSON", "RESPONSES_TOOLS"])
def test_instructor(url: str, mode: str) -> None:
    instructor: Any = pytest.importorskip("instructor", reason="needs the package instructor")
    import openai

    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as raw:
        client = instructor.from_openai(raw, mode=instructor.Mode[mode])
        fields: dict[str, Any] = {"model": "fake", "response_model": Mood, "max_retries": 0}
        fields["messages"] = [{"role": "user", "content": "How is it? Its properties are n and is_good."}]
        assert client.chat.completions.create(**fields).model_dump() == GOOD.model_dump()
        if mode == "JSON_SCHEMA":
            assert list(client.chat.completions.create_partial(**fields))[-1].n == GOOD.n


# --- LangChain -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_new", [False, True], ids=["chat", "responses"])
def test_langchain(url: str, is_new: bool) -> None:
    langchain: Any = pytest.importorskip("langchain_openai", reason="needs the package langchain-openai")
    from langchain_core.messages import HumanMessage, ToolMessage

    def model(**more: Any) -> Any:
        return langchain.ChatOpenAI(
            model="fake", base_url=url, api_key=KEY, max_retries=0, use_responses_api=is_new, **more
        )

    caller = model().bind_tools([weather])
    history: list[Any] = [HumanMessage(QUESTION)]
    history.append(caller.invoke(history))
    [call] = history[-1].tool_calls
    assert call["name"] == "weather" and call["args"] == {"place": "text"}
    history.append(ToolMessage("rain", tool_call_id=call["id"]))
    assert caller.invoke(history).text == SAYS
    assert "".join(chunk.text for chunk in caller.stream(history)) == SAYS
    for method in ("json_schema", "function_calling", "json_mode"):
        structured = model().with_structured_output(Mood, method=method)
        assert structured.invoke("As JSON, with the properties n and is_good: how is it?") == GOOD, method
    thinking = {"reasoning": {"effort": "high", "summary": "auto"}} if is_new else {"reasoning_effort": "high"}
    answer = model(**thinking).invoke(QUESTION)
    assert answer.text.startswith("You said") and ("Let me think." in str(answer.content)) is is_new
    preset = {name: PRESET[name] for name in ("temperature", "top_p")}
    assert model(**preset, extra_body=VENDORS).invoke(QUESTION).text.startswith("You said")


# --- litellm -------------------------------------------------------------------------------------------------------


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = pytest.importorskip("litellm", reason="needs the package litellm")
    monkeypatch.setattr(module, "telemetry", False, raising=False)
    monkeypatch.setattr(module, "suppress_debug_info", True)
    return module


def test_litellm_thoughts_and_a_preset(litellm: Any, url: str) -> None:
    fields: dict[str, Any] = {"api_base": url, "api_key": KEY, "messages": [{"role": "user", "content": "hi"}]}
    think = {"reasoning_effort": "high", "allowed_openai_params": ["reasoning_effort"]}
    answer = litellm.completion(model="openai/fake", **fields, **think)
    assert answer.choices[0].message.reasoning_content == "Let me think."
    answer = litellm.completion(model="hosted_vllm/fake", **fields, thinking={"type": "enabled", "budget_tokens": 99})
    assert answer.choices[0].message.reasoning_content == "Let me think."
    answer = litellm.completion(model="openai/fake", **fields, **PRESET, extra_body=VENDORS)
    assert answer.choices[0].message.content.startswith("You said")


def test_litellms_bridge_to_anthropics_messages(litellm: Any, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", ModuleType("soundfile"))  # it imports that, and nothing here is sound
    cached = {"cache_control": {"type": "ephemeral"}}
    fields: dict[str, Any] = {
        "api_base": url,
        "api_key": KEY,
        "model": "openai/fake",
        "max_tokens": 2000,
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi", **cached}]}],
        "system": [{"type": "text", "text": "Be brief.", **cached}],
        "tools": [{"name": "weather", "description": "", "input_schema": {"type": "object", "properties": {}}}],
    }

    async def ask() -> bytes:
        return b"".join([bytes(one) async for one in await litellm.anthropic.messages.acreate(**fields, stream=True)])

    text = asyncio.run(ask()).decode()
    assert "thinking_delta" in text and '"tool_use"' in text and "message_stop" in text


# --- pydantic-ai ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=["chat", "responses"])
def ask_pydantic(request: pytest.FixtureRequest, url: str) -> Callable[..., Any]:
    """Runs an agent of pydantic-ai, with the tool `weather` unless that is left out."""
    pytest.importorskip("pydantic_ai", reason="needs the package pydantic-ai-slim[openai]")
    import httpx
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    kind: Any = OpenAIChatModel if request.param == "chat" else OpenAIResponsesModel

    async def ask(output: Any, is_stream: bool, tools: list[Any], settings: Any) -> Any:
        async with httpx.AsyncClient() as http:
            provider = OpenAIProvider(base_url=url, api_key=KEY, http_client=http)
            agent: Any = Agent(
                kind("fake", provider=provider), output_type=output, tools=tools, model_settings=settings
            )
            if not is_stream:
                return (await agent.run(QUESTION)).output
            async with agent.run_stream(QUESTION) as run:
                return [one async for one in run.stream_output()][-1]

    def run(output: Any = str, is_stream: bool = False, has_tool: bool = True, **settings: Any) -> Any:
        return asyncio.run(ask(output, is_stream, [weather] if has_tool else [], settings or None))

    return run


@pytest.mark.parametrize("is_stream", [False, True])
def test_pydantic_ai(ask_pydantic: Callable[..., Any], is_stream: bool) -> None:
    from pydantic_ai import NativeOutput, PromptedOutput, ToolOutput

    assert ask_pydantic(is_stream=is_stream) == SAYS
    assert ask_pydantic(NativeOutput(Mood), is_stream) == GOOD
    assert ask_pydantic(ToolOutput(Mood), is_stream, has_tool=False) == GOOD
    assert ask_pydantic(PromptedOutput(Mood), is_stream, has_tool=False) == GOOD


def test_pydantic_ai_thoughts_and_a_preset(ask_pydantic: Callable[..., Any]) -> None:
    more = {"openai_reasoning_effort": "high", "openai_reasoning_summary": "auto", "openai_service_tier": "flex"}
    assert ask_pydantic(**more, openai_store=True, openai_user="me") == SAYS
    assert ask_pydantic(**PRESET, extra_body=VENDORS) == SAYS


# --- llm -----------------------------------------------------------------------------------------------------------


def test_llm(url: str) -> None:
    pytest.importorskip("llm", reason="needs the package llm")
    from llm.default_plugins.openai_models import Chat as Model

    model: Any = Model("fake", model_name="fake", api_base=url, supports_schema=True, supports_tools=True)
    model.key = KEY
    for is_stream in (False, True):
        assert model.prompt(QUESTION, stream=is_stream).text().startswith(f"You said: {QUESTION}")
        assert model.chain(QUESTION, tools=[weather], stream=is_stream).text().endswith(SAYS)
    assert Mood.model_validate_json(model.prompt("How is it?", schema=Mood, stream=False).text()) == GOOD
    assert model.prompt(QUESTION, **PRESET, stream=False).text().startswith("You said")
