"""templates/interface.py and templates/outcomes.py: what every model offers: texts, options by name, `async`, many."""

from __future__ import annotations

import asyncio
import copy
import gc
import inspect
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from sfumato import (
    LLM,
    Chat,
    Choice,
    Complete,
    Completion,
    Decide,
    Done,
    Draft,
    InputError,
    LanguageModel,
    Options,
    Slot,
)
from sfumato.events import Commit
from sfumato.options import OPTIONS
from sfumato.templates.outcomes import outcomes_of, result_of_query, results_of

PUZZLE = "800560790257001600040000152004050800038607041096348275085906320902704518370285400"
TEXT = "Solve this Sudoku:\n" + PUZZLE
ONE = Options(seed=3, max_tokens=82)
LONG = Options(seed=3, max_tokens=4000, min_tokens=3999, max_steps=4000, confidence=0.0)
"""Minutes of work."""


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM.load("nano", ops="fused") as model:
        yield model


def is_idle(llm: LLM) -> bool:
    """Whether the thread of what is awaited has ended, within ten seconds."""
    until = time.monotonic() + 10
    while llm._jobs._thread is not None and time.monotonic() < until:
        time.sleep(0.005)
    return llm._jobs._thread is None


# ---- texts and options ----------------------------------------------------------------------------------------------


def test_a_text_is_one_user_message(llm: LLM) -> None:
    message = {"role": "user", "content": TEXT}
    answers = [llm.chat(prompt, options=ONE) for prompt in (TEXT, message, [message])]
    assert len({answer.text for answer in answers}) == 1 and answers[0].usage.prompt_tokens == 95
    (commit, done) = llm.stream(TEXT, options=ONE)
    assert isinstance(commit, Commit) and isinstance(done, Done) and done.text == answers[0].text
    assert llm.complete(TEXT, options=ONE).usage.prompt_tokens != 95  # which continues, without the template
    (*_, continued) = llm.stream(Complete(TEXT, ONE))
    assert isinstance(continued, Done) and continued.text == llm.complete(TEXT, options=ONE).text
    assert Chat("Hi") == Chat({"role": "user", "content": "Hi"}) == Chat([{"role": "user", "content": "Hi"}])
    decided = [llm.decide(state, {"a": ["1", "2"]}, seed=1).answers for state in (message, [message])]
    assert decided[0] == decided[1]


def test_options_come_as_a_record_a_dict_or_one_by_one(llm: LLM) -> None:
    answers: list[Completion] = [
        llm.chat(TEXT, options=ONE),
        llm.chat(TEXT, options={"seed": 3, "max_tokens": 82}),
        llm.chat(TEXT, seed=3, max_tokens=82),
        llm.chat(TEXT, options=Options(seed=9, max_tokens=82), seed=3),
        llm.run(Chat(TEXT, options={"seed": 3, "max_tokens": 82})),  # type: ignore[arg-type]
    ]
    assert len({(answer.text, answer.seed, len(answer.tokens)) for answer in answers}) == 1
    assert llm.chat(TEXT, options=ONE, max_tokens=5).finish_reason == "length"
    slot: list[Any] = ["1", {"name": "x", "length": 1}]
    filled = llm.fill(slot, options={"seed": 1, "max_steps": 1})
    assert filled.values == llm.fill(["1", Slot("x", length=1)], seed=1, max_steps=1).values
    assert [type(event) for event in llm.events([[5]], options={"max_tokens": 2})] == [Commit, Done]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"max_new_tokens": 5}, "there is no option 'max_new_tokens'; did you mean max_tokens?"),
        ({"temprature": 1}, "did you mean temperature?"),
        ({"steps": 4}, "did you mean max_steps?"),
        ({"zzz": 1}, "there is no option 'zzz'; the options are adapter, choices, "),
        ({"stream": True}, "there is no option 'stream'; stream(…) in place of chat(…) gives the events"),
        ({"system": "x"}, "give a list that begins with"),
        ({"seed": -1}, "seed is -1; give a number from 0 to 2^62"),
    ],
)
def test_a_wrong_option_is_named_with_the_right_one(llm: LLM, more: dict[str, Any], words: str) -> None:
    for call in (lambda: llm.chat("a", **more), lambda: llm.chat("a", options=more), lambda: llm.stream("a", **more)):
        with pytest.raises(InputError) as caught:
            call()
        assert words in str(caught.value) and caught.value.option == next(iter(more))


def test_options_and_tools_have_names(llm: LLM) -> None:
    calls: list[Any] = [llm.chat, llm.complete, llm.stream, llm.achat, llm.acomplete, llm.astream, llm.chat_many]
    for call in calls:
        with pytest.raises(TypeError, match="positional"):
            call("a", ONE)


def test_a_query_brings_its_own_options(llm: LLM) -> None:
    own: list[dict[str, Any]] = [{"seed": 1}, {"options": ONE}, {"tools": []}]
    for more in own:
        with pytest.raises(InputError, match="a query came with options or tools beside its own"):
            llm.stream(Chat("a"), **more)
    with pytest.raises(InputError, match="tools came with token ids"):
        llm.stream([5, 6], tools=[{"name": "f"}])


def test_several_texts_are_for_chat_many(llm: LLM) -> None:
    with pytest.raises(InputError, match=r"message 0 is 'a'; .*; chat_many answers several texts"):
        llm.chat(["a", "b"])  # type: ignore[list-item]


# ---- many at once ---------------------------------------------------------------------------------------------------


def test_conversations_together_are_answered_as_one_by_one(llm: LLM) -> None:
    prompts: list[Any] = [TEXT, {"role": "user", "content": "7"}, [{"role": "user", "content": TEXT[:-3]}], "Hi"]
    options = Options(seed=5, max_tokens=100, max_steps=6)
    together = llm.chat_many(prompts, options=options)
    assert [answer.tokens for answer in together] == [llm.chat(prompt, options=options).tokens for prompt in prompts]
    assert is_idle(llm)


def test_an_error_of_one_conversation_ends_all(llm: LLM) -> None:
    began = time.monotonic()
    with pytest.raises(InputError, match="has the role 'robot'"):
        llm.chat_many(["Hi", [{"role": "robot", "content": "x"}]], options=LONG)
    assert time.monotonic() - began < 10 and is_idle(llm)


# ---- awaited --------------------------------------------------------------------------------------------------------


def test_what_is_awaited_at_the_same_time_shares_a_batch_and_is_the_same(llm: LLM) -> None:
    fields = {"a": Choice(["1", "2"])}

    async def main() -> tuple[list[Completion], Completion, Any]:
        chats = [llm.achat(TEXT, options=ONE, seed=seed) for seed in range(4)]
        decision = llm.arun(Decide("x", fields, options=Options(seed=1)))
        return await asyncio.gather(*chats), await llm.acomplete("1 2 3", options=ONE), await decision

    answers, completion, decisions = asyncio.run(main())
    assert [answer.text for answer in answers] == [llm.chat(TEXT, options=ONE, seed=seed).text for seed in range(4)]
    assert completion.tokens == llm.complete("1 2 3", options=ONE).tokens
    assert decisions["a"].choice == llm.decide("x", fields, seed=1)["a"].choice


def test_a_stream_is_awaited_event_by_event(llm: LLM) -> None:
    async def main() -> list[Any]:
        return [event async for event in llm.astream(TEXT, options=ONE, drafts=True)]

    events, plain = asyncio.run(main()), list(llm.stream(TEXT, options=ONE, drafts=True))
    assert [type(event) for event in events] == [type(event) for event in plain]
    assert [event.text for event in events] == [event.text for event in plain]
    assert isinstance(events[0], Draft) and isinstance(events[-1], Done)


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_cancelled_answer_stops_after_its_step(llm: LLM, is_stream: bool) -> None:
    async def main() -> None:
        if is_stream:
            async for event in llm.astream(Complete("1", replace(LONG, drafts=True))):
                if isinstance(event, Draft) and event.step == 3:
                    return
        task = asyncio.create_task(llm.acomplete("1", options=LONG))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(llm.acomplete("1", options=LONG), 0.1)

    asyncio.run(main())
    assert is_idle(llm)
    assert llm.chat(TEXT, options=ONE).text == asyncio.run(llm.achat(TEXT, options=ONE)).text


def test_a_call_in_place_goes_on_beside_one_that_is_awaited(llm: LLM) -> None:
    """They take turns, a step each, and neither changes the other's text."""
    options = replace(ONE, confidence=0.0, max_steps=12, max_tokens=160)
    expected = llm.chat(TEXT, options=options).tokens
    texts: list[list[int]] = []
    threads = [threading.Thread(target=lambda: texts.append(llm.chat(TEXT, options=options).tokens)) for _ in range(2)]

    async def main() -> Completion:
        task = asyncio.create_task(llm.achat(TEXT, options=options))
        await asyncio.sleep(0)
        for thread in threads:
            thread.start()
        return await task

    assert asyncio.run(main()).tokens == expected
    for thread in threads:
        thread.join()
    assert texts == [expected, expected]


def test_an_error_reaches_whoever_awaits(llm: LLM) -> None:
    async def main() -> None:
        with pytest.raises(InputError, match="context of 4096"):
            await llm.acomplete("9" * 5000)
        with pytest.raises(InputError, match="has the role 'robot'"):
            await llm.achat([{"role": "robot", "content": "x"}])
        with pytest.raises(InputError, match="there is no option"):
            llm.astream("a", sed=1)  # type: ignore[call-arg]

    asyncio.run(main())


def test_a_failing_engine_ends_what_is_awaited_and_the_next_query_runs(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("sfumato.engine.batch.Batch.turn", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            llm.chat_many(["a", "b"])
    assert llm.chat_many([TEXT], options=ONE)[0].text == llm.chat(TEXT, options=ONE).text


def test_outcomes_of_any_model() -> None:
    """The first error ends a list; the result is the last outcome; whoever begins can cancel."""
    cancelled: list[Any] = []

    def begin(query: Any, listener: Any) -> Any:
        for outcome in query:
            listener(outcome)
        return lambda: cancelled.append(query)

    one: Any = [Commit(0, 0, 1, []), {"a": 1}]
    bad: Any = [InputError("no")]
    assert asyncio.run(result_of_query(begin, one)) == {"a": 1}
    assert results_of(begin, [one, one]) == [{"a": 1}, {"a": 1}] and cancelled == [one] * 3
    with pytest.raises(InputError, match="no"):
        results_of(begin, [one, bad])

    async def first() -> Any:
        async for outcome in (events := outcomes_of(begin, one)):
            await events.aclose()
            return outcome

    assert asyncio.run(first()) is one[0] and cancelled[-1] is one


# ---- closing --------------------------------------------------------------------------------------------------------


def test_a_closed_model_is_freed_and_refuses() -> None:
    with LLM.load("nano", ops="fused") as llm:
        reference = weakref.ref(llm.model)
        stream = llm.stream(TEXT, options=ONE, drafts=True)
        next(stream)
        assert llm.chat_many([TEXT], options=ONE) and is_idle(llm)
        threads = {thread.name for thread in threading.enumerate()}
        assert not any(name.startswith("sfumato") for name in threads)
    calls: list[Callable[[], object]] = [
        lambda: llm.chat("a"),
        lambda: llm.complete(["a"]),
        lambda: llm.stream("a"),
        lambda: llm.chat_many(["a"]),
        lambda: asyncio.run(llm.achat("a")),
        lambda: llm.fill([Slot(length=1)]),
        lambda: llm.encode("a"),
        lambda: llm.events([[5]]),
        lambda: llm.run(Complete("a")),
        lambda: llm.model,
    ]
    for call in calls:
        with pytest.raises(InputError, match="the model nano is closed; load it again"):
            call()
    with pytest.raises(InputError, match="the model nano is closed; load it again"):
        next(stream)  # of an answer that was under way
    del stream
    gc.collect()
    assert reference() is None
    llm.close()  # again is no error
    assert repr(llm) == "<LLM nano, closed>"


def test_closing_ends_what_is_awaited() -> None:
    llm = LLM.load("nano", ops="fused")

    async def main() -> None:
        task = asyncio.create_task(llm.acomplete("1", options=LONG))
        await asyncio.sleep(0.1)
        await asyncio.to_thread(llm.close)
        with pytest.raises(InputError, match="the model nano was closed while it answered"):
            await task

    asyncio.run(main())
    assert is_idle(llm)


def test_a_model_that_nobody_holds_is_freed_at_once() -> None:
    """No circle of references keeps its weights until the collector comes."""
    llm = LLM.load("nano", ops="fused")
    llm.chat(TEXT, options=ONE)
    reference = weakref.ref(llm)
    gc.disable()
    try:
        del llm
        assert reference() is None
    finally:
        gc.enable()


def test_a_model_says_what_it_is(llm: LLM) -> None:
    assert repr(llm) == "<LLM nano, float32 on cpu, fused operations, canvas of 82>"
    assert isinstance(llm, LanguageModel)


def test_a_name_in_place_of_a_network_is_answered_with_load() -> None:
    kind: Any = LLM
    calls: list[Callable[[], object]] = [lambda: kind("nano"), lambda: kind(model="nano"), lambda: kind()]
    for make in calls:
        with pytest.raises(InputError, match=r"the model is (None|'nano'); give a network; LLM\.load\(…\) loads"):
            make()


def test_help_names_the_options_where_they_are_taken(llm: LLM) -> None:
    for name in ("chat", "chat_many", "complete", "stream", "watch", "fill", "infill", "edit", "decide", "achat"):
        names = inspect.signature(getattr(llm, name)).parameters
        assert {*OPTIONS} <= {*names} and "more" not in names and "options" in names
    assert inspect.signature(llm.chat).parameters["messages"].default is inspect.Parameter.empty
    assert not {*OPTIONS} & {*inspect.signature(llm.run).parameters}


def test_a_model_is_neither_pickled_nor_copied(llm: LLM) -> None:
    calls: list[Callable[[Any], object]] = [pickle.dumps, copy.copy, copy.deepcopy]
    for call in calls:
        with pytest.raises(TypeError, match="load it in each process"):
            call(llm)
