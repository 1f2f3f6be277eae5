"""A step and the passes it takes: masks as drawn, what a pass writes to the cache, encode and denoise in one pass, and
the engine's loop when it asks late, replays static buffers or runs other rows beside. On tiny models in float32."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sfumato import ops
from sfumato.engine import request as requests
from sfumato.engine import run as runs
from sfumato.engine import stepper
from sfumato.engine.engine import PREFILL_CHUNK, Engine, EngineSettings
from sfumato.engine.run import Run, generate
from sfumato.events import Commit, Done, Draft, Event
from sfumato.model import network
from sfumato.model.cache import KVCache
from sfumato.model.network import Model, Pass
from sfumato.ops.masks import Mask
from sfumato.options import Options
from sfumato.sampling.canvases import Canvases, HostCopy
from sfumato.sampling.noise import CountedNoise, HostNoise, first_uniform
from sfumato.sampling.recorded import Recorded
from sfumato.sampling.rules import Rules
from sfumato.sampling.step import StepInput, step_

SAME = 1e-4
CONFIG = tiny.tiny_config()
WINDOW, LENGTH = CONFIG.window, CONFIG.canvas_length
SETTLES = Options(max_steps=8, t_min=0.2, t_max=0.4, entropy_bound=0.5, confidence=0.5)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


@functools.cache
def model(name: str = "reference", length: int = LENGTH) -> Model:
    return tiny.tiny_model(tiny.tiny_config(canvas_length=length), seed=3, name=name)


@functools.cache
def talker(name: str = "fused") -> Model:
    """A model whose canvases settle after a few steps."""
    return tiny.tiny_model(tiny.tiny_config(eos_ids=(38, 45)), seed=1, name=name, sharp=3.0, mix=0.2)


def text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(6, CONFIG.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def padded(rows: Sequence[list[int]], width: int) -> Tensor:
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def cache_of(ours: Model, lengths: Sequence[int], capacity: int = 64) -> KVCache:
    """A cache whose rows hold texts of these lengths."""
    cache = KVCache.allocate(ours.config, len(lengths), capacity)
    ours.encode(padded([text(n, n) for n in lengths], max(lengths)), cache, counts=list(lengths))
    return cache


def content(cache: KVCache, rows: slice | list[int] = slice(None)) -> list[Tensor]:
    """Keys and values of these rows, without the slot that takes padding."""
    return [tensor[rows, :-1].clone() for tensor in (*cache.k, *cache.v)]


def same(one: Sequence[Tensor], two: Sequence[Tensor], limit: float = 0.0) -> bool:
    return all(a.shape == b.shape and bool(((a - b).abs() <= limit).all()) for a, b in zip(one, two, strict=True))


# ---- the mask, drawn ------------------------------------------------------------------------------------------------


def mask_of(lengths: Sequence[int], counts: Sequence[int], encode: int, canvas: int, window: int, ring: int) -> Mask:
    rows, used = list(range(len(lengths))), min(ring, max(lengths))
    return Mask(
        rows, torch.tensor(rows), torch.tensor(lengths), torch.tensor(counts), encode, canvas, window, ring, used
    )


def drawn(mask: Mask, row: int, *names: str) -> str:
    """What a row's positions see, as `Mask` draws it; names are those of the slots, of the encoded and of the canvas,
    "-" for padding, which has no line of its own."""
    groups = [group for group in names if group]
    ends = torch.tensor([len(group) for group in groups]).cumsum(0)
    lines = ["    " + " | ".join(" ".join(group) for group in groups)]
    for name, seen in zip("".join(names[1:]), mask.dense_BTS()[row], strict=True):
        cells = [" ".join(".x"[flag] for flag in part) for part in seen.int().tensor_split(ends[:-1])]
        lines += [f"{name}   " + " | ".join(cells)] if name != "-" else []
    return "\n".join("    " + line for line in lines)


@pytest.mark.parametrize(("held", "encoded", "canvas"), [("ab", "cde", ""), ("abc", "", "uvw"), ("ab", "cd", "uvw")])
def test_a_mask_is_what_its_docstring_draws(held: str, encoded: str, canvas: str) -> None:
    mask = mask_of([len(held)], [len(encoded)], len(encoded), len(canvas), window=3, ring=8)
    assert drawn(mask, 0, held, encoded, canvas) in (inspect.getdoc(Mask) or "")


TURNED = """\
        e b c d | f - | u v
    f   x . . x | x . | . .
    u   x . . . | x . | x x
    v   x . . . | x . | x x"""
NOTHING_NEW = """\
        a b . . | - - | u v
    u   x x . . | . . | x x
    v   x x . . | . . | x x"""


def test_a_mask_follows_the_ring_and_skips_padding() -> None:
    """A row whose ring of four has turned and that brings one of two tokens, beside one that brings none."""
    mask = mask_of([5, 2], [1, 0], encode=2, canvas=2, window=3, ring=4)
    assert drawn(mask, 0, "ebcd", "f-", "uv") == TURNED
    assert drawn(mask, 1, "ab..", "--", "uv") == NOTHING_NEW


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_angles_that_are_kept_are_those_of_the_position(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked up or worked out: the same bits, for rows before, at and beyond the last position that is kept."""
    ours = Model(CONFIG, ops.load("reference")).to(dtype)
    cache = KVCache.allocate(CONFIG, 4, 200)
    cache.lengths = [0, 100, 109, 140]
    rows, counts = [2, 0, 3, 1], [1, 3, 0, 2]
    plain = [Pass(ours, cache, [row], [count], 3, LENGTH) for row, count in zip(rows, counts, strict=True)]
    for near in (121, 120, 0):  # the longest of the first three brings positions up to 119
        monkeypatch.setattr(network, "NEAR", near)
        network._table.cache_clear()
        for some in (slice(0, 4), slice(0, 2)):
            run = Pass(ours, cache, rows[some], counts[some], 3, LENGTH)
            for kind, (_, *angles) in run.kinds.items():
                for n, one in enumerate(plain[some]):
                    assert all(torch.equal(a[n], b[0]) for a, b in zip(angles, one.kinds[kind][1:], strict=True))
    network._table.cache_clear()


# ---- what a pass writes to the cache --------------------------------------------------------------------------------

LENGTHS, SLACK, PADDING = [9, 0, 3], 2, 999.0
SLIDING, FULL = 0, 1


def append(cache: KVCache, layer: int, rows: list[int], counts: list[int], is_fresh: bool | None = None) -> None:
    """Append keys that say their position, and values that say its negative; padding says PADDING."""
    run = Pass(model(), cache, rows, counts, max(counts), 0)
    shape = (len(rows), max(counts), *cache.k[layer].shape[2:])
    key = torch.full(shape, PADDING)
    for place, (row, count) in enumerate(zip(rows, counts, strict=True)):
        key[place, :count] = (cache.lengths[row] + torch.arange(count))[:, None, None].float()
    cache.append(layer, key, -key, run.of(layer)[0], run.is_fresh if is_fresh is None else is_fresh)


@pytest.mark.parametrize("layer", [SLIDING, FULL])
@pytest.mark.parametrize("counts", [[3, 1], [4, 0], [12, 8], [1, 7]])
def test_append_writes_each_token_to_the_slot_of_its_position(layer: int, counts: list[int]) -> None:
    """Rows 2 and 0 of three: the last of their real tokens that the ring has room for, and not a slot besides; what is
    padding or too old goes behind the ring, the row that takes no part stays as it was."""
    cache = KVCache.allocate(CONFIG, 3, 32, slack=SLACK)
    cache.lengths, ring = list(LENGTHS), cache.ring(CONFIG.layers[layer].window)
    for tensor in (*cache.k, *cache.v):
        tensor.fill_(0.5)
    expected = torch.full((3, ring + 1), 0.5)
    for row, count in zip((2, 0), counts, strict=True):
        for position in range(LENGTHS[row], LENGTHS[row] + count)[-ring:]:
            expected[row, position % ring] = position
    append(cache, layer, [2, 0], counts)
    key, value = (tensor[layer] for tensor in (cache.k, cache.v))
    assert torch.equal(key[:, :ring], expected[:, :ring, None, None].expand_as(key[:, :ring]))
    assert bool((value[:, :ring] == torch.where(key == 0.5, key, -key)[:, :ring]).all())
    assert bool((key[1] == 0.5).all())
    for row, count in zip((2, 0), counts, strict=True):
        outside = {*range(LENGTHS[row], LENGTHS[row] + max(0, count - ring))}
        outside |= {PADDING} if count < max(counts) else set()
        assert set(key[row, ring].flatten().tolist()) <= (outside or {0.5})
    assert cache.lengths == LENGTHS, "only `advance` makes them count"


@pytest.mark.parametrize(
    ("lengths", "rows", "counts", "is_fresh"),
    [
        ([0, 0], [0, 1], [3, 3], True),
        ([0, 0], [1, 0], [3, 3], False),
        ([0, 0], [0], [3], False),
        ([0, 0], [0, 1], [3, 2], False),
        ([0, 1], [0, 1], [3, 3], False),
    ],
)
def test_fresh_are_all_rows_empty_and_without_padding(
    lengths: list[int], rows: list[int], counts: list[int], is_fresh: bool
) -> None:
    cache = KVCache.allocate(CONFIG, 2, 32)
    cache.lengths = lengths
    assert Pass(model(), cache, rows, counts, 3, 0).is_fresh is is_fresh
    places = torch.tensor(rows), torch.tensor(lengths)[rows], torch.tensor(counts)
    assert not Pass(model(), cache, rows, counts, 3, 0, places).is_fresh, "a recorded pass serves other lengths too"


@pytest.mark.parametrize("count", [2, WINDOW - 1 + SLACK, WINDOW + SLACK, 20])
def test_a_fresh_append_is_any_append(count: int) -> None:
    """The slice writes what the scatter writes, up to a full ring and beyond it."""
    caches = [KVCache.allocate(CONFIG, 2, 32, slack=SLACK) for _ in range(2)]
    for cache, is_fresh in zip(caches, (True, False), strict=True):
        for layer in (SLIDING, FULL):
            append(cache, layer, [0, 1], [count, count], is_fresh)
    assert same(content(caches[0]), content(caches[1]))
    assert all(bool(caches[0].k[layer].any()) for layer in (SLIDING, FULL))


@pytest.mark.parametrize("capacity", [64, 40, 90])
@pytest.mark.parametrize("apart", [(False, False), (True, True), (True, False)])
def test_rows_are_copied_alike_by_the_kind_and_by_the_layer(apart: tuple[bool, bool], capacity: int) -> None:
    """Into a cache of the same size, a smaller and a larger one, whose window's ring is as long or shorter."""
    caches = []
    for is_apart in apart:
        cache = KVCache.allocate(CONFIG, 3, 64, slack=SLACK)
        model().encode(padded([text(n, n) for n in (9, 0, 30)], 30), cache, counts=[9, 0, 30])
        assert len(cache.stacks) == 2
        if is_apart:
            cache.stacks.clear()
        caches.append(cache)
    forks = [cache.fork([2, None, 0, 2], capacity) for cache in caches]
    for fork, other in zip(forks, reversed(caches), strict=True):
        fork.take_(1, other, 7)
    assert same(content(forks[0]), content(forks[1])) and forks[0].lengths == forks[1].lengths == [30, 7, 9, 30]
    for row, source, count in (0, 2, 30), (1, 0, 7), (2, 0, 9), (3, 2, 30):
        assert torch.equal(forks[0].k[FULL][row, :count], caches[0].k[FULL][source, :count])
        assert bool(forks[0].v[SLIDING][row, :5].any())


def test_gradients_flow_through_a_fork() -> None:
    """Of every layer, though all of them are written in place."""
    ours = tiny.tiny_model(CONFIG, seed=3, name="reference").requires_grad_(True)
    with torch.no_grad():
        cache = KVCache.allocate(CONFIG, 1, 32)
    ours.encode(torch.tensor([text(5)]), cache)
    ours.denoise(torch.tensor([text(LENGTH)] * 2), cache.fork([0, 0])).sum().backward()
    assert all(bool(block.self_attn.k_proj.weight.grad.any()) for block in ours.layers)


# ---- encode and denoise in one pass ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.OPS)
@pytest.mark.parametrize("length", [WINDOW - 2, WINDOW + 2])
@pytest.mark.parametrize(
    ("rows", "counts"), [([0, 1, 2, 3], [7, 0, 5, 1]), ([0, 1, 2, 3], [1, 20, 0, 8]), ([2, 0], [0, 3])]
)
def test_one_pass_is_encode_then_denoise(name: str, length: int, rows: list[int], counts: list[int]) -> None:
    """For rows that bring much, little and nothing, to rings that are nearly empty, filling and turned, with canvases
    shorter and longer than the window: the same hidden states, tokens and cache."""
    ours = model(name, length)
    cache = cache_of(ours, [1, 3, 40, 17])
    apart = cache.fork([0, 1, 2, 3])
    tokens = padded([text(count, 50 + row) for row, count in zip(rows, counts, strict=True)], max(counts))
    canvas = padded([text(length, 70 + row) for row in rows], length)
    encoded, denoised = ours.encode_and_denoise(tokens, counts, canvas, cache, rows)
    bring = [place for place, count in enumerate(counts) if count]
    some = [counts[place] for place in bring]
    wanted = ours.encode(tokens[bring], apart, [rows[place] for place in bring], some)
    assert same(
        [encoded[place, :count] for place, count in zip(bring, some, strict=True)],
        [wanted[n, :count] for n, count in enumerate(some)],
        SAME,
    )
    wanted = ours.denoise(canvas, apart, None, rows)
    assert same([denoised], [wanted], SAME)
    assert torch.equal(ours.logits(denoised).argmax(-1), ours.logits(wanted).argmax(-1))
    assert cache.lengths == apart.lengths
    assert same(content(cache), content(apart), SAME)


# ---- one step of some rows ------------------------------------------------------------------------------------------


def canvases(ours: Model, rows: int) -> Canvases:
    """Rows that have just begun."""
    state = Canvases.allocate(ours, [Rules.of(SETTLES)] * rows, range(rows), [0] * rows)
    every, zeros = list(range(rows)), [0] * rows
    fresh = CountedNoise(range(rows), zeros, LENGTH, CONFIG.vocab_size).canvas(every, zeros)
    state.begin_(every, fresh, torch.full_like(fresh, -1), zeros)
    return state


def told(state: Canvases, rows: list[int]) -> list[Tensor]:
    """All that a row's answer is read from."""
    fields = state.canvas_XL, state.argmax_XL, state.entropy_XL, state.accepted_XL, state.step_X, state.is_done_X
    return [field[rows].clone().float() for field in fields]


def test_a_row_that_has_stopped_is_frozen() -> None:
    """Whatever further steps it takes part in; its neighbour goes on."""
    ours = talker()
    cache, state = cache_of(ours, [5, 9]), canvases(talker(), 2)
    for turn in range(3):
        before = told(state, [0])
        step_(ours, cache, state, StepInput(torch.arange(2), Pass(ours, cache, [0, 1], [0, 0], 0, LENGTH)))
        assert same(told(state, [0]), before) is (turn > 0)
        state.is_done_X[0] = True
    assert state.step_X.tolist() == [1, 3, 0]


@pytest.mark.parametrize("encode", [0, 3])
def test_a_recorded_step_for_four_serves_one(encode: int) -> None:
    """The fillers change no other row's canvas and no token of the cache; the one row's step is the plain one."""
    ours, tokens = talker(), padded([text(encode)], LENGTH)
    plain, recorded = ((cache_of(ours, [20, 9, 3]), canvases(ours, 3)) for _ in range(2))
    cache, state = plain
    more = tokens[:, :encode] if encode else None
    run = Pass(ours, cache, [1], [encode], encode, LENGTH)
    hidden = step_(ours, cache, state, StepInput(torch.tensor([1]), run, more))
    cache, state = recorded
    others = told(state, [0, 2]), content(cache, [0, 2])
    step = Recorded(ours, cache, state, 4, LENGTH if encode else 0)
    encoded = step([1], [9], [encode], tokens if encode else None)
    assert same(told(state, [0, 2]), others[0])
    assert same(content(cache, [0, 2]), others[1])
    assert same(told(state, [1]), told(plain[1], [1]), SAME)
    assert same(content(cache, [1]), content(plain[0], [1]), SAME)
    assert (encoded is None) is (hidden is None) is (encode == 0)
    if encoded is not None and hidden is not None:
        assert encoded.shape == (1, LENGTH, CONFIG.hidden_size)
        assert same([encoded[:, :encode]], [hidden], SAME)


def test_rows_begin_as_they_are_allocated() -> None:
    """A seat that another request had: nothing of that is left, and its neighbour's state stays as it was."""
    ours, rules = talker(), [Rules.of(o) for o in (SETTLES, Options(max_steps=3, stability=2, entropy_bound=0.3))]
    seeds, early, length = [2**40 + 5, 3], [True, False], LENGTH
    wanted = Canvases.allocate(ours, rules, seeds, [0, 0], early=early)
    found = canvases(ours, 3)
    cache = cache_of(ours, [5, 9, 2])
    step_(ours, cache, found, StepInput(torch.arange(3), Pass(ours, cache, [0, 1, 2], [0] * 3, 0, LENGTH)))
    before = {f.name: getattr(found, f.name)[1].clone() for f in dataclasses.fields(Canvases) if "_X" in f.name}
    fresh, pins = torch.arange(2 * length).view(2, length), torch.full((2, length), -1)
    pins[1, 2] = 7
    found.seat_([2, 0], rules, seeds, early)
    for state, rows in (wanted, [0, 1]), (found, [2, 0]):
        state.begin_(rows, fresh, pins, [4, 5], pins == 7, [3, length])
    for name, neighbour in before.items():
        whole = getattr(found, name)
        assert torch.equal(whole[1], neighbour), name
        if name not in ("still_XL", "entropy_XL", "accepted_XL"):  # these are read only after a step has written them
            assert torch.equal(whole[[2, 0]], getattr(wanted, name)[:2]), name
    found.begin_([0], fresh[:1], None, [0])  # it had a pin and a ban
    assert torch.equal(found.canvas_XL[0], fresh[0]) and bool((found.pin_XL[0] == -1).all())
    assert not found.banned_XL[0].any()


# ---- dice on the host -----------------------------------------------------------------------------------------------


def test_dice_on_the_host_are_the_counted_ones() -> None:
    """Whoever is asked for when, beside whom, and on which seat; also where a seat changes hands."""
    draw, host = random.Random(3), HostNoise(7, 262144)
    seeds = {seat: draw.randrange(1 << 62) for seat in range(12)}
    for _ in range(60):
        seats = draw.sample(range(12), draw.randrange(1, 9))
        if draw.random() < 0.3:
            seeds[seats[0]] = draw.randrange(1 << 62)
        own = [seeds[seat] for seat in seats]
        counted = CountedNoise(own, [0] * len(own), 7, 262144)
        rows, canvases = list(range(len(own))), [draw.choice([0, 1, 1 << 33]) for _ in own]
        assert torch.equal(host.canvas(seats, own, canvases, draw.random() < 0.5), counted.canvas(rows, canvases))
        for _ in range(3):
            steps = [draw.choice([0, 1, 7, 8, 9, 4095]) for _ in own]
            uniform, noise = host.step(seats, own, canvases, steps)
            assert torch.equal(uniform, counted.sample(rows, canvases, steps)["uniform_BL"])
            assert torch.equal(noise, counted.renoise(rows, canvases, steps))
            assert uniform.dtype == torch.float32 and noise.dtype == torch.int64
        first = counted.sample(rows, canvases, [0] * len(own))["uniform_BL"][:, 0]
        assert torch.equal(first_uniform(own, canvases), first)


# ---- the engine's loop ----------------------------------------------------------------------------------------------

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


# ---- passes, counted ------------------------------------------------------------------------------------------------


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
    late = Counter(e.row for e in events if isinstance(e, Commit) and lag and e.steps < SETTLES.max_steps)
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
        assert bool(one.seats.last_XD.any()) is is_read


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
    for seed in (0, 1):
        one.join(requests.Request(PROMPTS[seed], dataclasses.replace(SETTLES, seed=seed, max_tokens=3 * LENGTH)))
    commits, turns = 0, 0
    with Reads():
        while one.live:
            commits, turns = commits + sum(isinstance(event, Commit) for event in one.turn()), turns + 1
    assert commits > 3 and copies == [(3, 4 + LENGTH)] * len(copies) and len(copies) <= turns


def test_no_request_changes_a_shape_that_is_everybodys() -> None:
    """The most steps, and the longest memory, that a request may ask for: what is recorded stays, no step takes longer
    for the others."""
    one = Engine(talker(), 2, 64, settings=EngineSettings(record=True))
    for options in SETTLES, Options(max_tokens=8, max_steps=4096, stability=4096, temperature_steps=4096):
        one.join(requests.Request([7, 8, 9], options))
        one.turn()
        shapes = {f.name: getattr(one.seats.canvases[LENGTH], f.name) for f in dataclasses.fields(Canvases)}
        if options is SETTLES:
            before, recorded = shapes, dict(one.seats.recordings._kept)
    assert all(before[name] is tensor for name, tensor in shapes.items() if isinstance(tensor, Tensor))
    assert all(one.seats.recordings._kept[key] is kept for key, kept in recorded.items())
    assert sum(tensor.numel() for name, tensor in shapes.items() if isinstance(tensor, Tensor)) < 3 * 2 * 4096
