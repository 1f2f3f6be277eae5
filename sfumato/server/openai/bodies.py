"""The bodies of /v1/chat/completions and /v1/completions; a field that is not here is refused by its name.

A field of an OpenAI SDK that has no effect here stands with the values that it may have (`only`). The fields of
`Options` come from `OptionsBody`: each body says which uses its options have. The body of /v1/responses is in `items`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, Discriminator, Field, Tag, WithJsonSchema

from sfumato.errors import InputError
from sfumato.options import BIG, CONSTRAINTS, Options
from sfumato.server.backend import ModelCard
from sfumato.server.http.bodies import Body, Count, Most, only
from sfumato.server.http.checks import check_length
from sfumato.server.http.errors import Refusal
from sfumato.server.http.options import OptionsBody, option_field
from sfumato.server.settings import Limits

# --- how to generate -----------------------------------------------------------------------------------------------


class StreamOptions(Body):
    """What a stream holds beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: Any = only(False)


class Sampled(OptionsBody):
    """What SDKs send beside the options of an answer."""

    metadata: Annotated[dict[str, Any], Most("max_metadata", "entries")] | None = None
    service_tier: Any = only("auto", "default")
    store: Any = only(False)
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class Generation(Sampled):
    """What chat and completions share: several answers, and usage in a stream."""

    n: Count | None = None
    stream_options: StreamOptions | None = None

    def has_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        if self.stream_options is not None and not self.stream:
            message = "stream_options needs stream; set stream to true, or leave stream_options out"
            raise InputError(message, option="stream_options")
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def choice_count(self, prompts: int, limits: Limits) -> int:
        """How many answers each prompt gets; InputError or Refusal where that is too many."""
        n = self.n or 1
        if n > limits.max_n:
            message = f"n is {n}, more than the {limits.max_n} answers allowed to one prompt; ask for fewer"
            raise InputError(message, option="n")
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
    """A part of a message."""

    type: Annotated[str, AfterValidator(_is_text_part), WithJsonSchema({"const": "text"})]
    text: str


class CalledFunction(Body):
    """The function of a call, and its arguments as JSON."""

    name: str
    arguments: str | dict[str, Any]


class ToolCall(Body):
    """A call that an assistant's message holds."""

    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction
    index: Annotated[int, Field(ge=0, le=BIG)] | None = None


class Message(Body):
    """A message of a conversation."""

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
        """The message as a chat template takes it."""
        unread = ("annotations", "provider_specific_fields")
        return {name: value for name, value in super().plain().items() if name not in unread}


MessageList = Annotated[list[Message], Field(min_length=1), Most("max_messages", "messages")]


class Function(Body):
    """A function that the model may call."""

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; all are functions."""

    type: Literal["function"]
    function: Function


class Named(Body):
    """The name of a function."""

    name: str


class NamedChoice(Body):
    """The choice of one tool."""

    type: Literal["function"]
    function: Named


class JSONSchema(Body):
    """A schema with a name."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What form the answer has."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    def answer_schema(self) -> dict[str, Any] | None:
        """The schema that the answer obeys; None: it is text."""
        if self.type != "json_schema":
            return ANY_OBJECT if self.type == "json_object" else None
        if self.json_schema is None:
            raise Refusal(400, "response_format.json_schema is missing; give it", param="response_format.json_schema")
        return ANY_OBJECT if self.json_schema.schema_ is None else self.json_schema.schema_


ANY_OBJECT: dict[str, Any] = {"type": "object"}
EffortName = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def chat_options(
    tools: list[Function],
    choice: str,
    effort: str | None,
    thinking: bool | None,
    schema: dict[str, Any] | None,
) -> dict[str, Any]:
    """What tools, their choice ("none", "auto", "required" or a tool's name), effort and schema mean in `Options`."""
    more: dict[str, Any] = {}
    if effort is not None:
        if thinking is not None and thinking == (effort == "none"):
            raise Refusal(400, f"reasoning effort is {effort!r} and thinking {thinking}; give one", param="thinking")
        more["thinking"] = effort != "none"
    if choice not in ("none", "auto", "required") and choice not in [tool.name for tool in tools]:
        raise Refusal(400, f"tool_choice names {choice!r}, which is not among the tools", param="tool_choice")
    if choice == "required" and not tools:
        raise Refusal(400, "tool_choice is 'required' without tools; give at least one", param="tool_choice")
    can_call = bool(tools) and choice != "none"
    if schema is not None:
        more["schema"] = schema
    if can_call and choice != "auto":
        more["must_call"] = True
    if can_call and any(tool.strict for tool in tools):
        more["strict"] = True
    return more


def shown_tools(tools: list[Function], choice: str) -> list[dict[str, Any]] | None:
    """The tools that the model is shown."""
    if choice not in ("none", "auto", "required"):
        tools = [tool for tool in tools if tool.name == choice]
    if choice == "none" or not tools:
        return None
    return [{"type": "function", "function": tool.model_dump(exclude={"strict"}, exclude_none=True)} for tool in tools]


class ChatRequest(Generation, uses=("chat",)):
    """The body of /v1/chat/completions."""

    messages: MessageList
    max_completion_tokens: int | None = option_field("max_tokens")
    tools: Annotated[list[Tool], Most("max_tools", "tools")] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = Field(None, description="false: of several calls only the first is given.")
    response_format: ResponseFormat | None = None
    reasoning_effort: EffortName | None = Field(None, description='"none": no thinking; all others: thinking.')
    prediction: Any = only()
    modalities: Any = only(["text"])
    audio: Any = only()
    verbosity: Any = only("medium")
    web_search_options: Any = only()
    functions: Any = only([])
    function_call: Any = only()

    @property
    def tool_functions(self) -> list[Function]:
        """The functions of its tools."""
        return [tool.function for tool in self.tools or []]

    @property
    def choice(self) -> str:
        """ "none", "auto", "required", or the tool to call."""
        return (
            self.tool_choice.function.name if isinstance(self.tool_choice, NamedChoice) else self.tool_choice or "auto"
        )

    def answer_options(self, card: ModelCard) -> Options:
        """How to answer."""
        options = self.requested()
        schema = self.response_format.answer_schema() if self.response_format else None
        thinking = options.get("thinking")
        more = chat_options(self.tool_functions, self.choice, self.reasoning_effort, thinking, schema)
        most = self.max_completion_tokens
        if most is not None:
            if (other := options.get("max_tokens", most)) != most:
                message = f"max_tokens is {other} and max_completion_tokens {most}; give one of them"
                raise InputError(message, option="max_tokens")
            more["max_tokens"] = most
        if "schema" in more and any(name in options for name in CONSTRAINTS):
            raise Refusal(400, "response_format and a constraint are given; give one of them", param="response_format")
        return self.options(card, **more)


# --- completions ---------------------------------------------------------------------------------------------------

Tokens = Annotated[list[Annotated[int, Field(ge=0, le=BIG)]], Field(min_length=1), Most("max_ids", "token ids")]
Texts = Annotated[list[str], Field(min_length=1), Most("max_prompts", "prompts")]
Lists = Annotated[list[Tokens], Field(min_length=1), Most("max_prompts", "prompts")]


def _prompt_kind(prompt: Any) -> str:
    """The kind of a prompt, by its first item, so that a fault is reported of that kind alone."""
    match prompt:
        case list():
            first = prompt[0] if prompt else ""
            return "texts" if isinstance(first, str) else "lists" if isinstance(first, list) else "tokens"
        case _:
            return "text"


class CompletionRequest(Generation, uses=("complete",), without=("top_logprobs",)):
    """The body of /v1/completions. Its `logprobs` is a number, as in OpenAI's older form."""

    prompt: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[Texts, Tag("texts")]
        | Annotated[Tokens, Tag("tokens")]
        | Annotated[Lists, Tag("lists")],
        Discriminator(_prompt_kind),
    ]
    suffix: str | None = Field(None, description="What stands behind the text to write, which is then an infill.")
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = Field(None, description="With logprobs: the log-probabilities of the prompt's tokens, too.")
    max_tokens: int | None = Field(None, ge=0, le=BIG, description="New tokens at most; 0 with echo and logprobs.")
    best_of: Count | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Its prompts, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(cast(list[str | list[int]], self.prompt))

    @property
    def is_scored(self) -> bool:
        """Whether it asks for the log-probabilities of its prompts."""
        return bool(self.echo) and self.logprobs is not None

    def answer_options(self, card: ModelCard) -> Options:
        """How to answer; with `suffix`, how to infill."""
        if self.best_of not in (None, self.n or 1):
            message = f"best_of is {self.best_of} and n {self.n or 1}; it must be equal, or left out"
            raise InputError(message, option="best_of")
        if self.echo and not self.is_scored and not all(isinstance(prompt, str) for prompt in self.prompts):
            raise InputError("echo needs the prompt as text, or logprobs; it came as tokens", option="echo")
        if self.max_tokens == 0 and not self.is_scored:
            raise InputError("max_tokens is 0; give 1 or more, or echo with logprobs", option="max_tokens")
        most = None if self.max_tokens is None else max(1, self.max_tokens)
        more: dict[str, Any] = {"logprobs": self.logprobs is not None, "top_logprobs": self.logprobs}
        more["max_tokens"] = most
        for prompt in self.prompts:
            check_length("prompt", None if isinstance(prompt, str) else len(prompt), card)
        if self.suffix is None:
            return self.options(card, **more)
        if len(self.prompts) > 1 or not isinstance(self.prompts[0], str):
            raise InputError("suffix needs one prompt, as text; send one request for each", option="suffix")
        if self.logprobs is not None:
            raise InputError("logprobs cannot go with suffix; drop one of them", option="logprobs")
        check_length("max_tokens", self.requested().get("max_tokens"), card)
        return self.options(card, **more | {"max_tokens": None})
