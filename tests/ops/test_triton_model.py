"""ops/triton: a whole model on the kernels, under the interpreter: prompts of different length, two canvases a row, the
commit encoded with the next canvas's first step, static buffers. Tokens and steps are the reference's under the same
noise; so are hidden states where rows have adapters on everything, recorded or not."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from tape import Tape

from sfumato.engine.engine import EngineSettings
from sfumato.engine.run import Run
from sfumato.events import Done
from sfumato.model.adapters import TARGETS, Adapter, Adapters, new_adapter
from sfumato.model.cache import KVCache
from sfumato.model.config import LayerConfig, ModelConfig, Rope
from sfumato.model.network import Model
from sfumato.ops.lowrank import LanePair
from sfumato.options import Options
from sfumato.sampling.canvases import Canvases
from sfumato.sampling.recorded import Recorded, RecordedShape
from sfumato.sampling.rules import Rules

pytest.importorskip("triton")
import triton_interpreter

from sfumato.ops import triton as kernels

CONFIG: ModelConfig = tiny.tiny_config(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_experts=4,
    expert_size=16,
    eos_ids=(),
    layers=(LayerConfig(16, 2, 6, Rope(10_000.0)), LayerConfig(32, 1, None, Rope(1e6, 0.5, 1.0, True))),
)
PROMPTS = [[3, 7, 2, 9, 4, 11, 8, 6, 30], [5, 12]]


WAYS: dict[str, dict[str, Any]] = {
    "eager": {},
    "static buffers": {"record": True},
    "a graph's stand-in": {"record": True, "capture": Tape(), "lag": 1},
}


def answers(model: Model, **ways: Any) -> list[tuple[list[int], int, str]]:
    options = Options(max_tokens=2 * CONFIG.canvas_length, max_steps=2, seed=5, confidence=0.0)
    run = Run(model, PROMPTS, options, settings=EngineSettings(**ways))
    done = sorted((event for event in run if isinstance(event, Done)), key=lambda event: event.row)
    return [(event.tokens, event.usage.steps, event.finish_reason) for event in done]


@pytest.mark.parametrize("way", WAYS)
def test_the_tokens_are_the_references(way: str) -> None:
    plain = tiny.tiny_model(CONFIG, seed=3, name="reference")
    with torch.device("meta"):
        model = Model(CONFIG, kernels.record())
    model.load_state_dict(plain.state_dict(), assign=True)
    assert answers(model.requires_grad_(False).eval().pack_(), **WAYS[way]) == answers(plain)


@pytest.mark.slow
def test_reads_are_the_references_and_leave_the_cache_as_it_is() -> None:
    """Three canvases behind two rows, with tokens of different number that no cache keeps, and then with none."""
    plain = tiny.tiny_model(CONFIG, seed=3, name="reference")
    with torch.device("meta"):
        model = Model(CONFIG, kernels.record())
    model.load_state_dict(plain.state_dict(), assign=True)
    model = model.requires_grad_(False).eval().pack_()
    tokens_BT, canvas_BL = torch.arange(12).view(3, 4) % 61, torch.arange(18).view(3, 6) % 61
    results = []
    with torch.inference_mode():
        for one in (plain, model):
            cache = KVCache.allocate(CONFIG, 2, 12)
            padded = torch.tensor([[*prompt, *[0] * (9 - len(prompt))] for prompt in PROMPTS])
            one.encode(padded, cache, [0, 1], [9, 2])
            rings = [ring[:, :-1].clone() for ring in (*cache.k, *cache.v)]
            first = one.read(tokens_BT, [4, 1, 3], canvas_BL, cache, [1, 0, 1])
            assert cache.lengths == [9, 2]
            assert all(torch.equal(ring[:, :-1], old) for ring, old in zip((*cache.k, *cache.v), rings, strict=True))
            results.append((first, one.read(None, [0, 0, 0], canvas_BL, cache, [0, 0, 1], first)))
    for exact, fast in zip(*results, strict=True):
        assert (fast - exact).norm() < 1e-4 * exact.norm()


def adapter_of(model: Model, seed: int) -> Adapter:
    plain, generator = new_adapter(model, 3, 3.0, tuple(TARGETS), seed=seed), torch.Generator().manual_seed(seed)
    return Adapter({n: f._replace(b=torch.randn(f.b.shape, generator=generator) / 2) for n, f in plain.factors.items()})


def test_adapters_on_everything_are_the_references() -> None:
    """A step that encodes two rows of different adapters, and a recording of it that begins with other lanes."""
    plain = tiny.tiny_model(CONFIG, seed=3, name="reference")
    with torch.device("meta"):
        model = Model(CONFIG, kernels.record())
    model.load_state_dict(plain.state_dict(), assign=True)
    model = model.requires_grad_(False).eval().pack_()
    length, tokens_BT = CONFIG.canvas_length, torch.arange(2 * CONFIG.canvas_length).view(2, -1) % 61
    results = []
    with torch.inference_mode():
        for one, capture in ((plain, None), (model, None), (model, Tape())):
            bank = Adapters(one)
            lanes = [bank.load(name, adapter_of(one, seed)) for seed, name in enumerate("ab")]
            cache = KVCache.allocate(CONFIG, 2, 64)
            state = Canvases.allocate(one, [Rules.of(Options())] * 2, [5, 6], [0, 1])
            recording = Recorded(one, cache, state, RecordedShape(2, length, has_lanes=True), capture)
            state.begin_([0, 1], tokens_BT.flip(0) % 50, torch.full((2, length), -1), [0, 0])
            cache.lanes[:] = [LanePair(lanes[0].encode, lanes[1].denoise), LanePair(-1, lanes[0].denoise)]
            encoded_BTD = recording([0, 1], [0, 0], [length, 3], tokens_BT)
            assert encoded_BTD is not None
            results.append((encoded_BTD[0].clone(), encoded_BTD[1, :3].clone(), state.entropy_XL[:2].clone()))
            for name in "ab":
                bank.unload(name)
    for other in results[1:]:
        for exact, fast in zip(results[0], other, strict=True):
            assert (fast - exact).norm() < 1e-4 * exact.norm()


triton_interpreter.in_a_child(globals())
