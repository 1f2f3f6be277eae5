"""What requests may say, and every refusal of what they may not: a field that is not here is an error by its name.

A field of an OpenAI SDK that Sfumato has no use for is here with the values that ask for nothing (`only`). The fields
of `Options` are in every request under their own names. Requests to /v1/responses are in `responses`.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
)

from sfumato.errors import InputError
from sfumato.options import BIG, Options
from sfumato.server import catalogue
from sfumato.server.backend import ModelCard
from sfumato.server.catalogue import field as option
from sfumato.server.http.body import Body, Choices, Count, Most, only
from sfumato.server.http.errors import Refusal
from sfumato.server.settings import Limits

# --- how to generate -----------------------------------------------------------------------------------------------


class Steps(Body):
    """The options that a canvas has, whatever is written on it."""

    model: str | None = None
    seed: int | None = option("seed")
    max_steps: int | None = option("max_steps")
    t_max: float | None = option("t_max")
    t_min: float | None = option("t_min")
    temperature_steps: int | None = option("temperature_steps")
    entropy_bound: float | None = option("entropy_bound")
    stability: int | None = option("stability")
    confidence: float | None = option("confidence")
    temperature: float | None = option("temperature")
    drafts: bool | None = option("drafts")
    stream: bool | None = None
    user: str | None = None

    def options(self, card: ModelCard, limits: Limits, **more: Any) -> Options:
        """What the request says of how to generate, its seed drawn if it gives none; `more` goes before it."""
        names = catalogue.options()
        aliases = {name: info.alias or name for name, info in type(self).model_fields.items()}
        given = {aliases[name]: getattr(self, name) for name in self.model_fields_set if aliases[name] in names}
        given |= more
        if given.get("drafts") and not self.stream:
            raise InputError("drafts needs stream; set stream to true, or leave drafts out")
        given = {name: value for name, value in given.items() if value is not None}
        given.setdefault("seed", 0 if given.get("temperature") == 0 else secrets.randbits(32))
        options = Options.from_dict(given)
        for name in ("max_tokens", "min_tokens"):
            check_length(name, getattr(options, name), card)
        if (options.mode or ("diffusion" if card.is_diffusion else "autoregressive")) == "diffusion":
            for name in ("top_p", "top_k"):
                if (value := getattr(options, name)) != getattr(Options, name):
                    raise InputError(f"{name} is {value!r}; it applies to mode 'autoregressive' alone, leave it out")
        return options


def check_length(name: str, tokens: int | None, card: ModelCard) -> None:
    """Refusal of more tokens than the model's context holds; None asks for none in particular."""
    if tokens is not None and tokens > card.max_position:
        message = f"{name} is {tokens}, more than the context of {card.max_position} tokens; lower it"
        raise Refusal(400, message, param=name, code="context_length_exceeded")


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Any = only(False)


Stop = str | Annotated[list[str], Most("max_stops", "strings")] | None


class Sampled(Steps):
    """The options of an answer as a whole, and what SDKs send beside them."""

    min_tokens: int | None = option("min_tokens")
    stop: Stop = Field(None, description=catalogue.options()["stop"].doc)
    mode: Literal["diffusion", "autoregressive"] | None = option("mode")
    top_p: float | None = option("top_p")
    top_k: int | None = option("top_k")
    early: bool | None = option("early")
    short: bool | None = option("short")
    schema_: dict[str, Any] | bool | None = option("schema", alias="schema")
    regex: str | None = option("regex")
    grammar: str | None = option("grammar")
    choices: Choices | None = option("choices")
    metadata: Annotated[dict[str, Any], Most("max_metadata", "entries")] | None = None
    frequency_penalty: Any = only(0)
    presence_penalty: Any = only(0)
    repetition_penalty: Any = only(1)
    min_p: Any = only(0)
    logit_bias: Any = only({})
    service_tier: Any = only("auto", "default")
    store: Any = only(False)
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class Generation(Sampled):
    n: Count | None = None
    max_tokens: int | None = option("max_tokens")
    stream_options: StreamOptions | None = None

    def is_usage_asked(self) -> bool:
        if self.stream_options is not None and not self.stream:
            raise InputError("stream_options needs stream; set stream to true, or leave stream_options out")
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def choice_count(self, prompts: int, limits: Limits) -> int:
        n = self.n or 1
        if n > limits.max_n:
            raise InputError(f"n is {n}, more than the {limits.max_n} answers allowed to one prompt; ask for fewer")
        if n * prompts > limits.max_prompts:
            raise Refusal(
                400,
                f"{prompts} prompts with {n} answers each are more than the {limits.max_prompts} answers allowed to "
                "one request; send several requests",
                param="prompt",
            )
        return n


# --- chat ----------------------------------------------------------------------------------------------------------


def _is_text_part(kind: str) -> str:
    if kind != "text":
        raise ValueError("only parts of type 'text' are read, no images, sound or files, and nothing is fetched")
    return kind


class TextPart(Body):
    type: Annotated[str, AfterValidator(_is_text_part), WithJsonSchema({"const": "text"})]
    text: str


class CalledFunction(Body):
    name: str
    arguments: str | dict[str, Any]


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction
    index: Annotated[int, Field(ge=0, le=BIG)] | None = None


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Most("max_parts", "parts")] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Most("max_tools", "calls")] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    provider_specific_fields: dict[str, Any] | None = Field(None, description="litellm's echo of an answer; unread.")
    refusal: Any = only()
    annotations: Any = only([])
    audio: Any = only()
    function_call: Any = only()

    def plain(self) -> dict[str, Any]:
        unread = ("annotations", "provider_specific_fields")
        return {name: value for name, value in super().plain().items() if name not in unread}


Messages = Annotated[list[Message], Field(min_length=1), Most("max_messages", "messages")]


class Function(Body):
    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class Named(Body):
    name: str


class NamedChoice(Body):
    type: Literal["function"]
    function: Named


class JSONSchema(Body):
    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    def wanted(self) -> dict[str, Any] | None:
        """The schema that the answer obeys."""
        if self.type != "json_schema":
            return ANY_OBJECT if self.type == "json_object" else None
        if self.json_schema is None:
            raise Refusal(400, "response_format.json_schema is missing; give it", param="response_format.json_schema")
        return ANY_OBJECT if self.json_schema.schema_ is None else self.json_schema.schema_


ANY_OBJECT: dict[str, Any] = {"type": "object"}
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def chat_options(
    tools: list[Function],
    choice: str,
    effort: str | None,
    thinking: bool | None,
    wanted: dict[str, Any] | None,
    form: str = "response_format",
) -> dict[str, Any]:
    """What tools, their choice ("none", "auto", "required" or a tool's name), effort and format mean in `Options`."""
    more: dict[str, Any] = {}
    if effort is not None:
        if thinking is not None and thinking == (effort == "none"):
            raise Refusal(400, f"reasoning effort is {effort!r} and thinking {thinking}; give one", param="thinking")
        more["thinking"] = effort != "none"
    if choice not in ("none", "auto", "required") and choice not in [tool.name for tool in tools]:
        raise Refusal(400, f"tool_choice names {choice!r}, which is not among the tools", param="tool_choice")
    if choice == "required" and not tools:
        raise Refusal(400, "tool_choice is 'required' without tools; give at least one", param="tool_choice")
    is_open = bool(tools) and choice != "none"
    if wanted is not None:
        if is_open:
            raise Refusal(
                400,
                f"{form} holds the answer to JSON, so that it cannot call a tool; set tool_choice to 'none', or leave "
                f"{form} out",
                param=form,
            )
        more["schema"] = wanted
    if is_open and choice != "auto":
        more["must_call"] = True
    if is_open and any(tool.strict for tool in tools):
        more["strict"] = True
    return more


def tools_payload(tools: list[Function], choice: str) -> list[dict[str, Any]] | None:
    """The tools that the model is shown."""
    if choice not in ("none", "auto", "required"):
        tools = [tool for tool in tools if tool.name == choice]
    if choice == "none" or not tools:
        return None
    return [{"type": "function", "function": tool.model_dump(exclude={"strict"}, exclude_none=True)} for tool in tools]


class ChatRequest(Generation):
    messages: Messages
    max_completion_tokens: int | None = option("max_tokens")
    logprobs: bool | None = option("logprobs")
    top_logprobs: int | None = option("top_logprobs")
    tools: Annotated[list[Tool], Most("max_tools", "tools")] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = Field(None, description="false: of several calls only the first is given.")
    response_format: ResponseFormat | None = None
    reasoning_effort: Effort | None = Field(None, description='"none": no thinking; all others: thinking.')
    strict: bool | None = option("strict")
    thinking: bool | None = option("thinking")
    prediction: Any = only()
    modalities: Any = only(["text"])
    audio: Any = only()
    verbosity: Any = only("medium")
    web_search_options: Any = only()
    functions: Any = only([])
    function_call: Any = only()

    @property
    def functions_given(self) -> list[Function]:
        return [tool.function for tool in self.tools or []]

    @property
    def choice(self) -> str:
        return (
            self.tool_choice.function.name if isinstance(self.tool_choice, NamedChoice) else self.tool_choice or "auto"
        )

    def answer_options(self, card: ModelCard, limits: Limits) -> Options:
        wanted = self.response_format.wanted() if self.response_format else None
        more = chat_options(self.functions_given, self.choice, self.reasoning_effort, self.thinking, wanted)
        most = self.max_completion_tokens
        if most is not None:
            if self.max_tokens not in (None, most):
                raise InputError(f"max_tokens is {self.max_tokens} and max_completion_tokens {most}; give one of them")
            more["max_tokens"] = most
        if "schema" in more and (self.schema_, self.regex, self.grammar, self.choices) != (None,) * 4:
            raise Refusal(400, "response_format and a constraint are given; give one of them", param="response_format")
        return self.options(card, limits, **more)


# --- completions ---------------------------------------------------------------------------------------------------

Tokens = Annotated[list[Annotated[int, Field(ge=0, le=BIG)]], Field(min_length=1), Most("max_ids", "token ids")]
Texts = Annotated[list[str], Field(min_length=1), Most("max_prompts", "prompts")]
Lists = Annotated[list[Tokens], Field(min_length=1), Most("max_prompts", "prompts")]


def _prompt_kind(prompt: Any) -> str:
    """By its first item, so that what is said of it is said of the kind that it is."""
    match prompt:
        case list():
            first = prompt[0] if prompt else ""
            return "texts" if isinstance(first, str) else "lists" if isinstance(first, list) else "tokens"
        case _:
            return "text"


class CompletionRequest(Generation):
    prompt: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[Texts, Tag("texts")]
        | Annotated[Tokens, Tag("tokens")]
        | Annotated[Lists, Tag("lists")],
        Discriminator(_prompt_kind),
    ]
    suffix: str | None = Field(None, description="What stands behind the text to write, which is then an infill.")
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None
    best_of: Count | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        match self.prompt:
            case str() | [int(), *_]:
                return [self.prompt]  # type: ignore[list-item]
            case _:
                return list(self.prompt)  # type: ignore[arg-type]

    def answer_options(self, card: ModelCard, limits: Limits) -> Options:
        if self.best_of not in (None, self.n or 1):
            raise InputError(f"best_of is {self.best_of} and n {self.n or 1}; it must be equal, or left out")
        if self.echo and not all(isinstance(prompt, str) for prompt in self.prompts):
            raise InputError("echo needs the prompt as text; it came as tokens")
        if self.echo and self.logprobs is not None:
            raise InputError("echo cannot go with logprobs, which are of the answer alone; drop one of them")
        more: dict[str, Any] = {"logprobs": self.logprobs is not None, "top_logprobs": self.logprobs}
        for prompt in self.prompts:
            check_length("prompt", None if isinstance(prompt, str) else len(prompt), card)
        if self.suffix is None:
            return self.options(card, limits, **more)
        if len(self.prompts) > 1 or not isinstance(self.prompts[0], str):
            raise InputError("suffix needs one prompt, as text; send one request for each")
        if self.logprobs is not None:
            raise InputError("logprobs cannot go with suffix; drop one of them")
        check_length("max_tokens", self.max_tokens, card)
        return self.options(card, limits, **more, max_tokens=None)


# --- our own -------------------------------------------------------------------------------------------------------


class InfillRequest(Steps):
    prefix: str
    suffix: str
    length: Count | None = Field(None, description="Tokens to write; null: the length is found.")
    at_most: Count | None = Field(None, description="Tokens at most, where the length is found.")


Span = Annotated[list[Annotated[int, Field(ge=0, le=BIG)]], Field(min_length=2, max_length=2)]


class EditRequest(Steps):
    text: str
    instruction: str | None = None
    spans: Annotated[list[Span], Most("max_spans", "spans")] | None = Field(
        None, description="What may change: from character, to character."
    )
    strength: float | None = Field(None, ge=0, le=1, description="The share of the text that is noise at first.")


class Slot(Body):
    """A place to be written, and at most one thing that it obeys."""

    name: str | None = None
    length: Count | None = None
    at_most: Count | None = None
    text: str | None = None
    strength: float | None = Field(None, ge=0, le=1)
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    regex: str | None = None
    grammar: str | None = None
    choices: Choices | None = None


class Prompted(Body):
    """What stands before what is written: messages, a text, or nothing."""

    messages: Messages | None = None
    prompt: str | None = None

    def before(self) -> str | list[dict[str, Any]] | None:
        if self.messages is not None and self.prompt is not None:
            raise InputError("prompt and messages are given; give one of them")
        return self.prompt if self.messages is None else [message.plain() for message in self.messages]


class FillRequest(Prompted, Steps):
    template: Annotated[list[str | Slot], Field(min_length=1), Most("max_pieces", "pieces")]


class DecisionsRequest(Prompted):
    model: str | None = None
    fields_: Annotated[
        dict[str, Annotated[Choices, Field(min_length=2)]], Field(min_length=1), Most("max_fields", "fields")
    ] = Field(alias="fields", description="Field -> its choices.")
    steps: int | None = Field(None, ge=1, le=4096)
    seed: int | None = option("seed")
    user: str | None = None


def setting(name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """An option as GET /v1/options lists it."""
    found = asdict(catalogue.options()[name])
    return found | ({"default": defaults[name]} if defaults.get(name) is not None else {})
