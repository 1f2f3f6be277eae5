"""The output of a response while it grows: its items, and the events that tell a client of them.

The order of events is OpenAI's: an item is added, its part, deltas, and each is done before the next begins. Thoughts
come as summaries, whole, because that is what clients read.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Iterator
from typing import Any, Literal

from sfumato.events import Commit
from sfumato.server.http.seals import sealed

_PREFIX = {"reasoning": "rs", "message": "msg"}


class ResponseOutput:
    """The items so far. `customs` are the tools that take text; `is_sealed`: thoughts come as opaque text too."""

    def __init__(self, customs: Collection[str], is_one_call: bool, is_sealed: bool) -> None:
        self.items: list[dict[str, Any]] = []
        self._customs, self._is_one_call, self._is_sealed = customs, is_one_call, is_sealed

    def add(self, commit: Commit) -> Iterator[dict[str, Any]]:
        """The events of what a commit adds."""
        if commit.thought:
            yield from self._grow("reasoning", commit.thought)
        if commit.text:
            yield from self._grow("message", commit.text)
        for call in commit.tool_calls:
            if not (self._is_one_call and any(item["type"] in _CALLS for item in self.items)):
                yield from self._call(call)

    def close(self) -> Iterator[dict[str, Any]]:
        """The end of the thought or message that still grows."""
        if not self.items or self.items[-1]["status"] != "in_progress":
            return
        item = self.items[-1]
        form = _GROWTH[item["type"]]
        part = item[form.field][0]
        item["status"] = "completed"
        if item["type"] == "reasoning" and self._is_sealed:
            item["encrypted_content"] = sealed(part["text"])
        yield self._of_part(f"response.{form.text}.done", form.place, text=part["text"], **form.more)
        yield self._of_part(f"response.{form.part}.done", form.place, part=part)
        yield {"type": "response.output_item.done", "output_index": self._last, "item": item}

    def _grow(self, kind: Literal["reasoning", "message"], text: str) -> Iterator[dict[str, Any]]:
        form = _GROWTH[kind]
        if not (self.items and self.items[-1]["type"] == kind and self.items[-1]["status"] == "in_progress"):
            yield from self.close()
            item: dict[str, Any] = {"id": f"{_PREFIX[kind]}_{secrets.token_hex(12)}", "type": kind}
            item |= {"content": [], "status": "in_progress"}
            item["role" if kind == "message" else "summary"] = "assistant" if kind == "message" else []
            self.items.append(item)
            added = item | {form.field: []}
            yield {"type": "response.output_item.added", "output_index": self._last, "item": added}
            part: dict[str, Any] = {"type": form.kind, "text": ""} | form.more
            if kind == "message":
                part["annotations"] = []
            item[form.field].append(part)
            yield self._of_part(f"response.{form.part}.added", form.place, part=dict(part))
        self.items[-1][form.field][0]["text"] += text
        yield self._of_part(f"response.{form.text}.delta", form.place, delta=text, **form.more)

    def _call(self, call: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self.close()
        is_custom = call["name"] in self._customs
        arguments = json.dumps(call["arguments"], ensure_ascii=False)
        if is_custom:
            text = call["arguments"].get("input")
            arguments = text if isinstance(text, str) else arguments
        field = "input" if is_custom else "arguments"
        item = {
            "id": f"{'ctc' if is_custom else 'fc'}_{secrets.token_hex(12)}",
            "type": "custom_tool_call" if is_custom else "function_call",
            "call_id": f"call_{secrets.token_hex(12)}",
            "name": call["name"],
            field: arguments,
            "status": "completed",
        }
        self.items.append(item)
        place = {"output_index": self._last, "item_id": item["id"]}
        event = "response.custom_tool_call_input" if is_custom else "response.function_call_arguments"
        added = item | {field: "", "status": "in_progress"}
        yield {"type": "response.output_item.added", "output_index": self._last, "item": added}
        yield {"type": f"{event}.delta", **place, "delta": arguments}
        name = {} if is_custom else {"name": call["name"]}
        yield {"type": f"{event}.done", **place, **name, field: arguments}
        yield {"type": "response.output_item.done", "output_index": self._last, "item": item}

    @property
    def _last(self) -> int:
        return len(self.items) - 1

    def _of_part(self, type: str, place: str, **more: Any) -> dict[str, Any]:
        return {"type": type, "output_index": self._last, place: 0, "item_id": self.items[-1]["id"], **more}


_CALLS = ("function_call", "custom_tool_call")


class _Growth:
    """How an item that grows is told: the field of its parts, their type, and the names of its events."""

    def __init__(self, field: str, kind: str, text: str, part: str, place: str, **more: Any) -> None:
        self.field, self.kind, self.text, self.part, self.place, self.more = field, kind, text, part, place, more


_GROWTH = {
    "message": _Growth("content", "output_text", "output_text", "content_part", "content_index", logprobs=[]),
    "reasoning": _Growth(
        "summary", "summary_text", "reasoning_summary_text", "reasoning_summary_part", "summary_index"
    ),
}
"""OpenAI's types want `logprobs`; the figures themselves are /v1/chat/completions' to give."""
