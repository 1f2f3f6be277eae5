"""engine/kept.py: the engine that stays warm between two calls, with the last conversation in its cache."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from sfumato.engine import kept as kept_module
from sfumato.engine.engine import Engine
from sfumato.engine.kept import NOTHING
from sfumato.errors import InputError
from sfumato.events import Done
from sfumato.llm import LLM
from sfumato.model.prompt import Prompt
from sfumato.options import Options
from sfumato.templates.requests import Complete


@pytest.fixture(scope="module")
def nano() -> LLM:
    return LLM.load("nano", device="cpu", dtype="float32")


def test_a_model_keeps_its_engine(nano: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[Engine] = []
    init = Engine.__init__

    def noted(self: Engine, *args: Any, **more: Any) -> None:
        engines.append(self)
        init(self, *args, **more)

    nano.forget()
    monkeypatch.setattr(Engine, "__init__", noted)
    options = Options(max_tokens=20, seed=1)
    first = [nano.complete(text, options=options).text for text in ("ab", "abc def", "x")]
    assert len(engines) == 1
    again = []
    for text in ("ab", "abc def", "x"):
        nano.forget()
        again.append(nano.complete(text, options=options).text)
    assert first == again
    assert len(engines) == 4


def test_a_stream_that_is_left_leaves_a_clean_engine(nano: LLM) -> None:
    options = Options(max_tokens=160, seed=2, drafts=True)
    expected = nano.complete("the same", options=options).tokens
    stream = nano.stream(Complete("something else", options))
    next(stream)
    assert isinstance(stream, Generator)
    stream.close()
    assert (
        nano._engines.kept is not None
        and not len(nano._engines.kept.prompt)
        and not any(nano._engines.kept.engine.cache.lengths)
    )
    assert nano.complete("the same", options=options).tokens == expected


def test_two_calls_at_a_time_have_an_engine_each(nano: LLM) -> None:
    options = Options(max_tokens=160, seed=2, drafts=True)
    expected = [nano.complete(text, options=options).tokens for text in ("one", "two")]
    streams = [nano.stream(Complete(text, options)) for text in ("one", "two")]
    answers: list[list[int]] = [[], []]
    live = [0, 1]
    while live:
        for n in list(live):
            event = next(streams[n], None)
            if event is None:
                live.remove(n)
            elif isinstance(event, Done):
                answers[n] = event.tokens
    assert answers == expected


def test_a_request_that_is_refused_leaves_the_engine(nano: LLM) -> None:
    nano.complete("ab", options=Options(max_tokens=5, seed=1))
    before = nano._engines.kept
    with pytest.raises(InputError):
        nano.complete("ab" * 9000, options=Options(max_tokens=5))
    assert before is not None and nano._engines.kept is not None and nano._engines.kept.engine is before.engine


def test_a_constraint_without_room_leaves_the_conversation(nano: LLM) -> None:
    """It is refused before the engine is taken."""
    nano.forget()
    messages, options = [{"role": "user", "content": "1 2 3"}], Options(seed=1, max_steps=2, max_tokens=5)
    nano.chat(messages, options=options)
    with pytest.raises(InputError, match="has room for"):
        nano.chat(messages, options=Options(seed=1, regex="[1-9]{500}", max_tokens=20))
    assert nano.chat(messages, options=options).usage.reused_tokens > 0


def test_an_idle_engine_gives_a_large_cache_back(nano: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_module, "MOST_IDLE", 1000)
    nano.chat([{"role": "user", "content": "a"}], options=Options(max_tokens=5, seed=1))
    assert nano._engines.kept is not None and len(nano._engines.kept.prompt)  # a conversation stays
    nano._engines.put_back(nano._engines.kept.engine, NOTHING)
    assert nano._engines.kept.engine.cache.capacity == 1
    assert nano.complete("ab", options=Options(max_tokens=5, seed=1)).tokens


def test_a_conversation_with_other_content_is_not_continued(nano: LLM) -> None:
    """Equal tokens with another image in them are another conversation, from there on."""
    nano.forget()
    nano.complete("12345678", options=Options(max_tokens=5, seed=1))
    assert nano._engines.kept is not None
    engine, tokens = nano._engines.kept.engine, nano._engines.kept.prompt.tokens
    one, other = (Prompt(tokens, content={5: content}) for content in (b"cat", b"dog"))
    block = Prompt(tokens, content=one.content, blocks=((4, len(tokens) + 1),))
    for prompt, shared in (one, len(tokens)), (other, 5), (Prompt(tokens), 5), (block, 4):
        nano._engines.put_back(engine, one)
        assert nano._engines.take(nano.model, [prompt.extended([1])]) is engine and engine.cache.lengths[0] == shared
        engine.leave(0)
        nano.forget()
        nano.complete("12345678", options=Options(max_tokens=5, seed=1))
        assert nano._engines.kept is not None
        engine = nano._engines.kept.engine
