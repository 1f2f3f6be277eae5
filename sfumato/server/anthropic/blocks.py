"""The messages of Anthropic's API: turns of content blocks, and the conversation that a chat template takes of them.

A block that cannot be read as text is refused by its type. Thoughts come back as they went out: as text, or, where the
client asked not to be shown them, within their signature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Tag

from sfumato.errors import InputError
from sfumato.server.http.bodies import Body, Most
from sfumato.server.http.seals import unsealed


class OpenBody(Body):
    """An object of Anthropic's API, which grows: a field that is not known asks for nothing of the text."""

    is_open = True


class Cached(OpenBody):
    """What a client may mark as the end of a prompt to be kept; every prompt is kept here while there is room."""

    place = "content[]."
    cache_control: Any = None


class TextBlock(Cached):
    """Text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(OpenBody):
    """What the model thought."""

    place = "content[]."
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None

    @property
    def text(self) -> str:
        """The thought. A signature that is not ours says nothing."""
        return self.thinking or unsealed(self.signature) or ""


class RedactedBlock(OpenBody):
    """A thought that nobody but its own server can read."""

    type: Literal["redacted_thinking"]
    data: str | None = None


class UseBlock(Cached):
    """A call of a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class TextSource(OpenBody):
    """The text of a document."""

    type: Literal["text"]
    data: str
    media_type: str | None = None


def _is_text(value: Any) -> Any:
    if isinstance(value, dict) and value.get("type") != "text":
        raise ValueError("only documents with a source of type 'text' are read, and nothing is fetched")
    return value


class DocumentBlock(Cached):
    """A document."""

    type: Literal["document"]
    source: Annotated[TextSource, BeforeValidator(_is_text)]
    title: str | None = None
    context: str | None = None


class SearchBlock(Cached):
    """A result of a search."""

    type: Literal["search_result"]
    source: str
    title: str
    content: Annotated[list[TextBlock], Most("max_parts", "blocks")]


def _kind(block: Any) -> str:
    return str(block.get("type")) if isinstance(block, dict) else ""


def _readable(*kinds: str) -> BeforeValidator:
    """Refuses a block of another kind than these, in one sentence."""

    def check(block: Any) -> Any:
        if isinstance(block, dict) and _kind(block) not in kinds:
            raise ValueError(f"only blocks of type {', '.join(kinds)} are read here, and nothing is fetched")
        return block

    return BeforeValidator(check)


ResultPart = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[DocumentBlock, Tag("document")]
    | Annotated[SearchBlock, Tag("search_result")],
    Discriminator(_kind),
    _readable("text", "document", "search_result"),
]


class ResultBlock(Cached):
    """What a call returned."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Annotated[list[ResultPart], Most("max_parts", "blocks")] | None = None
    is_error: bool | None = None


ContentBlock = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[DocumentBlock, Tag("document")]
    | Annotated[SearchBlock, Tag("search_result")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[RedactedBlock, Tag("redacted_thinking")]
    | Annotated[UseBlock, Tag("tool_use")]
    | Annotated[ResultBlock, Tag("tool_result")],
    Discriminator(_kind),
    _readable("text", "document", "search_result", "thinking", "redacted_thinking", "tool_use", "tool_result"),
]

TextBlocks = Annotated[list[TextBlock], Most("max_parts", "blocks")]


class Turn(OpenBody):
    """A message of a conversation."""

    place = "messages[]."
    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[ContentBlock], Most("max_parts", "blocks")]


def conversation_of(system: str | Sequence[TextBlock] | None, turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The messages as a chat template takes them.

    Results of tools are messages of their own, and turns of the same role that follow one another are one."""
    messages: list[dict[str, Any]] = []
    if text := text_of(system or ""):
        messages.append({"role": "system", "content": text})
    for number, turn in enumerate(turns):
        _add_turn(messages, turn, f"messages[{number}]")
    return messages


def _add_turn(messages: list[dict[str, Any]], turn: Turn, place: str) -> None:
    if isinstance(turn.content, str):
        return _add(messages, {"role": turn.role, "content": turn.content})
    texts: list[str] = []
    message: dict[str, Any] = {"role": turn.role}
    for block in turn.content:
        match block:
            case TextBlock() | DocumentBlock() | SearchBlock():
                texts.append(text_of([block]))
            case ResultBlock():
                _check_role(turn, "user", block.type, place)
                text = text_of(block.content or "")
                content = f"Error: {text}" if block.is_error else text
                messages.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
            case UseBlock():
                _check_role(turn, "assistant", block.type, place)
                function = {"name": block.name, "arguments": block.input}
                message.setdefault("tool_calls", []).append({"id": block.id, "type": "function", "function": function})
            case ThinkingBlock():
                _check_role(turn, "assistant", block.type, place)
                message["reasoning_content"] = message.get("reasoning_content", "") + block.text
            case RedactedBlock():
                _check_role(turn, "assistant", block.type, place)
    content = "\n".join(texts)
    if content or message.keys() - {"role"}:
        _add(messages, message | {"content": content})


def _check_role(turn: Turn, role: str, kind: str, place: str) -> None:
    if turn.role != role:
        raise InputError(f"{place} is of the {turn.role} and holds a block of type {kind!r}; only the {role}'s may")


def _add(messages: list[dict[str, Any]], message: dict[str, Any]) -> None:
    """Append a message, or join it to the one before of the same role."""
    before = messages[-1] if messages else {}
    if before.get("role") != message["role"] or before.get("tool_calls"):
        messages.append(message)
        return
    before["content"] = "\n".join(filter(None, (before["content"], message["content"])))
    for name in ("tool_calls", "reasoning_content"):
        if name in message:
            before[name] = before.get(name, type(message[name])()) + message[name]


def text_of(content: str | Sequence[TextBlock | DocumentBlock | SearchBlock]) -> str:
    """The text of blocks, each on lines of its own."""
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for block in content:
        match block:
            case TextBlock():
                texts.append(block.text)
            case DocumentBlock():
                texts += filter(None, (block.title, block.context, block.source.data))
            case SearchBlock():
                texts += [f"{block.title} ({block.source})", *(part.text for part in block.content)]
    return "\n".join(texts)
