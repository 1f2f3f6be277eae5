"""Recorded steps without a GPU: the stand-in for a CUDA graph (tape.py) freezes what Python decided, and holds no
memory. What a recording gives, what it keeps alive, how many there are; and an engine that is warm stays right."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from tape import Tape
from torch import Tensor

from sfumato.engine import kept as kept_module
from sfumato.engine import stepper
from sfumato.engine.engine import Engine, EngineSettings
from sfumato.engine.run import Run
from sfumato.engine.stepper import is_recording
from sfumato.errors import InputError
from sfumato.events import Done
from sfumato.llm import LLM
from sfumato.measure.capture import watch
from sfumato.model.cache import KVCache
from sfumato.model.network import Model, replace_
from sfumato.model.prompt import Prompt
from sfumato.options import Options
from sfumato.sampling import recorded
from sfumato.sampling.canvases import Canvases
from sfumato.sampling.recorded import Recorded, Recordings
from sfumato.sampling.rules import Rules
from sfumato.sampling.step import step_

# Two experts, and enough tokens, are one product of fixed shapes in the fused operations.
CONFIG = tiny.tiny_config(num_experts=2, top_k_experts=1, canvas_length=32)
PROMPTS = [[3, 7, 2, 9, 4, 11, 8], [5, 12], [9] * 50]
OPTIONS = [Options(max_tokens=70, max_steps=3, seed=n, confidence=0.0) for n in range(3)]


def model_of() -> Model:
    return tiny.tiny_model(CONFIG, seed=3, name="fused")


PLAIN = EngineSettings()


def answers(
    options: list[Options], pins: list[dict[int, int]] | None = None, settings: EngineSettings = PLAIN
) -> list[tuple[list[int], int]]:
    run = Run(model_of(), PROMPTS, options, pins=pins, settings=settings)
    done = sorted((event for event in run if isinstance(event, Done)), key=lambda event: event.row)
    return [(event.tokens, event.usage.steps) for event in done]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("kind", ["plain", "early", "bans", "pins"])
def test_a_tape_gives_what_the_step_gives(kind: str, lag: int) -> None:
    """Over several canvases, at lengths, rows and counts that were not those of the recording."""
    options, pins = OPTIONS, None
    if kind == "early":
        options = [dataclasses.replace(o, early=True, confidence=5.0, max_steps=6) for o in OPTIONS]
    if kind == "bans":
        options = [dataclasses.replace(o, min_tokens=40 + 9 * n) for n, o in enumerate(OPTIONS)]
    if kind == "pins":
        pins = [{3: 13, 40: 2}, {}, {0: 1}]
    settings = EngineSettings(record=True, lag=lag, capture=Tape())
    assert answers(options, pins, settings) == answers(options, pins)


def recorded_alone(bans: int = 4, encode: int = 32) -> tuple[Recorded, dict[int, Any]]:
    """A recording that nobody else holds anything of, and the memory that it reads and writes."""
    model, outside = model_of(), {}
    cache = KVCache.allocate(CONFIG, 2, 200)
    state = Canvases.allocate(model, [Rules.of(Options())] * 2, [5, 6], [0, 1], early=[True, False], has_pins=True)

    def capture(run: Any) -> Any:
        run()
        outside.update(watch(run, "cpu").outside)
        return (lambda: None), None

    return Recorded(model, cache, state, 2, encode, bans, capture), outside


@pytest.mark.parametrize("encode", [0, 32])
def test_what_a_graph_reads_lives_as_long_as_the_graph(encode: int) -> None:
    with torch.inference_mode():
        one, outside = recorded_alone(encode=encode)
        gc.collect()
        assert len(outside) > 40
        assert not [memory for memory in outside.values() if memory.expired()]
        one.bans_N = None  # and the check sees what is let go of
        gc.collect()
        assert [memory for memory in outside.values() if memory.expired()]


def test_a_weight_that_is_replaced_is_recorded_anew() -> None:
    model = model_of()
    engine = Engine(model, 1, 256, settings=EngineSettings(record=True, capture=Tape()))
    first = [event for event in Run(model, PROMPTS[:1], OPTIONS[:1], engine=engine) if isinstance(event, Done)]
    engine.leave(0)
    with torch.no_grad():
        model.norm.weight = torch.nn.Parameter(-model.norm.weight.detach(), requires_grad=False)
        replace_(model.layers[0].mlp.down_proj, "weight", -model.layers[0].mlp.down_proj.weight)
    found = [event for event in Run(model, PROMPTS[:1], OPTIONS[:1], engine=engine) if isinstance(event, Done)]
    wanted = [event for event in Run(model, PROMPTS[:1], OPTIONS[:1]) if isinstance(event, Done)]
    assert found[0].tokens == wanted[0].tokens != first[0].tokens


def test_the_least_recently_used_recording_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "MOST", 2)
    model = model_of()
    cache = KVCache.allocate(CONFIG, 4, 64)
    state = Canvases.allocate(model, [Rules.of(Options())] * 4, [0] * 4, [0] * 4)
    kept = Recordings(None)
    with torch.inference_mode():
        one = kept.of(model, cache, state, 1, 0, ())
        two = kept.of(model, cache, state, 2, 0, ())
        assert kept.of(model, cache, state, 1, 0, ()) is one
        kept.of(model, cache, state, 4, 0, ())
        assert len(kept) == 2
        assert kept.of(model, cache, state, 1, 0, ()) is one
        assert kept.of(model, cache, state, 2, 0, ()) is not two


def test_banned_tokens_are_no_part_of_a_recording() -> None:
    """One serves all sets of about as many."""
    model, kept = model_of(), Recordings(None)
    cache = KVCache.allocate(CONFIG, 1, 64)
    state = Canvases.allocate(model, [Rules.of(Options())], [0], [0])
    with torch.inference_mode():
        one = kept.of(model, cache, state, 1, 0, (1, 2, 3))
        assert kept.of(model, cache, state, 1, 0, (4, 5, 6, 7)) is one
        assert kept.of(model, cache, state, 1, 0, (4, 5)) is not one
        assert kept.of(model, cache, state, 1, 0, ()) is not one
        state.banned_XL[0] = True
        for bans in (1, 2, 3), (4, 5, 6, 7), (8, 9, 10):
            state.begin_([0], torch.zeros(1, 32, dtype=torch.long), torch.full((1, 32), -1), [0])
            state.banned_XL[0] = True
            one([0], [0], [0], None, bans)
            assert not torch.isin(state.argmax_XL[0], torch.tensor(bans)).any()


def test_angles_are_made_once_a_canvas() -> None:
    model, made = model_of(), []
    cache = KVCache.allocate(CONFIG, 2, 64)
    state = Canvases.allocate(model, [Rules.of(Options())] * 2, [0] * 2, [0] * 2)
    with torch.inference_mode():
        one = Recorded(model, cache, state, 2, 0)
        refresh = one._refresh
        one._refresh = lambda: made.append(refresh())
        for lengths in [5, 9], [5, 9], [5, 9], [37, 9]:
            one([0, 1], lengths, [0, 0])
        assert len(made) == 2


def test_operations_that_wait_for_the_host_are_not_recorded() -> None:
    """On a CUDA device they run step by step; who insists is told. (The device is only claimed.)"""

    class Elsewhere(Model):
        device = torch.device("cuda", 1)  # type: ignore[assignment]

    model = model_of()
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
    model = model_of()
    assert list(Run(model, PROMPTS[:1], OPTIONS[:1]))
    assert devices and all(one == [model.device] for one in devices) and not within


def test_a_capture_that_fails_ends_recording_and_nothing_else() -> None:
    def capture(run: Any) -> Any:
        run()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much\nand more lines")

    expected = answers(OPTIONS)
    with pytest.warns(UserWarning, match="one by one from now on: CUDA out of memory. Tried to allocate much$"):
        assert answers(OPTIONS, settings=EngineSettings(record=True, capture=capture)) == expected


# ---- an engine that stays -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nano() -> LLM:
    return LLM.load("nano", device="cpu", dtype="float32")


def test_a_model_keeps_its_engine(nano: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Engine] = []
    init = Engine.__init__

    def noted(self: Engine, *args: Any, **more: Any) -> None:
        made.append(self)
        init(self, *args, **more)

    nano.forget()
    monkeypatch.setattr(Engine, "__init__", noted)
    options = Options(max_tokens=20, seed=1)
    first = [nano.complete(text, options).text for text in ("ab", "abc def", "x")]
    assert len(made) == 1
    again = []
    for text in ("ab", "abc def", "x"):
        nano.forget()
        again.append(nano.complete(text, options).text)
    assert first == again
    assert len(made) == 4


def test_a_stream_that_is_left_leaves_a_clean_engine(nano: LLM) -> None:
    options = Options(max_tokens=160, seed=2, drafts=True)
    wanted = nano.complete("the same", options).tokens
    stream = nano.stream("something else", options)
    next(stream)
    stream.close()
    kept = nano._engines.kept
    assert kept is not None and not len(kept.prompt) and not any(kept.engine.cache.lengths)
    assert nano.complete("the same", options).tokens == wanted


def test_two_calls_at_a_time_have_an_engine_each(nano: LLM) -> None:
    options = Options(max_tokens=160, seed=2, drafts=True)
    wanted = [nano.complete(text, options).tokens for text in ("one", "two")]
    streams = [nano.stream(text, options) for text in ("one", "two")]
    found: list[list[int]] = [[], []]
    live = [0, 1]
    while live:
        for n in list(live):
            event = next(streams[n], None)
            if event is None:
                live.remove(n)
            elif isinstance(event, Done):
                found[n] = event.tokens
    assert found == wanted


def test_a_request_that_is_refused_leaves_the_engine(nano: LLM) -> None:
    nano.complete("ab", Options(max_tokens=5, seed=1))
    before = nano._engines.kept
    with pytest.raises(InputError):
        nano.complete("ab" * 9000, Options(max_tokens=5))
    assert before is not None and nano._engines.kept is not None and nano._engines.kept.engine is before.engine


def test_an_idle_engine_gives_a_large_cache_back(nano: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_module, "MOST_IDLE", 1000)
    nano.chat([{"role": "user", "content": "a"}], options=Options(max_tokens=5, seed=1))
    assert nano._engines.kept is not None and len(nano._engines.kept.prompt)  # a conversation stays
    nano._engines.put_back(nano._engines.kept.engine, Prompt(()))
    assert nano._engines.kept.engine.cache.capacity == 1
    assert nano.complete("ab", Options(max_tokens=5, seed=1)).tokens
