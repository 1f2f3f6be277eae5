"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API, for its SDKs and the agents built on them.

One generator makes all events of an answer; what is not streamed is the message that they add up to.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any, Literal

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from sfumato.events import Commit, Done, TokenCount, Usage
from sfumato.server.anthropic.answers import ERRORS, CountBody, MessageBody, error_form, usage_in_message
from sfumato.server.anthropic.bodies import CountRequest, MessagesRequest
from sfumato.server.backend import ModelCard
from sfumato.server.http.checks import check_chat
from sfumato.server.http.document import takes
from sfumato.server.http.events import EventStream, StreamForm, data
from sfumato.server.http.seals import sealed
from sfumato.server.http.service import Service
from sfumato.templates.requests import CountTokens

__all__ = ["PATHS", "error_form", "routes"]

PATHS = "/v1/messages"
"""What the paths begin with whose errors have Anthropic's form."""

STREAM = StreamForm(
    silence=data({"type": "ping"}, "ping"),
    error=lambda refusal: data(error_form(refusal)[0], "error"),
)


def routes(service: Service) -> APIRouter:
    """The routes of messages."""
    router = APIRouter()

    @router.post("/v1/messages", **takes(MessagesRequest, MessageBody, errors=ERRORS))
    async def messages(request: Request) -> Response:
        """Answer a conversation."""
        body = await service.read(request, MessagesRequest)
        card = await service.card(body.model)
        answer = MessageAnswer(service, request.scope, body, card)
        if body.stream:
            return EventStream(service, answer.texts(), STREAM)
        return JSONResponse(await service.watched(request.receive, answer.whole()))

    @router.post("/v1/messages/count_tokens", **takes(CountRequest, CountBody, stream={}, errors=ERRORS))
    async def count_tokens(request: Request) -> Response:
        """Count the tokens of the prompt that /v1/messages would answer."""
        body = await service.read(request, CountRequest)
        check_chat(await service.card(body.model))
        query = CountTokens(body.query())
        count = await service.watched(request.receive, service.result(request.scope, query))
        assert isinstance(count, TokenCount)
        return JSONResponse({"input_tokens": count.prompt_tokens})

    return router


class MessageAnswer:
    """The answer to one request, block by block."""

    def __init__(self, service: Service, scope: Scope, body: MessagesRequest, card: ModelCard) -> None:
        check_chat(card)
        self.service, self.scope = service, scope
        self.query = body.query(card)
        self.is_one_call = body.is_one_call
        self.is_hidden = body.thinking is not None and body.thinking.display == "omitted"
        self.is_empty = body.max_tokens == 0
        """Whether nothing is to be written."""
        self.blocks: list[dict[str, Any]] = []
        self.open: Literal["text", "thinking"] | None = None
        """The kind of the last block, while it grows."""
        self.thought = ""
        """Of the last block."""
        self.head: dict[str, Any] = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": service.names(card)[0],
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage_in_message(Usage()),
        }

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        async with aclosing(self.events()) as events:
            end = [event async for event in events if event["type"] == "message_delta"][-1]
        return self.head | {"content": self.blocks, **end["delta"], "usage": end["usage"]}

    async def texts(self) -> AsyncGenerator[str, None]:
        """The answer as the events of a stream."""
        async with aclosing(self.events()) as events:
            async for event in events:
                yield data(event, event["type"])

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The events of the answer. The first comes with the first text, and does not know the prompt's tokens yet."""
        has_begun = False
        async with aclosing(self.service.events(self.scope, [self.query])) as events:
            async for _, event in events:
                if not has_begun:
                    has_begun = True
                    yield {"type": "message_start", "message": self.head}
                if isinstance(event, Commit) and not self.is_empty:
                    for change in self._commit(event):
                        yield change
                elif isinstance(event, Done):
                    for change in self._close():
                        yield change
                    yield self._end(event)
                    yield {"type": "message_stop"}

    def _commit(self, commit: Commit) -> Iterator[dict[str, Any]]:
        if commit.thought:
            yield from self._grow("thinking", commit.thought)
        if commit.text:
            yield from self._grow("text", commit.text)
        for call in commit.tool_calls:
            if not (self.is_one_call and any(block["type"] == "tool_use" for block in self.blocks)):
                yield from self._call(call)

    def _grow(self, kind: Literal["text", "thinking"], text: str) -> Iterator[dict[str, Any]]:
        if self.open != kind:
            yield from self._close()
            self.open, self.thought = kind, ""
            yield self._start({"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {}))
        if kind == "thinking":
            self.thought += text
        if kind == "text" or not self.is_hidden:
            self.blocks[-1][kind] += text
            yield self._delta({"type": f"{kind}_delta", kind: text})

    def _call(self, call: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self._close()
        yield self._start(
            {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": call["name"], "input": {}}
        )
        self.blocks[-1]["input"] = call["arguments"]
        yield self._delta(
            {"type": "input_json_delta", "partial_json": json.dumps(call["arguments"], ensure_ascii=False)}
        )
        yield self._stop()

    def _close(self) -> Iterator[dict[str, Any]]:
        """The end of the block that still grows."""
        if self.open == "thinking":
            signature = sealed(self.thought) if self.is_hidden else _digest(self.thought)
            self.blocks[-1]["signature"] = signature
            yield self._delta({"type": "signature_delta", "signature": signature})
        if self.open is not None:
            yield self._stop()
        self.open = None

    def _start(self, block: dict[str, Any]) -> dict[str, Any]:
        self.blocks.append(block)
        return {"type": "content_block_start", "index": len(self.blocks) - 1, "content_block": dict(block)}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self.blocks) - 1, "delta": delta}

    def _stop(self) -> dict[str, Any]:
        return {"type": "content_block_stop", "index": len(self.blocks) - 1}

    def _end(self, done: Done) -> dict[str, Any]:
        usage = usage_in_message(done.usage)
        if self.is_empty:
            delta: dict[str, Any] = {"stop_reason": "max_tokens", "stop_sequence": None}
            usage["output_tokens"] = 0
        else:
            delta = {"stop_reason": self._reason(done), "stop_sequence": done.stop}
        return {"type": "message_delta", "delta": delta, "usage": usage}

    def _reason(self, done: Done) -> str:
        if any(block["type"] == "tool_use" for block in self.blocks):
            return "tool_use"
        if done.stop is not None:
            return "stop_sequence"
        return "max_tokens" if done.finish_reason == "length" else "end_turn"


def _digest(thought: str) -> str:
    """The signature of a thought that the client is shown."""
    return base64.b64encode(hashlib.sha256(thought.encode("utf-8", "replace")).digest()).decode()
