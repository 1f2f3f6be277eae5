"""/v1/responses: OpenAI's newer form. A request brings its whole conversation, or goes on from a kept answer.

One generator makes all events of an answer; what is not streamed is the object that the last of them holds.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from sfumato.events import Commit, Done
from sfumato.options import Options
from sfumato.server.backend import ModelCard
from sfumato.server.http.answers import usage_of
from sfumato.server.http.checks import check_chat
from sfumato.server.http.document import gives, takes
from sfumato.server.http.errors import refusal
from sfumato.server.http.events import EventStream, data
from sfumato.server.http.service import Service
from sfumato.server.openai.answers import DeletedBody, ItemList, ResponseBody
from sfumato.server.openai.bodies import shown_tools
from sfumato.server.openai.inputs import MessageItem, messages_of
from sfumato.server.openai.items import INCLUDED, CustomTool, FlatTool, ResponsesRequest
from sfumato.server.openai.kept import KeptResponses
from sfumato.server.openai.output import ResponseOutput
from sfumato.templates.requests import Chat


def routes(service: Service) -> APIRouter:
    """The routes of responses."""
    router = APIRouter()
    kept = KeptResponses(service.settings.kept_responses)

    @router.post("/v1/responses", **takes(ResponsesRequest, ResponseBody))
    async def responses(request: Request) -> Response:
        """Answer an input, and keep the answer unless `store` is false."""
        body = await service.read(request, ResponsesRequest)
        card = await service.card(body.model)
        check_chat(card)
        answer = ResponseAnswer(service, request.scope, body, card, kept)
        if body.stream:
            return EventStream(service, answer.texts())
        return JSONResponse(await service.watched(request.receive, answer.whole()))

    @router.get("/v1/responses/{id}", **gives(ResponseBody))
    async def response_of(id: str) -> Response:
        """A kept answer."""
        return JSONResponse(kept.get(id).body)

    @router.get("/v1/responses/{id}/input_items", **gives(ItemList))
    async def input_items(id: str) -> Response:
        """The items that the request of a kept answer brought, the last first."""
        items = [item.plain() for item in reversed(kept.get(id).input) if hasattr(item, "plain")]
        ends = [items[0].get("id"), items[-1].get("id")] if items else [None, None]
        listed = {"object": "list", "data": items, "first_id": ends[0], "last_id": ends[1], "has_more": False}
        return JSONResponse(listed)

    @router.delete("/v1/responses/{id}", **gives(DeletedBody))
    async def delete(id: str) -> Response:
        """Forget a kept answer."""
        kept.remove(id)
        return JSONResponse({"id": id, "object": "response", "deleted": True})

    return router


class ResponseAnswer:
    """The answer to one request, item by item."""

    def __init__(
        self, service: Service, scope: Scope, body: ResponsesRequest, card: ModelCard, kept: KeptResponses
    ) -> None:
        options = body.answer_options(card)
        self.service, self.scope, self.kept = service, scope, kept
        self.is_kept = body.store is not False and bool(kept.most)
        previous = body.previous_response_id
        self.before = None if previous is None else kept.get(previous, "previous_response_id")
        self.input = kept.resolved(_input_of(body))
        system = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
        messages = system + messages_of([*(self.before.items if self.before else []), *self.input])
        self.query = Chat(messages, shown_tools(body.functions, body.choice), options)
        customs = [tool.name for tool in body.own_tools if isinstance(tool, CustomTool)]
        is_one_call = body.parallel_tool_calls is False
        self.output = ResponseOutput(customs, is_one_call, INCLUDED in (body.include or []))
        self.head = self._head(body, options, service.names(card)[0])

    def _head(self, body: ResponsesRequest, options: Options, model: str) -> dict[str, Any]:
        """The response before there is any output."""
        choice, reasoning = body.tool_choice, body.reasoning
        return {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "metadata": body.metadata or {},
            "model": model,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {
                "effort": reasoning.effort if reasoning else None,
                "summary": reasoning.summary if reasoning else None,
            },
            "safety_identifier": body.safety_identifier,
            "seed": options.seed,
            "service_tier": "default",
            "store": self.is_kept,
            "temperature": options.temperature,
            "text": {"format": body.text.format.plain() if body.text and body.text.format else {"type": "text"}},
            "tool_choice": choice if isinstance(choice, str) else choice.plain() if choice else "auto",
            "tools": [_repeated(tool) for tool in body.own_tools],
            "top_logprobs": 0,
            "top_p": options.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        async with aclosing(self.events()) as events:
            last = [event async for event in events][-1]
        return dict(last["response"])

    async def texts(self) -> AsyncGenerator[str, None]:
        """The answer as the events of a stream; one that fails under way says so before the error itself."""
        number = 0
        async with aclosing(self.events()) as events:
            try:
                async for event in events:
                    yield data(event | {"sequence_number": number}, event["type"])
                    number += 1
            except Exception as error:
                if number:
                    reason = {"code": "server_error", "message": refusal(error).error["message"]}
                    response = self.head | {"status": "failed", "error": reason, "output": self.output.items}
                    failed = {"type": "response.failed", "response": response, "sequence_number": number}
                    yield data(failed, "response.failed")
                raise

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The events of the answer; the last holds the whole."""
        has_begun = False
        async with aclosing(self.service.events(self.scope, [self.query])) as events:
            async for _, event in events:
                if not has_begun:
                    has_begun = True
                    yield {"type": "response.created", "response": self.head}
                    yield {"type": "response.in_progress", "response": self.head}
                if isinstance(event, Commit):
                    for change in self.output.add(event):
                        yield change
                if isinstance(event, Done):
                    for change in self.output.close():
                        yield change
                    yield self._end(event)

    def _end(self, done: Done) -> dict[str, Any]:
        is_cut = done.finish_reason == "length"
        usage = usage_of([done.usage])
        response = self.head | {
            "status": "incomplete" if is_cut else "completed",
            "completed_at": None if is_cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": self.output.items,
            "usage": {
                "input_tokens": usage.pop("prompt_tokens"),
                "input_tokens_details": usage.pop("prompt_tokens_details"),
                "output_tokens": usage.pop("completion_tokens"),
                "output_tokens_details": usage.pop("completion_tokens_details"),
                **usage,
            },
        }
        if self.is_kept:
            self.kept.keep(response, self.before, self.input)
        return {"type": f"response.{response['status']}", "response": response}


def _input_of(body: ResponsesRequest) -> list[Any]:
    """The items of a request; a text is one message of the user."""
    if isinstance(body.input, str):
        return [MessageItem(role="user", content=body.input)]
    return body.input


def _repeated(tool: FlatTool | CustomTool) -> dict[str, Any]:
    """A tool as the answer repeats it."""
    return tool.plain() | ({"strict": bool(tool.strict)} if isinstance(tool, FlatTool) else {})
