"""The body of /v1/responses: a conversation as items (`inputs`), and how to answer it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, ValidationInfo

from sfumato.errors import InputError
from sfumato.options import Options
from sfumato.server.backend import ModelCard
from sfumato.server.http.bodies import Body, Most, only, reading_of
from sfumato.server.http.options import option_field
from sfumato.server.openai.bodies import (
    ANY_OBJECT,
    FUNCTION_UNREAD,
    Function,
    OtherTool,
    Sampled,
    allowed_of,
    chat_options,
)
from sfumato.server.openai.inputs import AnyItem
from sfumato.server.openai.spellings import EffortName
from sfumato.server.openai.unread import RESPONSES_NEUTRAL, RESPONSES_UNREAD


class FlatTool(Function):
    """A tool, with its function's fields beside its type."""

    place = "tools[]."
    type: Literal["function"]

    def function(self) -> Function:
        """The function that the model is shown."""
        return Function(
            name=self.name, description=self.description, parameters=self.parameters, strict=self.strict or None
        )


class TextFormat(Body):
    """What the text of a custom tool is."""

    type: Literal["text", "grammar"]
    syntax: Literal["lark", "regex"] | None = None
    definition: str | None = None


class CustomTool(Body):
    """A tool that takes text: the model is shown a function of one argument. A grammar is told, not enforced."""

    place = "tools[]."
    unread = FUNCTION_UNREAD
    type: Literal["custom"]
    name: str = Field(min_length=1)
    description: str | None = None
    format: TextFormat | None = None

    def function(self) -> Function:
        """The function that the model is shown."""
        description = self.description or ""
        if self.format is not None and self.format.definition:
            description += f"\nThe input obeys this {self.format.syntax or 'lark'}:\n{self.format.definition}"
        text = {"type": "string", "description": "The text that the tool takes."}
        parameters = {"type": "object", "properties": {"input": text}, "required": ["input"]}
        return Function(name=self.name, description=description.strip() or None, parameters=parameters)


def _kind(tool: Any) -> str:
    kind = tool.get("type", "function") if isinstance(tool, dict) else "function"
    return str(kind) if kind in ("function", "custom") else "other"


AnyFlatTool = Annotated[
    Annotated[FlatTool, Tag("function")] | Annotated[CustomTool, Tag("custom")] | Annotated[OtherTool, Tag("other")],
    Discriminator(_kind),
]


class FlatChoice(Body):
    """The choice of one tool."""

    type: Literal["function", "custom"]
    name: str


class AllowedFlat(Body):
    """The choice among some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FlatChoice], Field(min_length=1), Most("max_tools", "tools")]


class AnswerFormat(Body):
    """What form the answer has."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class Text(Body):
    """How the answer's text is to be."""

    place = "text."
    unread: ClassVar[Mapping[str, str]] = {"verbosity": "the model knows no such setting; ask in words"}
    format: AnswerFormat | None = None


SummaryName = Literal["auto", "concise", "detailed"]


class Reasoning(Body):
    """How much the model is to think. Its thoughts come as a summary, whole, whatever `summary` says."""

    place = "reasoning."
    unread: ClassVar[Mapping[str, str]] = {
        "context": "thoughts of earlier turns are as the template has them",
        "mode": "there is one",
    }
    effort: EffortName | None = None
    summary: SummaryName | None = None
    generate_summary: SummaryName | None = None


INCLUDED = "reasoning.encrypted_content"
"""What an answer may include besides: its thoughts as opaque text."""
_TOOLS_ONLY = (
    "web_search_call.action.sources",
    "web_search_call.results",
    "file_search_call.results",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "message.input_image.image_url",
)
"""What could be included of tools and images that are not here: there is never any."""


def _check_included(names: list[str], info: ValidationInfo) -> list[str]:
    reading = reading_of(info)
    for name in names:
        if name == INCLUDED or (name in _TOOLS_ONLY and not reading.is_strict):
            if name != INCLUDED:
                reading.leave_out(f"include[].{name}")
        else:
            raise ValueError(f"only {INCLUDED!r} can be included; leave {name[:80]!r} out")
    return names


class ResponsesRequest(Sampled, uses=("chat",), without=("max_tokens", "logprobs"), neutral=RESPONSES_NEUTRAL):
    """The body of /v1/responses."""

    unread = RESPONSES_UNREAD
    input: str | Annotated[list[AnyItem], Most("max_messages", "items")]
    instructions: str | None = None
    max_output_tokens: int | None = option_field("max_tokens")
    text: Text | None = None
    tools: Annotated[list[AnyFlatTool], Most("max_tools", "tools")] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | AllowedFlat | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    top_logprobs: Any = only(0)
    include: Annotated[list[str], Most("max_parts", "names"), AfterValidator(_check_included)] | None = None
    store: bool | None = Field(None, description="false: the answer is not kept.")
    previous_response_id: str | None = Field(None, description="A kept answer, which this goes on from.")

    @property
    def own_tools(self) -> list[FlatTool | CustomTool]:
        """Its tools that the model may call."""
        return [tool for tool in self.tools or [] if isinstance(tool, FlatTool | CustomTool)]

    @property
    def functions(self) -> list[Function]:
        """The functions that the model is shown."""
        functions = [tool.function() for tool in self.own_tools]
        if isinstance(self.tool_choice, AllowedFlat):
            return allowed_of(functions, [choice.name for choice in self.tool_choice.tools])
        return functions

    @property
    def choice(self) -> str:
        """ "none", "auto", "required", or the tool to call."""
        match self.tool_choice:
            case FlatChoice(name=name):
                return name
            case AllowedFlat(mode=mode):
                return mode
            case str(choice):
                return choice
        return "auto"

    def answer_schema(self) -> dict[str, Any] | None:
        """The schema that the answer obeys; None: it is text."""
        form = self.text.format if self.text else None
        if form is None or form.type == "text":
            return None
        return ANY_OBJECT if form.type == "json_object" or form.schema_ is None else form.schema_

    def answer_options(self, card: ModelCard) -> Options:
        """How to answer."""
        options = self.requested()
        if options.get("drafts"):
            message = "drafts is true, but /v1/responses has no event for them; use /v1/chat/completions"
            raise InputError(message, option="drafts")
        effort = self.reasoning.effort if self.reasoning else None
        thinking, schema = options.get("thinking"), self.answer_schema()
        more = chat_options(self.functions, self.choice, effort, thinking, schema)
        if self.max_output_tokens is not None:
            more["max_tokens"] = self.max_output_tokens
        return self.options(card, **more)
