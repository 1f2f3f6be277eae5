"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM calls them: adapters that come and go while it runs.

They read files of the server's, so that they are refused unless it is started with a folder for them, and no other
place is read. Adapters that are loaded are listed under /v1/models, and chosen as a model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response
from typing_extensions import TypedDict

from sfumato.errors import InputError
from sfumato.server.http.bodies import Body, only
from sfumato.server.http.document import takes
from sfumato.server.http.errors import Refusal
from sfumato.server.http.service import Service
from sfumato.server.settings import Settings
from sfumato.server.status import ModelBody, entry_of
from sfumato.templates.requests import LoadAdapter, UnloadAdapter


class LoadRequest(Body):
    """The body of /v1/load_lora_adapter."""

    lora_name: str = Field(min_length=1, description="The name that requests then give as their model.")
    lora_path: str = Field(min_length=1, description="Its folder, in the one that the server is started with.")
    load_inplace: bool | None = only(False)


class UnloadRequest(Body):
    """The body of /v1/unload_lora_adapter."""

    unread: ClassVar[Mapping[str, str]] = {"lora_int_id": "an adapter is known by its name"}
    lora_name: str


class UnloadedBody(TypedDict):
    """The answer of /v1/unload_lora_adapter."""

    id: str
    object: str
    deleted: bool


def routes(service: Service) -> APIRouter:
    """The two routes."""
    router = APIRouter()

    @router.post("/v1/load_lora_adapter", **takes(LoadRequest, ModelBody, stream={}))
    async def load(request: Request) -> Response:
        """Load an adapter; what is under way goes on."""
        root = _root(service.settings)
        body = await service.read(request, LoadRequest)
        if body.lora_name in service.names(await service.card()):
            raise InputError(f"{body.lora_name!r} is the model's own name here; give another", option="lora_name")
        folder = folder_in(root, body.lora_path)
        try:
            card = await service.change_adapters(request, LoadAdapter(body.lora_name, str(folder)))
        except InputError as error:  # where the server keeps its files is no client's business
            words = str(error).replace(str(folder), body.lora_path).replace(str(root), ".")
            raise InputError(words, option="lora_name" if error.option == "adapter" else "lora_path") from None
        entry = entry_of(body.lora_name, card, service, int(time.time()))
        return JSONResponse(entry)

    @router.post("/v1/unload_lora_adapter", **takes(UnloadRequest, UnloadedBody, stream={}))
    async def unload(request: Request) -> Response:
        """Unload an adapter: it is refused from now on, and what is under way ends with it."""
        _root(service.settings)
        body = await service.read(request, UnloadRequest)
        if body.lora_name not in service.adapters(await service.card()):
            known = ", ".join(service.adapters(await service.card())) or "none is loaded"
            message = f"there is no adapter {body.lora_name!r} here; loaded are: {known}"
            raise Refusal(404, message, param="lora_name", code="model_not_found")
        await service.change_adapters(request, UnloadAdapter(body.lora_name))
        return JSONResponse({"id": body.lora_name, "object": "model", "deleted": True})

    return router


def _root(settings: Settings) -> Path:
    """The folder of adapters; Refusal where there is none."""
    if settings.adapter_folder is None:
        message = "clients of this server may not load adapters; start it with --adapter-folder DIR to allow it"
        raise Refusal(403, message, "permission_error")
    return Path(settings.adapter_folder).expanduser().resolve()


def folder_in(root: Path, path: str) -> Path:
    """A folder that a client names, in this one or below; InputError for any other, whether it exists or not."""
    try:
        folder = (root / path).resolve()
        is_inside = folder.is_relative_to(root) and folder.is_dir()
    except (OSError, ValueError, RuntimeError):  # too long, with a null character, or links in a circle
        is_inside = False
    if not is_inside:
        raise InputError(
            f"lora_path is {path[:200]!r}, which is no folder in the server's folder of adapters; give one, relative "
            "to that",
            option="lora_path",
        )
    return folder
