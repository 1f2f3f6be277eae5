"""POST /v1/chat/completions: OpenAI's chat, whole or as a stream, with thoughts, calls and drafts."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from sfumato.errors import InputError
from sfumato.events import Commit, Done, Draft
from sfumato.server import answers
from sfumato.server.backend import Job, ModelCard
from sfumato.server.http.service import END, EventStream, Service, data, draft_of, record_of, usage_of
from sfumato.server.openai.schema import ChatRequest, tools_payload


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", **answers.takes(ChatRequest, answers.ChatCompletion))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation, once or `n` times."""
        body = await service.read(request, ChatRequest)
        card = await service.card(body.model)
        talk = Talk(service, request.scope, body, card)
        if body.stream:
            return EventStream(service, talk.chunks())
        return JSONResponse(await service.watched(request.receive, talk.whole()))

    return router


def check_chat(card: ModelCard) -> None:
    if not card.has_chat:
        raise InputError(f"model {card.name!r} has no chat template; send a prompt to /v1/completions")


class Talk:
    """One request: its jobs, and what their events come to."""

    def __init__(self, service: Service, scope: Scope, body: ChatRequest, card: ModelCard) -> None:
        limits = service.settings.limits
        check_chat(card)
        options = body.answer_options(card, limits)
        n = body.choice_count(1, limits)
        self.service, self.scope = service, scope
        self.is_one_call = body.parallel_tool_calls is False
        self.is_usage_asked = body.is_usage_asked()
        payload = {
            "messages": [message.plain() for message in body.messages],
            "tools": tools_payload(body.functions_given, body.choice),
        }
        seed = options.seed or 0
        record = record_of(scope)
        self.jobs = [Job("chat", record.id, payload, replace(options, seed=seed + i)) for i in range(n)]
        self.head: dict[str, Any] = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": service.names(card)[0],
            "seed": seed,
            "system_fingerprint": None,
        }

    async def whole(self) -> dict[str, Any]:
        commits: list[list[Commit]] = [[] for _ in self.jobs]
        ends: dict[int, Done] = {}
        async with aclosing(self.service.events(self.scope, self.jobs)) as events:
            async for number, event in events:
                if isinstance(event, Commit):
                    commits[number].append(event)
                elif isinstance(event, Done):
                    ends[number] = event
        dones = [ends[number] for number in range(len(self.jobs))]
        choices = [self._choice(number, done, commits[number]) for number, done in enumerate(dones)]
        return self.head | {"choices": choices, "usage": usage_of([done.usage for done in dones], len(dones))}

    def _choice(self, number: int, done: Done, commits: list[Commit]) -> dict[str, Any]:
        calls = done.tool_calls[:1] if self.is_one_call else done.tool_calls
        message: dict[str, Any] = {"role": "assistant", "content": done.text, "refusal": None}
        if done.thought is not None:
            message["reasoning_content"] = done.thought
        if calls:
            message["content"] = done.text or None
            message["tool_calls"] = [call_of(call) for call in calls]
        return {
            "index": number,
            "message": message,
            "finish_reason": "tool_calls" if calls else done.finish_reason,
            "stop_reason": done.stop,
            "logprobs": logprobs_of(commits) if self.jobs[0].options.logprobs else None,
        }

    async def chunks(self) -> AsyncGenerator[str, None]:
        head = self.head | {"object": "chat.completion.chunk"} | ({"usage": None} if self.is_usage_asked else {})
        called = [0] * len(self.jobs)
        usages: dict[int, Any] = {}
        begun: set[int] = set()

        def chunk(number: int, delta: dict[str, Any], logprobs: Any = None, **end: Any) -> str:
            choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": None} | end
            return data(head | {"choices": [choice]})

        async with aclosing(self.service.events(self.scope, self.jobs)) as events:
            async for number, event in events:
                if number not in begun:
                    begun.add(number)
                    yield chunk(number, {"role": "assistant", "content": ""})
                if isinstance(event, Draft):
                    yield data(head | {"choices": [], "draft": draft_of(number, event)})
                elif isinstance(event, Commit):
                    calls = event.tool_calls
                    if self.is_one_call:
                        calls = calls[: 1 - called[number]]
                    delta: dict[str, Any] = {}
                    if event.thought:
                        delta["reasoning_content"] = event.thought
                    if event.text:
                        delta["content"] = event.text
                    if calls:
                        delta["tool_calls"] = [{"index": called[number] + i} | call_of(c) for i, c in enumerate(calls)]
                        called[number] += len(calls)
                    logprobs = logprobs_of([event]) if self.jobs[0].options.logprobs else None
                    if delta or logprobs:
                        yield chunk(number, delta, logprobs)
                elif isinstance(event, Done):
                    usages[number] = event.usage
                    reason = "tool_calls" if called[number] else event.finish_reason
                    yield chunk(number, {}, finish_reason=reason, stop_reason=event.stop)
        if self.is_usage_asked:
            usage = usage_of([usages[number] for number in range(len(self.jobs))], len(self.jobs))
            yield data(head | {"choices": [], "usage": usage})
        yield END


def call_of(call: dict[str, Any]) -> dict[str, Any]:
    """A call as clients get it, under an id of its own."""
    function = {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes so large a number for it."""
    return max(logprob, -9999.0)


def logprobs_of(commits: Sequence[Commit]) -> dict[str, Any]:
    """Of every token of these commits."""

    def entry(piece: str, logprob: float) -> dict[str, Any]:
        return {"token": piece, "logprob": finite(logprob), "bytes": list(piece.encode("utf-8", "replace"))}

    content = []
    for commit in commits:
        pieces, logprobs = commit.pieces or [], commit.logprobs or []
        tops = commit.top_logprobs or [{} for _ in pieces]
        for piece, logprob, top in zip(pieces, logprobs, tops, strict=True):
            content.append(entry(piece, logprob) | {"top_logprobs": [entry(p, value) for p, value in top.items()]})
    return {"content": content}
