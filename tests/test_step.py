"""A step and the passes it takes: masks as drawn, what a pass writes to the cache, encode and denoise in one pass, and
the engine's loop when it asks late, replays static buffers or runs other rows beside. On tiny models in float32."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from sfumato import engine
from sfumato import rows as requests
from sfumato import run as runs
from sfumato.cache import KVCache
from sfumato.diffusion import CountedDice, Rules
from sfumato.events import Commit, Done, Options
from sfumato.masks import Mask
from sfumato.model import Model, Pass
from sfumato.recorded import Recorded
from sfumato.run import Run, generate
from sfumato.step import Canvases, step_

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
    fresh = CountedDice(range(rows), zeros, LENGTH, CONFIG.vocab_size).canvas(every, zeros)
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
        step_(ours, cache, state, torch.arange(2), Pass(ours, cache, [0, 1], [0, 0], 0, LENGTH))
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
    hidden = step_(ours, cache, state, torch.tensor([1]), run, more)
    cache, state = recorded
    others = told(state, [0, 2]), content(cache, [0, 2])
    step = Recorded(ours, cache, state, 4, LENGTH if encode else 0)
    found = step([1], [9], [encode], tokens if encode else None)
    assert same(told(state, [0, 2]), others[0])
    assert same(content(cache, [0, 2]), others[1])
    assert same(told(state, [1]), told(plain[1], [1]), SAME)
    assert same(content(cache, [1]), content(plain[0], [1]), SAME)
    assert (found is None) is (hidden is None) is (encode == 0)
    if found is not None and hidden is not None:
        assert found.shape == (1, LENGTH, CONFIG.hidden_size)
        assert same([found[:, :encode]], [hidden], SAME)


# ---- the engine's loop ----------------------------------------------------------------------------------------------

PROMPTS = [text(length, 30 + length) for length in (4, 17, 9, 26)]


def each(**changes: Any) -> list[Options]:
    """Every row with a seed and a length of its own."""
    return [dataclasses.replace(SETTLES, seed=row, max_tokens=20 + 4 * row, **changes) for row in range(4)]


SORTS: list[dict[str, Any]] = [{"mode": "autoregressive"}, {"logprobs": True}, {}, {"min_tokens": 22}]
KINDS: dict[str, tuple[list[Options], dict[str, Any]]] = {
    "stopped early": (each(), {}),
    "capped": ([dataclasses.replace(o, max_steps=row + 1) for row, o in enumerate(each(confidence=0.0))], {}),
    "of all sorts": (
        [dataclasses.replace(o, **sort) for o, sort in zip(each(), SORTS, strict=True)],
        {"pins": [{}, {}, {3: 13}, {}], "chunk": 5},
    ),
}
WAYS: dict[str, dict[str, Any]] = {
    "asked late": {"lag": 1},
    "asked very late": {"lag": 3},
    "static": {"record": True},
    "static, asked late": {"record": True, "lag": 1},
}


def answers(ours: Model, prompts: Sequence[list[int]], options: list[Options], **more: Any) -> list[list[Any]]:
    """Each row's events, but for the row's number, times, passes and log-probabilities."""
    found: list[list[Any]] = [[] for _ in prompts]
    for event in generate(ours, prompts, options, **more):
        plain = dataclasses.replace(event, row=0, logprobs=None)
        if isinstance(plain, Done):
            usage = dataclasses.replace(plain.usage, seconds=0.0, first_commit_seconds=None, passes=0)
            plain = dataclasses.replace(plain, usage=usage)
        found[event.row].append(plain)
    return found


@functools.cache
def plainly(kind: str) -> list[list[Any]]:
    options, more = KINDS[kind]
    return answers(talker(), PROMPTS, options, **more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_no_way_of_stepping_changes_an_answer(way: str, kind: str) -> None:
    """Commits, steps, reasons and all: rows of different length and step counts, event for event."""
    options, more = KINDS[kind]
    assert answers(talker(), PROMPTS, options, **WAYS[way], **more) == plainly(kind)


def test_rows_stop_for_every_reason_at_different_steps() -> None:
    """The teeth of the test above."""
    steps = {kind: [[e.steps for e in row if isinstance(e, Commit)] for row in plainly(kind)] for kind in KINDS}
    assert all(set(row) == {cap} for cap, row in enumerate(steps["capped"], 1))
    early = {count for row in steps["stopped early"] for count in row}
    assert len(early) > 3
    assert len({tuple(row) for row in steps["stopped early"]}) == len(PROMPTS)
    assert {row[-1].finish_reason for row in plainly("stopped early")} == {"stop", "length"}
    changed = [one != two for one, two in zip(plainly("of all sorts"), plainly("stopped early"), strict=True)]
    assert changed == [True, False, True, True], "the prompt's chunks and log-probabilities alone change nothing"


@pytest.mark.parametrize("way", WAYS)
def test_no_way_of_stepping_changes_log_probabilities(way: str) -> None:
    def logprobs(**more: Any) -> list[Any]:
        events = generate(talker(), PROMPTS, each(logprobs=True), **more)
        done = {event.row: event.logprobs for event in events if isinstance(event, Done)}
        return [done[row] for row in range(len(PROMPTS))]

    for found, plain in zip(logprobs(**WAYS[way]), logprobs(), strict=True):
        assert found == pytest.approx(plain, abs=SAME)


@pytest.mark.parametrize("way", ["asked late", "static, asked late"])
def test_a_cache_that_grows_under_way_changes_nothing(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was recorded for the smaller cache is not replayed on it."""
    options = [dataclasses.replace(o, max_tokens=5 * LENGTH) for o in each()]
    wanted = answers(talker(), PROMPTS[:2], options[:2])
    monkeypatch.setattr(requests, "FIRST_ROOM", LENGTH)
    monkeypatch.setattr(runs, "ROUND", 1)
    run = Run(talker(), PROMPTS[:2], options[:2], **WAYS[way])
    small = run.cache.capacity
    tokens = {event.row: event.tokens for event in run if isinstance(event, Done)}
    assert tokens == {row: events[-1].tokens for row, events in enumerate(wanted)}
    assert run.cache.capacity > small
    for row, length in enumerate(run.cache.lengths):
        held = (PROMPTS[row] + tokens[row])[:length]
        fresh = KVCache.allocate(CONFIG, 1, run.cache.capacity)
        talker().encode(torch.tensor([held]), fresh)
        canvas = torch.tensor([text(LENGTH)])
        assert same([talker().denoise(canvas, run.cache, None, [row])], [talker().denoise(canvas, fresh)], SAME)


@pytest.mark.parametrize("name", tiny.OPS)
@pytest.mark.parametrize("way", [{}, WAYS["static, asked late"]], ids=["plain", "static, asked late"])
def test_a_rows_answer_does_not_depend_on_its_batch(name: str, way: dict[str, Any]) -> None:
    options, more = KINDS["of all sorts"]
    together = answers(talker(name), PROMPTS, options, **way, **more)
    for row, events in enumerate(together):
        alone = {**more, "pins": more["pins"][row : row + 1]}
        assert events == answers(talker(name), [PROMPTS[row]], [options[row]], **alone)[0]


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
    their own. Asked a step late, each canvas takes one more."""
    options, prompts = each(), [PROMPTS[row] for row in rows]
    events = list(generate(talker(), prompts, [options[row] for row in rows], chunk=chunk, lag=lag))
    usages = [event.usage for event in events if isinstance(event, Done)]
    canvases, steps = (sum(getattr(usage, name) for usage in usages) for name in ("canvases", "steps"))
    assert canvases > 2 * len(rows)
    assert passes["encode_and_denoise"] == canvases
    assert passes["encode_and_denoise"] + passes["denoise"] == steps + lag * canvases
    assert passes["encode"] == sum((len(prompt) - 1) // chunk for prompt in prompts)
    assert all(usage.passes == usage.steps + lag * usage.canvases for usage in usages)


def test_no_request_changes_a_shape_that_is_everybodys() -> None:
    """The most steps, and the longest memory, that a request may ask for: what is recorded stays, no step takes longer
    for the others."""
    one = engine.Engine(talker(), 2, 64, record=True)
    for options in SETTLES, Options(max_tokens=8, max_steps=4096, stability=4096, temperature_steps=4096):
        one.join(requests.Request([7, 8, 9], options))
        one.turn()
        shapes = {f.name: getattr(one.states[LENGTH], f.name) for f in dataclasses.fields(Canvases)}
        if options is SETTLES:
            before, recorded = shapes, dict(one.recordings._kept)
    assert all(before[name] is tensor for name, tensor in shapes.items() if isinstance(tensor, Tensor))
    assert all(one.recordings._kept[key] is kept for key, kept in recorded.items())
    assert sum(tensor.numel() for name, tensor in shapes.items() if isinstance(tensor, Tensor)) < 3 * 2 * 4096
