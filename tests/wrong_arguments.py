"""Arguments of another kind than a method takes, and every place of a `LanguageModel` where one can be given."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

from sfumato import LanguageModel, Options, Slot

WRONG: tuple[Any, ...] = (
    None,
    -3,
    1.5,
    True,
    b"x",
    {"a": 1},
    [None],
    [[None]],
    {1, 2},
    Path("a"),
    (n for n in "ab"),
    [],
)
"""Values that are right nowhere below, but for None and [], which `places` leaves out where they are."""

USER = [{"role": "user", "content": "Say it"}]

Places = dict[str, tuple[str, Callable[[], object]]]
"""What is wrong -> how the sentence names it, and the call."""


def awaited(coroutine: Coroutine[Any, Any, object]) -> object:
    return asyncio.run(coroutine)


def read(events: AsyncIterator[object]) -> object:
    async def reader() -> list[object]:
        return [event async for event in events]

    return asyncio.run(reader())


def places(model: LanguageModel, wrong: Any) -> Places:
    """Each public method with `wrong` as each of its arguments."""
    slot, once = Slot(length=1), Options(seed=1, max_steps=1)
    fields = {"a": ["b", "c"]}
    calls: Places = {
        "chat": ("the conversation|message 0", lambda: model.chat(wrong)),
        "chat content": ("message 0", lambda: model.chat([{"role": "user", "content": wrong}])),
        "chat role": ("message 0", lambda: model.chat([{"role": wrong, "content": "a"}])),
        "chat options": ("option", lambda: model.chat("a", options=wrong)),
        "chat option": (
            "seed|top_k",
            lambda: model.chat("a", **{"top_k" if wrong is None else "seed": wrong}),
        ),
        "chat_many": ("conversation|message 0", lambda: model.chat_many(wrong)),
        "chat_many one": ("the conversation|message 0", lambda: model.chat_many(["a", wrong])),
        "complete": ("the prompt", lambda: model.complete(wrong)),
        "complete several": ("the prompt", lambda: model.complete(["a", wrong])),
        "complete options": ("option", lambda: model.complete("a", options=wrong)),
        "stream": ("the prompt|the conversation|message 0", lambda: list(model.stream(wrong))),
        "stream options": ("option", lambda: list(model.stream("a", options=wrong))),
        "achat": ("the conversation|message 0", lambda: awaited(model.achat(wrong))),
        "acomplete": ("the prompt", lambda: awaited(model.acomplete(wrong))),
        "astream": ("the prompt|the conversation|message 0", lambda: read(model.astream(wrong))),
        "fill": ("the template", lambda: model.fill(wrong)),
        "fill piece": ("the template", lambda: model.fill([wrong, slot])),
        "fill options": ("option", lambda: model.fill([slot], options=wrong)),
        "infill": ("the prefix", lambda: model.infill(wrong, "b", 1, options=once)),
        "infill suffix": ("the suffix", lambda: model.infill("a", wrong, 1, options=once)),
        "infill options": ("option", lambda: model.infill("a", "b", 1, options=wrong)),
        "edit": ("the text", lambda: model.edit(wrong, "b", options=once)),
        "edit span": ("the span", lambda: model.edit("abc", None, [wrong], options=once)),
        "edit options": ("option", lambda: model.edit("abc", "b", options=wrong)),
        "decide questions": ("question", lambda: model.decide("x", wrong, options=once)),
        "decide question": ("question 'a'", lambda: model.decide("x", {"a": wrong}, options=once)),
        "decide choice": ("question 'a'", lambda: model.decide("x", {"a": ["b", wrong]}, options=once)),
        "decide steps": ("steps", lambda: model.decide("x", fields, steps=wrong, options=once)),
        "decide samples": ("samples", lambda: model.decide("x", fields, samples=wrong, options=once)),
        "decide think": ("think", lambda: model.decide("x", fields, think=wrong, options=once)),
        "decide options": ("option", lambda: model.decide("x", fields, options=wrong)),
    }
    if wrong is not None:  # which means that there is none
        calls |= {
            "infill length": ("length", lambda: model.infill("a", "b", wrong, options=once)),
            "infill at_most": ("at_most", lambda: model.infill("a", "b", at_most=wrong, options=once)),
            "edit instruction": ("the instruction", lambda: model.edit("abc", wrong, options=once)),
            "edit strength": ("strength", lambda: model.edit("abc", "b", strength=wrong, options=once)),
        }
        if wrong != []:
            calls |= {
                "chat tools": ("tool", lambda: model.chat(USER, tools=wrong)),
                "fill prompt": ("the prompt|message 0", lambda: model.fill([slot], wrong, options=once)),
                "edit spans": ("the span", lambda: model.edit("abc", None, wrong, options=once)),
            }
    if not isinstance(wrong, dict | list):  # which are data to ask about
        calls["decide"] = ("the state", lambda: model.decide(wrong, fields, options=once))
    if wrong == []:  # a message without parts is an empty one
        del calls["chat content"]
    return calls
