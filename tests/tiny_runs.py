"""What the tests of engine, sampling and model share: tiny models whose canvases settle, texts, and caches compared.

Equal means: within float32 rounding for numbers (SAME), exactly for tokens and for the bytes of a cache.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import tiny
import torch
from hypothesis import settings
from torch import Tensor

from sfumato.model.cache import KVCache
from sfumato.model.network import Model
from sfumato.options import Options
from sfumato.sampling.canvases import Canvases
from sfumato.sampling.noise import CountedNoise
from sfumato.sampling.rules import Rules

SAME = 1e-4
CONFIG = tiny.tiny_config()
WINDOW, LENGTH = CONFIG.window, CONFIG.canvas_length
OPS = tiny.OPS


def examples(count: int) -> settings:
    """Drawn anew on every change of the test, but the same on every run: the engine's floats are no coin to toss."""
    return settings(max_examples=count, deadline=None, derandomize=True)


@functools.cache
def model(name: str = "reference", length: int = LENGTH) -> Model:
    return tiny.tiny_model(tiny.tiny_config(canvas_length=length), seed=3, name=name)


@functools.cache
def talker(
    eos: tuple[int, ...] = (), name: str = "fused", seed: int = 1, max_position: int = CONFIG.max_position
) -> Model:
    """A model whose canvases settle after a few steps."""
    config = tiny.tiny_config(eos_ids=eos, max_position=max_position)
    return tiny.tiny_model(config, seed=seed, name=name, sharp=3.0, mix=0.2)


def text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(6, CONFIG.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def canvas_tokens(rows: int, seed: int = 0) -> Tensor:
    return torch.tensor([text(LENGTH, 100 * seed + row) for row in range(rows)])


def encoded(ours: Model, tokens: Sequence[int], cache: KVCache | None = None) -> KVCache:
    """A cache of one row that holds these tokens, encoded in one pass."""
    cache = cache or KVCache.allocate(ours.config, 1, 64)
    ours.encode(torch.tensor([list(tokens)]), cache)
    return cache


def probe(ours: Model, cache: KVCache, rows: list[int] | None = None) -> Tensor:
    """What a denoise pass makes of the cache: the same fixed canvas in every row."""
    count = cache.batch if rows is None else len(rows)
    return ours.denoise(canvas_tokens(1).expand(count, -1), cache, None, rows)


def near(one: Tensor, two: Tensor, limit: float = SAME) -> bool:
    assert one.shape == two.shape
    return bool(one.isfinite().all()) and float((one - two).abs().max()) < limit


def content(cache: KVCache) -> list[Tensor]:
    """All of its memory, the slot that takes padding too."""
    return [tensor.clone() for tensor in (*cache.k, *cache.v)]


def unchanged(cache: KVCache, before: list[Tensor]) -> bool:
    return all(torch.equal(one, two) for one, two in zip((*cache.k, *cache.v), before, strict=True))


def padded(rows: Sequence[list[int]], width: int) -> Tensor:
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def cache_of(ours: Model, lengths: Sequence[int], capacity: int = 64) -> KVCache:
    """A cache whose rows hold texts of these lengths."""
    cache = KVCache.allocate(ours.config, len(lengths), capacity)
    ours.encode(padded([text(n, n) for n in lengths], max(lengths)), cache, counts=list(lengths))
    return cache


def same(one: Sequence[Tensor], two: Sequence[Tensor], limit: float = 0.0) -> bool:
    return all(a.shape == b.shape and bool(((a - b).abs() <= limit).all()) for a, b in zip(one, two, strict=True))


def keys_and_values(cache: KVCache, rows: slice | list[int] = slice(None)) -> list[Tensor]:
    """Of these rows, without the slot that takes padding."""
    return [tensor[rows, :-1].clone() for tensor in (*cache.k, *cache.v)]


SETTLES = Options(max_steps=8, t_min=0.2, t_max=0.4, entropy_bound=0.5, confidence=0.5)


def canvases(ours: Model, rows: int) -> Canvases:
    """Rows that have just begun."""
    state = Canvases.allocate(ours, [Rules.of(SETTLES)] * rows, range(rows), [0] * rows)
    every, zeros = list(range(rows)), [0] * rows
    fresh = CountedNoise(range(rows), zeros, LENGTH, CONFIG.vocab_size).canvas(every, zeros)
    state.begin_(every, fresh, torch.full_like(fresh, -1), zeros)
    return state
