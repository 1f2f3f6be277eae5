"""Our own routes, for what only a canvas can do: /v1/infill, /v1/edit, /v1/fill, /v1/decisions."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from types import MappingProxyType
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from sfumato.errors import InputError
from sfumato.events import Draft, Edited, Filled
from sfumato.options import Options
from sfumato.server import answers
from sfumato.server.backend import Job
from sfumato.server.http.errors import Refusal
from sfumato.server.http.service import END, EventStream, Service, data, draft_of, record_of, usage_of
from sfumato.server.openai.chat import check_chat
from sfumato.server.openai.schema import (
    DecisionsRequest,
    EditRequest,
    FillRequest,
    InfillRequest,
    Slot,
    Steps,
    check_length,
)


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    async def answer(
        request: Request,
        body: Steps,
        kind: Any,
        payload: dict[str, Any],
        told: Callable[[Any], dict[str, Any]],
        lengths: Mapping[str, int | None] = MappingProxyType({}),
    ) -> Response:
        card = await service.card(body.model)
        for name, tokens in lengths.items():
            check_length(name, tokens, card)
        if kind == "edit" and payload["instruction"] is not None:
            check_chat(card)
        job = Job(kind, record_of(request.scope).id, payload, body.options(card, service.settings.limits))
        head = {"id": f"{kind}-{secrets.token_hex(12)}", "object": kind, "model": service.names(card)[0]}
        if body.stream:
            return EventStream(service, _chunks(service, request, job, head, told))
        return JSONResponse(head | told(await service.watched(request.receive, service.result(request.scope, job))))

    @router.post("/v1/infill", **answers.takes(InfillRequest, answers.Infill))
    async def infill(request: Request) -> Response:
        """Write what stands between two texts."""
        body = await service.read(request, InfillRequest)
        if body.length is not None and body.at_most is not None:
            raise InputError("length and at_most are given; at_most bounds a length that is found, drop one of them")
        payload = {"prefix": body.prefix, "suffix": body.suffix, "length": body.length, "at_most": body.at_most}
        lengths = {"length": body.length, "at_most": body.at_most}
        return await answer(request, body, "infill", payload, _infilled, lengths)

    @router.post("/v1/edit", **answers.takes(EditRequest, answers.Edit))
    async def edit(request: Request) -> Response:
        """Rewrite a text where it stands: by an instruction, between given characters, or both."""
        body = await service.read(request, EditRequest)
        payload = {
            "text": body.text,
            "instruction": body.instruction,
            "spans": body.spans,
            "strength": body.strength,
        }
        return await answer(request, body, "edit", payload, _edited)

    @router.post("/v1/fill", **answers.takes(FillRequest, answers.Fill))
    async def fill(request: Request) -> Response:
        """Fill the slots of a template; its fixed texts stay byte for byte."""
        body = await service.read(request, FillRequest)
        template = [piece if isinstance(piece, str) else piece.plain() for piece in body.template]
        slots = [(number, piece) for number, piece in enumerate(body.template) if isinstance(piece, Slot)]
        most = service.settings.limits.max_slots
        if len(slots) > most:
            raise Refusal(
                400, f"template has {len(slots)} slots, more than the {most} allowed; send fewer", param="template"
            )
        lengths = {f"template[{number}].length": slot.length for number, slot in slots}
        lengths |= {f"template[{number}].at_most": slot.at_most for number, slot in slots}
        payload = {"template": template, "prompt": body.before()}
        return await answer(request, body, "fill", payload, _filled, lengths)

    @router.post("/v1/decisions", **answers.takes(DecisionsRequest, answers.Decisions, is_streamed=False))
    async def decisions(request: Request) -> Response:
        """Choose among given answers: the likeliest to each question, and the probability of each."""
        body = await service.read(request, DecisionsRequest)
        card = await service.card(body.model)
        prompt = body.before()
        if prompt is None:
            raise InputError("prompt and messages are missing; give one of them")
        seed = 0 if body.seed is None else body.seed
        payload = {"prompt": prompt, "fields": body.fields_, "steps": body.steps or 1}
        job = Job("decide", record_of(request.scope).id, payload, Options(seed=seed))
        found: Any = await service.watched(request.receive, service.result(request.scope, job))
        told = {name: {"choice": one.choice, "probabilities": one.probabilities} for name, one in found.items()}
        head = {"id": f"decide-{secrets.token_hex(12)}", "object": "decisions", "model": service.names(card)[0]}
        return JSONResponse(head | {"decisions": told, "seed": seed})

    return router


async def _chunks(
    service: Service, request: Request, job: Job, head: dict[str, Any], told: Callable[[Any], dict[str, Any]]
) -> AsyncGenerator[str, None]:
    async with aclosing(service.events(request.scope, [job])) as events:
        async for number, event in events:
            if isinstance(event, Draft):
                yield data({"object": head["object"], "draft": draft_of(number, event)})
            else:
                yield data(head | told(event))
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
