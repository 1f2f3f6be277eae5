"""The HTTP application: routes over a `Backend`, behind the guards that every request passes.

`create` puts it together. The routes that generate are in `chat`, `completions`, `responses` and `templates`; here are
those that tell: the model, its options, health, figures, and the page.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.staticfiles import StaticFiles

from sfumato.errors import SfumatoError
from sfumato.server import answers
from sfumato.server.backend import Backend, ModelCard
from sfumato.server.canvas import routes as templates
from sfumato.server.catalogue import options
from sfumato.server.http import guard
from sfumato.server.http.errors import refusal
from sfumato.server.http.service import Service
from sfumato.server.openai import chat, completions, responses, schema
from sfumato.server.settings import Limits, Settings

__all__ = ["Limits", "Settings", "create"]

UI = Path(__file__).parent / "ui"


def create(backend: Backend, settings: Settings) -> FastAPI:
    """The application. Its lifespan starts the backend and stops it.

    `app.state.service` is for who runs it: `starting` is the backend's start, which fails where the model cannot be
    loaded, and `drain(seconds)` comes before the connections are closed."""
    service = Service(backend, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.drain(settings.drain)
            await backend.stop(0.0)
            await service.ended()

    app = FastAPI(
        title="Sfumato",
        version=version("sfumato"),
        description="DiffusionGemma over HTTP: OpenAI's routes, and those that only a canvas can offer.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        middleware=[Middleware(kind, service=service) for kind in (guard.Rest, guard.Access, guard.Door, guard.Bounds)],
        dependencies=[Depends(HTTPBearer(auto_error=False))] if settings.keys else [],
    )
    app.state.service = service
    for routes in (chat.routes, completions.routes, responses.routes, templates.routes, _routes):
        app.include_router(routes(service))
    app.mount("/ui", StaticFiles(directory=UI, check_dir=False))
    app.add_exception_handler(SfumatoError, _answer)
    app.add_exception_handler(HTTPException, _answer)
    document: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not document:
            document.update(answers.document(app))
        return document

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _answer(request: Request, error: Exception) -> Response:
    return refusal(error).response()


def _routes(service: Service) -> APIRouter:
    router, created = APIRouter(), int(time.time())
    either: dict[int | str, dict[str, Any]] = {status: {"model": answers.Status} for status in (200, 503)}

    def model(name: str, card: ModelCard) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "sfumato",
            "canvas_length": card.canvas_length,
            "max_model_len": card.max_position,
            "is_diffusion": card.is_diffusion,
            "has_chat": card.has_chat,
            "parameters": card.parameters,
            "dtype": card.dtype,
            "ops": card.ops,
            "quantised": card.quantised,
        }

    figures: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
        401: answers.ERRORS[401],
        403: answers.ERRORS[403],
    }

    @router.get("/v1/models", **answers.gives(answers.ModelList))
    async def models() -> Response:
        """The loaded model, once under each of its names."""
        card = await service.card()
        return JSONResponse({"object": "list", "data": [model(name, card) for name in service.names(card)]})

    @router.get("/v1/models/{name:path}", **answers.gives(answers.ModelBody))
    async def model_of(name: str) -> Response:
        return JSONResponse(model(name, await service.card(name)))

    @router.get("/v1/options", **answers.gives(answers.OptionList))
    async def option_list() -> Response:
        """How to generate: what requests may set, with this model's defaults."""
        card = await service.card()
        names = [name for name in options() if name != "must_call"]  # tool_choice sets that one
        return JSONResponse({"options": [schema.setting(name, card.defaults) for name in names]})

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

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        if not (UI / "index.html").is_file():
            raise HTTPException(404)
        return FileResponse(UI / "index.html")

    return router
