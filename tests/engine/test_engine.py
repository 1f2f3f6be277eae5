"""engine/engine.py and its stepper: no way of stepping changes an answer, and no pass is wasted.

The loop reads late, replays static buffers, and has rows that come and go. On tiny models in float32.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import tiny
import tiny_runs
import torch
from tiny_runs import (
    CONFIG,
    LENGTH,
    SAME,
    same,
    text,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sfumato.engine import request as requests
from sfumato.engine import run as runs
from sfumato.engine import stepper
from sfumato.engine.engine import PREFILL_CHUNK, Engine, EngineSettings
from sfumato.engine.run import Run, generate
from sfumato.engine.stepper import is_recording
from sfumato.errors import InputError
from sfumato.events import Commit, Done, Draft, Event
from sfumato.model.cache import KVCache
from sfumato.model.network import Model
from sfumato.options import Options
from sfumato.sampling.canvases import Canvases, HostCopy
from sfumato.sampling.step import step_


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


@functools.cache
def talker(name: str = "fused") -> Model:
    """A model whose canvases settle after a few steps, and that ends some answers by itself."""
    return tiny_runs.talker((38, 45), name)


MAX_STEPS = 8
SETTLES = Options(max_steps=MAX_STEPS, t_min=0.2, t_max=0.4, entropy_bound=0.5, confidence=0.5)

PROMPTS = [text(length, 30 + length) for length in (4, 17, 9, 26)]


def each(**changes: Any) -> list[Options]:
    """Every row with a seed and a length of its own."""
    return [dataclasses.replace(SETTLES, seed=row, max_tokens=20 + 4 * row, **changes) for row in range(4)]


SORTS: list[dict[str, Any]] = [{"mode": "autoregressive"}, {"logprobs": True}, {}, {"min_tokens": 22}]

NO_PINS: list[dict[int, int]] = [{}, {}, {}, {}]

KINDS: dict[str, tuple[list[Options], list[dict[int, int]], int]] = {
    "stopped early": (each(), NO_PINS, PREFILL_CHUNK),
    "capped": (
        [dataclasses.replace(o, max_steps=row + 1) for row, o in enumerate(each(confidence=0.0))],
        NO_PINS,
        PREFILL_CHUNK,
    ),
    "of all sorts": (
        [dataclasses.replace(o, **sort) for o, sort in zip(each(), SORTS, strict=True)],
        [{}, {}, {3: 13}, {}],
        5,
    ),
}

"""Options and pins of each row, and the prompt's chunk."""

WAYS: dict[str, EngineSettings] = {
    "read late": EngineSettings(lag=1),
    "read very late": EngineSettings(lag=3),
    "static": EngineSettings(record=True),
    "static, read late": EngineSettings(record=True, lag=1),
}

PLAIN = EngineSettings()


def answers(
    ours: Model,
    prompts: Sequence[list[int]],
    options: list[Options],
    settings: EngineSettings = PLAIN,
    pins: list[dict[int, int]] | None = None,
) -> list[list[Event]]:
    """Each row's events, but for the row's number, times, passes and log-probabilities."""
    events: list[list[Event]] = [[] for _ in prompts]
    for event in generate(ours, prompts, options, pins=pins, settings=settings):
        assert not isinstance(event, Draft)
        plain: Event = dataclasses.replace(event, row=0, request="", logprobs=None)
        if isinstance(plain, Done):
            usage = dataclasses.replace(plain.usage, seconds=0.0, first_commit_seconds=None, passes=0)
            plain = dataclasses.replace(plain, usage=usage)
        events[event.row].append(plain)
    return events


def answers_of(kind: str, settings: EngineSettings = PLAIN, ours: Model | None = None) -> list[list[Event]]:
    options, pins, chunk = KINDS[kind]
    return answers(ours or talker(), PROMPTS, options, dataclasses.replace(settings, chunk=chunk), pins)


@functools.cache
def plainly(kind: str) -> list[list[Event]]:
    return answers_of(kind)


def reason(events: list[Event]) -> str:
    done = events[-1]
    assert isinstance(done, Done)
    return done.finish_reason


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_no_way_of_stepping_changes_an_answer(way: str, kind: str) -> None:
    """Commits, steps, reasons and all: rows of different length and step counts, event for event."""
    assert answers_of(kind, WAYS[way]) == plainly(kind)


def test_rows_stop_for_every_reason_at_different_steps() -> None:
    """The teeth of the test above."""
    steps = {kind: [[e.steps for e in row if isinstance(e, Commit)] for row in plainly(kind)] for kind in KINDS}
    assert all(set(row) == {cap} for cap, row in enumerate(steps["capped"], 1))
    early = {count for row in steps["stopped early"] for count in row}
    assert len(early) > 3
    assert len({tuple(row) for row in steps["stopped early"]}) == len(PROMPTS)
    assert {reason(row) for row in plainly("stopped early")} == {"stop", "length"}
    changed = [one != two for one, two in zip(plainly("of all sorts"), plainly("stopped early"), strict=True)]
    assert changed == [True, False, True, True], "the prompt's chunks and log-probabilities alone change nothing"


@pytest.mark.parametrize("way", WAYS)
def test_no_way_of_stepping_changes_log_probabilities(way: str) -> None:
    def logprobs(settings: EngineSettings = PLAIN) -> list[Any]:
        events = generate(talker(), PROMPTS, each(logprobs=True), settings=settings)
        done = {event.row: event.logprobs for event in events if isinstance(event, Done)}
        return [done[row] for row in range(len(PROMPTS))]

    for numbers, plain in zip(logprobs(WAYS[way]), logprobs(), strict=True):
        assert numbers == pytest.approx(plain, abs=SAME)


@pytest.mark.parametrize("way", ["read late", "static, read late"])
def test_a_cache_that_grows_under_way_changes_nothing(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was recorded for the smaller cache is not replayed on it."""
    options = [dataclasses.replace(o, max_tokens=5 * LENGTH) for o in each()]
    expected = answers(talker(), PROMPTS[:2], options[:2])
    monkeypatch.setattr(requests, "FIRST_ROOM", LENGTH)
    monkeypatch.setattr(runs, "ROUND", 1)
    run = Run(talker(), PROMPTS[:2], options[:2], settings=WAYS[way])
    small = run.cache.capacity
    tokens = {event.row: event.tokens for event in run if isinstance(event, Done)}
    assert tokens == {row: events[-1].tokens for row, events in enumerate(expected)}
    assert run.cache.capacity > small
    for row, length in enumerate(run.cache.lengths):
        held = (PROMPTS[row] + tokens[row])[:length]
        fresh = KVCache.allocate(CONFIG, 1, run.cache.capacity)
        talker().encode(torch.tensor([held]), fresh)
        canvas = torch.tensor([text(LENGTH)])
        assert same([talker().denoise(canvas, run.cache, None, [row])], [talker().denoise(canvas, fresh)], SAME)


@pytest.mark.parametrize("name", tiny.OPS)
@pytest.mark.parametrize("way", [PLAIN, WAYS["static, read late"]], ids=["plain", "static, read late"])
def test_a_rows_answer_does_not_depend_on_its_batch(name: str, way: EngineSettings) -> None:
    options, pins, chunk = KINDS["of all sorts"]
    together, alone = answers_of("of all sorts", way, talker(name)), EngineSettings(chunk=chunk)
    for row, events in enumerate(together):
        assert events == answers(talker(name), [PROMPTS[row]], [options[row]], alone, pins[row : row + 1])[0]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many rows went through the model in each of its ways."""
    count: Counter[str] = Counter()

    def counted(name: str) -> Any:
        plain = getattr(Model, name)

        def run(self: Model, tokens: Tensor, *args: Any, **more: Any) -> Any:
            count[name] += len(tokens)
            return plain(self, tokens, *args, **more)

        return run

    for name in ("encode", "denoise", "encode_and_denoise"):
        monkeypatch.setattr(Model, name, counted(name))
    return count


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("chunk", [2048, 9, 4])
@pytest.mark.parametrize("rows", [[1], [0, 1, 2, 3]])
def test_a_pass_is_a_step(rows: list[int], chunk: int, lag: int, passes: Counter[str]) -> None:
    """Commits and the last chunk of a prompt go along with a canvas's first step; only earlier chunks take a pass of
    their own. Asked a step late, each canvas takes one more, unless it ends at the cap."""
    options, prompts = each(), [PROMPTS[row] for row in rows]
    events = list(
        generate(talker(), prompts, [options[row] for row in rows], settings=EngineSettings(chunk=chunk, lag=lag))
    )
    usages = {event.row: event.usage for event in events if isinstance(event, Done)}
    late = Counter(e.row for e in events if isinstance(e, Commit) and lag and e.steps < MAX_STEPS)
    canvases, steps = (sum(getattr(usage, name) for usage in usages.values()) for name in ("canvases", "steps"))
    assert canvases > 2 * len(rows)
    assert passes["encode_and_denoise"] == canvases
    assert passes["encode_and_denoise"] + passes["denoise"] == steps + late.total()
    assert passes["encode"] == sum((len(prompt) - 1) // chunk for prompt in prompts)
    assert all(usage.passes == usage.steps + late[row] for row, usage in usages.items())


@pytest.mark.parametrize("lag", [0, 1, 3])
@pytest.mark.parametrize("rows", [[0], [1], [2, 3], [0, 1, 2, 3]])
def test_no_pass_is_lost_at_the_cap(rows: list[int], lag: int, passes: Counter[str]) -> None:
    """That a row stops there is known without asking, however late the question and whoever goes on beside it."""
    options, *_ = KINDS["capped"]
    run = Run(
        talker(), [PROMPTS[row] for row in rows], [options[row] for row in rows], settings=EngineSettings(lag=lag)
    )
    usages = [event.usage for event in run if isinstance(event, Done)]
    assert len(usages) == len(rows) and all(usage.passes == usage.steps for usage in usages)
    assert passes["encode_and_denoise"] + passes["denoise"] == sum(usage.steps for usage in usages)


def test_a_row_at_its_cap_is_answered_though_nobody_else_steps() -> None:
    one = Engine(talker(), 2, 64, settings=EngineSettings(lag=1))
    capped, long = (one.join(requests.Request([7, 8, 9], dataclasses.replace(SETTLES, max_steps=n))) for n in (1, 8))
    assert one.turn() == []  # the other one goes on, so the answer is late
    assert [type(event) for event in one.turn([capped])] == [Commit] and one.live == [capped, long]


def test_what_is_encoded_is_kept_only_where_it_is_read() -> None:
    """The last hidden states stay zeros for a row that asks neither for log-probabilities nor for token by token."""
    for change, is_read in ({}, False), ({"logprobs": True}, True), ({"mode": "autoregressive"}, True):
        one = Engine(talker(), 1, 64, settings=EngineSettings(chunk=4))
        one.join(requests.Request(PROMPTS[1], dataclasses.replace(SETTLES, **change)))
        one.turn()
        assert bool(one.table.last_XD.any()) is is_read


def test_a_commit_asks_nothing_but_what_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that stop, commit and begin again read nothing of the device beside the step but the answer that was asked
    for: a copy each turn, waited for a turn later."""
    copies, inside, plainly, stepping = [], [False], HostCopy.of, step_
    reads = {"_local_scalar_dense", "nonzero", "equal", "masked_select"}

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert inside[0] or func.overloadpacket.__name__ not in reads, func
            return func(*args, **(kwargs or {}))

    def read(name: str) -> Any:
        plain = getattr(Tensor, name)

        def call(self: Tensor, *args: Any) -> Any:
            assert inside[0], f"a tensor was read: {name}"
            return plain(self, *args)

        return call

    def step(*args: Any) -> Any:
        inside[0] = True
        try:
            return stepping(*args)
        finally:
            inside[0] = False

    def to_host(x: Tensor) -> Any:
        copies.append(x.shape)
        return plainly(x)

    for name in ("tolist", "cpu", "item"):
        monkeypatch.setattr(Tensor, name, read(name))
    monkeypatch.setattr(HostCopy, "of", to_host)
    monkeypatch.setattr(stepper, "step_", step)
    one = Engine(talker(), 2, 64, settings=EngineSettings(lag=1))
    again: dict[str, Any] = {"redos": 1, "max_steps": 3, "confidence": 0.05}  # a row whose canvases begin again
    for seed in (0, 1):
        more = again if seed else {}
        options = dataclasses.replace(SETTLES, seed=seed, max_tokens=3 * LENGTH, **more)
        one.join(requests.Request(PROMPTS[seed], options))
    commits, turns = 0, 0
    with Reads():  # type: ignore[no-untyped-call]
        while one.live:
            commits, turns = commits + sum(isinstance(event, Commit) for event in one.turn()), turns + 1
    assert commits > 3 and copies == [(3, stepper.HEAD + LENGTH)] * len(copies) and len(copies) <= turns


def test_no_request_changes_a_shape_that_is_everybodys() -> None:
    """The most steps, and the longest memory, that a request may ask for: what is recorded stays, no step takes longer
    for the others."""
    one = Engine(talker(), 2, 64, settings=EngineSettings(record=True))
    for options in SETTLES, Options(max_tokens=8, max_steps=4096, stability=4096, temperature_steps=4096):
        one.join(requests.Request([7, 8, 9], options))
        one.turn()
        shapes = {f.name: getattr(one.table.canvases[LENGTH], f.name) for f in dataclasses.fields(Canvases)}
        if options is SETTLES:
            before, recorded = shapes, dict(one.table.recordings._kept)
    assert all(before[name] is tensor for name, tensor in shapes.items() if isinstance(tensor, Tensor))
    assert all(one.table.recordings._kept[key] is kept for key, kept in recorded.items())
    assert sum(tensor.numel() for name, tensor in shapes.items() if isinstance(tensor, Tensor)) < 3 * 2 * 4096


def test_operations_that_wait_for_the_host_are_not_recorded() -> None:
    """On a CUDA device they run step by step; who insists is told. (The device is only claimed.)"""

    class Elsewhere(Model):
        device = torch.device("cuda", 1)

    model = tiny.tiny_model(CONFIG, seed=3, name="fused")
    model.__class__ = Elsewhere
    assert not model.ops.is_recordable
    assert is_recording(model, None) is False
    with pytest.raises(InputError, match="fused operations wait for the host"):
        is_recording(model, True)
    model.use_(dataclasses.replace(model.ops, is_recordable=True))
    assert is_recording(model, None) is is_recording(model, True) is True
    assert is_recording(model, False) is False


def test_an_engine_works_on_its_models_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is the current one: streams, events and kernels are those of the current device."""
    within: list[torch.device] = []
    devices: list[list[torch.device]] = []

    @contextlib.contextmanager
    def on(device: torch.device) -> Iterator[None]:
        within.append(device)
        yield
        within.pop()

    monkeypatch.setattr("sfumato.engine.engine.on", on)

    def step(*args: Any) -> Tensor | None:
        devices.append(list(within))
        return step_(*args)

    monkeypatch.setattr(stepper, "step_", step)
    assert list(Run(talker(), PROMPTS[:1], each()[:1]))
    assert devices and all(one == [talker().device] for one in devices) and not within


def test_a_capture_that_fails_ends_recording_and_nothing_else() -> None:
    def capture(run: Any) -> Any:
        run()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much\nand more lines")

    expected = answers(talker(), PROMPTS, each())
    with pytest.warns(UserWarning, match="one by one from now on: CUDA out of memory. Tried to allocate much$"):
        assert answers(talker(), PROMPTS, each(), EngineSettings(record=True, capture=capture)) == expected
