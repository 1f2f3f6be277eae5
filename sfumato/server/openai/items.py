"""The body of /v1/responses: a conversation as items, and how to answer it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from sfumato.errors import InputError
from sfumato.options import Options
from sfumato.server.backend import ModelCard
from sfumato.server.http.bodies import Body, Most, only
from sfumato.server.http.errors import Refusal
from sfumato.server.http.options import option_field
from sfumato.server.openai.bodies import ANY_OBJECT, EffortName, Function, Sampled, StreamOptions, chat_options


class Content(Body):
    """A part of a message."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Any = only([])
    logprobs: Any = only([])


Contents = Annotated[list[Content], Most("max_parts", "parts")]


class Item(Body):
    """What every item may hold."""

    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class MessageItem(Item):
    """A message."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Contents
    phase: Literal["commentary", "final_answer"] | None = None


class CallItem(Item):
    """A call of a function."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class OutputItem(Item):
    """What a call returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | Contents


class Thought(Body):
    """A part of a thought."""

    type: Literal["reasoning_text"]
    text: str


class ThoughtItem(Item):
    """What the model thought."""

    type: Literal["reasoning"]
    summary: Annotated[list[Any], Most("max_parts", "parts")] | None = None
    content: Annotated[list[Thought], Most("max_parts", "parts")] | None = None
    encrypted_content: Any = only()


def _kind(item: Any) -> str:
    kind = item.get("type") if isinstance(item, dict) else None
    return "message" if kind is None else str(kind)


AnyItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[OutputItem, Tag("function_call_output")]
    | Annotated[ThoughtItem, Tag("reasoning")],
    Discriminator(_kind),
]


class FlatTool(Function):
    """A tool, with its function's fields beside its type."""

    type: Literal["function"]


class FlatChoice(Body):
    """The choice of one tool."""

    type: Literal["function"]
    name: str


class AnswerFormat(Body):
    """What form the answer has."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class Text(Body):
    """How the answer's text is to be."""

    format: AnswerFormat | None = None
    verbosity: Any = only("medium")


class Reasoning(Body):
    """How much the model is to think."""

    effort: EffortName | None = None
    summary: Any = only("auto")
    generate_summary: Any = only()


class ResponsesRequest(Sampled, uses=("chat",), without=("max_tokens", "logprobs")):
    """The body of /v1/responses."""

    input: str | Annotated[list[AnyItem], Field(min_length=1), Most("max_messages", "items")]
    instructions: str | None = None
    max_output_tokens: int | None = option_field("max_tokens")
    text: Text | None = None
    tools: Annotated[list[FlatTool], Most("max_tools", "tools")] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    truncation: Any = only("disabled")
    top_logprobs: Any = only(0)
    include: Any = only([])
    background: Any = only(False)
    previous_response_id: Any = only()
    conversation: Any = only()
    prompt: Any = only()
    max_tool_calls: Any = only()
    stream_options: StreamOptions | None = None

    @property
    def functions(self) -> list[Function]:
        """The functions of its tools."""
        return [Function.model_validate(tool.model_dump(exclude={"type"})) for tool in self.tools or []]

    @property
    def choice(self) -> str:
        """ "none", "auto", "required", or the tool to call."""
        return self.tool_choice.name if isinstance(self.tool_choice, FlatChoice) else self.tool_choice or "auto"

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

    def messages(self) -> list[dict[str, Any]]:
        """The conversation as the chat template takes it: an assistant's thought, text and calls are one message."""
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        thought = ""
        for item in self.input:
            match item:
                case ThoughtItem():
                    thought += "".join(part.text for part in item.content or [])
                    continue
                case OutputItem():
                    messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _joined(item.output)})
                    continue
                case CallItem():
                    if thought or not messages or messages[-1]["role"] != "assistant":
                        messages.append({"role": "assistant", "content": ""})
                    function = {"name": item.name, "arguments": item.arguments}
                    call = {"id": item.call_id, "type": "function", "function": function}
                    messages[-1].setdefault("tool_calls", []).append(call)
                case MessageItem():
                    messages.append({"role": item.role, "content": _joined(item.content)})
            if thought and messages[-1]["role"] == "assistant":
                messages[-1]["reasoning_content"] = thought
            thought = ""
        if not messages:
            raise Refusal(400, "input holds thoughts alone; give at least one message", param="input")
        return messages


def _joined(content: str | Contents) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
