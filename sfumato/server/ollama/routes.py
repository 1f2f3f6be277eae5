"""Ollama's API, under /api: chats and prompts as lines of JSON, and what its clients ask about the model.

One model is loaded and stays; what would load, make or remove another one is refused.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from datetime import timedelta
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from sfumato.events import Commit, Done, Filled
from sfumato.server.backend import ModelCard
from sfumato.server.http.document import gives, takes
from sfumato.server.http.errors import Refusal
from sfumato.server.http.events import EventStream, StreamForm
from sfumato.server.http.service import JSON, Service
from sfumato.server.ollama import answers
from sfumato.server.ollama.answers import ERRORS, error_form
from sfumato.server.ollama.bodies import LATEST, GenerateRequest, OllamaChatRequest, ShowRequest
from sfumato.server.openai.chat import logprobs_of
from sfumato.templates.requests import Query

__all__ = ["PATHS", "error_form", "routes"]

PATHS = "/api/"
"""What the paths begin with whose errors have Ollama's form."""
VERSION = "0.12.6"
"""The version of Ollama whose API this is: clients refuse one that is too old for what they use."""
LINES = "application/x-ndjson"
MEDIAS = (JSON, "application/x-www-form-urlencoded", "")
"""Types of a body: curl's own, without a header, is what Ollama's documentation uses."""

STREAM: dict[str, Any] = {LINES: {"itemSchema": {"type": "object", "description": "A part of the answer"}}}

REFUSED = {
    "pull": "this server has one model, and loads no other; `sfumato pull` downloads one",
    "push": "this server has one model, and sends it nowhere",
    "create": "this server makes no models; `sfumato convert` and `sfumato quantize` do",
    "copy": "this server has one model under the names that --alias gives it",
    "embed": "this model makes no embeddings; ask another server for them",
    "embeddings": "this model makes no embeddings; ask another server for them",
}
"""Routes of Ollama that are refused, and why."""


def routes(service: Service) -> APIRouter:
    """Ollama's routes."""
    router = APIRouter()
    _add_answer_routes(router, service)
    _add_model_routes(router, service)
    for name, reason in REFUSED.items():
        router.add_api_route(f"{PATHS}{name}", _refusing(reason), methods=["POST"], include_in_schema=False)
    reason = "this server keeps its model; `sfumato rm` removes one that was downloaded"
    router.add_api_route(f"{PATHS}delete", _refusing(reason), methods=["DELETE"], include_in_schema=False)
    return router


def _refusing(reason: str) -> Callable[[], Any]:
    async def refuse() -> Response:
        raise Refusal(501, reason, "not_supported_error")

    return refuse


# --- answers -------------------------------------------------------------------------------------------------------


def _add_answer_routes(router: APIRouter, service: Service) -> None:
    @router.post("/api/chat", **takes(OllamaChatRequest, answers.ChatBody, STREAM, ERRORS))
    async def chat(request: Request) -> Response:
        """Answer a conversation, by default as lines."""
        body = await service.read(request, OllamaChatRequest, MEDIAS)
        card = await _card(service, body.model)
        return await _answered(service, request, body, body.query(card) if body.messages else None)

    @router.post("/api/generate", **takes(GenerateRequest, answers.GenerateBody, STREAM, ERRORS))
    async def generate(request: Request) -> Response:
        """Answer a prompt, continue it (`raw`), or write what stands between it and a suffix."""
        body = await service.read(request, GenerateRequest, MEDIAS)
        card = await _card(service, body.model)
        has_text = bool(body.prompt or body.suffix)
        return await _answered(service, request, body, body.query(card) if has_text else None)


async def _answered(
    service: Service, request: Request, body: OllamaChatRequest | GenerateRequest, query: Query | None
) -> Response:
    """The answer, as lines or as one object. Without a query it says that the model is loaded, as it always is."""
    answer = OllamaAnswerer(service, request.scope, body)
    if query is None:
        return JSONResponse(answer.loaded())
    if body.stream is not False:
        form = StreamForm(LINES, line(answer.part()), lambda refusal: line(error_form(refusal)[0]))
        return EventStream(service, answer.lines(query), form)
    return JSONResponse(await service.watched(request.receive, answer.whole(query)))


def line(value: Any) -> str:
    """One line of a stream."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n"


class OllamaAnswerer:
    """The answer to one request, in parts of Ollama's form."""

    def __init__(self, service: Service, scope: Scope, body: OllamaChatRequest | GenerateRequest) -> None:
        self.service, self.scope, self.body = service, scope, body
        self.calls = 0

    def part(self, text: str = "", thought: str = "", calls: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """A part of the answer."""
        head: dict[str, Any] = {"model": self.body.model, "created_at": answers.time_text()}
        thinking = {"thinking": thought} if thought else {}
        if isinstance(self.body, GenerateRequest):
            return head | {"response": text, **thinking, "done": False}
        message: dict[str, Any] = {"role": "assistant", "content": text, **thinking}
        if calls:
            message["tool_calls"] = calls
        return head | {"message": message, "done": False}

    def loaded(self) -> dict[str, Any]:
        """What is said to a request without a prompt, which loads a model elsewhere, or frees it."""
        is_unload = self.body.keep_alive in (0, "0", "0s")
        return self.part() | {"done": True, "done_reason": "unload" if is_unload else "load"}

    async def lines(self, query: Query) -> AsyncGenerator[str, None]:
        """The answer as the lines of a stream."""
        async with aclosing(self.parts(query)) as parts:
            async for part in parts:
                yield line(part)

    async def whole(self, query: Query) -> dict[str, Any]:
        """The answer as one object."""
        text, thought, calls, logprobs = "", "", [], []
        last: dict[str, Any] = {}
        async with aclosing(self.parts(query)) as parts:
            async for last in parts:
                message = last.get("message", last)
                text += message.get("content", "") or message.get("response", "")
                thought += message.get("thinking", "")
                calls += message.get("tool_calls", [])
                logprobs += last.get("logprobs", [])
        costs = {
            name: value for name, value in last.items() if name not in ("model", "created_at", "message", "response")
        }
        return self.part(text, thought, calls) | costs | ({"logprobs": logprobs} if self.body.logprobs else {})

    async def parts(self, query: Query) -> AsyncGenerator[dict[str, Any], None]:
        """The parts of the answer; the last has no text, and says what the answer took."""
        async with aclosing(self.service.events(self.scope, [query])) as events:
            async for _, event in events:
                if isinstance(event, Commit):
                    calls = [self._call(call) for call in event.tool_calls]
                    part = self.part(event.text, event.thought, calls)
                    if self.body.logprobs:
                        part["logprobs"] = logprobs_of([event])["content"]
                    if event.text or event.thought or calls or part.get("logprobs"):
                        yield part
                elif isinstance(event, Filled):
                    yield self.part(event.values["middle"])
                    yield self._end(event, "stop")
                elif isinstance(event, Done):
                    yield self._end(event, event.finish_reason)

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = {"index": self.calls, "name": call["name"], "arguments": call["arguments"]}
        self.calls += 1
        return {"id": f"call_{secrets.token_hex(12)}", "function": function}

    def _end(self, event: Done | Filled, reason: str) -> dict[str, Any]:
        end = self.part() | {"done": True, "done_reason": reason} | answers.costs_of(event.usage)
        if isinstance(self.body, GenerateRequest) and (context := self.body.context_with(event.text)):
            end["context"] = context
        return end


# --- the model -----------------------------------------------------------------------------------------------------


async def _card(service: Service, name: str) -> ModelCard:
    """The loaded model's card, by its name with or without Ollama's tag."""
    card, short = await service.card(), name.removesuffix(LATEST)
    return await service.card(short if short in [*service.names(card), *service.adapters(card)] else name)


def _add_model_routes(router: APIRouter, service: Service) -> None:
    since = answers.time_text()

    @router.get("/api/version", **gives(answers.VersionBody, ERRORS))
    async def version() -> Response:
        """The version of Ollama whose API this is."""
        return JSONResponse({"version": VERSION})

    @router.get("/api/tags", **gives(answers.ModelEntries, ERRORS))
    async def tags() -> Response:
        """The loaded model, once under each of its names, and its adapters."""
        card = await service.card()
        size = service.backend.stats().memory_bytes
        names = [*service.names(card), *service.adapters(card)]
        entries = [answers.entry_of(name, card, size) | {"modified_at": since} for name in names]
        return JSONResponse({"models": entries})

    @router.get("/api/ps", **gives(answers.ModelEntries, ERRORS))
    async def running() -> Response:
        """The loaded model, which stays."""
        card = await service.card()
        size = service.backend.stats().memory_bytes
        more = {
            "expires_at": answers.time_text(timedelta(days=36500)),
            "size_vram": 0,
            "context_length": card.max_position,
        }
        return JSONResponse({"models": [answers.entry_of(service.names(card)[0], card, size) | more]})

    @router.post("/api/show", **takes(ShowRequest, answers.ShowBody, {}, ERRORS))
    async def show(request: Request) -> Response:
        """What the model is, and what it can do."""
        body = await service.read(request, ShowRequest, MEDIAS)
        if not (name := body.model or body.name):
            raise Refusal(400, "model is missing; give it", param="model")
        card = await _card(service, name)
        return JSONResponse(answers.shown_model(card, service.names(card), since))
