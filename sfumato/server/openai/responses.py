"""POST /v1/responses: OpenAI's newer form, kept nowhere: every request brings its whole conversation.

One generator makes all events of an answer; what is not streamed is the object that the last of them holds.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Discriminator, Field, Tag
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from sfumato.errors import InputError
from sfumato.events import Commit, Done
from sfumato.options import Options
from sfumato.server import answers
from sfumato.server.backend import Job, ModelCard
from sfumato.server.catalogue import field as option
from sfumato.server.http.body import Body, Most, only
from sfumato.server.http.errors import Refusal
from sfumato.server.http.service import EventStream, Service, data, record_of, usage_of
from sfumato.server.openai import schema
from sfumato.server.openai.chat import check_chat
from sfumato.server.openai.schema import Effort, Function
from sfumato.server.settings import Limits


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/responses", **answers.takes(ResponsesRequest, answers.ResponseBody))
    async def responses(request: Request) -> Response:
        """Answer an input; nothing is stored."""
        body = await service.read(request, ResponsesRequest)
        card = await service.card(body.model)
        check_chat(card)
        answer = Answer(service, request.scope, body, card)
        if body.stream:
            return EventStream(service, answer.texts())
        return JSONResponse(await service.watched(request.receive, answer.whole()))

    return router


# --- what is asked -------------------------------------------------------------------------------------------------


class Content(Body):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Any = only([])
    logprobs: Any = only([])


Contents = Annotated[list[Content], Most("max_parts", "parts")]


class Item(Body):
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class MessageItem(Item):
    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Contents
    phase: Literal["commentary", "final_answer"] | None = None


class CallItem(Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class OutputItem(Item):
    type: Literal["function_call_output"]
    call_id: str
    output: str | Contents


class Thought(Body):
    type: Literal["reasoning_text"]
    text: str


class ThoughtItem(Item):
    type: Literal["reasoning"]
    summary: Annotated[list[Any], Most("max_parts", "parts")] | None = None
    content: Annotated[list[Thought], Most("max_parts", "parts")] | None = None
    encrypted_content: Any = only()


def _kind(item: Any) -> str:
    kind = item.get("type") if isinstance(item, dict) else None
    return "message" if kind is None else str(kind)


AnyItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[OutputItem, Tag("function_call_output")]
    | Annotated[ThoughtItem, Tag("reasoning")],
    Discriminator(_kind),
]


class FlatTool(Function):
    type: Literal["function"]


class FlatChoice(Body):
    type: Literal["function"]
    name: str


class Format(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class Text(Body):
    format: Format | None = None
    verbosity: Any = only("medium")


class Reasoning(Body):
    effort: Effort | None = None
    summary: Any = only("auto")
    generate_summary: Any = only()


class ResponsesRequest(schema.Sampled):
    input: str | Annotated[list[AnyItem], Field(min_length=1), Most("max_messages", "items")]
    instructions: str | None = None
    max_output_tokens: int | None = option("max_tokens")
    text: Text | None = None
    tools: Annotated[list[FlatTool], Most("max_tools", "tools")] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    strict: bool | None = option("strict")
    thinking: bool | None = option("thinking")
    truncation: Any = only("disabled")
    top_logprobs: Any = only(0)
    include: Any = only([])
    background: Any = only(False)
    previous_response_id: Any = only()
    conversation: Any = only()
    prompt: Any = only()
    max_tool_calls: Any = only()
    stream_options: schema.StreamOptions | None = None

    @property
    def functions(self) -> list[Function]:
        return [Function.model_validate(tool.model_dump(exclude={"type"})) for tool in self.tools or []]

    @property
    def choice(self) -> str:
        return self.tool_choice.name if isinstance(self.tool_choice, FlatChoice) else self.tool_choice or "auto"

    def wanted(self) -> dict[str, Any] | None:
        form = self.text.format if self.text else None
        if form is None or form.type == "text":
            return None
        return schema.ANY_OBJECT if form.type == "json_object" or form.schema_ is None else form.schema_

    def answer_options(self, card: ModelCard, limits: Limits) -> Options:
        if self.drafts:
            raise InputError("drafts is true, but /v1/responses has no event for them; use /v1/chat/completions")
        effort = self.reasoning.effort if self.reasoning else None
        more = schema.chat_options(self.functions, self.choice, effort, self.thinking, self.wanted(), "text.format")
        if self.max_output_tokens is not None:
            more["max_tokens"] = self.max_output_tokens
        return self.options(card, limits, **more)

    def messages(self) -> list[dict[str, Any]]:
        """The conversation as the chat template takes it: what an assistant thought, said and called is one message."""
        found: list[dict[str, Any]] = []
        if self.instructions is not None:
            found.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*found, {"role": "user", "content": self.input}]
        thought = ""
        for item in self.input:
            match item:
                case ThoughtItem():
                    thought += "".join(part.text for part in item.content or [])
                    continue
                case OutputItem():
                    found.append({"role": "tool", "tool_call_id": item.call_id, "content": _joined(item.output)})
                    continue
                case CallItem():
                    if thought or not found or found[-1]["role"] != "assistant":
                        found.append({"role": "assistant", "content": ""})
                    function = {"name": item.name, "arguments": item.arguments}
                    call = {"id": item.call_id, "type": "function", "function": function}
                    found[-1].setdefault("tool_calls", []).append(call)
                case MessageItem():
                    found.append({"role": item.role, "content": _joined(item.content)})
            if thought and found[-1]["role"] == "assistant":
                found[-1]["reasoning_content"] = thought
            thought = ""
        if not found:
            raise Refusal(400, "input holds thoughts alone; give at least one message", param="input")
        return found


def _joined(content: str | Contents) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


# --- what is answered ----------------------------------------------------------------------------------------------


class Answer:
    def __init__(self, service: Service, scope: Scope, body: ResponsesRequest, card: ModelCard) -> None:
        limits = service.settings.limits
        options = body.answer_options(card, limits)
        payload = {
            "messages": body.messages(),
            "tools": schema.tools_payload(body.functions, body.choice),
        }
        self.service, self.scope = service, scope
        self.is_one_call = body.parallel_tool_calls is False
        self.job = Job("chat", record_of(scope).id, payload, options)
        self.output: list[dict[str, Any]] = []
        choice = body.tool_choice
        self.head: dict[str, Any] = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": service.names(card)[0],
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
        async with aclosing(self.events()) as events:
            told = [event async for event in events]
        return dict(told[-1]["response"])

    async def texts(self) -> AsyncGenerator[str, None]:
        number = 0
        async with aclosing(self.events()) as events:
            async for event in events:
                yield data(event | {"sequence_number": number}, event["type"])
                number += 1

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        is_begun = False
        async with aclosing(self.service.events(self.scope, [self.job])) as events:
            async for _, event in events:
                if not is_begun:
                    is_begun = True
                    yield {"type": "response.created", "response": self.head}
                    yield {"type": "response.in_progress", "response": self.head}
                told = self._commit(event) if isinstance(event, Commit) else iter(())
                for one in told:
                    yield one
                if isinstance(event, Done):
                    for one in self._close():
                        yield one
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
