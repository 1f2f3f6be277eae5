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

from sfumato.events import Commit, Done, Draft, Usage
from sfumato.server.backend import ModelCard
from sfumato.server.http.answers import draft_of, usage_of
from sfumato.server.http.checks import check_chat
from sfumato.server.http.document import takes
from sfumato.server.http.events import END, EventStream, data
from sfumato.server.http.service import Service
from sfumato.server.openai.answers import ChatCompletion
from sfumato.server.openai.bodies import ChatRequest, shown_tools
from sfumato.templates.requests import Chat


def routes(service: Service) -> APIRouter:
    """The route of chats."""
    router = APIRouter()

    @router.post("/v1/chat/completions", **takes(ChatRequest, ChatCompletion))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation, once or `n` times."""
        body = await service.read(request, ChatRequest)
        card = await service.card(body.model)
        answer = ChatAnswer(service, request.scope, body, card)
        if body.stream:
            return EventStream(service, answer.chunks())
        return JSONResponse(await service.watched(request.receive, answer.whole()))

    return router


class ChatAnswer:
    """The answers to one conversation: `n` queries, and what their events come to."""

    def __init__(self, service: Service, scope: Scope, body: ChatRequest, card: ModelCard) -> None:
        check_chat(card)
        options = body.answer_options(card)
        n = body.choice_count(1, service.settings.limits)
        self.service, self.scope = service, scope
        self.is_old, self.thought_fields = body.is_old, body.thought_fields
        self.is_one_call = body.is_old or body.parallel_tool_calls is False
        self.has_usage = body.has_usage()
        self.has_logprobs = options.logprobs
        messages, tools = [message.plain() for message in body.messages], shown_tools(body.tool_functions, body.choice)
        seed = options.seed or 0
        self.queries = [Chat(messages, tools, replace(options, seed=seed + i)) for i in range(n)]
        self.head: dict[str, Any] = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": service.names(card)[0],
            "seed": seed,
            "system_fingerprint": None,
        }

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        commits: list[list[Commit]] = [[] for _ in self.queries]
        ends: dict[int, Done] = {}
        async with aclosing(self.service.events(self.scope, self.queries)) as events:
            async for number, event in events:
                if isinstance(event, Commit):
                    commits[number].append(event)
                elif isinstance(event, Done):
                    ends[number] = event
        dones = [ends[number] for number in range(len(self.queries))]
        choices = [self._choice(number, done, commits[number]) for number, done in enumerate(dones)]
        return self.head | {"choices": choices, "usage": usage_of([done.usage for done in dones], len(dones))}

    def _choice(self, number: int, done: Done, commits: list[Commit]) -> dict[str, Any]:
        calls = done.tool_calls[:1] if self.is_one_call else done.tool_calls
        message: dict[str, Any] = {"role": "assistant", "content": done.text, "refusal": None}
        if done.thought is not None:
            message |= dict.fromkeys(self.thought_fields, done.thought)
        if calls:
            message["content"] = done.text or None
            message |= self._calls([call_of(call) for call in calls])
        return {
            "index": number,
            "message": message,
            "finish_reason": self._reason(done, len(calls)),
            "stop_reason": done.stop,
            "logprobs": logprobs_of(commits) if self.has_logprobs else None,
        }

    def _calls(self, calls: list[dict[str, Any]]) -> dict[str, Any]:
        """The field that holds calls; in the older form there is one."""
        return {"function_call": calls[0]["function"]} if self.is_old else {"tool_calls": calls}

    def _reason(self, done: Done, calls: int) -> str:
        """Why an answer with so many calls ended."""
        return ("function_call" if self.is_old else "tool_calls") if calls else done.finish_reason

    async def chunks(self) -> AsyncGenerator[str, None]:
        """The answer as the events of a stream."""
        head = self.head | {"object": "chat.completion.chunk"} | ({"usage": None} if self.has_usage else {})
        call_counts = [0] * len(self.queries)
        usages: dict[int, Usage] = {}
        roles: set[int] = set()  # answers whose first chunk, with the role, is sent

        def chunk(number: int, delta: dict[str, Any], logprobs: Any = None, **end: Any) -> str:
            choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": None} | end
            return data(head | {"choices": [choice]})

        async with aclosing(self.service.events(self.scope, self.queries)) as events:
            async for number, event in events:
                if number not in roles:
                    roles.add(number)
                    yield chunk(number, {"role": "assistant", "content": ""})
                if isinstance(event, Draft):
                    yield data(head | {"choices": [], "draft": draft_of(number, event)})
                elif isinstance(event, Commit):
                    delta, count = self._delta(event, call_counts[number])
                    call_counts[number] += count
                    logprobs = logprobs_of([event]) if self.has_logprobs else None
                    if delta or logprobs:
                        yield chunk(number, delta, logprobs)
                elif isinstance(event, Done):
                    usages[number] = event.usage
                    reason = self._reason(event, call_counts[number])
                    yield chunk(number, {}, finish_reason=reason, stop_reason=event.stop)
        if self.has_usage:
            usage = usage_of([usages[number] for number in range(len(self.queries))], len(self.queries))
            yield data(head | {"choices": [], "usage": usage})
        yield END

    def _delta(self, commit: Commit, calls_before: int) -> tuple[dict[str, Any], int]:
        """What a commit adds to an answer that has so many calls, and how many calls that are."""
        calls = commit.tool_calls[: max(0, 1 - calls_before)] if self.is_one_call else commit.tool_calls
        delta: dict[str, Any] = {}
        if commit.thought:
            delta |= dict.fromkeys(self.thought_fields, commit.thought)
        if commit.text:
            delta["content"] = commit.text
        if calls:
            delta |= self._calls([{"index": calls_before + i} | call_of(call) for i, call in enumerate(calls)])
        return delta, len(calls)


def call_of(call: dict[str, Any]) -> dict[str, Any]:
    """A call as clients get it, under an id of its own."""
    function = {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes so large a number for it."""
    return max(logprob, -9999.0)


def logprobs_of(commits: Sequence[Commit]) -> dict[str, Any]:
    """The log-probabilities of every token of these commits."""

    def entry(piece: str, logprob: float) -> dict[str, Any]:
        return {"token": piece, "logprob": finite(logprob), "bytes": list(piece.encode("utf-8", "replace"))}

    content = []
    for commit in commits:
        pieces, logprobs = commit.pieces or [], commit.logprobs or []
        tops = commit.top_logprobs or [{} for _ in pieces]
        for piece, logprob, top in zip(pieces, logprobs, tops, strict=True):
            content.append(entry(piece, logprob) | {"top_logprobs": [entry(p, value) for p, value in top.items()]})
    return {"content": content}
