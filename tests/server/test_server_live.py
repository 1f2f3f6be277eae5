"""server/ and remote/: `sfumato serve -m nano` in a process, real sockets, other people's clients and ours.

nano knows nothing but Sudoku, so that a text is held to another run of the same seed, and a call or JSON to its schema.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import psutil
import pytest
import torch

from sfumato import LLM, Options
from sfumato.checkpoints.adapters import write_adapter
from sfumato.errors import InputError
from sfumato.events import Commit, Done, Draft
from sfumato.model.adapters import new_adapter
from sfumato.remote import Remote
from sfumato.tasks.sudoku import is_solved
from sfumato.templates.slots import Slot

os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION", "DO_NOT_TRACK": "1"}

openai = pytest.importorskip("openai", reason="needs the package openai")

MODEL = "nano"
PUZZLE = "020008000908045603450391800301409270507082000204703901710500438045837090832010000"
"""46 clues."""
SUDOKU: list[Any] = [{"role": "user", "content": f"Solve this Sudoku:\n{PUZZLE}"}]
MESSAGES: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
QUICK: dict[str, Any] = {"model": MODEL, "seed": 3, "max_tokens": 24}
FEW_STEPS: dict[str, Any] = {"max_steps": 4, "short": True}
ENDLESS: dict[str, Any] = {"max_tokens": 8, "max_steps": 4096, "confidence": 0}
"""Takes minutes."""

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"place": {"type": "string", "maxLength": 12}, "unit": {"enum": ["C", "F"]}},
    "required": ["place", "unit"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather", "parameters": PARAMETERS},
}
TIDE: Any = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {}}}}
MOOD: dict[str, Any] = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "mood": {"enum": ["good", "bad"]}},
    "required": ["n", "mood"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Server:
    url: str
    process: subprocess.Popen[str]

    @property
    def api(self) -> str:
        return f"{self.url}/v1"

    def worker(self) -> psutil.Process:
        """The process that has the model."""
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if "--multiprocessing-fork" in child.cmdline())

    def metric(self, name: str) -> int:
        page = httpx.get(f"{self.url}/metrics").text
        return int(float(re.search(rf"^sfumato_{name} (\S+)$", page, re.MULTILINE)[1]))  # type: ignore[index]

    def rows(self) -> int:
        return self.metric("rows")

    def restarts(self) -> int:
        return self.metric("worker_restarts_total")

    def until_rows(self, is_right: Callable[[int], bool], seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while not is_right(rows := self.rows()):
            assert time.monotonic() < end, f"{rows} rows"
            time.sleep(0.02)

    def post(self, path: str, **body: Any) -> Any:
        response = httpx.post(f"{self.api}{path}", json=body, timeout=60)
        assert response.status_code == 200, response.text
        return response.json()

    @contextmanager
    def busy(self, requests: int) -> Iterator[None]:
        """While so many others run."""
        with ExitStack() as stack:
            client = stack.enter_context(httpx.Client(timeout=60))
            for seed in range(requests):
                body = ENDLESS | {"messages": MESSAGES, "seed": seed, "stream": True, "drafts": True}
                stack.enter_context(client.stream("POST", f"{self.api}/chat/completions", json=body))
            yield


@pytest.fixture(scope="module")
def adapters(local: LLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters, in which one changes every answer."""
    folder, model = tmp_path_factory.mktemp("adapters"), local.model
    adapter = new_adapter(model, 4, 4, seed=1)
    for factors in adapter.factors.values():
        factors.b.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(1))
    write_adapter(adapter, folder / "run", model, base="nano")
    return folder


@pytest.fixture(scope="module")
def server(adapters: Path) -> Iterator[Server]:
    command = [sys.executable, "-c", "from sfumato.cli import main; raise SystemExit(main())"]
    command += ["serve", "-m", "nano", "--port", "0", "--ops", "fused", "--drain", "1"]
    command += ["--adapter-folder", str(adapters)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            match = re.match(r"Sfumato serves nano on (http://127\.0\.0\.1:\d+) ", line)
            assert match, line
            yield Server(match[1], process)
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=server.api, api_key="none", max_retries=0, timeout=60) as one:
        yield one


@pytest.fixture(scope="module")
def local() -> LLM:
    return LLM.load("nano", ops="fused")


def valid(text: str, schema: dict[str, Any]) -> Any:
    value = json.loads(text)
    jsonschema.validate(value, schema)
    return value


# --- openai: chat --------------------------------------------------------------------------------------------------


def test_a_sudoku_is_solved(client: Any) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=SUDOKU, seed=3)
    assert is_solved(answer.choices[0].message.content, PUZZLE) and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 82 and answer.usage.prompt_tokens == 95 and answer.seed == 3


def test_a_stream_joins_to_the_whole(client: Any) -> None:
    whole = client.chat.completions.create(messages=MESSAGES, **QUICK)
    fields = {"stream": True, "stream_options": {"include_usage": True}, "extra_body": {"drafts": True}}
    chunks = list(client.chat.completions.create(messages=MESSAGES, **QUICK, **fields))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(one.delta.content or "" for one in choices) == whole.choices[0].message.content
    assert choices[-1].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 24
    drafts = [chunk.draft for chunk in chunks if not chunk.choices and chunk.usage is None]
    assert [draft["step"] for draft in drafts] == list(range(1, whole.usage.steps + 1))
    for draft in drafts:
        assert len(draft["pieces"]) == len(draft["entropies"]) == len(draft["accepted"]) >= 24
    assert "".join(drafts[-1]["pieces"]).startswith(whole.choices[0].message.content)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_tools_in_two_rounds(client: Any, choice: Any) -> None:
    fields: dict[str, Any] = {"model": MODEL, "seed": 1, "max_tokens": 96, "extra_body": {"short": True}}
    fields["tools"] = [WEATHER] if choice == "required" else [TIDE, WEATHER]
    first = client.chat.completions.create(messages=MESSAGES, tool_choice=choice, **fields).choices[0]
    [call] = first.message.tool_calls
    assert first.finish_reason == "tool_calls" and call.function.name == "weather"
    valid(call.function.arguments, PARAMETERS)
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    last = client.chat.completions.create(messages=[*MESSAGES, first.message, result], **fields).choices[0]
    assert last.message.content and not last.message.tool_calls and last.finish_reason in ("stop", "length")


def test_a_streamed_call(client: Any) -> None:
    fields = QUICK | {"max_tokens": 96, "tools": [WEATHER], "tool_choice": "required", "extra_body": {"short": True}}
    with client.chat.completions.stream(messages=MESSAGES, **fields) as stream:
        streamed = stream.get_final_completion().choices[0]
    whole = client.chat.completions.create(messages=MESSAGES, **fields).choices[0]
    [call], [same] = streamed.message.tool_calls, whole.message.tool_calls
    assert call.function.arguments == same.function.arguments and streamed.finish_reason == "tool_calls"


def test_json_schema(client: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "mood", "strict": True, "schema": MOOD}}
    answer = client.chat.completions.create(messages=MESSAGES, response_format=form, **(QUICK | {"max_tokens": 64}))
    valid(answer.choices[0].message.content, MOOD)
    assert answer.choices[0].finish_reason == "stop"
    fields = QUICK | {"max_tokens": 96, "tools": [WEATHER], "reasoning_effort": "low", "extra_body": {"short": True}}
    for choice in ("auto", "required"):  # a call or JSON, behind a thought or not
        with client.chat.completions.stream(messages=MESSAGES, tool_choice=choice, response_format=form, **fields) as s:
            message = s.get_final_completion().choices[0].message
        assert message.tool_calls or choice == "auto"
        valid(
            *((message.tool_calls[0].function.arguments, PARAMETERS) if message.tool_calls else (message.content, MOOD))
        )


def test_the_same_seed_is_the_same_text_alone_and_among_others(client: Any, server: Server) -> None:
    def texts() -> list[str]:
        requests = [QUICK | {"messages": MESSAGES, "seed": seed} for seed in (7, 8)] + [QUICK | {"messages": SUDOKU}]
        answers = [client.chat.completions.create(**one, extra_body=FEW_STEPS) for one in requests]
        return [one.choices[0].message.content for one in answers]

    alone = texts()
    assert alone[0] != alone[1] and texts() == alone
    with server.busy(8):
        server.until_rows(lambda rows: rows == 8)
        assert texts() == alone
    server.until_rows(lambda rows: rows == 0)


def test_stop_strings(client: Any) -> None:
    text = client.chat.completions.create(messages=MESSAGES, **QUICK).choices[0].message.content
    stop = text[9:12]
    choice = client.chat.completions.create(messages=MESSAGES, stop=["never", stop], **QUICK).choices[0]
    assert choice.message.content == text[: text.index(stop)]
    assert choice.finish_reason == "stop" and choice.stop_reason == stop


def test_logprobs(client: Any) -> None:
    answer = client.chat.completions.create(messages=SUDOKU, model=MODEL, seed=3, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    assert "".join(one.token for one in content) == answer.choices[0].message.content + "<turn|>"
    surest = 0
    for one in content:
        tops = [top.logprob for top in one.top_logprobs]
        assert len(tops) == 3 and tops == sorted(tops, reverse=True) and one.logprob <= tops[0] + 1e-4
        assert bytes(one.bytes).decode() == one.token
        if one.logprob >= tops[0] - 1e-6:
            surest += 1
            assert one.token == one.top_logprobs[0].token
    assert surest
    assert client.chat.completions.create(messages=MESSAGES, **QUICK).choices[0].logprobs is None


def test_three_answers_have_three_seeds(client: Any) -> None:
    fields = {"messages": MESSAGES, "extra_body": FEW_STEPS}
    answer = client.chat.completions.create(n=3, **fields, **QUICK)
    assert [choice.index for choice in answer.choices] == [0, 1, 2] and answer.usage.completion_tokens == 72
    alone = [client.chat.completions.create(**fields, **(QUICK | {"seed": seed})) for seed in (3, 4, 5)]
    texts = [one.choices[0].message.content for one in alone]
    assert [choice.message.content for choice in answer.choices] == texts and len(set(texts)) == 3


# --- openai: completions, responses, errors ------------------------------------------------------------------------


def test_completions(client: Any) -> None:
    fields = QUICK | {"extra_body": FEW_STEPS}
    plain = client.completions.create(prompt=["Solve", "12"], logprobs=2, **fields)
    assert [choice.index for choice in plain.choices] == [0, 1]
    for choice in plain.choices:
        logprobs = choice.logprobs
        assert "".join(logprobs.tokens) == choice.text and len(logprobs.tokens) == len(logprobs.token_logprobs) == 24
        assert all(
            choice.text[at:].startswith(piece) for at, piece in zip(logprobs.text_offset, logprobs.tokens, strict=True)
        )
        assert all(len(top) == 2 for top in logprobs.top_logprobs)
    echoed = client.completions.create(prompt="Solve", echo=True, **fields)
    assert echoed.choices[0].text == "Solve" + plain.choices[0].text
    chunks = client.completions.create(prompt="Solve", stream=True, **fields)
    assert "".join(chunk.choices[0].text for chunk in chunks) == plain.choices[0].text
    middle = client.completions.create(prompt="12", suffix="45", **(fields | {"max_tokens": 4, "extra_body": {}}))
    assert middle.choices[0].finish_reason == "stop" and isinstance(middle.choices[0].text, str)


@pytest.mark.parametrize("cut", [2, 5, None])
def test_scores_are_those_of_python(server: Server, client: Any, local: LLM, cut: int | None) -> None:
    """`Remote.score` asks the same route as lm-eval: a prompt's log-probabilities, and one token behind it."""
    text = "Solve 020 hé∀😀 | 5"
    parts = (text,) if cut is None else (text[:cut], text[cut:])
    ours, theirs = local.score(*parts, top_logprobs=2, temperature=0), Remote(server.url).score(*parts, temperature=0)
    assert (theirs.text, theirs.answer, theirs.is_greedy) == (ours.text, ours.answer, ours.is_greedy)
    assert theirs.logprob == pytest.approx(ours.logprob, abs=1e-3) and theirs.tokens[0].token == -1
    assert [(one.piece, one.offset) for one in theirs.tokens] == [(one.piece, one.offset) for one in ours.tokens]
    assert [list(one.top) for one in theirs.tokens] == [list(one.top)[:1] for one in ours.tokens]
    ids = list(local.encode(text).tokens)
    fields: Any = {"model": MODEL, "prompt": [ids, ids[:3]], "echo": True, "logprobs": 1, "temperature": 0}
    whole, short = client.completions.create(max_tokens=1, **fields).choices
    logprobs = [one.logprob for one in local.score(ids).tokens]
    assert whole.logprobs.token_logprobs[1:-1] == pytest.approx(logprobs[1:], abs=1e-4)
    assert whole.logprobs.token_logprobs[0] is None and len(short.logprobs.tokens) == 4
    assert all(
        value <= max(top.values())
        for value, top in zip(whole.logprobs.token_logprobs[1:], whole.logprobs.top_logprobs[1:], strict=True)
    )


def test_responses(client: Any) -> None:
    fields: dict[str, Any] = {"model": MODEL, "max_output_tokens": 24, "extra_body": FEW_STEPS | {"seed": 1}}
    answer = client.responses.create(input="Hello", instructions="Be brief.", **fields)
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage.output_tokens == 24 and len(answer.output_text) == 24
    events = list(client.responses.create(input="Hello", instructions="Be brief.", stream=True, **fields))
    assert events[0].type == "response.created" and events[-1].type == "response.incomplete"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == answer.output_text == events[-1].response.output_text


def test_responses_with_a_tool(client: Any) -> None:
    tool: Any = {"type": "function", "strict": True, **WEATHER["function"]}
    fields: dict[str, Any] = {"model": MODEL, "tools": [tool], "max_output_tokens": 96}
    fields["extra_body"] = {"seed": 1, "short": True}
    with client.responses.stream(input=MESSAGES, tool_choice="required", **fields) as stream:
        first = stream.get_final_response()
    [call] = first.output
    assert call.type == "function_call" and call.name == "weather" and first.status == "completed"
    valid(call.arguments, PARAMETERS)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    spoken = {"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": call.arguments}
    last = client.responses.create(input=[*MESSAGES, spoken, result], **fields)
    assert last.output_text and last.usage.output_tokens > 0


def test_errors(client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(messages=MESSAGES, **(QUICK | {"model": "other"}))
    assert missing.value.code == "model_not_found" and "nano" in missing.value.message
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(messages=MESSAGES, **(QUICK | {"temperature": 3}))
    assert wrong.value.param == "temperature" and wrong.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as unknown:
        client.chat.completions.create(messages=MESSAGES, extra_body={"nonsense": 1}, **QUICK)
    assert unknown.value.param == "nonsense"
    for is_stream in (False, True):
        with pytest.raises(openai.BadRequestError) as long:
            client.completions.create(prompt="Solve " * 4096, stream=is_stream, **QUICK)
        assert long.value.code == "context_length_exceeded" and "4096" in long.value.message
    schema = {"type": "object", "properties": {"a": {"type": "no such type"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(messages=MESSAGES, response_format=form, **QUICK)


# --- litellm and an agent ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("untidy")
@pytest.mark.filterwarnings("ignore")
def test_litellm(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    litellm = pytest.importorskip("litellm", reason="needs the package litellm")
    monkeypatch.setattr(litellm, "telemetry", False)
    monkeypatch.setattr(litellm, "suppress_debug_info", True)
    its_own = client.copy()  # litellm changes how often it asks again
    fields: dict[str, Any] = QUICK | {"model": f"openai/{MODEL}", "client": its_own, "extra_body": {"short": True}}
    whole = litellm.completion(messages=MESSAGES, **fields)
    chunks = list(litellm.completion(messages=MESSAGES, stream=True, **fields))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and whole.usage.completion_tokens == 24
    fields |= {"max_tokens": 96, "tools": [WEATHER]}
    called = litellm.completion(messages=MESSAGES, tool_choice="required", **fields).choices[0].message
    [call] = called.tool_calls
    valid(call.function.arguments, PARAMETERS)
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    last = litellm.completion(messages=[*MESSAGES, called.model_dump(), result], tool_choice="none", **fields)
    assert last.choices[0].message.content


@pytest.mark.usefixtures("untidy")
@pytest.mark.filterwarnings("ignore")
def test_an_agent_calls_a_tool_and_answers(server: Server) -> None:
    """Of its own accord nano calls nothing, so the agent asks for a call in its first step, and only there."""
    pydantic_ai = pytest.importorskip("pydantic_ai", reason="needs the package pydantic-ai-slim[openai]")
    from pydantic import BaseModel
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    class Mood(BaseModel):
        n: int
        is_good: bool

    places: list[str] = []

    def weather(place: str) -> str:
        """The weather in a place."""
        places.append(place)
        return "rain"

    def settings(context: Any) -> Any:
        choice = "required" if context.run_step <= 1 else "none"
        return {"seed": 1, "max_tokens": 96, "tool_choice": choice, "extra_body": {"short": True}}

    async def ask() -> list[Any]:
        async with httpx.AsyncClient(timeout=60) as http:
            provider = OpenAIProvider(base_url=server.api, api_key="none", http_client=http)
            model = OpenAIChatModel(MODEL, provider=provider)
            caller = pydantic_ai.Agent(model, tools=[weather], model_settings=settings)
            plain = {"seed": 1, "max_tokens": 96}
            teller = pydantic_ai.Agent(model, output_type=pydantic_ai.NativeOutput(Mood), model_settings=plain)
            return [await agent.run("What is the weather in Oslo?") for agent in (caller, teller)]

    called, result = asyncio.run(ask())
    assert len(places) == 1 and isinstance(called.output, str) and called.output
    assert called.usage.requests == 2 and called.usage.tool_calls == 1
    assert isinstance(result.output, Mood)


# --- our own routes, our own client --------------------------------------------------------------------------------

BOARD: list[Any] = [run if run[0] != "0" else {"length": len(run)} for run in re.findall("0+|[1-9]+", PUZZLE)]
QUESTIONS: dict[str, Any] = {
    "q": {"type": "noul", "instructions": "Is it solved?"},
    "c": {"type": "choice", "criteria": {"Yes": None, "No": "It is not"}},
}
FIELDS = {"digit": ["1", "5", "9"], "row": ["first", "last"]}


def streamed(server: Server, path: str, **body: Any) -> list[Any]:
    response = httpx.post(f"{server.api}{path}", json=body | {"stream": True}, timeout=60)
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert events.pop() == "[DONE]"
    return [json.loads(one) for one in events]


def test_a_sudoku_as_a_template(server: Server) -> None:
    body: dict[str, Any] = {"template": BOARD, "messages": SUDOKU, "seed": 0}
    answer = server.post("/fill", **body)
    assert is_solved(answer["text"], PUZZLE)
    runs = re.findall("0+", PUZZLE)
    assert [len(value) for value in answer["values"].values()] == list(map(len, runs))
    assert answer["lengths"] == {str(number + 1): len(run) for number, run in enumerate(runs)}
    *drafts, last = streamed(server, "/fill", **body, drafts=True)
    assert len(drafts) == answer["usage"]["steps"] and all(one["object"] == "fill" for one in drafts)
    assert [one["draft"]["step"] for one in drafts] == list(range(1, len(drafts) + 1))
    for one in drafts:
        pieces = one["draft"]["pieces"]
        assert all(clue in ("0", piece) for clue, piece in zip(PUZZLE, pieces[:81], strict=True))
    assert last["text"] == answer["text"] and last["values"] == answer["values"]


def test_infill_edit_and_decisions(server: Server, local: LLM) -> None:
    answer = server.post("/infill", prefix="12", suffix="45", length=3, seed=1)
    assert answer["text"] == f"12{answer['middle']}45" and answer["length"] == 3 == len(answer["middle"])
    assert 0 < len(server.post("/infill", prefix="12", suffix="45", at_most=4, seed=1)["text"]) <= 8
    text = "1234567890"
    edited = server.post("/edit", text=text, spans=[[2, 5]], seed=1, max_steps=4)
    assert edited["text"].startswith("12") and edited["text"].endswith("67890")
    assert bool(edited["diff"]) == (edited["text"] != text)
    typed = server.post("/systemone", state=PUZZLE, questions=QUESTIONS)["answers"]
    direct = local.decide(PUZZLE, QUESTIONS, seed=0)
    assert typed["q"]["noul"] == pytest.approx(direct["q"].probability, abs=1e-5)
    assert typed["c"]["probabilities"] == pytest.approx(direct["c"].probabilities, abs=1e-5)
    decided = server.post("/decisions", messages=SUDOKU, fields=FIELDS)["decisions"]
    assert set(decided) == set(FIELDS)
    for name, one in decided.items():
        assert set(one["probabilities"]) == set(FIELDS[name])
        assert sum(one["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert one["choice"] == max(one["probabilities"], key=one["probabilities"].__getitem__)


@pytest.fixture(scope="module")
def remote(server: Server) -> Remote:
    return LLM.connect(server.url)


def test_the_remote_model_answers_as_the_local_one(remote: Remote, local: LLM) -> None:
    assert remote.is_sfumato and remote.has_drafts and remote.name == "nano"
    options = Options(max_tokens=24, seed=5, max_steps=6)
    for messages, answer_options in ((MESSAGES, options), (SUDOKU, Options(seed=5, logprobs=True, top_logprobs=2))):
        there, here = remote.chat(messages, options=answer_options), local.chat(messages, options=answer_options)
        assert (there.text, there.finish_reason, there.seed) == (here.text, here.finish_reason, here.seed)
        counts = [(one.usage.prompt_tokens, one.usage.tokens, one.usage.steps) for one in (there, here)]
        assert counts[0] == counts[1]
        assert there.logprobs == (here.logprobs and pytest.approx(here.logprobs, abs=1e-3))
    assert remote.complete("Solve", options=options).text == local.complete("Solve", options=options).text
    forced = replace(options, max_tokens=96, short=True, must_call=True, max_steps=None)
    assert (
        remote.chat(MESSAGES, tools=[WEATHER], options=forced).tool_calls
        == local.chat(MESSAGES, tools=[WEATHER], options=forced).tool_calls
    )


def test_the_remote_stream_has_the_drafts_of_the_local_one(remote: Remote, local: LLM) -> None:
    options = Options(seed=5, drafts=True)
    there, here = list(remote.stream(SUDOKU, options=options)), list(local.stream(SUDOKU, options=options))
    assert [type(event) for event in there] == [type(event) for event in here]
    assert isinstance(there[-1], Done) and isinstance(there[-2], Commit) and isinstance(there[0], Draft)
    for one, other in zip(there, here, strict=True):
        assert one.text == other.text
        if isinstance(one, Draft) and isinstance(other, Draft):
            assert (one.canvas, one.step, one.pieces, one.accepted) == (
                *(other.canvas, other.step),
                *(other.pieces, other.accepted),
            )
            assert one.entropies == pytest.approx(other.entropies, abs=1e-3)


def test_remote_templates_are_those_of_the_local_model(remote: Remote, local: LLM) -> None:
    options = Options(seed=2)
    board = [piece if isinstance(piece, str) else Slot(**piece) for piece in BOARD]
    there, here = remote.fill(board, SUDOKU, options=options), local.fill(board, SUDOKU, options=options)
    assert (there.text, there.values, there.lengths, there.seed) == (here.text, here.values, here.lengths, here.seed)
    decided, same = remote.decide(SUDOKU, FIELDS, options=options), local.decide(SUDOKU, FIELDS, options=options)
    for name in FIELDS:
        assert decided[name].choice == same[name].choice
        assert decided[name].probabilities == pytest.approx(same[name].probabilities, abs=1e-5)


# --- what goes wrong -----------------------------------------------------------------------------------------------


def test_an_adapter_is_loaded_while_others_run(
    server: Server, client: Any, remote: Remote, local: LLM, adapters: Path
) -> None:
    def text(model: str) -> str:
        answer = client.chat.completions.create(model=model, seed=3, max_tokens=24, messages=MESSAGES)
        assert answer.model == model
        return str(answer.choices[0].message.content)

    with server.busy(2):
        server.post("/load_lora_adapter", lora_name="mine", lora_path="run")
        texts = [text("mine"), text("nano")]
    listed = client.models.list().data
    assert [(one.id, one.parent) for one in listed] == [("nano", None), ("mine", "nano")]
    local.adapters.load("mine", adapters / "run")
    options = Options(seed=3, max_tokens=24)
    assert texts == [local.chat(MESSAGES, options=options, adapter=name).text for name in ("mine", None)]
    assert remote.chat(MESSAGES, options=options, adapter="mine").text == texts[0] != texts[1]
    decided = [remote.decide(SUDOKU, FIELDS, adapter=name) for name in (None, "mine")]
    assert decided[0] != decided[1]
    assert (
        LLM.connect(server.url, model="mine").complete("1 2", seed=1).text
        == remote.complete("1 2", seed=1, adapter="mine").text
    )
    wrong = httpx.post(f"{server.api}/load_lora_adapter", json={"lora_name": "x", "lora_path": "."}, timeout=60)
    assert wrong.status_code == 400 and wrong.json()["error"]["message"].startswith(". is no adapter itself")
    page = httpx.get(f"{server.url}/metrics").text
    assert "sfumato_adapters 1.0" in page and re.search(r"^sfumato_adapter_bytes [1-9]", page, re.MULTILINE)


def test_a_client_that_leaves_frees_its_row(server: Server) -> None:
    with server.busy(2):
        server.until_rows(lambda rows: rows == 2)
    server.until_rows(lambda rows: rows == 0)
    url = f"{server.api}/chat/completions"
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json=ENDLESS | {"messages": MESSAGES}, timeout=0.5)
    server.until_rows(lambda rows: rows == 0)
    stream = iter(LLM.connect(server.url).stream(MESSAGES, options=Options(drafts=True, **ENDLESS)))
    assert isinstance(next(stream), Draft)
    stream.close()  # type: ignore[attr-defined]
    server.until_rows(lambda rows: rows == 0)


def test_a_killed_worker_is_told_and_replaced(server: Server, client: Any) -> None:
    times: list[float] = []
    ready = threading.Barrier(7)

    def ask(seed: int) -> Any:
        ready.wait()
        with pytest.raises(openai.InternalServerError) as error:
            client.chat.completions.create(model=MODEL, seed=seed, messages=MESSAGES, extra_body=ENDLESS)
        times.append(time.monotonic())
        return error.value

    before, restarts = server.worker(), server.restarts()
    with ThreadPoolExecutor(6) as threads, httpx.Client(timeout=60) as http:
        body = ENDLESS | {"messages": MESSAGES, "stream": True, "drafts": True}
        with http.stream("POST", f"{server.api}/chat/completions", json=body) as stream:
            errors = [threads.submit(ask, seed) for seed in range(6)]
            ready.wait()
            server.until_rows(lambda rows: rows == 7)
            killed = time.monotonic()
            before.kill()
            answers = [error.result(30) for error in errors]
            lines = [line for line in stream.iter_lines() if line]
    assert max(times) - killed < 10
    for error in answers:
        assert error.status_code == 503 and error.type == "worker_error" and "signal 9" in error.message
        assert error.response.headers["retry-after"]
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["type"] == "worker_error"
    answer = client.chat.completions.create(model=MODEL, messages=SUDOKU, seed=3)
    assert time.monotonic() - killed < 20
    assert is_solved(answer.choices[0].message.content, PUZZLE)
    assert server.worker().pid != before.pid
    assert server.restarts() == restarts + 1


def test_a_new_worker_has_the_adapters_of_the_one_before(
    server: Server, remote: Remote, local: LLM, adapters: Path
) -> None:
    options = Options(seed=3, max_tokens=24, adapter="kept")
    local.adapters.load("kept", adapters / "run")
    server.post("/load_lora_adapter", lora_name="kept", lora_path="run")
    before = server.worker()
    before.kill()
    before.wait(10)
    assert remote.chat(MESSAGES, options=options).text == local.chat(MESSAGES, options=options).text
    assert server.worker().pid != before.pid
    server.post("/unload_lora_adapter", lora_name="kept")
    with pytest.raises(InputError, match="there is no model 'kept' here"):
        remote.chat(MESSAGES, options=options)
