"""text/reader.py: what may become a stop string is held back, and the pieces joined are the text."""

from __future__ import annotations

from chats import TOKENIZER

from sfumato.events import Commit
from sfumato.text.reader import Reader


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
