"""The answers of OpenAI's routes, as types for the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from sfumato.server.http.answers import UsageBody


class CallFunction(TypedDict):
    """The function of a call, with its arguments as JSON."""

    name: str
    arguments: str


class Call(TypedDict):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CallFunction
    index: NotRequired[int]


class TopLogprob(TypedDict):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer, and the likeliest ones at its place."""

    top_logprobs: list[TopLogprob]


class Logprobs(TypedDict):
    """The log-probabilities of an answer."""

    content: list[TokenLogprob]


class ChatMessage(TypedDict):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[str]
    tool_calls: NotRequired[list[Call]]
    function_call: NotRequired[CallFunction]


class ChatChoice(TypedDict):
    """One answer of a chat."""

    index: int
    message: ChatMessage
    finish_reason: Literal["stop", "length", "tool_calls", "function_call"]
    stop_reason: str | None
    logprobs: Logprobs | None


class ChatCompletion(TypedDict):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    seed: int
    system_fingerprint: None
    choices: list[ChatChoice]
    usage: UsageBody


class LegacyLogprobs(TypedDict):
    """The log-probabilities of an answer, in OpenAI's older form."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(TypedDict):
    """One answer to one prompt."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | None
    logprobs: LegacyLogprobs | None


class TextCompletion(TypedDict):
    """The answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    seed: int
    system_fingerprint: None
    choices: list[TextChoice]
    usage: UsageBody


class ResponseBody(TypedDict):
    """The answer of /v1/responses: the parts of OpenAI's object that vary."""

    id: str
    object: Literal["response"]
    created_at: float
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    output: list[dict[str, Any]]
    seed: int
    usage: dict[str, Any] | None


class ItemList(TypedDict):
    """The answer of /v1/responses/{id}/input_items."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedBody(TypedDict):
    """The answer of a response's deletion."""

    id: str
    object: Literal["response"]
    deleted: bool
