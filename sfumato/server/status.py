"""The routes that generate nothing: the model, its options, health, figures, and the page."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, PlainTextResponse, Response
from typing_extensions import TypedDict

from sfumato.server.backend import ModelCard
from sfumato.server.http.document import ERRORS, gives
from sfumato.server.http.options import listed
from sfumato.server.http.service import Service
from sfumato.server.http.static import PageFiles
from sfumato.templates.systemone import JEV

UI = Path(__file__).parent / "ui"
"""The page's files."""


class PurposeBody(TypedDict):
    """What a model is for that is for one thing alone: a sentence, and what stands in every prompt of that kind."""

    purpose: str
    prompt: str


class AdapterBody(TypedDict):
    """What an adapter is: its largest rank, and the bytes of its factors."""

    rank: int
    bytes: int


class ModelBody(TypedDict):
    """A model, as GET /v1/models has it: for OpenAI's clients, for Anthropic's, and what only a canvas has.

    An adapter is a model of its own there: its `parent` is the model that it changes."""

    id: str
    object: Literal["model"]
    created: int
    type: Literal["model"]
    display_name: str
    created_at: str
    max_input_tokens: int
    max_tokens: int
    owned_by: str
    canvas_length: int
    max_model_len: int
    is_diffusion: bool
    has_chat: bool
    parameters: int
    dtype: str
    ops: str
    quantised: str | None
    purpose: PurposeBody | None
    root: str
    parent: str | None
    adapter: AdapterBody | None


class SystemOneModel(TypedDict):
    """A model's name as TypeSafe's clients list it; `release_date`: when the server began, as YYYY-MM-DD."""

    name: str
    description: str
    release_date: str


class ModelList(TypedDict):
    """The answer of GET /v1/models: `data` for OpenAI's and Anthropic's clients, `models` for TypeSafe's."""

    object: Literal["list"]
    data: list[ModelBody]
    has_more: bool
    first_id: str
    last_id: str
    models: list[SystemOneModel]


class OptionBody(TypedDict):
    """An option, as GET /v1/options has it."""

    name: str
    type: Literal["integer", "number", "boolean", "string", "array", "object"]
    default: Any
    minimum: float | None
    maximum: float | None
    choices: list[str] | None
    doc: str


class OptionList(TypedDict):
    """The answer of GET /v1/options."""

    options: list[OptionBody]


class Status(TypedDict):
    """The answer of GET /health and GET /ready."""

    status: str


def routes(service: Service) -> APIRouter:
    """The routes about the model, and those about the server."""
    router = APIRouter()
    _add_model_routes(router, service)
    _add_server_routes(router, service)
    return router


def _add_model_routes(router: APIRouter, service: Service) -> None:
    created = int(time.time())

    @router.get("/v1/models", **gives(ModelList))
    async def models() -> Response:
        """The loaded model, once under each of its names, and then its adapters."""
        card = await service.card()
        names = [*service.names(card), *service.adapters(card)]
        page = {"has_more": False, "first_id": names[0], "last_id": names[-1]}
        entries = [entry_of(name, await service.card(name), service, created) for name in names]
        known = [system_one_entry(entry) for entry in entries]
        known += [{**known[0], "name": name} for name in JEV if name not in names]
        return JSONResponse({"object": "list", "data": entries, **page, "models": known})

    @router.get("/v1/models/{name:path}", **gives(ModelBody))
    async def model_of(name: str) -> Response:
        return JSONResponse(entry_of(name, await service.card(name), service, created))

    @router.get("/v1/options", **gives(OptionList))
    async def option_list() -> Response:
        """How to generate: what requests may set, with this model's defaults."""
        card = await service.card()
        return JSONResponse({"options": listed(card.defaults | dict(card.preset))})


def entry_of(name: str, card: ModelCard, service: Service, created: int) -> ModelBody:
    """The loaded model, or one of its adapters, under this name. `created`: when, in seconds."""
    adapter = next((one for one in card.adapters if one.name == card.adapter), None)
    parent = None if adapter is None else service.names(replace(card, adapter=None))[0]
    return {
        "id": name,
        "object": "model",
        "created": created,
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(created, UTC).isoformat().replace("+00:00", "Z"),
        "max_input_tokens": card.max_position,
        "max_tokens": card.max_position,
        "owned_by": "sfumato",
        "canvas_length": card.canvas_length,
        "max_model_len": card.max_position,
        "is_diffusion": card.is_diffusion,
        "has_chat": card.has_chat,
        "parameters": card.parameters,
        "dtype": card.dtype,
        "ops": card.ops,
        "quantised": card.quantised,
        "purpose": None if card.purpose is None else {"purpose": card.purpose.sentence, "prompt": card.purpose.prompt},
        "root": card.name if adapter is None else adapter.name,
        "parent": parent,
        "adapter": None if adapter is None else {"rank": adapter.rank, "bytes": adapter.bytes},
    }


def system_one_entry(model: ModelBody) -> SystemOneModel:
    """A model, as TypeSafe's clients list it."""
    purpose = model["purpose"]
    kind = "A block-diffusion language model" if model["is_diffusion"] else "A language model"
    sentence = purpose["purpose"] if purpose else f"{kind} of {model['parameters']} parameters"
    return {"name": model["id"], "description": sentence, "release_date": model["created_at"][:10]}


def _add_server_routes(router: APIRouter, service: Service) -> None:
    either: dict[int | str, dict[str, Any]] = {status: {"model": Status} for status in (200, 503)}
    figures: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
        401: ERRORS[401],
        403: ERRORS[403],
    }

    @router.get("/health", responses=either)
    async def health() -> Response:
        """Whether the server lives, and its worker does or is started again."""
        return JSONResponse({"status": "failed"}, 503) if service.has_failed() else JSONResponse({"status": "ok"})

    @router.get("/ready", responses=either)
    async def ready() -> Response:
        """Whether jobs are taken and prepared: "ready", or else why not."""
        state = service.state()
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @router.get("/metrics", response_class=PlainTextResponse, responses=figures)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    @router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(request: Request) -> Response:
        return await PageFiles(directory=UI, check_dir=False).get_response("index.html", request.scope)
