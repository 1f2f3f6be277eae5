"""engine/batch.py: many requests on one engine: no text depends on who else is there, memory stays bounded, nobody is
forgotten.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch

from sfumato import Options
from sfumato.engine import request as rows
from sfumato.engine.batch import Batch
from sfumato.engine.engine import Engine, EngineSettings
from sfumato.engine.limits import BatchLimits
from sfumato.engine.memory import row_bytes
from sfumato.engine.request import Failure, Request
from sfumato.engine.run import ROUND, Run
from sfumato.errors import BusyError, CapacityError, InputError
from sfumato.events import Commit, Done, Draft, Event
from sfumato.model.cache import KVCache
from sfumato.model.network import Model

CONFIG = tiny.tiny_config(eos_ids=(38, 45), max_position=400)
SETTLES = Options(max_steps=8, t_min=0.2, t_max=0.4, entropy_bound=0.5, confidence=0.5)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


@functools.cache
def model() -> Model:
    """Canvases of it settle after a few steps."""
    return tiny.tiny_model(CONFIG, seed=1, name="fused", sharp=3.0, mix=0.2)


def text(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(f"{length} {seed}")
    return [draw.randrange(6, CONFIG.vocab_size) for _ in range(length)]


def requests(count: int) -> list[Request]:
    """Of all sorts: lengths, caps, pins, least lengths, short canvases, log-probabilities, tokens one by one."""
    sorts: list[dict[str, Any]] = [
        {},
        {"logprobs": True},
        {"mode": "autoregressive"},
        {"min_tokens": 9},
        {"early": True},
        {"short": True, "max_tokens": 5},
        {"max_steps": 11, "stability": 2},
        {"drafts": True},
    ]
    each = []
    for n in range(count):
        options = dataclasses.replace(SETTLES, seed=n, max_tokens=9 + n % 17, **{})
        options = dataclasses.replace(options, **sorts[n % len(sorts)])
        pins = {2: 7} if n % 3 == 0 and options.mode is None else {}
        each.append(Request(text(3 + 7 * n % 60, n), options, pins, banned=(9,) if n % 5 == 0 else ()))
    return each


def plain(event: Event) -> Event:
    event = dataclasses.replace(event, row=0, request="")
    if isinstance(event, Done):
        usage = dataclasses.replace(event.usage, seconds=0.0, first_commit_seconds=None, reused_tokens=0)
        event = dataclasses.replace(event, usage=usage, logprobs=near(event.logprobs))
    elif isinstance(event, Commit):
        event = dataclasses.replace(event, logprobs=near(event.logprobs))
    else:
        event = dataclasses.replace(event, entropies=near(event.entropies))
    return event


class Near(list[float]):
    """Equal to what differs by less than a thousandth: floats are summed in other orders beside others."""

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Near)
        return len(self) == len(other) and all(abs(a - b) < 1e-3 for a, b in zip(self, other, strict=True))

    __hash__ = None


def near(values: list[float] | None) -> Any:
    return None if values is None else Near(values)


@functools.cache
def alone(number: int) -> list[Event]:
    return [plain(event) for event in Run(model(), [requests(number + 1)[number]])]


def succeeded(events: list[Event | Failure]) -> list[Event]:
    for event in events:
        if isinstance(event, Failure):
            raise event.error
    return [event for event in events if not isinstance(event, Failure)]


def finish(some: Batch) -> list[Event]:
    events: list[Event] = []
    while not some.is_idle:
        events += succeeded(some.turn())
    return events


# ---- the engine, rows coming and going -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "settings",
    [EngineSettings(), EngineSettings(lag=1), EngineSettings(record=True, lag=1)],
    ids=["plain", "late", "static and late"],
)
def test_a_row_is_the_same_whoever_joins_leaves_or_waits(seed: int, settings: EngineSettings) -> None:
    draw, each = random.Random(seed), requests(24)
    engine, seats = Engine(model(), 2, 16, settings=settings), dict[int, int]()
    events: dict[int, list[Event]] = {n: [] for n in range(24)}
    dropped, waiting = set(draw.sample(range(24), 4)), list(range(24))
    draw.shuffle(waiting)
    while waiting or seats:
        while waiting and (not seats or (len(seats) < 9 and draw.random() < 0.6)):
            number = waiting.pop()
            seats[engine.join(each[number])] = number
        some = [seat for seat in seats if draw.random() < 0.7] or list(seats)
        for event in succeeded(engine.turn(some, draw.choice([None, 3, 20]))):
            assert event.request == each[seats[event.row]].id
            events[seats[event.row]].append(event)
        for seat, number in list(seats.items()):
            row = engine.rows[seat]
            assert row is not None
            if row.finish_reason is not None or (number in dropped and draw.random() < 0.3):
                engine.leave(seat)
                del seats[seat]
    for number in set(range(24)) - dropped:
        own = [plain(event) for event in events[number]]
        if settings.lag:
            own = [without_passes(event) for event in own if not isinstance(event, Draft)]
            assert own == [without_passes(event) for event in alone(number) if not isinstance(event, Draft)]
        else:
            assert own == alone(number)


def without_passes(event: Event) -> Event:
    """Without what a late read changes."""
    return (
        dataclasses.replace(event, usage=dataclasses.replace(event.usage, passes=0))
        if isinstance(event, Done)
        else event
    )


# ---- the batch -----------------------------------------------------------------------------------------------------


def test_no_text_depends_on_its_neighbours() -> None:
    some = Batch(model(), BatchLimits(rows=5, memory=1 << 30, stall=1e-4))
    numbers = {some.submit(request): number for number, request in enumerate(requests(24))}
    events: dict[int, list[Event]] = {n: [] for n in range(24)}
    for event in finish(some):
        events[numbers[event.request]].append(plain(event))
    for number, own in events.items():
        assert own == alone(number)
    figures = some.figures()
    done = [event.usage for some in events.values() for event in some if isinstance(event, Done)]
    assert figures.tokens == sum(usage.tokens for usage in done) and figures.steps == sum(u.steps for u in done)
    assert (figures.rows, figures.queue, figures.rows_max) == (0, 0, 5)


def test_a_queue_is_bounded_and_what_can_never_fit_is_refused() -> None:
    some = Batch(model(), BatchLimits(rows=1, queue=2, memory=1 << 30))
    ids = [some.submit(request) for request in requests(2)]
    with pytest.raises(BusyError, match="2 requests wait already"):
        some.submit(requests(3)[2])
    assert {event.request for event in finish(some)} == set(ids)
    small = Batch(model(), BatchLimits(memory=row_bytes(CONFIG, torch.float32) + (40 << 10)))
    with pytest.raises(CapacityError, match=r"need 0\.\d+ GB of memory, 0\.\d+ are set aside"):
        small.submit(Request(text(300), SETTLES))
    with pytest.raises(CapacityError, match="exceed the context of 50; shorten the prompt or lower max_tokens"):
        Batch(model(), BatchLimits(context=50)).submit(Request(text(30), dataclasses.replace(SETTLES, max_tokens=40)))
    with pytest.raises(InputError, match="the prompt is empty"):
        small.submit(Request([], SETTLES))


def test_the_cache_stays_within_the_memory_and_all_get_their_turn() -> None:
    row = row_bytes(CONFIG, torch.float32)
    memory = 3 * (KVCache.bytes_of(CONFIG, 1, 256, torch.float32) + row)
    some = Batch(model(), BatchLimits(rows=16, memory=memory))
    numbers = {some.submit(request): number for number, request in enumerate(requests(24))}
    most, ended = 0, set()
    while not some.is_idle:
        for event in some.turn():
            if isinstance(event, Done):
                ended.add(event.request)
                assert plain(event) == alone(numbers[event.request])[-1]
        engine, rows = some.engine, some.figures().rows
        assert engine.cache.bytes + len(engine.rows) * row + some.prefixes.bytes <= memory
        most = max(most, rows)
    assert ended == set(numbers) and 2 <= most <= 3


def test_an_answer_that_outgrows_the_memory_ends_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "FIRST_ROOM", 64)
    submitted = Request(text(9), dataclasses.replace(SETTLES, max_tokens=370, min_tokens=370, seed=1))
    size = KVCache.bytes_of(CONFIG, 1, 256, torch.float32)
    tight = size + row_bytes(CONFIG, torch.float32) + size // 4  # no room for a second, larger one
    ends = []
    for memory in (tight, 1 << 30):
        some = Batch(model(), BatchLimits(memory=memory))
        some.submit(submitted)
        ends.append(finish(some)[-1])
        assert some.engine.cache.bytes + row_bytes(CONFIG, torch.float32) <= memory
    short, whole = ends
    assert isinstance(short, Done) and isinstance(whole, Done) and len(whole.tokens) == 370
    assert short.finish_reason == "length" and 200 < len(short.tokens) <= 256 - 9
    assert short.tokens == whole.tokens[: len(short.tokens)]


def test_who_is_cancelled_leaves_at_once() -> None:
    some = Batch(model(), BatchLimits(rows=2))
    first, second, third = (some.submit(request) for request in requests(3))
    some.turn()
    some.cancel(first)
    some.cancel(third)
    assert some.figures().rows == 1 and some.figures().queue == 0
    assert {event.request for event in finish(some)} == {second}


# ---- turns ---------------------------------------------------------------------------------------------------------


def turns_of(
    some: Batch, monkeypatch: pytest.MonkeyPatch, start: float, slope: float
) -> list[tuple[list[int], int | None]]:
    """What the engine is asked to do, on a machine whose turns cost so many seconds."""
    turns: list[tuple[list[int], int | None]] = []
    plainly = some.engine.turn

    def turn(seats: list[int], limit: int | None) -> list[Event | Failure]:
        turns.append((list(seats), limit))
        return plainly(seats, limit)

    monkeypatch.setattr(some.engine, "turn", turn)
    monkeypatch.setattr(some.cost, "line", lambda: (start, slope))
    return turns


def settle(some: Batch) -> None:
    """Until everyone has committed something."""
    waiting = True
    while waiting:
        some.turn()
        waiting = any(row is not None and row.first_commit is None for row in some.engine.rows)


LONG = dataclasses.replace(SETTLES, max_tokens=64, confidence=0.0, seed=1)


def test_where_rows_cost_what_they_cost_alone_newcomers_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    some = Batch(model(), BatchLimits(rows=9))
    turns = turns_of(some, monkeypatch, 0.0, 1.0)
    for n in range(8):
        some.submit(Request(text(4, n), dataclasses.replace(LONG, seed=n)))
    settle(some)
    turns.clear()
    some._credit = 0.0
    late = some.submit(Request(text(5), LONG))
    while not any(isinstance(event, Commit) and event.request == late for event in some.turn()):
        pass
    shared = sum(len(seats) > 1 for seats, _ in turns)
    assert len(turns) == LONG.max_steps and shared == 0  # a turn of the others costs as much as all of these steps
    turns.clear()
    finish(some)
    assert all(len(seats) > 1 for seats, _ in turns[:6])


def test_of_several_newcomers_a_brief_one_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    some = Batch(model(), BatchLimits(rows=9))
    turns = turns_of(some, monkeypatch, 0.0, 1.0)
    for n in range(8):
        some.submit(Request(text(4, n), dataclasses.replace(LONG, seed=n)))
    some.turn()
    turns.clear()
    late = some.submit(Request(text(5), dataclasses.replace(LONG, max_tokens=CONFIG.canvas_length)))
    while not any(isinstance(event, Commit) and event.request == late for event in some.turn()):
        pass
    assert len(turns) == LONG.max_steps and sum(len(seats) > 1 for seats, _ in turns) == 0


def test_newcomers_without_end_leave_the_others_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    some = Batch(model(), BatchLimits(rows=3))
    turns = turns_of(some, monkeypatch, 0.0, 1.0)
    old = [some.submit(Request(text(4, n), dataclasses.replace(LONG, max_tokens=300, seed=n))) for n in range(2)]
    settle(some)
    turns.clear()
    for n in range(200):
        if some.figures().rows < 3:
            some.submit(Request(text(5, n), dataclasses.replace(LONG, max_tokens=8, seed=n)))
        some.turn()
    shared = sum(len(seats) == 3 for seats, _ in turns)
    assert 20 <= shared <= 60 and old  # of the time a quarter: each costs three, of which two are theirs


def test_where_rows_cost_little_everyone_shares_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    some = Batch(model(), BatchLimits(rows=9))
    turns = turns_of(some, monkeypatch, 1.0, 1e-5)
    for n in range(9):
        some.submit(Request(text(4, n), dataclasses.replace(LONG, seed=n)))
        some.turn()
    finish(some)
    assert [len(seats) for seats, _ in turns[:9]] == list(range(1, 10))


def test_a_long_prompt_is_encoded_between_the_others_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    some = Batch(model(), BatchLimits(rows=2, stall=0.02))
    turns = turns_of(some, monkeypatch, 0.0, 0.001)
    some.submit(Request(text(4), dataclasses.replace(LONG, max_tokens=300)))
    settle(some)
    late = some.submit(Request(text(200), dataclasses.replace(LONG, max_tokens=8)))
    turns.clear()
    events = finish(some)
    assert all(limit == 20 for seats, limit in turns if len(seats) == 2)
    assert [len(seats) for seats, _ in turns[:9]] == [2] * 9  # nine chunks, and the others step in each of those turns
    assert [e for e in events if isinstance(e, Done) and e.request == late]


# ---- prefixes ------------------------------------------------------------------------------------------------------


def test_instructions_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []
    plainly = Model.encode

    def encode(self: Model, tokens: torch.Tensor, cache: KVCache, rows: Any = None, counts: Any = None) -> Any:
        encoded.append(sum(counts or [tokens.shape[1]] * len(tokens)))
        return plainly(self, tokens, cache, rows, counts)

    monkeypatch.setattr(Model, "encode", encode)
    shared, some = text(100), Batch(model(), BatchLimits(rows=4))
    submitted = [
        Request([*shared, *text(5, n)], dataclasses.replace(SETTLES, max_tokens=16, seed=n), marks=[100])
        for n in range(6)
    ]
    done = {}
    for request in submitted:
        some.submit(request)
    for event in finish(some):
        if isinstance(event, Done):
            done[event.seed] = event
    assert sum(encoded) == 100 and some.figures().prefix_hits == 5 and some.figures().prefix_tokens == 500
    for n, request in enumerate(submitted):
        assert done[n].tokens == list(Run(model(), [request]))[-1].tokens
        assert done[n].usage.reused_tokens == (100 if n else 0)


def test_what_is_kept_leaves_the_rows_their_read_outs() -> None:
    row, size = (row_bytes(CONFIG, torch.float32), KVCache.bytes_of(CONFIG, 1, 256, torch.float32))
    for spare, kept in ((-1, 0), (0, 1)):
        memory = size + row + KVCache.bytes_of(CONFIG, 1, 64, torch.float32) + spare
        some = Batch(model(), BatchLimits(rows=1, memory=memory, prefixes=1 << 30))
        some.submit(Request(text(40), dataclasses.replace(SETTLES, max_tokens=8, seed=1)))
        finish(some)
        assert (some.prefixes.bytes > 0) == kept


def test_a_conversation_goes_on_from_what_is_kept() -> None:
    some = Batch(model(), BatchLimits())
    some.submit(Request(text(60), dataclasses.replace(SETTLES, max_tokens=24, seed=3)))
    first = finish(some)[-1]
    assert isinstance(first, Done)
    more = Request([*text(60), *first.tokens, *text(4)], dataclasses.replace(SETTLES, max_tokens=8, seed=4))
    some.submit(more)
    second = finish(some)[-1]
    assert isinstance(second, Done) and second.usage.reused_tokens >= 60 + len(first.tokens) - 8
    assert second.tokens == list(Run(model(), [more]))[-1].tokens


def encoded(tokens: list[int]) -> KVCache:
    cache = KVCache.allocate(CONFIG, 1, len(tokens))
    model().encode(torch.tensor([tokens]), cache)
    return cache


def test_a_request_runs_as_often_as_it_is_submitted() -> None:
    """It is a value: a run changes nothing of it. Two with one id are not under way at once."""
    request = requests(1)[0]
    some = Batch(model(), BatchLimits(rows=1))
    some.submit(request)
    with pytest.raises(InputError, match=f"a request with the id '{request.id}' is under way; give each one its own"):
        some.submit(request)
    some.submit(dataclasses.replace(request, id="again"))
    some.turn()
    with pytest.raises(InputError, match="is under way"):
        some.submit(request)
    events = [event for event in finish(some) if isinstance(event, Done)]
    some.submit(request)
    events += [event for event in finish(some) if isinstance(event, Done)]
    assert [event.request for event in events] == [request.id, "again", request.id]
    assert len({tuple(event.tokens) for event in events}) == 1


def test_what_is_admitted_has_room_as_it_is_rounded() -> None:
    """Else it would stand at the head of the queue for ever."""
    one = Batch(model(), BatchLimits(memory=10**9))
    capacity = Request(text(300), Options(max_tokens=10)).capacity(CONFIG)
    assert capacity % ROUND
    with pytest.raises(CapacityError, match="GB of memory"):
        Batch(model(), BatchLimits(memory=one._bytes(1, capacity))).submit(Request(text(300), Options(max_tokens=10)))
