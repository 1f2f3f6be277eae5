"""Chats for the tests of sfumato/text: nano's tokenizer and template, and messages, calls and text to put into them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from sfumato.text.template import ChatTemplate
from sfumato.text.tokenizer import Tokenizer

NANO = Path(__file__).parents[1] / "sfumato" / "nano"
TOKENIZER = Tokenizer.from_folder(NANO)
TEMPLATE = ChatTemplate.from_folder(NANO, TOKENIZER.special)

Message = dict[str, Any]


def user(text: Any) -> Message:
    return {"role": "user", "content": text}


def model(text: Any, *calls: Message, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **({"tool_calls": list(calls)} if calls else {}), **more}


def call(name: str, identity: str = "1", **arguments: Any) -> Message:
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time"}}

FRAGMENTS: st.SearchStrategy[str] = st.lists(
    st.sampled_from(
        ["<", "|", ">", "<|", "|>", "turn", "<turn", "|turn>", "<turn|>", '<|"|>', '"', "\ue000", " ", "a"]
    ),
    max_size=12,
).map("".join)
"""Texts out of parts of control tokens."""
