"""The bodies of /v1/chat/completions and /v1/completions; a field that is not here is refused by its name.

What clients send that has no effect here is in `unread`, other names of what is here in `spellings`. The fields of
`Options` come from `OptionsBody`: each body says which uses its options have. The body of /v1/responses is in `items`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, ValidationInfo, WithJsonSchema

from sfumato.errors import InputError
from sfumato.options import BIG, CONSTRAINTS, OPTIONS, Options
from sfumato.server.backend import ModelCard
from sfumato.server.http.bodies import Body, Count, Most, reading_of
from sfumato.server.http.checks import check_length
from sfumato.server.http.errors import Refusal
from sfumato.server.http.options import OptionsBody, option_field
from sfumato.server.openai.spellings import (
    ConstraintSpellings,
    EffortName,
    ThinkingSpellings,
    ThinkingSwitch,
    agreed,
)
from sfumato.server.openai.unread import CHAT_NEUTRAL, CHAT_UNREAD, NEUTRAL
from sfumato.server.settings import Limits

# --- how to generate -----------------------------------------------------------------------------------------------


class StreamOptions(Body):
    """What a stream holds beside the answer."""

    place = "stream_options."
    unread: ClassVar[Mapping[str, str]] = {
        "include_obfuscation": "no padding is sent",
        "continuous_usage_stats": "the usage comes at the end",
    }
    include_usage: bool | None = None


class Sampled(OptionsBody):
    """What SDKs send beside the options of an answer."""

    metadata: Annotated[dict[str, Any], Most("max_metadata", "entries")] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class Generation(Sampled):
    """What chat and completions share: several answers, and usage in a stream."""

    unread = CHAT_UNREAD
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
    if kind not in ("text", "input_text", "output_text"):
        raise ValueError("only parts of type 'text' are read, no images, sound or files, and nothing is fetched")
    return kind


class TextPart(Body):
    """A part of a message."""

    place = "messages[].content[]."
    is_open = True
    type: Annotated[str, AfterValidator(_is_text_part), WithJsonSchema({"enum": ["text", "input_text", "output_text"]})]
    text: str


class CalledFunction(Body):
    """The function of a call, and its arguments as JSON."""

    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(Body):
    """A call that an assistant's message holds."""

    place = "messages[].tool_calls[]."
    is_open = True
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction
    index: Annotated[int, Field(ge=0, le=BIG)] | None = None


class Message(Body):
    """A message of a conversation; what else it holds is left out."""

    place = "messages[]."
    is_open = True
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[TextPart], Most("max_parts", "parts")] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Most("max_tools", "calls")] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: Any = Field(None, description="The same, where it is text.")
    refusal: str | None = Field(None, description="The content, where there is no other.")
    function_call: CalledFunction | None = Field(None, description="The older form of tool_calls.")

    def plain(self) -> dict[str, Any]:
        """The message as a chat template takes it."""
        unread = {"reasoning", "refusal", "function_call"}
        message = self.model_dump(by_alias=True, exclude_none=True, exclude=unread)
        if self.reasoning_content is None and isinstance(self.reasoning, str):
            message["reasoning_content"] = self.reasoning
        if isinstance(self.content, list):
            message["content"] = [{"type": "text", "text": part.text} for part in self.content]
        if self.role == "assistant":
            self._complete(message)
        if self.role == "function":
            message |= {"role": "tool", "tool_call_id": message.get("tool_call_id", _old_id(self.name))}
        return message

    def _complete(self, message: dict[str, Any]) -> None:
        """Fill in what an assistant's message of other clients lacks: they send an empty answer as null."""
        if self.function_call is not None and not self.tool_calls:
            function = self.function_call.model_dump(exclude_none=True)
            message["tool_calls"] = [{"id": _old_id(self.function_call.name), "type": "function", "function": function}]
        if not message.get("tool_calls"):
            message.pop("tool_calls", None)
            message.setdefault("content", self.refusal or "")


def _old_id(name: str | None) -> str:
    """The id of a call in the older form, which has none: its result follows under the function's name."""
    return f"call_of_{name}"


MessageList = Annotated[list[Message], Field(min_length=1), Most("max_messages", "messages")]


FUNCTION_UNREAD = {
    "cache_control": "what was encoded is kept while there is room, for everybody",
    "defer_loading": "tools are shown at once",
    "allowed_callers": "calls are the model's own",
    "output_schema": "what a tool returns is the client's",
    "returns": "what a tool returns is the client's",
}
"""What declarations of functions hold beside what a template shows."""


class Function(Body):
    """A function that the model may call."""

    place = "tools[].function."
    unread = FUNCTION_UNREAD
    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool that is a function."""

    place = "tools[]."
    unread = FUNCTION_UNREAD
    type: Literal["function"] | None = None
    function: Function


def _left_out(tool: Any, info: ValidationInfo) -> dict[str, Any]:
    reading, kind = reading_of(info), tool["type"]
    if not isinstance(kind, str) or reading.is_strict:
        raise ValueError("only tools of type 'function' are called; leave the others out")
    reading.leave_out(f"tools[].{kind}")
    return {}


OtherTool = Annotated[
    dict[str, Any],
    BeforeValidator(_left_out),
    WithJsonSchema({"type": "object", "properties": {"type": {"type": "string"}}, "required": ["type"]}),
]
"""A tool of another kind: it runs at a vendor's, or is no function. It is left out, and the header says so."""


def _tool_kind(tool: Any) -> str:
    """Which kind of tool this is."""
    kind = tool.get("type") if isinstance(tool, dict) else None
    return "callable" if kind in (None, "function") else "other"


AnyTool = Annotated[Annotated[Tool, Tag("callable")] | Annotated[OtherTool, Tag("other")], Discriminator(_tool_kind)]


class Named(Body):
    """The name of a function."""

    name: str


class NamedChoice(Body):
    """The choice of one tool."""

    type: Literal["function"]
    function: Named


class AllowedTools(Body):
    """Which tools may be called, and whether one must be."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedChoice], Field(min_length=1), Most("max_tools", "tools")]


class AllowedChoice(Body):
    """The choice among some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class JSONSchema(Body):
    """A schema with a name."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What form the answer has."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="Of json_object, as llama.cpp has it.")

    def answer_schema(self) -> dict[str, Any] | None:
        """The schema that the answer obeys; None: it is text."""
        if self.type != "json_schema":
            return (self.schema_ or ANY_OBJECT) if self.type == "json_object" else None
        if self.json_schema is None:
            raise Refusal(400, "response_format.json_schema is missing; give it", param="response_format.json_schema")
        return ANY_OBJECT if self.json_schema.schema_ is None else self.json_schema.schema_


ANY_OBJECT: dict[str, Any] = {"type": "object"}


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


class ChatRequest(Generation, ConstraintSpellings, ThinkingSpellings, uses=("chat",), neutral=CHAT_NEUTRAL):
    """The body of /v1/chat/completions."""

    messages: MessageList
    max_completion_tokens: int | None = option_field("max_tokens")
    tools: Annotated[list[AnyTool], Most("max_tools", "tools")] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | AllowedChoice | None = None
    parallel_tool_calls: bool | None = Field(None, description="false: of several calls only the first is given.")
    response_format: ResponseFormat | None = None
    reasoning_effort: EffortName | None = Field(None, description='"none": no thinking; all others: thinking.')
    thinking: bool | ThinkingSwitch | None = option_field("thinking")
    functions: Annotated[list[Function], Most("max_tools", "functions")] | None = Field(
        None, description="The older form of tools."
    )
    function_call: Literal["none", "auto"] | Named | None = Field(None, description="The older form of tool_choice.")

    @property
    def is_old(self) -> bool:
        """Whether calls are in the older form: one `function_call` instead of `tool_calls`."""
        return bool(self.functions) and not self.tools

    @property
    def tool_functions(self) -> list[Function]:
        """The functions of its tools that may be called."""
        if self.is_old:
            return list(self.functions or [])
        functions = [tool.function for tool in self.tools or [] if isinstance(tool, Tool)]
        if isinstance(self.tool_choice, AllowedChoice):
            allowed = [choice.function.name for choice in self.tool_choice.allowed_tools.tools]
            return allowed_of(functions, allowed)
        return functions

    @property
    def choice(self) -> str:
        """ "none", "auto", "required", or the tool to call."""
        match self.function_call if self.is_old else self.tool_choice:
            case Named(name=name) | NamedChoice(function=Named(name=name)):
                return name
            case AllowedChoice(allowed_tools=allowed):
                return allowed.mode
            case str(choice):
                return choice
        return "auto"

    def requested(self) -> dict[str, Any]:
        """The options that it sets, whatever it calls them."""
        options = self.spelled(super().requested())
        most = agreed(("max_tokens", options.get("max_tokens")), ("max_completion_tokens", self.max_completion_tokens))
        folded = {"thinking": self.thinks(self.thinking), "max_tokens": most}
        return options | {name: value for name, value in folded.items() if value is not None}

    def answer_options(self, card: ModelCard) -> Options:
        """How to answer."""
        options = self.requested()
        schema = self.response_format.answer_schema() if self.response_format else None
        effort, thinking = self.effort(self.reasoning_effort), options.get("thinking")
        more = chat_options(self.tool_functions, self.choice, effort, thinking, schema)
        if "schema" in more and any(name in options for name in CONSTRAINTS):
            raise Refusal(400, "response_format and a constraint are given; give one of them", param="response_format")
        return self.options(card, **more)


def allowed_of(functions: list[Function], names: list[str]) -> list[Function]:
    """The functions of these names; a Refusal for a name that none has."""
    if missing := set(names) - {function.name for function in functions}:
        text = f"tool_choice allows {min(missing)!r}, which is not among the tools"
        raise Refusal(400, text, param="tool_choice")
    return [function for function in functions if function.name in names]


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


class CompletionRequest(
    Generation, ConstraintSpellings, uses=("complete",), without=("top_logprobs",), neutral=NEUTRAL
):
    """The body of /v1/completions. Its `logprobs` is a number, as in OpenAI's older form."""

    prompt: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[Texts, Tag("texts")]
        | Annotated[Tokens, Tag("tokens")]
        | Annotated[Lists, Tag("lists")],
        Discriminator(_prompt_kind),
    ]
    max_tokens: int | None = Field(None, ge=0, le=BIG, description=f"{OPTIONS['max_tokens'].about.sentence} 0: none.")
    suffix: str | None = Field(None, description="What stands behind the text to write, which is then an infill.")
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = Field(None, description="With logprobs: the log-probabilities of the prompt's tokens, too.")
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

    def requested(self) -> dict[str, Any]:
        """The options that it sets, whatever it calls them; for no text at all one token is asked for."""
        options = self.spelled(super().requested())
        return options | ({"max_tokens": 1} if self.is_empty else {})

    @property
    def is_empty(self) -> bool:
        """Whether no text is to be written."""
        return self.max_tokens == 0

    def answer_options(self, card: ModelCard) -> Options:
        """How to answer; with `suffix`, how to infill."""
        if self.is_empty and self.suffix is not None:
            raise InputError("max_tokens is 0 and suffix asks for text before it; give 1 or more", option="max_tokens")
        if self.best_of not in (None, self.n or 1):
            message = f"best_of is {self.best_of} and n {self.n or 1}; it must be equal, or left out"
            raise InputError(message, option="best_of")
        if self.echo and not self.is_scored and not all(isinstance(prompt, str) for prompt in self.prompts):
            raise InputError("echo needs the prompt as text, or logprobs; it came as tokens", option="echo")
        more: dict[str, Any] = {"logprobs": self.logprobs is not None, "top_logprobs": self.logprobs}
        for prompt in self.prompts:
            check_length("prompt", None if isinstance(prompt, str) else len(prompt), card)
        if self.suffix is None:
            return self.options(card, **more)
        if len(self.prompts) > 1 or not isinstance(self.prompts[0], str):
            raise InputError("suffix needs one prompt, as text; send one request for each", option="suffix")
        if self.logprobs is not None:
            raise InputError("logprobs cannot go with suffix; drop one of them", option="logprobs")
        check_length("max_tokens", self.requested().get("max_tokens"), card)
        return self.options(card, is_template=True, **more, max_tokens=None)
