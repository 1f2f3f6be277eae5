"""Our own routes, for what only a canvas can do: /v1/infill, /v1/edit, /v1/fill, /v1/decisions.

Each kind of query that is offered has a route and a body of its own here, and its counterpart in `remote.bodies`.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from sfumato.errors import InputError
from sfumato.events import Draft, Edited, Filled
from sfumato.server.backend import ModelCard
from sfumato.server.canvas import answers, bodies
from sfumato.server.canvas.bodies import DecisionsRequest, EditRequest, FillRequest, InfillRequest
from sfumato.server.http.answers import draft_of, usage_of
from sfumato.server.http.checks import check_chat, check_length
from sfumato.server.http.document import takes
from sfumato.server.http.errors import Refusal
from sfumato.server.http.events import END, EventStream, data
from sfumato.server.http.options import OptionsBody
from sfumato.server.http.service import Service
from sfumato.templates.requests import Edit, Fill, Infill
from sfumato.templates.slots import Slot

TemplateQuery = Infill | Edit | Fill
"""A query that writes on a template, and can show its drafts."""


@dataclass(frozen=True)
class Answer:
    """How a template's result is answered: its object's name, and its fields."""

    object: str
    fields: Callable[[Any], dict[str, Any]]


def routes(service: Service) -> APIRouter:
    """The routes of templates, and that of decisions."""
    router = APIRouter()

    @router.post("/v1/infill", **takes(InfillRequest, answers.InfillBody))
    async def infill(request: Request) -> Response:
        """Write what stands between two texts."""
        body = await service.read(request, InfillRequest)
        query = await _infill(body, service)
        return await _answer(service, request, body, query, Answer("infill", _infilled))

    @router.post("/v1/edit", **takes(EditRequest, answers.EditBody))
    async def edit(request: Request) -> Response:
        """Rewrite a text where it stands: by an instruction, between given characters, or both."""
        body = await service.read(request, EditRequest)
        query = _edit(body, await service.card(body.model))
        return await _answer(service, request, body, query, Answer("edit", _edited))

    @router.post("/v1/fill", **takes(FillRequest, answers.FillBody))
    async def fill(request: Request) -> Response:
        """Fill the slots of a template; its fixed texts stay byte for byte."""
        body = await service.read(request, FillRequest)
        query = await _fill(body, service)
        return await _answer(service, request, body, query, Answer("fill", _filled))

    @router.post("/v1/decisions", **takes(DecisionsRequest, answers.DecisionsBody, stream={}))
    async def decisions(request: Request) -> Response:
        """Choose among given answers: the likeliest to each question, and the probability of each."""
        body = await service.read(request, DecisionsRequest)
        card = await service.card(body.model)
        query = body.query(card)
        result: Any = await service.watched(request.receive, service.result(request.scope, query))
        if body.questions is not None:
            return JSONResponse(answers.typed_body(service.names(card)[0], result))
        head = _head("decide", "decisions", service, card)
        choices = {name: {"choice": one.choice, "probabilities": one.probabilities} for name, one in result.items()}
        return JSONResponse(head | {"decisions": choices, "seed": query.options.seed})

    return router


# ---- queries -----------------------------------------------------------------------------------------------------


async def _infill(body: InfillRequest, service: Service) -> Infill:
    if body.length is not None and body.at_most is not None:
        message = "length and at_most are given; at_most bounds a length that is found, drop one of them"
        raise InputError(message, option="length")
    card = await service.card(body.model)
    for name in ("length", "at_most"):
        check_length(name, getattr(body, name), card)
    return Infill(body.prefix, body.suffix, body.length, body.at_most, body.options(card))


def _edit(body: EditRequest, card: ModelCard) -> Edit:
    if body.instruction is not None:
        check_chat(card)
    spans = None if body.spans is None else [(start, end) for start, end in body.spans]
    return Edit(body.text, body.instruction, spans, body.strength, body.options(card))


async def _fill(body: FillRequest, service: Service) -> Fill:
    slots = {number: piece for number, piece in enumerate(body.template) if isinstance(piece, bodies.SlotBody)}
    most = service.settings.limits.max_slots
    if len(slots) > most:
        message = f"template has {len(slots)} slots, more than the {most} allowed; send fewer"
        raise Refusal(400, message, param="template")
    prompt, card = body.before(), await service.card(body.model)
    for name in ("length", "at_most"):
        for number, slot in slots.items():
            check_length(f"template[{number}].{name}", getattr(slot, name), card)
    options = body.options(card)
    template = [piece if isinstance(piece, str) else Slot(**piece.plain()) for piece in body.template]
    if "redos" not in body.requested() and any(isinstance(one, Slot) and one.constraint for one in template):
        options = replace(options, redos=0)  # a preset's, which a grammar cannot have
    return Fill(template, prompt, options)


# ---- answers -----------------------------------------------------------------------------------------------------


def _head(prefix: str, object: str, service: Service, card: ModelCard) -> dict[str, Any]:
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": object, "model": service.names(card)[0]}


async def _answer(
    service: Service, request: Request, body: OptionsBody, query: TemplateQuery, answer: Answer
) -> Response:
    """The result of a template, whole or as a stream with its drafts."""
    head = _head(answer.object, answer.object, service, await service.card(body.model))
    if body.stream:
        return EventStream(service, _chunks(service, request, query, head, answer))
    result = await service.watched(request.receive, service.result(request.scope, query))
    return JSONResponse(head | answer.fields(result))


async def _chunks(
    service: Service, request: Request, query: TemplateQuery, head: dict[str, Any], answer: Answer
) -> AsyncGenerator[str, None]:
    async with aclosing(service.events(request.scope, [query])) as events:
        async for number, event in events:
            if isinstance(event, Draft):
                yield data({"object": answer.object, "draft": draft_of(number, event)})
            else:
                yield data(head | answer.fields(event))
    yield END


def _infilled(result: Filled) -> dict[str, Any]:
    middle, length = result.values["middle"], result.lengths["middle"]
    return {"text": result.text, "middle": middle, "length": length} | _cost(result)


def _edited(result: Edited) -> dict[str, Any]:
    return {"text": result.text, "diff": result.diff()} | _cost(result)


def _filled(result: Filled) -> dict[str, Any]:
    return {"text": result.text, "values": result.values, "lengths": result.lengths} | _cost(result)


def _cost(result: Filled | Edited) -> dict[str, Any]:
    return {"seed": result.seed, "usage": usage_of([result.usage])}
