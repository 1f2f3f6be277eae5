"""The answers of Anthropic's routes, as types for the OpenAPI document, and the form of its errors."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import TypedDict

from sfumato.events import Usage
from sfumato.server.http.document import errors_in
from sfumato.server.http.errors import Refusal


class ThinkingTokens(TypedDict):
    """Tokens of the thoughts."""

    thinking_tokens: int


class MessageUsage(TypedDict):
    """What an answer took; the prompt's tokens are `input_tokens` and those that needed no encoding."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingTokens


class MessageBody(TypedDict):
    """The answer of /v1/messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessageUsage


class CountBody(TypedDict):
    """The answer of /v1/messages/count_tokens."""

    input_tokens: int


class AnthropicDetail(TypedDict):
    """What an error is."""

    type: str
    message: str


class AnthropicError(TypedDict):
    """The answer of a request that fails."""

    type: Literal["error"]
    error: AnthropicDetail


OVERLOADED = 529
"""Anthropic's status where too many requests wait."""

ERRORS = errors_in(AnthropicError, OVERLOADED)

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    504: "timeout_error",
    OVERLOADED: "overloaded_error",
}
"""Anthropic's types of errors by their status; all others are invalid requests."""


def error_form(error: Refusal) -> tuple[dict[str, Any], int]:
    """An error in Anthropic's form. Clients that shorten a conversation look for the words of one that is too long."""
    status = OVERLOADED if error.status == 503 else error.status
    message = str(error)
    if error.error["code"] == "context_length_exceeded":
        message = f"prompt is too long: {message}"
    kind = _TYPES.get(status, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}}, status


def usage_in_message(usage: Usage) -> MessageUsage:
    """What an answer took, in Anthropic's words."""
    return {
        "input_tokens": usage.prompt_tokens - usage.reused_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.reused_tokens,
        "output_tokens": usage.tokens,
        "output_tokens_details": {"thinking_tokens": usage.thought_tokens},
    }
