"""What /v1/responses takes as input: the items of a conversation, and what they come to for a chat template.

An assistant's thought, text and calls are several items and one message. A thought may come as text, or as the opaque
text that an answer brought (`seals`), which clients send back where nothing is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Tag, TypeAdapter, ValidationInfo, WithJsonSchema

from sfumato.server.http.bodies import Body, BodyReading, Most, reading_of
from sfumato.server.http.errors import Refusal
from sfumato.server.http.seals import unsealed
from sfumato.server.settings import Limits


class TextContent(Body):
    """A part of a message, or of what a tool returned."""

    place = "input[].content[]."
    is_open = True
    type: Literal["input_text", "output_text", "text"]
    text: str


class RefusalContent(Body):
    """A part in which a model refused to answer."""

    place = "input[].content[]."
    is_open = True
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """What it said."""
        return self.refusal


def _part_kind(part: Any) -> str:
    return "refused" if isinstance(part, dict) and part.get("type") == "refusal" else "written"


AnyContent = Annotated[
    Annotated[TextContent, Tag("written")] | Annotated[RefusalContent, Tag("refused")], Discriminator(_part_kind)
]
Contents = Annotated[list[AnyContent], Most("max_parts", "parts")]


class Item(Body):
    """What every item may hold."""

    place = "input[]."
    is_open = True
    id: str | None = None
    status: str | None = None


class MessageItem(Item):
    """A message."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Contents
    phase: str | None = None


class CallItem(Item):
    """A call of a function."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class CustomCallItem(Item):
    """A call of a tool that takes text."""

    type: Literal["custom_tool_call"]
    call_id: str
    name: str
    input: str


class OutputItem(Item):
    """What a call returned."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: str
    output: str | Contents


class Summary(Body):
    """A part of what is shown of a thought."""

    place = "input[].content[]."
    is_open = True
    type: Literal["summary_text"]
    text: str


class Thought(Body):
    """A part of a thought."""

    place = "input[].content[]."
    is_open = True
    type: Literal["reasoning_text", "text"]
    text: str


class ThoughtItem(Item):
    """What the model thought: its content, or else what is sealed in it, or else its summary."""

    type: Literal["reasoning"]
    summary: Annotated[list[Summary], Most("max_parts", "parts")] | None = None
    content: Annotated[list[Thought], Most("max_parts", "parts")] | None = None
    encrypted_content: str | None = None

    @property
    def text(self) -> str:
        """The thought."""
        if self.content:
            return "".join(part.text for part in self.content)
        thought = unsealed(self.encrypted_content)
        return "\n".join(part.text for part in self.summary or []) if thought is None else thought


class Reference(Item):
    """An item of an answer that the server keeps."""

    type: Literal["item_reference"] | None = None
    id: str


def _left_out(item: Any, info: ValidationInfo) -> dict[str, Any]:
    reading = reading_of(info)
    if reading.is_strict:
        raise ValueError("a tool that this server does not have; leave the item out")
    reading.leave_out("input[].web_search_call")
    return {}


SearchNote = Annotated[
    dict[str, Any],
    BeforeValidator(_left_out),
    WithJsonSchema({"type": "object", "properties": {"type": {"const": "web_search_call"}}, "required": ["type"]}),
]
"""The note of another server that it searched; what came of it stands in the messages."""


def _kind(item: Any) -> str:
    if not isinstance(item, dict):
        return "message"
    kind = item.get("type")
    if kind is None:
        return "item_reference" if "id" in item and "role" not in item else "message"
    return "function_call_output" if kind == "custom_tool_call_output" else str(kind)


AnyItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CustomCallItem, Tag("custom_tool_call")]
    | Annotated[OutputItem, Tag("function_call_output")]
    | Annotated[ThoughtItem, Tag("reasoning")]
    | Annotated[Reference, Tag("item_reference")]
    | Annotated[SearchNote, Tag("web_search_call")],
    Discriminator(_kind),
]
_ITEMS: TypeAdapter[list[Any]] = TypeAdapter(list[AnyItem])


def items_of(output: list[dict[str, Any]]) -> list[Any]:
    """The items of an answer, as input of the next."""
    return _ITEMS.validate_python(output, context=BodyReading(Limits()))


def messages_of(items: Sequence[Any]) -> list[dict[str, Any]]:
    """A conversation as the chat template takes it; a Refusal where there is no message."""
    messages: list[dict[str, Any]] = []
    thought = ""
    for item in items:
        match item:
            case ThoughtItem():
                thought += item.text
                continue
            case OutputItem():
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": joined(item.output)})
            case CallItem() | CustomCallItem():
                if thought or not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": ""})
                messages[-1].setdefault("tool_calls", []).append(_call_of(item))
            case MessageItem():
                messages.append({"role": item.role, "content": joined(item.content)})
            case _:  # a search of another server
                continue
        if thought and messages[-1]["role"] == "assistant":
            messages[-1]["reasoning_content"] = thought
        thought = ""
    if not messages:
        raise Refusal(400, "input holds no message; give at least one", param="input")
    return messages


def _call_of(item: CallItem | CustomCallItem) -> dict[str, Any]:
    arguments: Any = item.arguments if isinstance(item, CallItem) else {"input": item.input}
    return {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": arguments}}


def joined(content: str | Sequence[TextContent | RefusalContent]) -> str:
    """The text of a content."""
    return content if isinstance(content, str) else "".join(part.text for part in content)
