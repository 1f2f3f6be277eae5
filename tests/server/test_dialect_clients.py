"""server/anthropic/ and server/ollama/: their own clients over a real socket, LangChain's and litellm.

Each test skips without its package (extra `clients`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from fake_backend import FakeBackend, serving
from pydantic import BaseModel

os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION", "DO_NOT_TRACK": "1"}

KEY = "test-key"
MESSAGES: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
PARAMETERS = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
THINKING: Any = {"type": "enabled", "budget_tokens": 1024}

pytestmark = [pytest.mark.usefixtures("untidy"), pytest.mark.filterwarnings("ignore")]


class Mood(BaseModel):
    """How things are."""

    n: int
    is_good: bool


def weather(place: str) -> str:
    """The weather in a place.

    Args:
        place: Where.
    """
    return f"rain in {place}"


def client_of(name: str) -> Any:
    return pytest.importorskip(name, reason=f"needs the package {name}")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    from sfumato.server.app import Settings, create

    with serving(create(FakeBackend(), Settings(keys=(KEY,)))) as one:
        yield one.url


# --- anthropic -----------------------------------------------------------------------------------------------------

WEATHER: Any = {"name": "weather", "description": "The weather in a place", "input_schema": PARAMETERS}


@pytest.fixture
def claude(url: str) -> Iterator[Any]:
    with client_of("anthropic").Anthropic(base_url=url, api_key=KEY, max_retries=0) as one:
        yield one


def test_anthropic_answers_with_a_preset(claude: Any) -> None:
    preset: dict[str, Any] = {"stop_sequences": ["zz"], "system": [{"type": "text", "text": "Be brief."}]}
    fields = {"model": "fake", "max_tokens": 100, "messages": MESSAGES, "thinking": THINKING, **preset}
    fields["extra_body"] = {"temperature": 0.7, "seed": 3}  # newer SDKs have no argument for the first
    whole = claude.messages.create(**fields)
    assert [block.type for block in whole.content] == ["thinking", "text"] and whole.stop_reason == "end_turn"
    assert whole.usage.output_tokens > 0 and whole._request_id.startswith("req_")
    with claude.messages.stream(**fields) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[1].text == whole.content[1].text and final.usage == whole.usage
    assert final.content[0].signature == whole.content[0].signature
    counted = claude.messages.count_tokens(model="fake", messages=MESSAGES, system=preset["system"], thinking=THINKING)
    assert counted.input_tokens == whole.usage.input_tokens + whole.usage.cache_read_input_tokens


@pytest.mark.parametrize("is_stream", [False, True])
def test_anthropic_calls_a_tool_and_reads_its_result(claude: Any, is_stream: bool) -> None:
    fields = {"model": "fake", "max_tokens": 100, "tools": [WEATHER], "thinking": THINKING}
    if is_stream:
        with claude.messages.stream(messages=MESSAGES, **fields) as stream:
            first = stream.get_final_message()
    else:
        first = claude.messages.create(messages=MESSAGES, **fields)
    call = first.content[-1]
    assert first.stop_reason == "tool_use" and (call.name, call.input) == ("weather", {"place": "text"})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": weather(**call.input)}
    turns = [*MESSAGES, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    assert claude.messages.create(messages=turns, **fields).content[-1].text == "The tool says rain in text"


def test_anthropic_runs_tools_by_itself_and_parses(claude: Any) -> None:
    tool = client_of("anthropic").beta_tool(weather)
    run = claude.beta.messages.tool_runner(model="fake", max_tokens=100, tools=[tool], messages=MESSAGES)
    assert run.until_done().content[0].text == "The tool says rain in text"
    parsed = claude.messages.parse(model="fake", max_tokens=100, messages=MESSAGES, output_format=Mood)
    assert parsed.parsed_output == Mood(n=7, is_good=True)
    assert [model.display_name for model in claude.models.list()] == ["fake"]
    assert claude.models.retrieve("fake").max_input_tokens == 4096


def test_anthropic_knows_the_errors(claude: Any) -> None:
    anthropic = client_of("anthropic")
    fields = {"max_tokens": 100, "messages": MESSAGES}
    with pytest.raises(anthropic.NotFoundError) as missing:
        claude.messages.create(model="other", **fields)
    assert missing.value.request_id and missing.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="mcp_servers"):
        claude.beta.messages.create(model="fake", mcp_servers=[{"type": "url", "url": "x", "name": "x"}], **fields)
    with pytest.raises(anthropic.AuthenticationError):
        claude.with_options(api_key="no").messages.create(model="fake", **fields)


# --- ollama --------------------------------------------------------------------------------------------------------


@pytest.fixture
def llama(url: str) -> Any:
    return client_of("ollama").Client(host=url, headers={"authorization": f"Bearer {KEY}"})


def test_ollama_answers_with_a_preset(llama: Any) -> None:
    options = client_of("ollama").Options(num_ctx=4096, temperature=0.3, seed=4, stop=["zz"], repeat_penalty=1.0)
    fields = {"model": "fake", "messages": MESSAGES, "think": True, "options": options}
    whole = llama.chat(**fields)
    parts = list(llama.chat(**fields, stream=True))
    assert "".join(part.message.content for part in parts) == whole.message.content and whole.message.thinking
    assert parts[-1].done_reason == whole.done_reason == "stop" and whole.eval_count > 0
    schema = Mood.model_json_schema()
    assert Mood.model_validate_json(llama.chat(model="fake", messages=MESSAGES, format=schema).message.content).n == 7


def test_ollama_calls_a_tool_and_reads_its_result(llama: Any) -> None:
    message = llama.chat(model="fake", messages=MESSAGES, tools=[weather]).message
    [call] = message.tool_calls
    result = {"role": "tool", "tool_name": call.function.name, "content": weather(**call.function.arguments)}
    last = llama.chat(model="fake", messages=[*MESSAGES, message, result], tools=[weather])
    assert last.message.content == "The tool says rain in text"


def test_ollama_generates_and_lists(llama: Any) -> None:
    first = llama.generate(model="fake", prompt="One", system="Be brief.")
    assert llama.generate(model="fake", prompt="Two", context=first.context).response.startswith("You said: Two")
    assert llama.generate(model="fake", prompt="a", suffix="b").response == " middle "
    assert [model.model for model in llama.list().models] == ["fake:latest"]
    assert llama.ps().models[0].context_length == 4096 and "tools" in llama.show("fake").capabilities
    failure = client_of("ollama").ResponseError
    for ask in (lambda: llama.embed("fake", "x"), lambda: llama.pull("fake"), lambda: llama.generate("other", "x")):
        with pytest.raises(failure) as error:
            ask()  # type: ignore[no-untyped-call]
        assert error.value.status_code in (404, 501)


# --- what is built on them -----------------------------------------------------------------------------------------


def chat_models(url: str) -> dict[str, Any]:
    """LangChain's models of both dialects, each with a preset, where their packages are."""
    models: dict[str, Any] = {}
    headers = {"headers": {"authorization": f"Bearer {KEY}"}}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "langchain_anthropic": ("ChatAnthropic", {"api_key": KEY, "max_tokens": 100, "max_retries": 0}),
        "langchain_ollama": ("ChatOllama", {"client_kwargs": headers, "num_predict": 100, "num_ctx": 4096}),
    }
    for name, (kind, fields) in kinds.items():
        models[name] = lambda name=name, kind=kind, fields=fields: getattr(client_of(name), kind)(
            model="fake", base_url=url, temperature=0.7, **fields
        )
    return models


@pytest.mark.parametrize("package", ["langchain_anthropic", "langchain_ollama"])
def test_langchain(url: str, package: str) -> None:
    model = chat_models(url)[package]()
    answer = model.invoke("Hi")
    assert answer.content.startswith("You said: Hi") and answer.usage_metadata["output_tokens"] > 0
    chunks = list(model.stream("Hi"))
    assert "".join(chunk.content for chunk in chunks if isinstance(chunk.content, str)).startswith("You said: Hi")
    first = model.bind_tools([weather]).invoke("Hi")
    [call] = first.tool_calls
    tool_message = client_of("langchain_core.messages").ToolMessage(weather(**call["args"]), tool_call_id=call["id"])
    turns = [("human", "Hi"), first, tool_message]
    assert model.bind_tools([weather]).invoke(turns).content == "The tool says rain in text"
    assert model.with_structured_output(Mood, method="json_schema").invoke("Hi") == Mood(n=7, is_good=True)


@pytest.mark.parametrize(
    ("model", "more"),
    [("anthropic/fake", {"api_key": KEY}), ("ollama_chat/fake", {"headers": {"authorization": f"Bearer {KEY}"}})],
)
def test_litellm_speaks_both(url: str, model: str, more: dict[str, Any]) -> None:
    client_of("anthropic")  # in the extra `clients`, as is this use of litellm
    litellm = client_of("litellm")
    litellm.telemetry, litellm.suppress_debug_info = False, True
    fields = {"model": model, "api_base": url, "messages": MESSAGES, "temperature": 0.5, "max_tokens": 100, **more}
    assert litellm.completion(**fields).choices[0].message.content.startswith("You said")
    chunks = litellm.completion(**fields, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).startswith("You said")
    tool = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": PARAMETERS}}
    [call] = litellm.completion(**fields, tools=[tool]).choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"place": "text"}
