"""The HTTP application: the routes over a `Backend`, behind the layers that every request passes.

`create` puts it together, and is the only thing here: the routes are in a folder for each dialect and in `status`,
the layers in `http`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import Response

from sfumato.errors import SfumatoError
from sfumato.server import adapters, status
from sfumato.server.anthropic import routes as anthropic
from sfumato.server.backend import Backend
from sfumato.server.canvas import routes as canvas
from sfumato.server.http.access_log import AccessLog
from sfumato.server.http.authentication import Authentication
from sfumato.server.http.document import document
from sfumato.server.http.limits import BodyLimits, BodyRemainder
from sfumato.server.http.service import Service
from sfumato.server.http.static import PageFiles
from sfumato.server.ollama import routes as ollama
from sfumato.server.openai import chat, completions, responses
from sfumato.server.settings import Limits, Settings
from sfumato.server.systemone import routes as systemone

__all__ = ["Limits", "Settings", "create"]

LAYERS = (BodyRemainder, AccessLog, Authentication, BodyLimits)
"""What every request passes before its route, from the outside in."""

KEYS = (HTTPBearer(auto_error=False), APIKeyHeader(name="x-api-key", auto_error=False))
"""Where a request may carry its key, for the document; `Authentication` looks for it."""


def create(backend: Backend, settings: Settings) -> FastAPI:
    """The application. Its lifespan starts the backend and stops it.

    `app.state.service` is for the caller that runs it: `starting` is the backend's start, which fails where the model
    cannot be loaded, and `drain(seconds)` comes before the connections are closed."""
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
        description="DiffusionGemma over HTTP: routes of OpenAI, Anthropic, Ollama, System One and of a canvas.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        middleware=[Middleware(layer, service=service) for layer in LAYERS],
        dependencies=[Depends(scheme) for scheme in KEYS] if settings.keys else [],
    )
    app.state.service = service
    service.error_forms |= {one.PATHS: one.error_form for one in (anthropic, ollama, systemone)}
    for dialect in (chat, completions, responses, anthropic, ollama, systemone, canvas, adapters, status):
        app.include_router(dialect.routes(service))
    app.mount("/ui", PageFiles(directory=status.UI, check_dir=False))
    app.add_exception_handler(SfumatoError, _answer)
    app.add_exception_handler(HTTPException, _answer)
    kept: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not kept:
            kept.update(document(app))
        return kept

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _answer(request: Request, error: Exception) -> Response:
    service: Service = request.app.state.service
    return service.error_answer(error, request.scope)
