"""A query as it is sent: the route and the JSON body, in OpenAI's words where OpenAI's API has such a request.

The counterpart of the server's routes. A kind of query that is to be had over HTTP is one more case here and in
`results.result_of`, because each has a body of its own. Options that cannot be said to a host are refused by `Remote`.
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sfumato.errors import InputError
from sfumato.model.prompt import Prompt
from sfumato.options import OPTIONS, Options, differences
from sfumato.templates.requests import (
    DECISION_OPTIONS,
    AnswerQuery,
    Chat,
    Edit,
    Fill,
    Infill,
    Likelihood,
    Messages,
    QueryFor,
)

_UNSENT = ("early", "short", "drafts", "adapter")
"""Options of templates that a Sfumato server's routes do not take, drafts, which a whole result does not have, and the
adapter, which is sent as the model."""

TEMPLATE_OPTIONS = tuple(
    name
    for name, option in OPTIONS.items()
    if {"canvas", "templates"} <= set(option.about.uses) and name not in _UNSENT
)
"""Options that a Sfumato server takes with a template."""

DECISIONS = "/systemone"
"""The route of decisions."""


def answer_route(query: AnswerQuery) -> str:
    """The route that a query for an answer goes to."""
    return "/chat/completions" if isinstance(query, Chat) else "/completions"


def answer_body(query: AnswerQuery, is_sfumato: bool, has_drafts: bool) -> dict[str, Any]:
    """The body that asks for an answer as a stream. Drafts are left out where the host has none."""
    body: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    fields = _fields_of(query.options)
    is_strict = fields.pop("strict", False) or query.options.must_call
    if isinstance(query, Chat):
        body["messages"] = messages_out(query.conversation, is_sfumato)
        if query.is_continued:
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        if query.tools:
            body["tools"] = tools_out(query.tools, is_strict)
        if fields.pop("must_call", False):
            body["tool_choice"] = "required"
    else:
        body["prompt"] = query.prompt if isinstance(query.prompt, str) else _ids(query.prompt)
        if query.options.logprobs:
            fields["logprobs"] = fields.pop("top_logprobs", 0)
    if not has_drafts:
        fields.pop("drafts", None)
    if not is_sfumato and (schema := fields.pop("schema", None)) is not None:
        form = {"name": "answer", "schema": schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": form}
    return body | fields


def score_body(query: Likelihood) -> dict[str, Any]:
    """The body that asks /completions for the log-probabilities of a text, and for one token behind it."""
    fields = _fields_of(dataclasses.replace(query.options, drafts=False))
    top = max(1, fields.pop("top_logprobs", 0))
    if isinstance(query.prompt, str):
        prompt: str | list[int] = query.prompt + (query.continuation if isinstance(query.continuation, str) else "")
    else:
        prompt = _ids([*_ids(query.prompt), *(one for one in query.continuation or () if isinstance(one, int))])
    return fields | {"prompt": prompt, "echo": True, "logprobs": top, "max_tokens": 1}


def _ids(prompt: Sequence[int] | Prompt) -> list[int]:
    """The tokens of a prompt. InputError for one that has more than tokens, or what is none."""
    if isinstance(prompt, Prompt) and (prompt.embeddings is not None or prompt.blocks or prompt.content):
        raise InputError("a prompt with embeddings or blocks cannot be sent to a server; give a text or token ids")
    for token in prompt:
        if type(token) is not int or token < 0:
            raise InputError(f"the prompt holds token {reprlib.repr(token)}; token ids are whole numbers from 0 up")
    return list(prompt)


def template_route_and_body(query: QueryFor[Any]) -> tuple[str, dict[str, Any]]:
    """Route and body of a query that a Sfumato server alone takes; it is answered at once, without drafts."""
    match query:
        case Infill():
            route, body = "/infill", _fields(query, "prefix", "suffix", "length", "at_most")
        case Edit():
            route, body = "/edit", _fields(query, "text", "instruction", "spans", "strength")
        case Fill():
            pieces = [differences(piece) if dataclasses.is_dataclass(piece) else piece for piece in query.template]
            route, body = "/fill", {"template": pieces} | _prompt(query.prompt)
        case _:
            raise InputError(f"there is no request {query!r}; give one of templates.requests")
    return route, body | _whole_result(query.options)


def option_refused(route: str, options: Options) -> str | None:
    """The first of the options that a server does not take at this route; None: it takes all."""
    names = DECISION_OPTIONS if route == DECISIONS else TEMPLATE_OPTIONS
    return next((name for name in _whole_result(options) if name not in (*names, "model")), None)


def _whole_result(options: Options) -> dict[str, Any]:
    """The options to send for a result that comes as one body."""
    return _fields_of(dataclasses.replace(options, drafts=False))


def _fields_of(options: Options) -> dict[str, Any]:
    """The options to send, under the names that a body has for them: an adapter is a model."""
    fields = differences(options)
    adapter = fields.pop("adapter", None)
    return fields | ({"model": adapter} if adapter else {})


def _fields(query: Infill | Edit, *names: str) -> dict[str, Any]:
    """These fields, without those that are open."""
    return {name: value for name in names if (value := getattr(query, name)) is not None}


def _prompt(prompt: str | Messages | None) -> dict[str, Any]:
    if prompt is None:
        return {}
    return {"prompt": prompt} if isinstance(prompt, str) else {"messages": messages_out(prompt, True)}


def tools_out(tools: Iterable[Mapping[str, Any]], is_strict: bool) -> list[dict[str, Any]]:
    """Tools as OpenAI's API has them; `is_strict`: arguments obey their schema."""
    extra = {"strict": True} if is_strict else {}
    return [{"type": "function", "function": {**tool.get("function", tool), **extra}} for tool in tools]


def messages_out(messages: Messages, is_sfumato: bool) -> list[dict[str, Any]]:
    """A conversation as OpenAI's API has it: arguments as JSON text, an id on every call and on what answers it.

    A thought goes to a Sfumato server alone, whose template decides. InputError names the message that is wrong."""
    sent: list[dict[str, Any]] = []
    open_calls: list[tuple[str, str]] = []  # (name, id) of calls without an answer yet
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(f'message {number} is {type(message).__name__}; give a record with "role" and "content"')
        copy = dict(message)
        if not is_sfumato:
            copy.pop("reasoning_content", None)
        if copy.get("tool_calls"):
            copy["tool_calls"] = [_call_out(call, number, place) for place, call in enumerate(copy["tool_calls"])]
            open_calls += [(call["function"]["name"], call["id"]) for call in copy["tool_calls"]]
        if copy.get("role") == "tool":
            for call in open_calls:
                if copy.get("name", call[0]) == call[0] and copy.get("tool_call_id", call[1]) == call[1]:
                    copy["tool_call_id"] = call[1]
                    open_calls.remove(call)
                    break
        sent.append(copy)
    return sent


def _call_out(call: Any, number: int, place: int) -> dict[str, Any]:
    try:
        name = call["function"]["name"]
        if not isinstance(name, str):
            raise TypeError
        function = {**call["function"], "name": name}
        if not isinstance(function.get("arguments"), str):
            function["arguments"] = json.dumps(function.get("arguments") or {})
        return {"id": call.get("id") or f"call_{number}_{place}", "type": "function", "function": function}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        where = f"tool call {place} of message {number}"
        raise InputError(f'{where} is not {{"function": {{"name": …, "arguments": …}}}} with JSON in it') from None
