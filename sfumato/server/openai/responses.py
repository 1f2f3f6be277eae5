"""POST /v1/responses: OpenAI's newer form, kept nowhere: every request brings its whole conversation.

One generator makes all events of an answer; what is not streamed is the object that the last of them holds.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any, Literal

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from sfumato.events import Commit, Done
from sfumato.options import Options
from sfumato.server.backend import ModelCard
from sfumato.server.http.answers import usage_of
from sfumato.server.http.checks import check_chat
from sfumato.server.http.document import takes
from sfumato.server.http.events import EventStream, data
from sfumato.server.http.service import Service
from sfumato.server.openai.answers import ResponseBody
from sfumato.server.openai.bodies import shown_tools
from sfumato.server.openai.items import FlatChoice, ResponsesRequest
from sfumato.templates.requests import Chat


def routes(service: Service) -> APIRouter:
    """The route of responses."""
    router = APIRouter()

    @router.post("/v1/responses", **takes(ResponsesRequest, ResponseBody))
    async def responses(request: Request) -> Response:
        """Answer an input; nothing is stored."""
        body = await service.read(request, ResponsesRequest)
        card = await service.card(body.model)
        check_chat(card)
        answer = ResponseAnswer(service, request.scope, body, card)
        if body.stream:
            return EventStream(service, answer.texts())
        return JSONResponse(await service.watched(request.receive, answer.whole()))

    return router


class ResponseAnswer:
    """The answer to one request, item by item."""

    def __init__(self, service: Service, scope: Scope, body: ResponsesRequest, card: ModelCard) -> None:
        options = body.answer_options(card)
        self.service, self.scope = service, scope
        self.is_one_call = body.parallel_tool_calls is False
        self.query = Chat(body.messages(), shown_tools(body.functions, body.choice), options)
        self.output: list[dict[str, Any]] = []
        self.head = self._head(body, options, service.names(card)[0])

    def _head(self, body: ResponsesRequest, options: Options, model: str) -> dict[str, Any]:
        """The response before there is any output."""
        choice = body.tool_choice
        return {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": model,
            "output": [],
            "parallel_tool_calls": not self.is_one_call,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "seed": options.seed,
            "store": False,
            "temperature": options.temperature,
            "text": {"format": body.text.format.plain() if body.text and body.text.format else {"type": "text"}},
            "tool_choice": choice.plain() if isinstance(choice, FlatChoice) else choice or "auto",
            "tools": [tool.plain() | {"strict": bool(tool.strict)} for tool in body.tools or []],
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
        """The answer as the events of a stream."""
        number = 0
        async with aclosing(self.events()) as events:
            async for event in events:
                yield data(event | {"sequence_number": number}, event["type"])
                number += 1

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
                    for change in self._commit(event):
                        yield change
                if isinstance(event, Done):
                    for change in self._close():
                        yield change
                    yield self._end(event)

    def _commit(self, commit: Commit) -> Iterator[dict[str, Any]]:
        if commit.thought:
            yield from self._grow("reasoning", commit.thought)
        if commit.text:
            yield from self._grow("message", commit.text)
        for call in commit.tool_calls:
            if not (self.is_one_call and any(item["type"] == "function_call" for item in self.output)):
                yield from self._call(call)

    def _grow(self, kind: Literal["reasoning", "message"], text: str) -> Iterator[dict[str, Any]]:
        if not self._is_open(kind):
            yield from self._close()
            item: dict[str, Any] = {"id": f"{_PREFIX[kind]}_{secrets.token_hex(12)}", "type": kind, "content": []}
            item["status"] = "in_progress"
            if kind == "message":
                item["role"] = "assistant"
            else:
                item["summary"] = []
            self.output.append(item)
            yield {"type": "response.output_item.added", "output_index": self._last, "item": dict(item, content=[])}
            part: dict[str, Any] = {"type": _TEXT[kind], "text": ""} | _LOGPROBS[kind]
            if kind == "message":
                part["annotations"] = []
            item["content"].append(part)
            yield self._of_part("response.content_part.added", part=dict(part))
        self.output[-1]["content"][0]["text"] += text
        yield self._of_part(f"response.{_TEXT[kind]}.delta", delta=text, **_LOGPROBS[kind])

    def _call(self, call: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self._close()
        arguments = json.dumps(call["arguments"], ensure_ascii=False)
        item = {
            "id": f"fc_{secrets.token_hex(12)}",
            "type": "function_call",
            "call_id": f"call_{secrets.token_hex(12)}",
            "name": call["name"],
            "arguments": arguments,
            "status": "completed",
        }
        self.output.append(item)
        place = {"output_index": self._last, "item_id": item["id"]}
        added = item | {"arguments": "", "status": "in_progress"}
        yield {"type": "response.output_item.added", "output_index": self._last, "item": added}
        yield {"type": "response.function_call_arguments.delta", **place, "delta": arguments}
        done = {"name": call["name"], "arguments": arguments}
        yield {"type": "response.function_call_arguments.done", **place, **done}
        yield {"type": "response.output_item.done", "output_index": self._last, "item": item}

    def _close(self) -> Iterator[dict[str, Any]]:
        """The end of the thought or message that still grows."""
        for kind in ("reasoning", "message"):
            if self._is_open(kind):
                item = self.output[-1]
                part = item["content"][0]
                item["status"] = "completed"
                yield self._of_part(f"response.{_TEXT[kind]}.done", text=part["text"], **_LOGPROBS[kind])
                yield self._of_part("response.content_part.done", part=part)
                yield {"type": "response.output_item.done", "output_index": self._last, "item": item}

    def _is_open(self, kind: str) -> bool:
        return bool(self.output) and self.output[-1]["type"] == kind and self.output[-1]["status"] == "in_progress"

    @property
    def _last(self) -> int:
        return len(self.output) - 1

    def _of_part(self, type: str, **more: Any) -> dict[str, Any]:
        place = {"output_index": self._last, "content_index": 0, "item_id": self.output[-1]["id"]}
        return {"type": type, **place, **more}

    def _end(self, done: Done) -> dict[str, Any]:
        is_cut = done.finish_reason == "length"
        usage = usage_of([done.usage])
        response = self.head | {
            "status": "incomplete" if is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": self.output,
            "usage": {
                "input_tokens": usage.pop("prompt_tokens"),
                "input_tokens_details": usage.pop("prompt_tokens_details"),
                "output_tokens": usage.pop("completion_tokens"),
                "output_tokens_details": {"reasoning_tokens": 0},
                **usage,
            },
        }
        return {"type": f"response.{response['status']}", "response": response}


_PREFIX = {"reasoning": "rs", "message": "msg"}
_TEXT = {"reasoning": "reasoning_text", "message": "output_text"}
_LOGPROBS: dict[str, dict[str, Any]] = {"reasoning": {}, "message": {"logprobs": []}}
"""OpenAI's types want the field; the figures themselves are /v1/chat/completions' to give."""
