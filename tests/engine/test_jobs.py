"""engine/jobs.py: plans of many callers on one batch give what the methods give, and no job harms another."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import tiny

from sfumato import LLM, Choice, Options, Slot
from sfumato.constraints.guide import Guide
from sfumato.engine.jobs import Jobs
from sfumato.engine.limits import BatchLimits
from sfumato.engine.plan import Plan
from sfumato.errors import BusyError, CapacityError, InputError
from sfumato.events import Commit, Done, Draft
from sfumato.templates.requests import Chat, Complete, Decide, Edit, Fill, Infill, Query
from sfumato.text.reader import Reader


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


@pytest.fixture(scope="module")
def nano() -> LLM:
    return LLM.load("nano", ops="fused")


def carried_out(jobs: Jobs[Query]) -> dict[str, list[Any]]:
    outcomes: dict[str, list[Any]] = {}
    while not jobs.is_idle:
        for id, outcome in jobs.turn():
            outcomes.setdefault(id, []).append(outcome)
    return outcomes


def test_jobs_give_what_the_methods_give(nano: LLM) -> None:
    puzzle = "800560790257001600040000152004050800038607041096348275085906320902704518370285400"
    messages = [{"role": "user", "content": "Solve this Sudoku:\n" + puzzle}]
    one, quick = Options(seed=3, max_tokens=82), Options(seed=3)
    stopped, one_by_one = dataclasses.replace(one, stop=("7",)), dataclasses.replace(one, mode="autoregressive")
    jobs: Jobs[Query] = Jobs(nano, BatchLimits(rows=24))
    template: list[str | Slot] = ["1 2 ", Slot("x", choices=("3", "4")), " 5 ", Slot("y"), " 6"]
    fields = {"a": Choice(["1", "2"]), "b": Choice(["3", "45"])}
    queries: list[Query] = [
        Chat(messages, options=dataclasses.replace(one, drafts=True)),
        Complete("1 2 3", stopped),
        Infill("12", "45", options=quick),
        Fill(template, messages, quick),
        Edit("123456", spans=[(1, 3)], options=quick),
        Edit("123456", "Turn it around.", options=quick),
        Decide(messages, fields, options=quick),
        Complete(nano.tokenizer.encode("1 2 3", bos=True), one_by_one),
    ]
    for number, query in enumerate(queries):
        jobs.begin(str(number), query)
    outcomes = carried_out(jobs)
    results = [outcomes[str(number)] for number in range(len(queries))]
    done = results[0][-1]
    assert isinstance(done, Done) and done.text == nano.chat(messages, options=one).text
    assert any(isinstance(event, Draft) and event.pieces for event in results[0])
    assert "".join(event.text for event in results[0] if isinstance(event, Commit)) == done.text
    assert results[1][-1].text == nano.complete("1 2 3", options=stopped).text
    assert results[2][-1].text == nano.infill("12", "45", options=quick).text
    assert results[3][-1].values == nano.fill(template, messages, options=quick).values
    assert results[4][-1].text == nano.edit("123456", spans=[(1, 3)], options=quick).text
    assert results[5][-1].text == nano.edit("123456", "Turn it around.", options=quick).text
    decided = nano.decide(messages, fields, options=quick)
    for name, decision in results[6][-1].items():
        assert decision.choice == decided[name].choice
        assert decision.probabilities == pytest.approx(decided[name].probabilities, abs=1e-4)
    assert results[7][-1].text == nano.complete("1 2 3", options=one_by_one).text
    assert jobs.figures().rows == 0


class PanicException(BaseException):
    """As pyo3's: no Exception."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (InputError("the regex is too complex to follow; make it simpler"), "too complex to follow"),
        (ValueError("a fault of ours"), "a fault of ours"),
        (PanicException("index out of bounds"), "a library failed at this request"),
    ],
)
def test_a_grammar_that_cannot_be_followed_ends_its_own_job(
    error: BaseException, words: str, nano: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: Jobs[Query] = Jobs(nano, BatchLimits())
    walked: list[Guide] = []
    plainly = Guide.walking

    def walking(self: Guide, *args: Any, **more: Any) -> Any:
        walked.append(self)
        if self is walked[0] and len(walked) > 3:
            raise error
        return (yield from plainly(self, *args, **more))

    monkeypatch.setattr(Guide, "walking", walking)
    jobs.begin("1", Complete("1", Options(seed=1, regex="[0-9 ]{60,80}", confidence=0.0)))
    jobs.begin("2", Complete("1", Options(seed=2, regex="[0-9]{5}")))
    jobs.begin("3", Complete("1 2 3", Options(seed=3, max_tokens=82)))
    outcomes = carried_out(jobs)
    assert words in str(outcomes["1"][-1]) and isinstance(outcomes["1"][-1], Exception)
    monkeypatch.setattr(Guide, "walking", plainly)
    assert outcomes["2"][-1].text == nano.complete("1", options=Options(seed=2, regex="[0-9]{5}")).text
    assert outcomes["3"][-1].text == nano.complete("1 2 3", options=Options(seed=3, max_tokens=82)).text


@pytest.mark.parametrize("place", ["watch", "tell", "commit", "inspect", "plan"])
def test_what_fails_in_one_jobs_own_part_ends_that_job(place: str, nano: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a fault of ours")

    jobs: Jobs[Query] = Jobs(nano, BatchLimits())
    plainly: dict[str, Any] = {"watch": Reader.push, "tell": Reader.with_text}
    whole: list[Any] = []
    if place in plainly:
        name = {"watch": "push", "tell": "with_text"}[place]

        def some(self: Reader, *args: Any) -> Any:
            return fail() if self._stops == ("mark",) else plainly[place](self, *args)

        monkeypatch.setattr(Reader, name, some)
        jobs.begin("1", Complete("1", Options(seed=1, max_tokens=82, stop=("mark",))))
    elif place == "commit":
        monkeypatch.setattr(Guide, "commit", fail)
        jobs.begin("1", Complete("1", Options(seed=1, regex="[0-9]{5}")))
    elif place == "plan":
        monkeypatch.setattr("sfumato.templates.decisions.AnswerSet.probabilities", fail)
        jobs.begin("1", Decide("1", {"mood": Choice(["good", "bad"])}, options=Options(seed=1)))
    else:
        plan = nano.planner.fill

        def planned(query: Fill) -> Any:
            whole.append(plan(query))  # so that it is not closed before the job is
            asks = next(whole[0])
            yield [dataclasses.replace(ask, inspect=fail) for ask in asks]

        monkeypatch.setattr(nano.planner, "fill", planned)
        jobs.begin("1", Fill(["1", Slot("x", length=2)], options=Options(seed=1)))
    jobs.begin("2", Complete("1 2 3", Options(seed=3, max_tokens=82)))
    outcomes = carried_out(jobs)
    assert isinstance(outcomes["1"][-1], RuntimeError)
    monkeypatch.undo()
    assert outcomes["2"][-1].text == nano.complete("1 2 3", options=Options(seed=3, max_tokens=82)).text
    assert jobs.figures().rows == 0


def test_a_slow_walk_leaves_the_others_half_of_each_turn(nano: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The texts are the same as without it: when a walk ends is nothing to anybody."""
    regex, plain = Options(seed=1, regex="[0-9]{5}"), Options(seed=3, max_tokens=82)
    alone = nano.complete("1", options=regex).text, nano.complete("1 2 3", options=plain).text
    plainly, ended = Guide.walking, dict[str, Done]()
    walked = whole = 0.0

    def walking(self: Guide, *args: Any, **more: Any) -> Any:
        nonlocal walked
        until = time.perf_counter() + 30
        while "2" not in ended and (began := time.perf_counter()) < until:
            time.sleep(0.001)
            walked += time.perf_counter() - began
            yield
        return (yield from plainly(self, *args, **more))

    monkeypatch.setattr(Guide, "walking", walking)
    monkeypatch.setattr("sfumato.engine.walks.LONGEST", 60.0)
    jobs: Jobs[Query] = Jobs(nano, BatchLimits())
    jobs.begin("1", Complete("1", regex))
    jobs.begin("2", Complete("1 2 3", plain))
    while not jobs.is_idle:
        began = time.perf_counter()
        outcomes = jobs.turn()
        whole += 0.0 if "2" in ended else time.perf_counter() - began
        ended |= {id: event for id, event in outcomes if isinstance(event, Done)}
    assert list(ended) == ["2", "1"]  # it did not wait for the walk
    assert (ended["1"].text, ended["2"].text) == alone
    assert 0 < walked < 0.7 * whole  # as long as the rest of a turn, and what a slice is too long


def test_a_job_that_is_cancelled_or_wrong_leaves_the_others_alone(nano: LLM) -> None:
    jobs: Jobs[Query] = Jobs(nano, BatchLimits(rows=2, queue=3))
    with pytest.raises(InputError, match="there is no request 'sing'"):
        jobs.begin("1", "sing")  # type: ignore[arg-type]
    for number in range(2, 5):
        jobs.begin(str(number), Complete("1 2 3", Options(seed=number, max_tokens=82)))
    with pytest.raises(BusyError, match="3 requests wait already, of 3"):
        jobs.begin("5", Complete("1"))
    jobs.turn()
    jobs.cancel("2")
    jobs.cancel("99")
    outcomes = carried_out(jobs)
    assert set(outcomes) == {"3", "4"} and all(isinstance(events[-1], Done) for events in outcomes.values())
    jobs.begin("6", Complete("1" * 4000, Options(max_tokens=82)))
    assert isinstance(carried_out(jobs)["6"][-1], (Done, CapacityError))


def test_a_walk_without_end_ends_its_own_request(nano: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def walking(self: Guide, *args: Any, **more: Any) -> Any:
        while True:
            yield

    monkeypatch.setattr(Guide, "walking", walking)
    monkeypatch.setattr("sfumato.engine.walks.LONGEST", 0.3)
    with pytest.raises(InputError, match=r"takes longer than the 0.3 seconds allowed to follow; make it simpler"):
        nano.complete("1", options=Options(seed=1, regex="[0-9]{5}"))


def test_a_slow_walk_does_not_hold_up_who_has_committed_already(nano: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    plainly, ended = Guide.walking, list[str]()

    def walking(self: Guide, *args: Any, **more: Any) -> Any:
        until = time.perf_counter() + 30
        while "1" not in ended and time.perf_counter() < until:
            time.sleep(0.001)
            yield
        return (yield from plainly(self, *args, **more))

    monkeypatch.setattr(Guide, "walking", walking)
    monkeypatch.setattr("sfumato.engine.walks.LONGEST", 60.0)
    jobs: Jobs[Query] = Jobs(nano, BatchLimits())
    jobs.begin("1", Complete("1 2 3", Options(seed=3, max_tokens=400, max_steps=4)))
    while not any(isinstance(event, Commit) for _, event in jobs.turn()):
        pass
    jobs.begin("2", Complete("1", Options(seed=1, regex="[0-9]{5}", max_steps=3)))
    while not jobs.is_idle:
        ended += [id for id, event in jobs.turn() if isinstance(event, Done)]
    assert ended == ["1", "2"]


def test_the_later_parts_of_a_plan_run_beside_the_engine(nano: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    in_main, plainly = list[bool](), nano.planner._ask_sheet

    def ask_sheet(*args: Any, **more: Any) -> Any:
        in_main.append(threading.current_thread() is threading.main_thread())
        return plainly(*args, **more)

    monkeypatch.setattr(nano.planner, "_ask_sheet", ask_sheet)
    jobs: Jobs[Query] = Jobs(nano, BatchLimits())
    template: list[str | Slot] = ["1", Slot("a"), "2", Slot("b", regex="[0-9]{3}")]
    jobs.begin("1", Fill(template, options=Options(seed=1, max_steps=4)))
    first = len(in_main)
    outcomes = carried_out(jobs)
    assert first and len(in_main) > first and not any(in_main[first:])
    monkeypatch.undo()
    assert outcomes["1"][-1].text == nano.fill(template, options=Options(seed=1, max_steps=4)).text
    # One that is cancelled meanwhile, or fails there, leaves nothing behind.
    for attack in ("cancel", "fail"):
        if attack == "cancel":
            jobs.begin("2", Fill(template, options=Options(seed=1, max_steps=4)))
            while not jobs._planning:
                jobs.turn()
            jobs.cancel("2")
            assert carried_out(jobs) == {}
        else:
            monkeypatch.setattr(nano.planner, "_sheet", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                jobs.begin("3", Fill(template, options=Options(seed=1)))
    assert jobs.is_idle and jobs.figures().rows == 0


def test_a_plan_may_end_before_it_asks_for_anything(nano: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(query: Complete) -> Plan[str]:
        if query.prompt:
            yield [nano.planner.ask_answer(query)]
        return "nothing to do"

    monkeypatch.setattr(nano.planner, "plan", plan)
    jobs: Jobs[Query] = Jobs(nano, BatchLimits(queue=1))
    jobs.begin("1", Complete(""))
    jobs.begin("2", Complete(""))  # which takes no place among those that wait
    jobs.cancel("2")
    jobs.begin("3", Complete("1 2 3", Options(seed=3, max_tokens=5)))
    assert not jobs.is_idle
    outcomes = carried_out(jobs)
    assert outcomes.keys() == {"1", "3"} and outcomes["1"] == ["nothing to do"]
    assert isinstance(outcomes["3"][-1], Done)
    assert jobs.is_idle and jobs.figures().rows == 0


@pytest.mark.parametrize("is_later", [False, True])
def test_a_plan_that_asks_for_nothing_ends_its_own_job(
    is_later: bool, nano: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, plainly = Options(seed=3, max_tokens=5), nano.planner.plan

    def plan(query: Query) -> Plan[Any]:
        if isinstance(query, Complete):
            return (yield from plainly(query))
        if is_later:
            yield [dataclasses.replace(nano.planner.ask_answer(Complete("1", one)), is_answer=False)]
        yield []

    monkeypatch.setattr(nano.planner, "plan", plan)
    jobs: Jobs[Query] = Jobs(nano, BatchLimits())
    jobs.begin("1", Complete("1 2 3", one))
    message = "there are 0 prompts to run; give at least one"
    if is_later:
        jobs.begin("2", Infill("1", "2"))
    else:
        with pytest.raises(InputError, match=message):
            jobs.begin("2", Infill("1", "2"))
    outcomes = carried_out(jobs)
    assert isinstance(outcomes["1"][-1], Done)
    assert [str(outcome) for outcome in outcomes.get("2", [])] == ([message] if is_later else [])
    assert jobs.is_idle and jobs.figures().rows == 0
