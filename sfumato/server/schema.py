"""What requests may say, and every refusal of what they may not: a field that is not here is an error by its name.

A field of an OpenAI SDK that Sfumato has no use for is here with the values that ask for nothing (`only`). The fields
of `Options` are in every request under their own names. Requests to /v1/responses are in `responses`.
"""

from __future__ import annotations

import gc
import json
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    Tag,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from sfumato.events import _BIG, InputError, Options
from sfumato.server import catalogue
from sfumato.server.backend import ModelCard
from sfumato.server.catalogue import field as option
from sfumato.server.errors import Refusal, short
from sfumato.server.settings import Limits


def schemas_in(schema: Any) -> Iterator[dict[str, Any]]:
    """A pydantic schema and all within it."""
    if isinstance(schema, dict):
        if isinstance(schema.get("type"), str):
            yield schema
        for name, inner in schema.items():
            if name != "metadata":
                yield from schemas_in(inner)
    elif isinstance(schema, (list, tuple)):
        for inner in schema:
            yield from schemas_in(inner)


class Body(BaseModel):
    """A request, or an object in one. What is wrong with it is said of its first fault: pydantic would look for all,
    and a million of them take gigabytes."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        for inner in schemas_in(handler.resolve_ref_schema(schema)):
            if inner["type"] in ("list", "tuple", "set", "frozenset"):
                inner["fail_fast"] = True
        return schema

    @model_validator(mode="before")
    @classmethod
    def _with_one_stranger(cls, value: Any) -> Any:
        """Of many unknown names only the first is left, to be refused."""
        if not isinstance(value, dict) or len(value) <= len(cls.model_fields):
            return value
        known = {info.alias or name for name, info in cls.model_fields.items()}
        stranger = next(name for name in value if name not in known)
        return {name: value[name] for name in (*known & value.keys(), stranger)}

    @field_validator("*")
    @classmethod
    def _asks_for_nothing(cls, value: Any, info: ValidationInfo) -> Any:
        extra = cls.model_fields[str(info.field_name)].json_schema_extra
        allowed = extra["enum"] if isinstance(extra, dict) else None
        if isinstance(allowed, list) and not any(_is_same(value, one) for one in allowed):
            raise ValueError(f"this is not supported; leave it out, or give {' or '.join(map(json.dumps, allowed))}")
        return value

    def plain(self) -> dict[str, Any]:
        """As the JSON that it came from, nulls left out."""
        return self.model_dump(by_alias=True, exclude_none=True)


def _is_same(value: Any, other: Any) -> bool:
    """As JSON has it: 0 is not false."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


T = TypeVar("T", bound=BaseModel)


def only(*values: Any) -> Any:
    """A field that may be sent, but not to ask for anything: it is null or one of these values."""
    return Field(None, json_schema_extra={"enum": [None, *values]})


@dataclass(frozen=True)
class Most:
    """Of a list or an object: at most so many as `Limits` has under this name, counted before any is looked at."""

    limit: str
    what: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_before_validator_function(self.check, handler(source))

    def check(self, value: Any, info: Any) -> Any:
        most = getattr(info.context, self.limit)
        if isinstance(value, (list, dict)) and len(value) > most:
            raise PydanticCustomError(TOO_MANY, f"{len(value)} {self.what}, more than the {most} allowed")
        return value


TOO_MANY = "too_many"
Count = Annotated[int, Field(ge=1, le=_BIG)]
Choices = Annotated[list[str], Most("max_choices", "choices")]


# --- from bytes to a checked request -------------------------------------------------------------------------------


def read(data: bytes, kind: type[T], limits: Limits) -> T:
    """The request in a body; a Refusal says what is wrong with it, and where."""
    _count_values(data, limits.max_values)
    value = parse(data, limits.max_depth)
    try:
        return kind.model_validate(value, context=limits)
    except ValidationError as error:
        raise _refusal(error, value) from None


def parse(data: bytes, max_depth: int) -> Any:
    try:
        with _without_collector():
            value = json.loads(data.decode(), parse_constant=_no_number, parse_float=_finite)
    except RecursionError:
        raise _too_deep(max_depth) from None
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if data.count(b"[") + data.count(b"{") > max_depth and _depth(value, max_depth) > max_depth:
        raise _too_deep(max_depth)
    if any(match.lastindex for match in _ESCAPE.finditer(data)):
        raise Refusal(400, "the body has a lone surrogate, which is no character; remove it", code="invalid_json")
    return value


def _count_values(data: bytes, most: int) -> None:
    """Refusal for a body of more values, before it is read: reading them would hold up everybody."""
    count = _separators(data)
    if count > most and (count := _separators(_STRING.sub(b"", data))) > most:
        text = f"the body has about {count} values, more than the {most} allowed; send fewer"
        raise Refusal(400, text, code="invalid_json")


def _separators(data: bytes) -> int:
    return sum(data.count(mark) for mark in (b",", b"[", b"{"))


_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\Z)', re.DOTALL)
"""Of JSON; one that is not closed goes to the end."""


@contextmanager
def _without_collector() -> Iterator[None]:
    """JSON holds no circles, and looking for them takes seven times as long as to read it."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


_ESCAPE = re.compile(rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F])|.)", re.DOTALL)
"""A backslash of JSON and what belongs to it; its group matches where that is half a surrogate pair."""


def _depth(value: Any, most: int) -> int:
    """Levels of lists and objects in a value, counted up to one more than `most`."""
    level, depth = [value] if isinstance(value, (list, dict)) else [], 0
    while level and depth <= most:
        depth += 1
        level = [
            inner
            for one in level
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, (list, dict))
        ]
    return depth


def _too_deep(limit: int) -> Refusal:
    return Refusal(400, f"the body nests deeper than the {limit} levels allowed; flatten it", code="invalid_json")


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON's")


def _finite(text: str) -> float:
    if abs(number := float(text)) == float("inf"):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


def _refusal(error: ValidationError, value: Any) -> Refusal:
    """What is wrong at the deepest place: a text that may be a list fails as both, and the list's reason says more."""
    found: dict[str, list[Any]] = {}
    for one in error.errors(include_url=False):
        found.setdefault(_place(one["loc"], value, one["type"] == "missing"), []).append(one)
    place = max(found, key=lambda name: name.count(".") + name.count("["))
    faults = [one for one in found[place] if one["type"] == TOO_MANY] or found[place]
    first, shown = faults[0], short(place, 200)
    if first["type"] == "extra_forbidden":
        message = f"there is no field {shown!r} in this request; leave it out"
    elif first["type"] == "missing":
        message = f"{shown} is missing; give it"
    elif first["type"] == TOO_MANY:
        message = f"{shown} has {first['msg']}; send fewer"
    else:
        reasons = dict.fromkeys(one["msg"].removeprefix("Value error, ") for one in faults)
        message = f"{shown or 'the body'} is {_shown(first['input'])}: {' – or: '.join(reasons)}"
    return Refusal(400, message, param=shown or None)


def _shown(value: Any) -> str:
    """The beginning of a value; it may be as large as the body."""
    if isinstance(value, (list, dict)):
        return short("".join(islice(_JSON.iterencode(value), 100)), 80)
    return short(repr(value[:100] if isinstance(value, str) else value), 80)


_JSON = json.JSONEncoder(ensure_ascii=False)


def _place(loc: tuple[int | str, ...], value: Any, is_missing: bool) -> str:
    """A place in the request, such as messages[0].role: pydantic's own, less the names of the types it tried."""
    name = ""
    for number, step in enumerate(loc):
        if isinstance(step, int) and isinstance(value, list) and step < len(value):
            name, value = f"{name}[{step}]", value[step]
        elif isinstance(step, str) and isinstance(value, dict):
            if step in value:
                name, value = f"{name}.{step}" if name else step, value[step]
            elif is_missing and number == len(loc) - 1:
                name = f"{name}.{step}" if name else step
    return name


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
    index: Annotated[int, Field(ge=0, le=_BIG)] | None = None


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

Tokens = Annotated[list[Annotated[int, Field(ge=0, le=_BIG)]], Field(min_length=1), Most("max_ids", "token ids")]
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


Span = Annotated[list[Annotated[int, Field(ge=0, le=_BIG)]], Field(min_length=2, max_length=2)]


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
