"""The answers of Ollama's routes, as types for the OpenAPI document, and the form of its errors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from sfumato.events import Usage
from sfumato.server.backend import ModelCard
from sfumato.server.http.document import errors_in
from sfumato.server.http.errors import Refusal
from sfumato.server.ollama.bodies import LATEST


class OllamaError(TypedDict):
    """The answer of a request that fails."""

    error: str


ERRORS = errors_in(OllamaError)


def error_form(error: Refusal) -> tuple[dict[str, Any], int]:
    """An error in Ollama's form."""
    return {"error": str(error)}, error.status


class OllamaCosts(TypedDict):
    """What the last object of an answer says of it: durations in nanoseconds."""

    model: str
    created_at: str
    done: bool
    done_reason: NotRequired[Literal["stop", "length", "load", "unload"]]
    total_duration: NotRequired[int]
    load_duration: NotRequired[int]
    prompt_eval_count: NotRequired[int]
    prompt_eval_duration: NotRequired[int]
    eval_count: NotRequired[int]
    eval_duration: NotRequired[int]
    logprobs: NotRequired[list[dict[str, Any]]]


class OllamaAnswer(TypedDict):
    """The message of an answer, or a part of it."""

    role: Literal["assistant"]
    content: str
    thinking: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]


class ChatBody(OllamaCosts):
    """The answer of /api/chat."""

    message: OllamaAnswer


class GenerateBody(OllamaCosts):
    """The answer of /api/generate."""

    response: str
    thinking: NotRequired[str]
    context: NotRequired[list[int]]


class ModelDetails(TypedDict):
    """What a model is."""

    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class ModelEntry(TypedDict):
    """A model in a list."""

    name: str
    model: str
    size: int
    digest: str
    details: ModelDetails
    modified_at: NotRequired[str]
    expires_at: NotRequired[str]
    size_vram: NotRequired[int]
    context_length: NotRequired[int]


class ModelEntries(TypedDict):
    """The answer of /api/tags and /api/ps."""

    models: list[ModelEntry]


class ShowBody(TypedDict):
    """The answer of /api/show."""

    license: str
    modelfile: str
    parameters: str
    template: str
    details: ModelDetails
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class VersionBody(TypedDict):
    """The answer of /api/version."""

    version: str


NANO = 10**9


def time_text(later: timedelta = timedelta()) -> str:
    """The time, now or `later`, as Ollama writes it."""
    return (datetime.now(UTC) + later).isoformat().replace("+00:00", "Z")


def costs_of(usage: Usage) -> dict[str, int]:
    """What an answer took. The prompt's share of the time is not known, as the first text ends a whole canvas."""
    total = round(usage.seconds * NANO)
    return {
        "total_duration": total,
        "load_duration": 0,
        "prompt_eval_count": usage.prompt_tokens,
        "prompt_eval_duration": 0,
        "eval_count": usage.tokens,
        "eval_duration": total,
    }


def tagged(name: str) -> str:
    """A model's name with a tag, as Ollama lists it."""
    return name if ":" in name else name + LATEST


def details_of(card: ModelCard) -> ModelDetails:
    """What the loaded model is."""
    family = "diffusion-gemma" if card.is_diffusion else "gemma"
    return {
        "parent_model": "",
        "format": "sfumato",
        "family": family,
        "families": [family],
        "parameter_size": _size(card.parameters),
        "quantization_level": card.quantised or {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[card.dtype],
    }


def _size(parameters: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if parameters >= size:
            return f"{parameters / size:.1f}{unit}"
    return str(parameters)


def entry_of(name: str, card: ModelCard, size: int) -> ModelEntry:
    """A model in a list; `size` in bytes. Its digest is of its name, as nothing else of it is known here."""
    return {
        "name": tagged(name),
        "model": tagged(name),
        "size": size,
        "digest": hashlib.sha256(name.encode()).hexdigest(),
        "details": details_of(card),
    }


def shown_model(card: ModelCard, names: Sequence[str], since: str) -> ShowBody:
    """All that is known of the loaded model."""
    details = details_of(card)
    family, chat, canvas = details["family"], ["tools", "thinking"], ["insert"]
    values = card.defaults | dict(card.preset)
    return {
        "license": "",
        "modelfile": f"FROM {names[0]}\n",
        "parameters": "\n".join(f"{name} {value}" for name, value in values.items() if value is not None),
        "template": "",
        "details": details,
        "model_info": {
            "general.architecture": family,
            "general.basename": card.name,
            "general.parameter_count": card.parameters,
            f"{family}.context_length": card.max_position,
            f"{family}.vocab_size": card.vocab_size,
            f"{family}.canvas_length": card.canvas_length,
        },
        "capabilities": ["completion", *(chat if card.has_chat else ()), *(canvas if card.is_diffusion else ())],
        "modified_at": since,
    }
