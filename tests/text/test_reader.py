"""text/reader.py: what may become a stop string is held back, and the pieces joined are the text."""

from __future__ import annotations

import re

import pytest
from chats import TOKENIZER

from sfumato.events import Commit, Done, Usage
from sfumato.text.reader import Reader
from sfumato.text.replies import ReplyParser


def read(reader: Reader, parts: list[str]) -> list[Commit]:
    """The commits of an answer that comes in these parts, up to its stop string."""
    commits = []
    for number, part in enumerate(parts, 1):
        tokens = TOKENIZER.encode(part, parse_special=True)
        keep = reader.push(tokens)
        is_last = keep is not None or number == len(parts)
        event = reader.with_text(Commit(0, 0, 1, tokens[:keep], is_last=is_last))
        assert isinstance(event, Commit)
        commits.append(event)
        if is_last:
            break
    return commits


def test_a_stream_holds_back_what_may_become_a_stop_string() -> None:
    reader = Reader(TOKENIZER, ("END!",), ends=())
    pieces = [commit.text for commit in read(reader, ["abc E", "N", "D, no", " EN", "D!tail"])]
    assert pieces[:2] == ["abc ", ""]
    assert "".join(pieces) == reader.text == "abc END, no " and reader.stop == "END!"


@pytest.mark.parametrize("parts", [["abc E", "N", "D!\n", "tail"], ["abc END!\ntail"], ["abc EN", "D!\ntail"]])
@pytest.mark.parametrize(
    "hidden", ["", "<|channel>thought\nhm END!\n EN<channel|>", "<|tool_call>call:END!\n{}<tool_call|>"]
)
@pytest.mark.parametrize("opening", ["", "<|channel>thought\n"])
def test_a_stop_string_ends_the_text_and_no_thought_or_call(parts: list[str], hidden: str, opening: str) -> None:
    parser = ReplyParser(TOKENIZER, prompt=TOKENIZER.encode(opening, parse_special=True))
    reader = Reader(TOKENIZER, ("END!\n",), (), parser)
    start = "END!\n<channel|>" if opening else ""
    commits = read(reader, [start + hidden + parts[0], *parts[1:]])
    done = reader.with_text(Done(0, "stop", [], Usage()))
    assert isinstance(done, Done)
    assert "".join(commit.text for commit in commits) == done.text == "abc "
    assert "".join(commit.thought for commit in commits) == (done.thought or "")
    assert ("hm END!\n EN" in (done.thought or "")) == ("hm" in hidden) and bool(done.tool_calls) == ("call" in hidden)
    assert done.stop == "END!\n"


def test_a_chat_without_an_end_gives_what_it_held_back() -> None:
    reader = Reader(TOKENIZER, ("END!",), (), ReplyParser(TOKENIZER))
    commits = read(reader, ["<|channel>thought\nhm EN", "<channel|>abc EN", "<|tool_call>call:f{a:1}<tool_call|> E"])
    done = reader.with_text(Done(0, "length", [], Usage()))
    assert isinstance(done, Done)
    assert [commit.thought for commit in commits] == ["hm EN", "", ""]
    assert [commit.text for commit in commits] == ["", "abc ", "EN E"]
    assert (done.text, done.thought, done.stop) == ("abc EN E", "hm EN", None)
    assert done.tool_calls == commits[-1].tool_calls == [{"name": "f", "arguments": {"a": 1}}]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("b", 0),
        ("<|channel>aa<channel|>b", 2),
        ("<|channel>aa<channel|>b<|channel>a<channel|>", 3),
        ("b<|channel>aaa", 3),
    ],
)
def test_tokens_of_thoughts_are_counted(text: str, count: int) -> None:
    """Those between markers; a thought may be open when the turn ends."""
    pieces = [piece for piece in re.split(r"(<\|channel>|<channel\|>)", text) if piece]
    tokens = [token for piece in pieces for token in ids_of(piece)]
    reader = Reader(TOKENIZER, (), (), ReplyParser(TOKENIZER))
    reader.with_text(Commit(0, 0, 1, tokens, is_last=True))
    done = reader.with_text(Done(0, "stop", tokens, Usage()))
    assert isinstance(done, Done) and done.usage.thought_tokens == count


def ids_of(piece: str) -> list[int]:
    """One token for a marker and for each character."""
    if piece.startswith("<"):
        return [TOKENIZER.id(piece) or pytest.fail(piece)]
    return [token for character in piece for token in TOKENIZER.encode(character)]
