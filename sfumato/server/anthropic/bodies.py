"""The bodies of /v1/messages and /v1/messages/count_tokens, and what they ask of the model.

Both ask for the same prompt, so that the count is the one that an answer has. A tool that the server would run, or
whose shape Anthropic's models know, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from sfumato.errors import InputError
from sfumato.options import BIG, CONSTRAINTS, Options
from sfumato.server.anthropic.blocks import OpenBody, TextBlocks, Turn, conversation_of
from sfumato.server.backend import ModelCard
from sfumato.server.http.bodies import Most, only, reading_of
from sfumato.server.http.errors import Refusal
from sfumato.server.http.options import OptionsBody
from sfumato.server.openai.bodies import Function, chat_options, shown_tools
from sfumato.templates.requests import Chat


class ToolBody(OpenBody):
    """A tool: of the client, or (with a type of its own) one that Anthropic's models know."""

    place = "tools[]."
    type: str | None = None
    name: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    cache_control: Any = None

    @property
    def is_function(self) -> bool:
        """Whether it is a tool of the client, with a schema."""
        return self.type in (None, "custom")

    @model_validator(mode="after")
    def _is_whole_or_left_out(self, info: ValidationInfo) -> Self:
        reading = reading_of(info)
        if not self.is_function:
            if reading.is_strict:
                raise ValueError("only tools with an input_schema are called; leave the others out")
            reading.leave_out(f"{self.place}{self.type}")
        elif not self.name or self.input_schema is None:
            raise ValueError("a tool needs a name and an input_schema")
        return self


class ToolChoiceBody(OpenBody):
    """Whether a tool is to be called, and which."""

    place = "tool_choice."
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = Field(None, description="true: of several calls only the first is given.")

    @model_validator(mode="after")
    def _has_name(self) -> Self:
        if self.type == "tool" and not self.name:
            raise ValueError("tool_choice of type 'tool' needs a name")
        return self


class ThinkingBody(OpenBody):
    """Whether the model is to think."""

    place = "thinking."
    unread: ClassVar[Mapping[str, str]] = {"budget_tokens": "the model thinks as long as it does"}
    type: Literal["enabled", "adaptive", "between_tools", "disabled"]
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(OpenBody):
    """The form of the answer."""

    place = "output_config.format."
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(OpenBody):
    """How the answer is to be."""

    place = "output_config."
    unread: ClassVar[Mapping[str, str]] = {"effort": "the model takes the steps that an answer needs"}
    format: OutputFormat | None = None


UNREAD = {
    "metadata": "nothing is kept of who asks",
    "service_tier": "all requests are served alike",
    "speed": "all requests are served alike",
    "inference_geo": "the model runs where the server is",
    "context_management": "a conversation is read whole",
    "diagnostics": "the log has them",
}
"""Fields of both bodies that ask for nothing of the text; others that are not known are left out as well."""


class PromptBody(OptionsBody):
    """What the two bodies share: all that makes the prompt."""

    is_open = True
    unread = UNREAD
    messages: Annotated[list[Turn], Field(min_length=1), Most("max_messages", "messages")]
    system: str | TextBlocks | None = None
    tools: Annotated[list[ToolBody], Most("max_tools", "tools")] | None = None
    tool_choice: ToolChoiceBody | None = None
    thinking: ThinkingBody | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    cache_control: Any = None
    mcp_servers: Any = only([])
    container: Any = only()

    @property
    def functions(self) -> list[Function]:
        """Its tools that are functions of the client."""
        return [
            Function(name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict)
            for tool in self.tools or []
            if tool.is_function and tool.name
        ]

    @property
    def choice(self) -> str:
        """ "none", "auto", "required", or the tool to call."""
        if self.tool_choice is None:
            return "auto"
        kind = self.tool_choice.type
        return str(self.tool_choice.name) if kind == "tool" else "required" if kind == "any" else kind

    @property
    def is_one_call(self) -> bool:
        """Whether one call at most is wanted."""
        return bool(self.tool_choice and self.tool_choice.disable_parallel_tool_use)

    @property
    def is_thinking(self) -> bool:
        """Whether the model is to think."""
        return self.thinking is not None and self.thinking.type != "disabled"

    def chat(self, options: Options) -> Chat:
        """The conversation, answered with these options; a last message of the assistant is continued."""
        messages = conversation_of(self.system, self.messages)
        last = messages[-1] if messages else {"role": "system"}
        if last["role"] == "assistant" and last.get("tool_calls"):
            raise InputError("the last message calls a tool and no result follows; add a message with a tool_result")
        if last["role"] == "assistant" and not last["content"]:
            messages.pop()
        if not any(message["role"] != "system" for message in messages):
            raise Refusal(400, "messages hold no text; give at least one message with some", param="messages")
        is_continued = messages[-1]["role"] == "assistant"
        return Chat(messages, shown_tools(self.functions, self.choice), options, is_continued)


class MessagesRequest(PromptBody, uses=("chat",), without=("stop", "thinking", "logprobs", "top_logprobs", "drafts")):
    """The body of /v1/messages."""

    max_tokens: int = Field(ge=0, le=BIG, description="0: the prompt is read, and nothing is written.")
    stop_sequences: Annotated[list[str], Most("max_stops", "strings")] | None = None

    def query(self, card: ModelCard) -> Chat:
        """What is asked of the model."""
        form = self.output_config.format if self.output_config and self.output_config.format else self.output_format
        schema = None if form is None else form.schema_
        if schema is not None and any(name in self.requested() for name in CONSTRAINTS):
            raise Refusal(400, "output_config.format and a constraint are given; give one of them", param="format")
        more = chat_options(self.functions, self.choice, None, None, schema)
        more |= {"max_tokens": min(max(self.max_tokens, 1), card.max_position), "thinking": self.is_thinking}
        if not self.max_tokens:  # one token has no room for what they ask for
            more = {name: value for name, value in more.items() if name in ("max_tokens", "thinking")}
        if self.stop_sequences:
            more["stop"] = self.stop_sequences
        return self.chat(self.options(card, **more))


class CountRequest(PromptBody):
    """The body of /v1/messages/count_tokens."""

    def query(self) -> Chat:
        """What would be asked of the model."""
        return self.chat(Options(thinking=self.is_thinking))
