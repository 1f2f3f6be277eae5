"""engine/reading.py: what is read behind a prompt is what a pass over each canvas alone shows, whatever stands beside.

Brute force: encode prompt and question as one text, denoise the canvas with its pins, take the logits of the words."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import tiny
import torch

from sfumato.engine import reading
from sfumato.engine.batch import Batch
from sfumato.engine.engine import Engine
from sfumato.engine.limits import BatchLimits
from sfumato.engine.reads import Glance, Read, Readings, Reads
from sfumato.engine.request import Failure, Request, Row
from sfumato.errors import CapacityError, InputError, NumericError
from sfumato.events import Done, Event
from sfumato.model.cache import KVCache
from sfumato.model.network import Model
from sfumato.options import Options
from sfumato.sampling.noise import CountedNoise

CLOSE = 1e-4


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


def some_read(
    rng: random.Random, vocab: int, length: int, glances: int | None = None, tokens: int | None = None
) -> Read:
    own = tuple(rng.randrange(vocab) for _ in range(rng.randint(0, 20) if tokens is None else tokens))
    each = []
    for _ in range(rng.choice([1, 1, 2, 5]) if glances is None else glances):
        pins = tuple(rng.randrange(vocab) for _ in range(rng.randint(0, length - 1)))
        words = tuple(rng.sample(range(vocab), rng.randint(2, 6)))
        each.append(Glance(pins, words, rng.randrange(3)))
    return Read(own, tuple(each), length)


def prompt_of(rng: random.Random, vocab: int, length: int) -> list[int]:
    return [rng.randrange(vocab) for _ in range(length)]


@torch.inference_mode()
def brute(model: Model, prompt: Sequence[int], reads: Reads, seed: int) -> list[list[list[float]]]:
    """Each canvas alone, in passes of its own, with everything before it encoded as one text."""
    values = []
    for read in reads.each:
        cache = KVCache.allocate(model.config, 1, len(prompt) + len(read.tokens))
        model.encode(torch.tensor([[*prompt, *read.tokens]]), cache)
        noise = CountedNoise([seed], [0], read.length, model.config.vocab_size)
        values.append([glimpse(model, cache, one, noise, reads.steps) for one in read.glances])
    return values


def glimpse(model: Model, cache: KVCache, glance: Glance, noise: CountedNoise, steps: int) -> list[float]:
    soft, pins = None, torch.tensor([glance.pins], dtype=torch.long)
    for step in range(steps):
        canvas = noise.renoise([0], [glance.draw], [step]) if step else noise.canvas([0], [glance.draw])
        canvas[:, : pins.shape[1]] = pins
        hidden = model.denoise(canvas, cache, soft)
        logits = model.logits(hidden)
        soft = model.ops.soft_embedding(logits, model.embed_tokens.weight, model.embed_scale)
        soft[:, : pins.shape[1]] = model.embed_tokens(pins) * model.embed_scale
    return [float(logits[0, pins.shape[1], word]) for word in glance.words]


def row_of(model: Model, prompt: Sequence[int], reads: Reads, **more: object) -> tuple[Row, Readings]:
    readings = Readings()
    options = Options(seed=more.pop("seed", 5))  # type: ignore[arg-type]
    request = Request(list(prompt), options, marks=[len(prompt)], reads=reads, **more)  # type: ignore[arg-type]
    return Row.of(request, model.config, readings=readings), readings


def furthest(one: Sequence[Sequence[Sequence[float]]], two: Sequence[Sequence[Sequence[float]]]) -> float:
    pairs = zip(one, two, strict=True)
    lists = [pair for reads in pairs for pair in zip(*reads, strict=True)]
    return max(abs(a - b) for pair in lists for a, b in zip(*pair, strict=True))


def run(engine: Engine | Batch) -> list[Event | Failure]:
    events: list[Event | Failure] = []
    while engine.live if isinstance(engine, Engine) else not engine.is_idle:
        events += engine.turn()
    return events


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("ops", tiny.OPS)
def test_reads_are_what_each_canvas_alone_shows(ops: str, steps: int) -> None:
    """Prompts below, at and beyond the window; canvases shorter than the model's; reads that share their tokens."""
    model, rng = tiny.tiny_model(seed=4, name=ops), random.Random(steps)
    vocab, window = model.config.vocab_size, model.config.window
    for length in (window - 2, 3 * window + 1):
        prompt = prompt_of(rng, vocab, length)
        each = [some_read(rng, vocab, rng.randint(2, 8)) for _ in range(4)]
        each.append(some_read(rng, vocab, 8, glances=3, tokens=130))
        reads = Reads(tuple(each), steps)
        assert each[-1].is_copied
        row, readings = row_of(model, prompt, reads)
        engine = Engine(model)
        engine.join(row)
        (done,) = run(engine)
        assert isinstance(done, Done)
        assert furthest(readings.values, brute(model, prompt, reads, 5)) < steps * CLOSE
        assert engine.cache.lengths[0] == length
        assert done.usage.canvases == sum(len(read.glances) for read in each)
        assert done.usage.tokens == 0


@pytest.mark.parametrize("limit", [7, 100])
def test_a_turn_takes_no_more_than_its_share_and_nothing_changes(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads go on in the middle, in passes of any size, and with room for one copy."""
    monkeypatch.setattr(reading, "POSITIONS", limit)
    monkeypatch.setattr(reading, "CHUNK", 50)
    model, rng = tiny.tiny_model(seed=4), random.Random(9)
    vocab = model.config.vocab_size
    rows, expected = [], []
    for steps in (1, 2):
        prompt = prompt_of(rng, vocab, 17)
        each = [some_read(rng, vocab, 8, glances=4, tokens=100), *(some_read(rng, vocab, 4) for _ in range(3))]
        rows.append(row_of(model, prompt, Reads(tuple(each), steps)))
        expected.append(brute(model, prompt, Reads(tuple(each), steps), 5))
    engine = Engine(model, seats=3, capacity=32)
    engine.read_passes.room = KVCache.bytes_of(model.config, 1, 130, model.dtype)  # of one copy
    for row, _ in rows:
        engine.join(row)
    turns, done = 0, 0
    while engine.live:
        before = [row.positions_read for row, _ in rows]
        done += len(engine.turn())
        turns += 1
        own = [row.positions_read - one for (row, _), one in zip(rows, before, strict=True)]
        most = max(read.width * 2 for row, _ in rows for read in (row.request.reads or Reads(())).each)
        assert sum(own) < limit + most
    assert done == 2
    assert turns > 5
    for (_, readings), one in zip(rows, expected, strict=True):
        assert furthest(readings.values, one) < CLOSE
    assert not engine.read_passes._copies


def test_rows_take_their_reads_in_rounds() -> None:
    """A row with one read does not wait for a row with a hundred, whichever came first."""
    model, rng = tiny.tiny_model(seed=4), random.Random(1)
    vocab = model.config.vocab_size
    many = Reads(tuple(some_read(rng, vocab, 8, 1, 10) for _ in range(100)))
    few = Reads((some_read(rng, vocab, 8, 1, 10),))
    engine = Engine(model, seats=6, capacity=32)
    for reads in (many, many, few, few, few, few):
        engine.join(row_of(model, prompt_of(rng, vocab, 12), reads)[0])
    turns: list[set[int]] = []
    while engine.live:
        turns.append({event.row for event in engine.turn(prefill_limit=256)})
    assert turns[0] == {2, 3, 4, 5}
    assert turns[-1] & {0, 1}


def test_many_callers_share_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 callers, each a question or two, of one state and of their own: a few passes serve them all."""
    model, rng = tiny.tiny_model(seed=4), random.Random(2)
    vocab = model.config.vocab_size
    passes: list[int] = []
    inner = model.read

    def counted(*args: Any) -> Any:
        passes.append(len(args[4]))
        return inner(*args)

    monkeypatch.setattr(model, "read", counted)
    for is_shared in (True, False):
        batch, one = Batch(model, BatchLimits(rows=32, memory=1 << 28)), prompt_of(rng, vocab, 40)
        prompts = [one if is_shared else prompt_of(rng, vocab, 40) for _ in range(32)]
        rows = [
            row_of(model, prompt, Reads((some_read(rng, vocab, 8, 1, 12),)), id=str(n))
            for n, prompt in enumerate(prompts)
        ]
        passes.clear()
        for row, _ in rows:
            batch.submit(row)
        events = run(batch)
        assert len(events) == 32
        assert sum(passes) == 32
        assert len(passes) <= 3
        encoded = sum(40 - event.usage.reused_tokens for event in events if isinstance(event, Done))
        assert encoded == (40 if is_shared else 32 * 40)
        for (row, readings), prompt in list(zip(rows, prompts, strict=True))[::7]:
            assert row.request.reads is not None
            assert furthest(readings.values, brute(model, prompt, row.request.reads, 5)) < CLOSE


def test_chats_go_on_beside_a_huge_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """720 canvases to look at: a chat that has begun ends long before."""
    model, rng = tiny.tiny_model(seed=4), random.Random(3)
    vocab = model.config.vocab_size
    huge = Reads(tuple(some_read(rng, vocab, 8, 30, 60) for _ in range(24)))
    batch = Batch(model, BatchLimits(rows=4, memory=1 << 28))
    monkeypatch.setattr(batch.cost, "within", lambda seconds: 64)  # what a turn may take, whatever the machine's speed
    batch.submit(Request(prompt_of(rng, vocab, 12), Options(max_tokens=64, seed=1, max_steps=8), id="chat"))
    batch.turn()
    batch.submit(row_of(model, prompt_of(rng, vocab, 12), huge, id="huge")[0])
    ended: list[str] = []
    while not batch.is_idle:
        ended += [event.request for event in batch.turn() if isinstance(event, Done)]
    assert ended == ["chat", "huge"]


def test_a_cancelled_read_leaves_nothing() -> None:
    model, rng = tiny.tiny_model(seed=4), random.Random(3)
    vocab = model.config.vocab_size
    big = Reads((some_read(rng, vocab, 8, 500, 60),))
    batch = Batch(model, BatchLimits(rows=4, memory=1 << 28))
    for name in ("gone", "stays"):
        batch.submit(row_of(model, prompt_of(rng, vocab, 12), big, id=name)[0])
    batch.turn()
    batch.turn()
    batch.cancel("gone")
    (done,) = run(batch)
    assert isinstance(done, Done)
    assert done.request == "stays"
    assert not batch.engine.read_passes._copies


@pytest.mark.parametrize("ops", tiny.OPS)
def test_a_row_whose_numbers_are_not_finite_fails_alone(ops: str) -> None:
    """The embedding of one word is not a number: whoever asks for it fails, and whoever does not is right."""
    model = tiny.tiny_model(seed=4, name=ops)
    vocab = model.config.vocab_size
    prompt = [n % (vocab - 1) for n in range(12)]
    good = Reads((Read((3, 4), (Glance((), (5, 6)), Glance((5,), (7, 8))), 8),))
    bad = Reads((Read((3, 4), (Glance((), (5, vocab - 1)),), 8),))
    expected = brute(model, prompt, good, 0)
    model.embed_tokens.weight.data[vocab - 1] = torch.nan
    noise = CountedNoise([0], [0], 8, vocab).canvas([0], [0])
    assert vocab - 1 not in noise
    rows = [row_of(model, prompt, reads, seed=0, id=name) for reads, name in ((good, "good"), (bad, "bad"))]
    batch = Batch(model, BatchLimits(rows=4, memory=1 << 28))
    for row, _ in rows:
        batch.submit(row)
    events = {event.request: event for event in run(batch)}
    failure = events["bad"]
    assert isinstance(failure, Failure)
    assert isinstance(failure.error, NumericError)
    assert "in a read" in str(failure.error)
    assert isinstance(events["good"], Done)
    assert furthest(rows[0][1].values, expected) < CLOSE


def test_what_has_no_room_is_refused() -> None:
    model = tiny.tiny_model(seed=4)
    reads = Reads((Read(tuple(range(50)), (Glance((), (1, 2)),), 8),))
    with pytest.raises(CapacityError, match="beyond the context of 256; shorten the prompt"):
        row_of(model, [1] * 200, reads)
    row, _ = row_of(model, [1] * 60, reads)
    with pytest.raises(CapacityError, match="canvas 58, beyond the context of 100; shorten the prompt or"):
        Batch(model, BatchLimits(context=100)).submit(row)
    with pytest.raises(InputError, match="a read needs a canvas, and Gemma 4 has none"):
        config = tiny.tiny_config(is_diffusion=False)
        Row.of(Request([1], Options(seed=5, mode="autoregressive"), reads=reads), config)


def test_memory_counts_the_copies() -> None:
    """A request whose reads copy the cache needs room for its prompt twice."""
    model = tiny.tiny_model(seed=4)
    reads = Reads((Read(tuple(range(50)) * 2, tuple(Glance((n,), (1, 2)) for n in range(4)), 8),))
    batch = Batch(model, BatchLimits(rows=2, memory=1 << 28))
    one = batch._bytes(1, 256)
    tight = Batch(model, BatchLimits(rows=2, memory=one + 1))
    with pytest.raises(CapacityError, match="memory"):
        tight.submit(row_of(model, [1] * 100, reads)[0])
    enough = one + KVCache.bytes_of(model.config, 1, 200, model.dtype)
    fits = Batch(model, BatchLimits(rows=2, memory=max(enough, one * 16 // 15 + 1)))
    row, readings = row_of(model, [1] * 100, reads)
    fits.submit(row)
    run(fits)
    assert furthest(readings.values, brute(model, [1] * 100, reads, 5)) < CLOSE
