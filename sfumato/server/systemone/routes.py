"""POST /v1/systemone: TypeSafe's System One API, for its SDKs and whatever else speaks it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from sfumato.errors import CapacityError, InputError
from sfumato.events import Decisions
from sfumato.questions import OWN
from sfumato.server.backend import ModelCard
from sfumato.server.http.document import takes
from sfumato.server.http.errors import Refusal
from sfumato.server.http.service import Service, media_of
from sfumato.server.systemone.answers import ERRORS, SystemOneBody, error_form
from sfumato.server.systemone.bodies import SystemOneRequest
from sfumato.server.systemone.multipart import MEDIA, parts_of
from sfumato.server.systemone.questions import place_of, refused
from sfumato.templates.systemone import JEV, READING, answers_of

__all__ = ["PATHS", "error_form", "routes"]

PATHS = "/v1/systemone"
"""What the paths begin with whose errors have System One's form."""
REQUEST = "request"
"""The part of a multipart body that is the request itself."""


def routes(service: Service) -> APIRouter:
    """The route of typed questions."""
    router = APIRouter()

    @router.post("/v1/systemone", **takes(SystemOneRequest, SystemOneBody, stream={}, errors=ERRORS))
    async def systemone(request: Request) -> Response:
        """Answer questions about a state, each with probabilities; images may come as parts of multipart/form-data."""
        body = await _read(service, request)
        card = await _card(service, body)
        query = body.query(card)
        try:
            result = await service.watched(request.receive, service.result(request.scope, query))
        except InputError as error:
            raise _refusal(error) from None
        assert isinstance(result, Decisions)
        return JSONResponse(answers_of(result, service.names(card)[0]))

    return router


async def _read(service: Service, request: Request) -> SystemOneRequest:
    """The body, which is JSON, or has JSON as its first part."""
    if media_of(request) != MEDIA:
        body = await service.read(request, SystemOneRequest)
        body.check_images(None)
        return body
    content_type, data = request.headers["content-type"], await service.body(request)
    parts = await asyncio.to_thread(parts_of, content_type, data, service.settings.limits.max_parts)
    part = parts.pop(REQUEST, None)
    if part is None or part.media not in ("", "application/json"):
        raise refused((), f"the body has no part {REQUEST!r} of type application/json; send it", "missing")
    body = await service.parsed(request, part.data, SystemOneRequest)
    body.check_images(parts)
    return body


async def _card(service: Service, body: SystemOneRequest) -> ModelCard:
    """The card of the model that is asked for, with its adapter."""
    card = await service.card()
    if body.model not in JEV or body.model in (*service.names(card), *service.adapters(card)):
        card = await service.card(body.model)
    name = body.x_adapter
    if name is None or name == card.adapter:
        return card
    known = service.adapters(card)
    if card.adapter is not None or name not in known:
        here = f"this server has {', '.join(known)}" if known else "this server has none"
        why = f"model is the adapter {card.adapter!r}" if card.adapter is not None else here
        raise refused((f"{OWN}adapter",), f"x_adapter is {name!r}, and {why}; leave it out")
    return replace(card, adapter=name)


def _refusal(error: InputError) -> Refusal:
    """What the plan of the query refuses, at its place in the body."""
    if isinstance(error, CapacityError) and error.option is None:
        return refused(("state",), str(error), "context_length_exceeded")
    place = place_of(error)
    if place and place[0] in READING:
        place = (f"{OWN}{place[0]}",)
    return refused(place, str(error))
