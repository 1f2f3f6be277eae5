"""A conversation: what was said, in turns that can be taken back, saved and read from a file.

A turn is a message as OpenAI has it, with a `note` where an answer did not come to its end; a note is for people, and
the model does not get it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sfumato.errors import InputError
from sfumato.events import Done
from sfumato.text.messages import check_messages

_FIELDS = ("role", "content", "tool_calls", "tool_call_id", "name")
"""Of a turn, what the model gets."""
MOST_TITLE = 80


class Conversation:
    """The system message and the turns so far."""

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self.turns: list[dict[str, Any]] = []
        self.id = ""
        """The name of its file; "" before it is saved."""

    @property
    def title(self) -> str:
        """The first line of the first message."""
        first = next((turn["content"] for turn in self.turns if turn["role"] == "user"), "")
        return next(iter(str(first).strip().splitlines()), "")[:MOST_TITLE]

    def prompt(self, message: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The messages for an answer to this one."""
        start = [{"role": "system", "content": self.system}] if self.system else []
        turns = [*self.turns, message]
        return start + [{key: turn[key] for key in _FIELDS if turn.get(key) is not None} for turn in turns]

    def add(self, message: dict[str, Any], answer: dict[str, Any]) -> None:
        """Put a message and its answer behind what was said."""
        self.turns += [message, answer]

    def undo(self) -> dict[str, Any]:
        """Take back the last message and what came after it; returns it. InputError where nothing was said."""
        for at in reversed(range(len(self.turns))):
            if self.turns[at]["role"] == "user":
                message = self.turns[at]
                del self.turns[at:]
                return message
        raise InputError("nothing has been said yet")

    @classmethod
    def of(cls, record: object, name: str) -> Conversation:
        """A conversation from a record out of a file called `name`, or a list of messages; InputError for neither."""
        if isinstance(record, list):
            record = {"messages": record}
        if not isinstance(record, Mapping) or not isinstance(record.get("messages"), list):
            raise InputError(f"{name} holds no conversation: there is no list of messages")
        messages = _path(record["messages"], record.get("leaf"), name)
        system = record.get("system")
        conversation = cls(system if isinstance(system, str) and system else None)
        if not messages:
            raise InputError(f"{name} holds a conversation without messages")
        try:
            checked = check_messages([{key: one[key] for key in _FIELDS if key in one} for one in messages])
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        for message, raw in zip(checked, messages, strict=True):
            if message["role"] == "system":
                conversation.system = conversation.system or _text_of(message["content"]) or None
                continue
            message["content"] = _text_of(message["content"])
            for call in message.get("tool_calls") or ():
                arguments = call["function"]["arguments"]
                call["function"]["arguments"] = arguments if isinstance(arguments, str) else json.dumps(arguments)
            if isinstance(raw.get("note"), str):
                message["note"] = raw["note"]
            conversation.turns.append(message)
        return conversation


def turn_of(done: Done) -> dict[str, Any]:
    """The turn of a finished answer; its thought stays behind."""
    calls = [
        {"type": "function", "function": {"name": call["name"], "arguments": json.dumps(call["arguments"])}}
        for call in done.tool_calls
    ]
    turn = {"role": "assistant", "content": done.text} | ({"tool_calls": calls} if calls else {})
    return turn | ({} if done.finish_reason == "stop" else {"note": "Cut off at the token limit."})


def _path(messages: list[Any], leaf: object, name: str) -> list[dict[str, Any]]:
    """The messages of a list; of a tree, whose messages name their parents, those up to the chosen leaf."""
    for number, one in enumerate(messages):
        if not isinstance(one, dict):
            raise InputError(f"{name}: message {number} is {type(one).__name__}, no record")
    by_id = {one.get("id"): one for one in messages if isinstance(one.get("id"), str)}
    if len(by_id) < len(messages) or not all("parent" in one for one in messages):
        return messages
    path: list[dict[str, Any]] = []
    at = leaf if isinstance(leaf, str) and leaf in by_id else messages[-1]["id"] if messages else None
    while isinstance(at, str) and at in by_id and len(path) < len(messages):
        path.append(by_id[at])
        at = by_id[at]["parent"]
    return path[::-1]


def _text_of(content: Any) -> str:
    """The text of a content, which may be a list of text parts."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content or ())
