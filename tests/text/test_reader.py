"""text/reader.py: what may become a stop string is held back, and the pieces joined are the text."""

from __future__ import annotations

import re

import pytest
from chats import TOKENIZER

from sfumato.events import Commit, Done, Usage
from sfumato.text.reader import Reader, thought_tokens


def test_a_stream_holds_back_what_may_become_a_stop_string() -> None:
    reader = Reader(TOKENIZER, ("END!",), ends=())
    pieces = []
    for part in ("abc E", "N", "D, no", " EN", "D!tail"):
        tokens = TOKENIZER.encode(part)
        keep = reader.push(tokens)
        event = reader.with_text(Commit(0, 0, 1, tokens[:keep], is_last=keep is not None))
        pieces.append(event.text)
    assert pieces[:2] == ["abc ", ""]
    assert "".join(pieces) == reader.text == "abc END, no " and reader.stop == "END!"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("b", 0),
        ("<|channel>aa<channel|>b", 2),
        ("a<channel|>b", 1),
        ("<|channel>aa<channel|>b<|channel>a<channel|>", 3),
        ("b<|channel>aaa", 3),
    ],
)
def test_tokens_of_thoughts_are_counted(text: str, count: int) -> None:
    """Those between markers; a thought may be open when the turn begins, and when it ends."""
    pieces = [piece for piece in re.split(r"(<\|channel>|<channel\|>)", text) if piece]
    tokens = [token for piece in pieces for token in ids_of(piece)]
    assert thought_tokens(TOKENIZER, tokens) == count
    reader = Reader(TOKENIZER, (), ends=(), is_chat=True)
    reader.with_text(Commit(0, 0, 1, tokens, is_last=True))
    done = reader.with_text(Done(0, "stop", tokens, Usage()))
    assert isinstance(done, Done) and done.usage.thought_tokens == (0 if done.thought is None else count)


def ids_of(piece: str) -> list[int]:
    """One token for a marker and for each character."""
    if piece.startswith("<"):
        return [TOKENIZER.id(piece) or pytest.fail(piece)]
    return [token for character in piece for token in TOKENIZER.encode(character)]
