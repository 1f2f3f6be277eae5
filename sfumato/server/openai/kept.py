"""Answers of /v1/responses that are kept in memory, so that a client can go on from one or ask for it again.

There are as many as the settings say, and so many bytes; the oldest goes first. Ids are random, so that nobody finds
another's. It deliberately lacks a disk: what a server has kept ends with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sfumato.server.http.errors import Refusal
from sfumato.server.openai.inputs import Reference, items_of

MOST_BYTES = 64 << 20
"""Of JSON that all kept answers come from, together."""


@dataclass(frozen=True)
class KeptResponse:
    """One answer, and the conversation that it ends."""

    body: dict[str, Any]
    """As the client got it."""
    items: list[Any]
    """Everything said so far, the answer included."""
    input: list[Any]
    """The items that this request brought."""
    size: int
    """Bytes of JSON that its whole conversation comes from: what it shares with others is counted with each."""
    named: dict[str, Any] = field(default_factory=dict)
    """Its own items by their ids."""


class KeptResponses:
    """At most so many answers; 0 keeps none."""

    def __init__(self, most: int) -> None:
        self.most, self._size = most, 0
        self._kept: dict[str, KeptResponse] = {}
        self._items: dict[str, Any] = {}

    def keep(self, body: dict[str, Any], before: KeptResponse | None, input: Sequence[Any]) -> None:
        """Keep an answer to `input`, behind the conversation `before`."""
        output = items_of(body["output"])
        new = [*input, *output]
        texts = (one.model_dump_json(warnings=False) for one in input if hasattr(one, "id"))
        size = len(json.dumps(body)) + sum(map(len, texts))
        size += 0 if before is None else before.size
        if not self.most or size > MOST_BYTES:
            return
        named = {one.id: one for one in new if getattr(one, "id", None)}
        self._kept[body["id"]] = KeptResponse(body, [*(before.items if before else []), *new], list(input), size, named)
        self._items |= named
        self._size += size
        while len(self._kept) > self.most or self._size > MOST_BYTES:
            self.remove(next(iter(self._kept)))

    def get(self, id: str, param: str | None = None) -> KeptResponse:
        """A kept answer; a Refusal where there is none of this id, which a field of this name holds."""
        if id not in self._kept:
            raise _unknown("response", id, param, 404 if param is None else 400)
        return self._kept[id]

    def remove(self, id: str) -> None:
        """Forget an answer; a Refusal where there is none of this id."""
        kept = self.get(id)
        del self._kept[id]
        self._size -= kept.size
        for name, item in kept.named.items():
            if self._items.get(name) is item:
                del self._items[name]

    def resolved(self, items: Iterable[Any]) -> list[Any]:
        """The items, each reference replaced by what it names; a Refusal for one that names nothing kept."""
        whole = []
        for item in items:
            if isinstance(item, Reference):
                if item.id not in self._items:
                    raise _unknown("item", item.id, "input", 400)
                item = self._items[item.id]
            whole.append(item)
        return whole


def _unknown(what: str, id: str, param: str | None, status: int) -> Refusal:
    message = f"there is no {what} {id[:80]!r} here: it is not kept, or no longer; send the whole conversation"
    return Refusal(status, message, param=param, code="not_found")
