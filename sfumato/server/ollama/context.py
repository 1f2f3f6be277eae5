"""`context` of /api/generate: a conversation as whole numbers, which the client sends back to go on from it.

Ollama's are token ids. Here they are the conversation's JSON, six bytes a number, so that every client reads
them without loss; it sees no difference, and nothing is kept for it. What comes back is hostile until it is checked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sfumato.errors import InputError

BYTES = 6
"""Of a number."""
MOST_MESSAGES = 4096
ROLES = ("system", "user", "assistant")


def written_context(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The numbers of a conversation: its bytes, ended by a 1 and filled with 0."""
    pairs = [[ROLES.index(message["role"]), message["content"]] for message in messages]
    data = json.dumps(pairs, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\x01"
    data += bytes(-len(data) % BYTES)
    return [int.from_bytes(data[at : at + BYTES], "big") for at in range(0, len(data), BYTES)]


def read_context(numbers: Sequence[int]) -> list[dict[str, Any]]:
    """The conversation in the numbers. InputError where there is none."""
    if not numbers:
        return []
    try:
        data = b"".join(number.to_bytes(BYTES, "big") for number in numbers).rstrip(b"\x00")
        pairs = json.loads(data.removesuffix(b"\x01").decode())
        if len(pairs) > MOST_MESSAGES:
            raise ValueError
        return [_message(number, text) for number, text in pairs]
    except (ValueError, TypeError, IndexError, OverflowError, RecursionError):
        message = "context is not what an answer of this server gave; leave it out, or send that"
        raise InputError(message, option="context") from None


def _message(number: Any, text: Any) -> dict[str, Any]:
    if type(number) is not int or not isinstance(text, str) or number < 0:
        raise TypeError
    text.encode()  # ValueError for half a character
    return {"role": ROLES[number], "content": text}
