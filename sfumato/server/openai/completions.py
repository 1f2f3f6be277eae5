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
from sfumato.server import answers
from sfumato.server.backend import Job, ModelCard
from sfumato.server.http.service import END, EventStream, Service, data, draft_of, record_of, usage_of
from sfumato.server.openai.chat import finite
from sfumato.server.openai.schema import CompletionRequest


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions", **answers.takes(CompletionRequest, answers.TextCompletion))
    async def completions(request: Request) -> Response:
        """Continue a text, or several; or write what stands between two."""
        body = await service.read(request, CompletionRequest)
        card = await service.card(body.model)
        texts = Texts(service, request.scope, body, card)
        if body.stream:
            return EventStream(service, texts.chunks())
        return JSONResponse(await service.watched(request.receive, texts.whole()))

    return router


class Texts:
    """One request: a job for each answer to each prompt, the answers to one prompt side by side."""

    def __init__(self, service: Service, scope: Scope, body: CompletionRequest, card: ModelCard) -> None:
        limits = service.settings.limits
        options = body.answer_options(card, limits)
        prompts = body.prompts
        self.n = body.choice_count(len(prompts), limits)
        self.service, self.scope = service, scope
        self.is_usage_asked = body.is_usage_asked()
        self.echoes = [prompt if body.echo and isinstance(prompt, str) else "" for prompt in prompts]
        seed, record = options.seed or 0, record_of(scope)
        self.jobs = []
        for prompt in prompts:
            payload: dict[str, Any] = {"prompt": prompt}
            if body.suffix is not None:
                payload = {"prefix": prompt, "suffix": body.suffix, "length": None, "at_most": body.max_tokens}
            for i in range(self.n):
                kind = "complete" if body.suffix is None else "infill"
                self.jobs.append(Job(kind, record.id, payload, replace(options, seed=seed + i)))  # type: ignore[arg-type]
        self.head: dict[str, Any] = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.names(card)[0],
            "seed": seed,
            "system_fingerprint": None,
        }

    async def whole(self) -> dict[str, Any]:
        commits: list[list[Commit]] = [[] for _ in self.jobs]
        ends: dict[int, Done | Filled] = {}
        async with aclosing(self.service.events(self.scope, self.jobs)) as events:
            async for number, event in events:
                if isinstance(event, Commit):
                    commits[number].append(event)
                elif isinstance(event, Done | Filled):
                    ends[number] = event
        choices = []
        for number in range(len(self.jobs)):
            end, echo = ends[number], self.echoes[number // self.n]
            choices.append(
                {
                    "index": number,
                    "text": echo + _text(end),
                    **_end(end),
                    "logprobs": _logprobs(commits[number]) if self.jobs[0].options.logprobs else None,
                }
            )
        usage = usage_of([ends[number].usage for number in range(len(self.jobs))], self.n)
        return self.head | {"choices": choices, "usage": usage}

    async def chunks(self) -> AsyncGenerator[str, None]:
        head = self.head | ({"usage": None} if self.is_usage_asked else {})
        usages: dict[int, Usage] = {}
        offsets = [0] * len(self.jobs)
        begun: set[int] = set()

        def chunk(number: int, text: str, logprobs: Any = None, **end: Any) -> str:
            choice = {"index": number, "text": text, "logprobs": logprobs, "finish_reason": None} | end
            return data(head | {"choices": [choice]})

        async with aclosing(self.service.events(self.scope, self.jobs)) as events:
            async for number, event in events:
                if number not in begun:
                    begun.add(number)
                    if echo := self.echoes[number // self.n]:
                        yield chunk(number, echo)
                if isinstance(event, Draft):
                    yield data(head | {"choices": [], "draft": draft_of(number, event)})
                elif isinstance(event, Commit):
                    logprobs = None
                    if self.jobs[0].options.logprobs:
                        logprobs = _logprobs([event], offsets[number])
                        offsets[number] += sum(map(len, event.pieces or []))
                    if event.text or logprobs:
                        yield chunk(number, event.text, logprobs)
                elif isinstance(event, Done | Filled):
                    usages[number] = event.usage
                    yield chunk(number, _text(event) if isinstance(event, Filled) else "", **_end(event))
        if self.is_usage_asked:
            usage = usage_of([usages[number] for number in range(len(self.jobs))], self.n)
            yield data(head | {"choices": [], "usage": usage})
        yield END


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
