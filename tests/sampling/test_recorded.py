"""sampling/recorded.py: recorded steps without a GPU: the stand-in for a CUDA graph (tape.py) freezes what Python
decided, and holds no memory. What a recording gives, what it keeps alive, how many there are; and an engine that is
warm stays right.
"""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import pytest
import tiny
import torch
from tape import Tape

from sfumato.engine.engine import Engine, EngineSettings
from sfumato.engine.run import Run
from sfumato.events import Done
from sfumato.measure.capture import watch
from sfumato.model.adapters import Adapter, Adapters, new_adapter
from sfumato.model.cache import KVCache
from sfumato.model.network import Model, replace_
from sfumato.model.passes import Pass
from sfumato.ops.lowrank import LanePair
from sfumato.options import Options
from sfumato.sampling import recorded
from sfumato.sampling.canvases import Canvases
from sfumato.sampling.recorded import Recorded, RecordedShape, Recordings
from sfumato.sampling.rules import Rules
from sfumato.sampling.step import StepInput, step_

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
@pytest.mark.parametrize("kind", ["plain", "early", "bans", "pins", "repeats"])
def test_a_tape_gives_what_the_step_gives(kind: str, lag: int) -> None:
    """Over several canvases, at lengths, rows and counts that were not those of the recording."""
    options, pins = OPTIONS, None
    if kind == "early":
        options = [dataclasses.replace(o, early=True, confidence=5.0, max_steps=6) for o in OPTIONS]
    if kind == "bans":
        options = [dataclasses.replace(o, min_tokens=40 + 9 * n) for n, o in enumerate(OPTIONS)]
    if kind == "repeats":  # the plain end of a step, with what it remembers of those before
        options = [dataclasses.replace(o, max_steps=20, repeats=2 * n) for n, o in enumerate(OPTIONS)]
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

    return Recorded(model, cache, state, RecordedShape(2, encode, bans), capture), outside


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
        product = model.get_submodule("layers.0.mlp.down_proj")
        replace_(product, "weight", -model.get_parameter("layers.0.mlp.down_proj.weight"))
    again = [event for event in Run(model, PROMPTS[:1], OPTIONS[:1], engine=engine) if isinstance(event, Done)]
    expected = [event for event in Run(model, PROMPTS[:1], OPTIONS[:1]) if isinstance(event, Done)]
    assert again[0].tokens == expected[0].tokens != first[0].tokens


def test_the_least_recently_used_recording_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "MOST", 2)
    model = model_of()
    cache = KVCache.allocate(CONFIG, 4, 64)
    state = Canvases.allocate(model, [Rules.of(Options())] * 4, [0] * 4, [0] * 4)
    kept = Recordings(None)
    with torch.inference_mode():
        one = kept.of(model, cache, state, [0], 0, ())
        two = kept.of(model, cache, state, [0, 1], 0, ())
        assert kept.of(model, cache, state, [0], 0, ()) is one
        kept.of(model, cache, state, [0, 1, 2, 3], 0, ())
        assert len(kept) == 2
        assert kept.of(model, cache, state, [0], 0, ()) is one
        assert kept.of(model, cache, state, [0, 1], 0, ()) is not two


def test_banned_tokens_are_no_part_of_a_recording() -> None:
    """One serves all sets of about as many."""
    model, kept = model_of(), Recordings(None)
    cache = KVCache.allocate(CONFIG, 1, 64)
    state = Canvases.allocate(model, [Rules.of(Options())], [0], [0])
    with torch.inference_mode():
        one = kept.of(model, cache, state, [0], 0, (1, 2, 3))
        assert kept.of(model, cache, state, [0], 0, (4, 5, 6, 7)) is one
        assert kept.of(model, cache, state, [0], 0, (4, 5)) is not one
        assert kept.of(model, cache, state, [0], 0, ()) is not one
        state.banned_XL[0] = True
        for bans in (1, 2, 3), (4, 5, 6, 7), (8, 9, 10):
            state.begin_([0], torch.zeros(1, 32, dtype=torch.long), torch.full((1, 32), -1), [0])
            state.banned_XL[0] = True
            one([0], [0], [0], None, bans)
            assert not torch.isin(state.argmax_XL[0], torch.tensor(bans)).any()


def test_angles_are_made_once_a_canvas() -> None:
    model, refreshed = model_of(), []
    cache = KVCache.allocate(CONFIG, 2, 64)
    state = Canvases.allocate(model, [Rules.of(Options())] * 2, [0] * 2, [0] * 2)
    with torch.inference_mode():
        one = Recorded(model, cache, state, RecordedShape(2))
        refresh = one._refresh
        one._refresh = lambda: refreshed.append(refresh())
        for lengths in [5, 9], [5, 9], [5, 9], [37, 9]:
            one([0, 1], lengths, [0, 0])
        assert len(refreshed) == 2


# ---- adapters --------------------------------------------------------------------------------------------------------


def adapter_of(model: Model, seed: int, rank: int = 3) -> Adapter:
    """Factors for what needs no number of the device in the fused operations."""
    plain = new_adapter(model, rank, 2.0 * rank, ("attention", "dense", "self_conditioning"), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return Adapter({n: f._replace(b=torch.randn(f.b.shape, generator=generator)) for n, f in plain.factors.items()})


@pytest.mark.parametrize("encode", [0, 32])
@pytest.mark.parametrize("capture", [Tape(), None], ids=["captured", "as it is"])
def test_who_has_which_adapter_may_change_under_a_recording(encode: int, capture: Tape | None) -> None:
    model = model_of()
    bank = Adapters(model)
    one, two = (bank.load(name, adapter_of(model, seed)) for seed, name in enumerate("ab"))
    cache = KVCache.allocate(CONFIG, 3, 200)
    state = Canvases.allocate(model, [Rules.of(Options())] * 3, [5, 6, 7], [0, 1, 2])
    tokens = torch.arange(64).view(2, 32) % 61 if encode else None
    counts = [20, 32] if encode else [0, 0]

    def entropies(step: Any) -> torch.Tensor:
        state.begin_([0, 2], torch.arange(64).view(2, 32) % 50, torch.full((2, 32), -1), [0, 0])
        for _ in range(2 if not encode else 1):  # the second with a soft embedding
            step()
        return state.entropy_XL[[0, 2]].clone()

    def plain() -> None:
        run = Pass(model, cache, [0, 2], counts, encode, 32)
        step_(model, cache, state, StepInput(torch.tensor([0, 2]), run, tokens))

    with torch.inference_mode():
        recording = Recorded(model, cache, state, RecordedShape(4, encode, has_lanes=True), capture)
        base = entropies(lambda: recording([0, 2], [0, 0], counts, tokens))
        for lanes in ([one, two], [two, LanePair()], [LanePair(-1, two.denoise), LanePair(one.encode, -1)]):
            cache.lanes[0], cache.lanes[2] = lanes
            recorded_XL, plain_XL = entropies(lambda: recording([0, 2], [0, 0], counts, tokens)), entropies(plain)
            assert (recorded_XL - plain_XL).abs().max() < 1e-4
            is_changed = [lane.denoise >= 0 or (encode > 0 and lane.encode >= 0) for lane in lanes]
            assert [not torch.equal(*pair) for pair in zip(recorded_XL, base, strict=True)] == is_changed


def test_what_is_written_onto_a_lane_is_not_recorded_anew() -> None:
    """A stack that grows is; and rows without adapters have a recording without."""
    model, kept = model_of(), Recordings(None)
    bank = Adapters(model)
    for name in "ab":
        bank.load(name, adapter_of(model, 1))
    bank.unload("b")
    cache = KVCache.allocate(CONFIG, 2, 64)
    state = Canvases.allocate(model, [Rules.of(Options())] * 2, [0] * 2, [0] * 2)
    cache.lanes[1] = bank.load("c", adapter_of(model, 2))
    with torch.inference_mode():
        without, having = (kept.of(model, cache, state, [row], 0, ()) for row in (0, 1))
        assert (without.has_lanes, having.has_lanes) == (False, True)
        assert kept.of(model, cache, state, [1], 0, ()) is having
    bank.unload("a")
    bank.load("d", adapter_of(model, 3))
    kept.check(model)
    assert len(kept) == 2
    bank.load("e", adapter_of(model, 4, rank=8))
    kept.check(model)
    assert len(kept) == 0
