"""POST /v1/completions: OpenAI's older form, text in and text out; with `suffix` it is an infill."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from sfumato.events import Commit, Done, Draft, Filled, Usage
from sfumato.options import Options
from sfumato.server.backend import ModelCard
from sfumato.server.http.answers import draft_of, usage_of
from sfumato.server.http.document import takes
from sfumato.server.http.events import END, EventStream, data
from sfumato.server.http.service import Service
from sfumato.server.openai.answers import TextCompletion
from sfumato.server.openai.bodies import CompletionRequest
from sfumato.server.openai.chat import finite
from sfumato.templates.requests import Complete, Infill


def routes(service: Service) -> APIRouter:
    """The route of completions."""
    router = APIRouter()

    @router.post("/v1/completions", **takes(CompletionRequest, TextCompletion))
    async def completions(request: Request) -> Response:
        """Continue a text, or several; or write what stands between two."""
        body = await service.read(request, CompletionRequest)
        card = await service.card(body.model)
        answer = CompletionAnswer(service, request.scope, body, card)
        if body.stream:
            return EventStream(service, answer.chunks())
        return JSONResponse(await service.watched(request.receive, answer.whole()))

    return router


class CompletionAnswer:
    """The answers to one request: a query for each answer to each prompt, those to one prompt side by side."""

    def __init__(self, service: Service, scope: Scope, body: CompletionRequest, card: ModelCard) -> None:
        options = body.answer_options(card)
        prompts = body.prompts
        self.n = body.choice_count(len(prompts), service.settings.limits)
        self.service, self.scope = service, scope
        self.has_usage, self.is_empty = body.has_usage(), body.is_empty
        self.has_logprobs = options.logprobs
        self.echoes = [prompt if body.echo and isinstance(prompt, str) else "" for prompt in prompts]
        seed = options.seed or 0
        each = [replace(options, seed=seed + i) for i in range(self.n)]
        self.queries = [_query(body, prompt, options) for prompt in prompts for options in each]
        self.head: dict[str, Any] = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.names(card)[0],
            "seed": seed,
            "system_fingerprint": None,
        }

    async def _events(self) -> AsyncGenerator[tuple[int, Any], None]:
        """The events of the answers; where no text is asked for, the ends alone, without any."""
        async with aclosing(self.service.events(self.scope, self.queries)) as events:
            async for number, event in events:
                if not self.is_empty:
                    yield number, event
                elif isinstance(event, Done):
                    usage = replace(event.usage, tokens=0)
                    yield number, replace(event, text="", finish_reason="length", stop=None, usage=usage)

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        commits: list[list[Commit]] = [[] for _ in self.queries]
        ends: dict[int, Done | Filled] = {}
        async with aclosing(self._events()) as events:
            async for number, event in events:
                if isinstance(event, Commit):
                    commits[number].append(event)
                elif isinstance(event, Done | Filled):
                    ends[number] = event
        choices = []
        for number in range(len(self.queries)):
            end, echo = ends[number], self.echoes[number // self.n]
            choices.append(
                {
                    "index": number,
                    "text": echo + _text(end),
                    **_end(end),
                    "logprobs": _logprobs(commits[number]) if self.has_logprobs else None,
                }
            )
        usage = usage_of([ends[number].usage for number in range(len(self.queries))], self.n)
        return self.head | {"choices": choices, "usage": usage}

    async def chunks(self) -> AsyncGenerator[str, None]:
        """The answer as the events of a stream."""
        head = self.head | ({"usage": None} if self.has_usage else {})
        usages: dict[int, Usage] = {}
        offsets = [0] * len(self.queries)
        echoed: set[int] = set()  # answers whose prompt, where it is echoed, is sent

        def chunk(number: int, text: str, logprobs: Any = None, **end: Any) -> str:
            choice = {"index": number, "text": text, "logprobs": logprobs, "finish_reason": None} | end
            return data(head | {"choices": [choice]})

        async with aclosing(self._events()) as events:
            async for number, event in events:
                if number not in echoed:
                    echoed.add(number)
                    if echo := self.echoes[number // self.n]:
                        yield chunk(number, echo)
                if isinstance(event, Draft):
                    yield data(head | {"choices": [], "draft": draft_of(number, event)})
                elif isinstance(event, Commit):
                    logprobs = None
                    if self.has_logprobs:
                        logprobs = _logprobs([event], offsets[number])
                        offsets[number] += sum(map(len, event.pieces or []))
                    if event.text or logprobs:
                        yield chunk(number, event.text, logprobs)
                elif isinstance(event, Done | Filled):
                    usages[number] = event.usage
                    yield chunk(number, _text(event) if isinstance(event, Filled) else "", **_end(event))
        if self.has_usage:
            usage = usage_of([usages[number] for number in range(len(self.queries))], self.n)
            yield data(head | {"choices": [], "usage": usage})
        yield END


def _query(body: CompletionRequest, prompt: str | list[int], options: Options) -> Complete | Infill:
    """What is asked of the model; with a suffix the prompt is text, which `answer_options` has checked."""
    if body.suffix is None:
        return Complete(prompt, options)
    assert isinstance(prompt, str)
    return Infill(prompt, body.suffix, None, body.requested().get("max_tokens"), options)


def _text(end: Done | Filled) -> str:
    return end.text if isinstance(end, Done) else end.values["middle"]


def _end(end: Done | Filled) -> dict[str, Any]:
    reason, stop = (end.finish_reason, end.stop) if isinstance(end, Done) else ("stop", None)
    return {"finish_reason": reason, "stop_reason": stop}


def _logprobs(commits: Sequence[Commit], offset: int = 0) -> dict[str, Any]:
    pieces = [piece for commit in commits for piece in commit.pieces or []]
    tops = [
        {piece: finite(value) for piece, value in top.items()}
        for commit in commits
        for top in commit.top_logprobs or []
    ]
    offsets = []
    for piece in pieces:
        offsets.append(offset)
        offset += len(piece)
    return {
        "tokens": pieces,
        "token_logprobs": [finite(value) for commit in commits for value in commit.logprobs or []],
        "top_logprobs": tops or None,
        "text_offset": offsets,
    }
