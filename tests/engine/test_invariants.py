"""What must hold whatever the model says: chunks, batches, caches, seeds, limits. On a tiny model with every feature.

Equal means: within float32 rounding for numbers (SAME), exactly for tokens and for the bytes of a cache.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfumato.engine import request as requests
from sfumato.engine import run as runs
from sfumato.engine.engine import EngineSettings
from sfumato.engine.request import Request, Row
from sfumato.engine.run import Run, generate
from sfumato.errors import CapacityError, InputError
from sfumato.events import Commit, Done, Draft
from sfumato.model.cache import KVCache
from sfumato.model.network import Model
from sfumato.ops.reference import inverse_cdf
from sfumato.options import Options
from sfumato.sampling.noise import CountedNoise
from sfumato.sampling.rules import Rules, Schedule, accept, count_still, is_confident, is_stable, pick_token

SAME = 1e-4
CONFIG = tiny.tiny_config()
WINDOW, LENGTH = CONFIG.window, CONFIG.canvas_length
OPS = tiny.OPS


def examples(count: int) -> settings:
    """Drawn anew on every change of the test, but the same on every run: the engine's floats are no coin to toss."""
    return settings(max_examples=count, deadline=None, derandomize=True)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


@functools.cache
def model(name: str = "reference") -> Model:
    return tiny.tiny_model(CONFIG, seed=3, name=name)


@functools.cache
def talker(eos: tuple[int, ...] = (), seed: int = 1, max_position: int = 256) -> Model:
    """A model whose canvases settle after a few steps."""
    config = tiny.tiny_config(eos_ids=eos, max_position=max_position)
    return tiny.tiny_model(config, seed=seed, name="fused", sharp=3.0, mix=0.2)


SETTLES = Options(max_steps=8, entropy_bound=0.5, confidence=0.5)


def text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(6, CONFIG.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def canvases(rows: int, seed: int = 0) -> Tensor:
    return torch.tensor([text(LENGTH, 100 * seed + row) for row in range(rows)])


def encode(ours: Model, tokens: Sequence[int], cache: KVCache | None = None) -> KVCache:
    """One row, one pass."""
    cache = cache or KVCache.allocate(ours.config, 1, 64)
    ours.encode(torch.tensor([list(tokens)]), cache)
    return cache


def seen(ours: Model, cache: KVCache, rows: list[int] | None = None) -> Tensor:
    """What a denoise pass makes of the cache: the same fixed canvas in every row."""
    count = cache.batch if rows is None else len(rows)
    return ours.denoise(canvases(1).expand(count, -1), cache, None, rows)


def near(one: Tensor, two: Tensor, limit: float = SAME) -> bool:
    assert one.shape == two.shape
    return bool(one.isfinite().all()) and float((one - two).abs().max()) < limit


def content(cache: KVCache) -> list[Tensor]:
    return [tensor.clone() for tensor in (*cache.k, *cache.v)]


def unchanged(cache: KVCache, before: list[Tensor]) -> bool:
    return all(torch.equal(one, two) for one, two in zip((*cache.k, *cache.v), before, strict=True))


# ---- passes and the cache -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPS)
@examples(15)
@given(data=st.data())
def test_any_chunking_of_ragged_rows_is_one_pass(name: str, data: st.DataObject) -> None:
    """Each row has its own length and its own chunks; passes pad with tokens that must never be seen."""
    ours = model(name)
    chunks = data.draw(st.lists(st.lists(st.integers(1, 3 * WINDOW), min_size=1, max_size=4), min_size=1, max_size=3))
    junk = data.draw(st.integers(0, CONFIG.vocab_size - 1))
    texts = [text(sum(parts), seed=row) for row, parts in enumerate(chunks)]
    cache = KVCache.allocate(CONFIG, len(texts), max(map(len, texts)))
    hidden: list[list[Tensor]] = [[] for _ in texts]
    for turn in range(max(map(len, chunks))):
        rows = [row for row, parts in enumerate(chunks) if len(parts) > turn]
        rows.reverse()  # the order of a pass's rows is free
        pieces = [texts[row][cache.lengths[row] :][: chunks[row][turn]] for row in rows]
        counts = [len(piece) for piece in pieces]
        padded = torch.tensor([piece + [junk] * (max(counts) - len(piece)) for piece in pieces])
        out = ours.encode(padded, cache, rows, counts)
        for place, row in enumerate(rows):
            hidden[row].append(out[place, : counts[place]])
    assert cache.lengths == [len(tokens) for tokens in texts]
    denoised = seen(ours, cache)
    for row, tokens in enumerate(texts):
        alone = KVCache.allocate(CONFIG, 1, len(tokens))
        assert near(torch.cat(hidden[row]), ours.encode(torch.tensor([tokens]), alone)[0])
        assert near(denoised[row : row + 1], seen(ours, alone))


@pytest.mark.parametrize("name", OPS)
def test_a_row_alone_is_the_row_in_a_batch(name: str) -> None:
    """Encode and denoise, with a soft embedding, for subsets and orders of the rows of one cache."""
    ours = model(name)
    texts = [text(length, length) for length in (3, 20, 7, 12)]
    cache = KVCache.allocate(CONFIG, 4, 40)
    for row, tokens in enumerate(texts):
        ours.encode(torch.tensor([tokens]), cache, [row])
    canvas = canvases(4, 1)
    soft = torch.randn(4, LENGTH, CONFIG.hidden_size, generator=torch.Generator().manual_seed(0))
    whole = ours.denoise(canvas, cache, soft)
    for rows in ([0], [3], [2, 0], [3, 1, 2, 0], [1, 3]):
        assert near(ours.denoise(canvas[rows], cache, soft[rows], rows), whole[rows])
    for row, tokens in enumerate(texts):
        assert near(ours.denoise(canvas[[row]], encode(ours, tokens), soft[[row]]), whole[[row]])


@pytest.mark.parametrize("name", OPS)
def test_no_soft_embedding_is_one_of_zeros(name: str) -> None:
    cache = encode(model(name), text(9))
    zeros = torch.zeros(1, LENGTH, CONFIG.hidden_size)
    ours = model(name)
    assert near(ours.denoise(canvases(1), cache), ours.denoise(canvases(1), cache, zeros), 1e-6)
    assert not near(ours.denoise(canvases(1), cache), ours.denoise(canvases(1), cache, zeros + 1), 0.1)


@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, 3 * WINDOW])
def test_denoise_leaves_every_byte_of_the_cache(length: int) -> None:
    ours = model()
    cache = KVCache.allocate(CONFIG, 2, 40)
    ours.encode(torch.tensor([text(length), text(length, 1)]), cache)
    before, lengths = content(cache), list(cache.lengths)
    for soft in (None, torch.ones(2, LENGTH, CONFIG.hidden_size)):
        ours.denoise(canvases(2), cache, soft)
        ours.denoise(canvases(1), cache, None if soft is None else soft[:1], [1])
    assert unchanged(cache, before)
    assert cache.lengths == lengths


@pytest.mark.parametrize("length", [2, WINDOW, 3 * WINDOW])
def test_encode_never_changes_what_denoise_read(length: int) -> None:
    """Neither in a fork taken before, nor in the other rows of the same cache."""
    ours = model()
    cache = KVCache.allocate(CONFIG, 2, 64)
    ours.encode(torch.tensor([text(length), text(length, 1)]), cache)
    read, read_row = seen(ours, cache), seen(ours, cache, [1])
    fork = cache.fork([0, 1])
    before = content(fork)
    for more in (1, WINDOW - 1, 2 * WINDOW):
        ours.encode(torch.tensor([text(more, 5)]), cache, [0])
        assert unchanged(fork, before)
        assert torch.equal(seen(ours, fork), read)
        assert torch.equal(seen(ours, cache, [1]), read_row)
    assert not near(seen(ours, cache, [0]), read[:1], 1e-3)


def test_padding_never_leaks() -> None:
    """Whatever stands behind a row's real tokens, and whatever the unseen slot holds: nothing changes."""
    ours = model()
    counts, out = [3, 2 * WINDOW + 1, 1], []
    for junk in (0, 17):
        cache = KVCache.allocate(CONFIG, 3, 40)
        for turn in range(2):
            padded = torch.full((3, max(counts)), junk)
            for row, count in enumerate(counts):
                padded[row, :count] = torch.tensor(text(count, 10 * turn + row))
            hidden = ours.encode(padded, cache, [0, 1, 2], counts)
        for tensor in (*cache.k, *cache.v):
            assert bool(tensor[:, -1].any()), "the unseen slot did take the padding"
            tensor[:, -1] = 1e9 * (junk + 1)
        read = torch.cat([hidden[row, :count] for row, count in enumerate(counts)])
        out.append((read, seen(ours, cache), ours.encode(torch.tensor([[9], [9], [9]]), cache)))
    assert all(near(one, two) for one, two in zip(*out, strict=True))


@examples(40)
@given(data=st.data())
def test_any_history_of_a_cache_reads_as_its_text(data: st.DataObject) -> None:
    """Encode, truncate, fork and grow in any order: what is held reads like a fresh encode of the text it stands for,
    and a truncation is either exact or refused."""
    ours = model("fused")
    slack = data.draw(st.sampled_from([0, 3, LENGTH]), "slack")
    capacity = data.draw(st.integers(WINDOW, 40), "capacity")
    cache = KVCache.allocate(CONFIG, 1, capacity, slack=slack)
    held: list[int] = []
    peak = 0
    for turn in range(data.draw(st.integers(1, 7), "turns")):
        act = data.draw(st.sampled_from(["encode", "encode", "truncate", "truncate", "fork", "grow"]), "act")
        if act == "encode":
            more = text(data.draw(st.integers(1, 2 * WINDOW), "more"), turn)
            if len(held) + len(more) > cache.capacity:
                with pytest.raises(CapacityError, match=f"room for {cache.capacity}"):
                    encode(ours, more, cache)
            else:
                encode(ours, more, cache)
                held += more
                peak = max(peak, len(held))
        elif act == "truncate":
            length = data.draw(st.integers(0, len(held)), "length")
            if cache.can_truncate(0, length):
                cache.truncate_(0, length)
                held = held[:length]
                peak = peak if held else 0
            else:
                # Refused only where something is lost: a window that reaches back beyond what the ring still holds.
                assert length > 0
                assert length < peak - slack
                assert peak > WINDOW - 1 + slack
                with pytest.raises(CapacityError, match=f"keep {slack} tokens"):
                    cache.truncate_(0, length)
        else:
            cache = cache.fork([0], cache.capacity + 9 if act == "grow" else None)
        assert cache.lengths == [len(held)]
    if held:
        assert near(seen(ours, cache), seen(ours, encode(ours, held, KVCache.allocate(CONFIG, 1, len(held)))))
        if len(held) < cache.capacity:
            fresh = KVCache.allocate(CONFIG, 1, len(held) + 1)
            encode(ours, held, fresh)
            assert near(ours.encode(torch.tensor([[7]]), cache), ours.encode(torch.tensor([[7]]), fresh))


def test_truncating_goes_back_as_far_as_the_slack() -> None:
    ours = model()
    tokens = text(30)
    for slack in (0, 4, LENGTH):
        for back in range(slack + 1):
            cache = encode(ours, tokens, KVCache.allocate(CONFIG, 1, 64, slack=slack))
            cache.truncate_(0, len(tokens) - back)
            encode(ours, [*tokens[len(tokens) - back :], 9], cache)
            assert near(seen(ours, cache), seen(ours, encode(ours, [*tokens, 9])))
        cache = encode(ours, tokens, KVCache.allocate(CONFIG, 1, 64, slack=slack))
        assert not cache.can_truncate(0, len(tokens) - slack - 1)
        with pytest.raises(CapacityError, match=f"row 0 holds 30 tokens and cannot go back to {29 - slack}"):
            cache.truncate_(0, len(tokens) - slack - 1)
        assert cache.lengths == [30]
        assert near(seen(ours, cache), seen(ours, encode(ours, tokens)))
    assert not cache.can_truncate(0, 31)
    assert not cache.can_truncate(0, -1)


def test_truncating_twice_is_no_way_around_the_slack() -> None:
    ours = model()
    cache = encode(ours, text(40), KVCache.allocate(CONFIG, 1, 64, slack=4))
    cache.truncate_(0, 36)
    assert not cache.can_truncate(0, 32)
    encode(ours, text(2, 1), cache)
    assert cache.can_truncate(0, 36)
    assert not cache.can_truncate(0, 35)
    encode(ours, text(20, 2), cache)
    cache.truncate_(0, 54)
    assert near(seen(ours, cache), seen(ours, encode(ours, (text(40)[:36] + text(2, 1) + text(20, 2))[:54])))


def test_a_short_row_goes_back_all_the_way() -> None:
    """Until the ring has turned once nothing is lost: a prompt that fits is reusable from its first token on."""
    ours = model()
    cache = encode(ours, text(WINDOW - 1 + LENGTH))
    for length in (5, 1, 0):
        cache.truncate_(0, length)
        assert cache.lengths == [length]
    encode(ours, text(9, 1), cache)
    assert near(seen(ours, cache), seen(ours, encode(ours, text(9, 1))))


@pytest.mark.parametrize("capacity", [None, 64])
def test_a_fork_is_independent_and_equal(capacity: int | None) -> None:
    """Rows in any order, repeated; larger or not; each goes its own way afterwards."""
    ours = model()
    texts = [text(5), text(25, 1)]
    cache = KVCache.allocate(CONFIG, 2, 40)
    for row, tokens in enumerate(texts):
        ours.encode(torch.tensor([tokens]), cache, [row])
    read, before = seen(ours, cache), content(cache)
    fork = cache.fork([1, 0, 1], capacity)
    assert fork.lengths == [25, 5, 25]
    assert fork.capacity == (capacity or 40)
    assert near(seen(ours, fork), read[[1, 0, 1]], 1e-5)
    for row in range(3):
        ours.encode(torch.tensor([text(10, 7 + row)]), fork, [row])
    fork.truncate_(0, 30)
    assert unchanged(cache, before)
    assert cache.lengths == [5, 25]
    expected = [(texts[1] + text(10, 7))[:30], texts[0] + text(10, 8), texts[1] + text(10, 9)]
    for row, tokens in enumerate(expected):
        assert near(seen(ours, fork, [row]), seen(ours, encode(ours, tokens)))
    before = content(fork)
    ours.encode(torch.tensor([text(4), text(4)]), cache)
    assert unchanged(fork, before)


def test_the_cache_says_when_it_is_full() -> None:
    ours = model()
    cache = encode(ours, text(20), KVCache.allocate(CONFIG, 1, 24))
    before = content(cache)
    with pytest.raises(CapacityError, match=r"would hold 25 tokens, the cache has room for 24; allocate more"):
        encode(ours, text(5), cache)
    assert unchanged(cache, before)
    assert cache.lengths == [20]
    encode(ours, text(4), cache)
    with pytest.raises(CapacityError, match=f"257 tokens of context .* limit is {CONFIG.max_position}"):
        KVCache.allocate(CONFIG, 1, 257)


def test_sliding_layers_take_only_their_ring() -> None:
    short, long = KVCache.allocate(CONFIG, 1, 40), KVCache.allocate(CONFIG, 1, 240)
    for layer, one, two in zip(CONFIG.layers, short.k, long.k, strict=True):
        assert one.shape[1] == (WINDOW - 1 + LENGTH if layer.is_sliding else 40) + 1
        assert two.shape[1] == (WINDOW - 1 + LENGTH if layer.is_sliding else 240) + 1
    assert short.bytes == sum(t.numel() * 4 for t in (*short.k, *short.v))


# ---- the engine ---------------------------------------------------------------------------------------------------


@dataclass
class Told:
    """What the engine said about one row."""

    drafts: list[Draft] = field(default_factory=list)
    commits: list[Commit] = field(default_factory=list)
    done: list[Done] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.done[0].tokens

    @property
    def reason(self) -> str:
        return self.done[0].finish_reason


def tell(
    ours: Model,
    prompts: Sequence[Sequence[int]],
    options: Options | Sequence[Options] = SETTLES,
    watch: Callable[[int, list[int]], int | None] | None = None,
    **more: Any,
) -> list[Told]:
    """Run to the end, and hold every run to what all runs have in common."""
    told = [Told() for _ in prompts]
    each = [options] * len(prompts) if isinstance(options, Options) else options
    rows: Sequence[Sequence[int] | Row] = prompts
    if watch is not None:
        requests = [Request(prompt, own) for prompt, own in zip(prompts, each, strict=True)]
        rows = [Row.of(request, ours.config, partial(watch, row)) for row, request in enumerate(requests)]
    for event in generate(ours, rows, options, **more):
        assert not torch.is_inference_mode_enabled(), "the engine's mode leaks into the caller's code"
        row = told[event.row]
        assert not row.done, "nothing after Done"
        {Draft: row.drafts, Commit: row.commits, Done: row.done}[type(event)].append(event)  # type: ignore[attr-defined]
    for row, wanted, prompt in zip(told, each, prompts, strict=True):
        (done,) = row.done
        length = ours.config.canvas_length
        assert done.tokens == [token for commit in row.commits for token in commit.tokens]
        assert not any(token in ours.config.eos_ids for token in done.tokens[:-1])
        if done.tokens and done.tokens[-1] in ours.config.eos_ids:
            assert done.finish_reason == "stop"
        assert done.usage.tokens == len(done.tokens)
        assert done.usage.prompt_tokens == len(prompt)
        assert len(prompt) + len(done.tokens) <= ours.config.max_position
        if wanted.max_tokens is not None:
            assert len(done.tokens) <= wanted.max_tokens
        assert (done.logprobs is not None) is wanted.logprobs
        assert len(row.drafts) == (done.usage.steps if wanted.drafts else 0)
        if wanted.mode != "autoregressive":
            assert all(len(commit.tokens) == length for commit in row.commits[:-1])
            assert [commit.canvas for commit in row.commits] == list(range(done.usage.canvases))
            assert sum(commit.steps for commit in row.commits) == done.usage.steps
            extra = sum(bool(commit.tokens) for commit in row.commits) if wanted.logprobs else 0
            assert done.usage.passes == done.usage.steps + extra  # a commit goes along with the next canvas's step
        else:
            assert done.usage.passes == done.usage.steps == len(row.commits)
    return told


PROMPTS = [text(length, 30 + length) for length in (4, 17, 9, 26)]
EACH = [dataclasses.replace(SETTLES, max_tokens=20 + 4 * row, seed=row, max_steps=6 + row) for row in range(4)]


@functools.cache
def alone(row: int) -> tuple[list[int], tuple[int, ...]]:
    (told,) = tell(talker((1, 5)), [PROMPTS[row]], EACH[row])
    return told.tokens, tuple(commit.steps for commit in told.commits)


@examples(15)
@given(rows=st.lists(st.integers(0, 3), min_size=1, max_size=6), chunk=st.sampled_from([1, 5, 2048]))
def test_the_same_seed_gives_the_same_text_in_any_batch(rows: list[int], chunk: int) -> None:
    """Any rows, any order, repeats; prompts, seeds, caps and limits of their own; prompts encoded in any chunks."""
    told = tell(
        talker((1, 5)), [PROMPTS[r] for r in rows], [EACH[r] for r in rows], settings=EngineSettings(chunk=chunk)
    )
    assert [(t.tokens, tuple(c.steps for c in t.commits)) for t in told] == [alone(r) for r in rows]


def test_rows_really_go_their_own_way() -> None:
    """The teeth of the test above: the rows differ in text, length and steps, and seeds matter."""
    texts = [alone(row) for row in range(4)]
    assert len({tuple(tokens) for tokens, _ in texts}) == 4
    assert len({steps for _, steps in texts}) == 4
    by_seed = {tuple(tell(talker(), [PROMPTS[0]], dataclasses.replace(EACH[0], seed=s))[0].tokens) for s in range(6)}
    assert len(by_seed) == 6


def test_a_mixed_batch_of_both_modes() -> None:
    sampled = Options(max_tokens=9, mode="autoregressive", seed=4, temperature=1.5)
    told = tell(talker((1, 5)), [PROMPTS[1], PROMPTS[0], PROMPTS[2]], [sampled, EACH[0], sampled])
    assert told[1].tokens == alone(0)[0]
    for row, prompt in ((0, PROMPTS[1]), (2, PROMPTS[2])):
        assert told[row].tokens == tell(talker((1, 5)), [prompt], sampled)[0].tokens


def test_the_cache_afterwards_holds_the_committed_text() -> None:
    """Cached equals recomputed, after a run with rows of different length and growth; and a chat goes on from it."""
    ours = talker()
    options = [dataclasses.replace(SETTLES, max_tokens=limit, seed=limit) for limit in (12, 44)]
    run = Run(ours, PROMPTS[:2], options, cache=KVCache.allocate(ours.config, 2, 30))
    answers = {event.row: event.tokens for event in run if isinstance(event, Done)}
    assert run.cache.lengths == [len(PROMPTS[0]) + 8, len(PROMPTS[1]) + 40]
    for row in range(2):
        whole = PROMPTS[row] + answers[row]
        held = whole[: run.cache.lengths[row]]
        assert near(seen(ours, run.cache, [row]), seen(ours, encode(ours, held, KVCache.allocate(CONFIG, 1, 99))))
    follow = [PROMPTS[row] + answers[row] + text(5, row) for row in range(2)]
    told = tell(ours, follow, SETTLES.with_defaults({"max_tokens": 16}), cache=run.cache)
    fresh = tell(ours, follow, SETTLES.with_defaults({"max_tokens": 16}))
    assert [t.tokens for t in told] == [t.tokens for t in fresh]
    assert [t.done[0].usage.reused_tokens for t in told] == [len(PROMPTS[0]) + 8, len(PROMPTS[1]) + 40]
    assert [t.done[0].usage.reused_tokens for t in fresh] == [0, 0]


@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
def test_max_tokens_cuts(mode: Any) -> None:
    options = dataclasses.replace(SETTLES, seed=3, mode=mode, max_tokens=3 * LENGTH)
    (whole,) = tell(talker(), PROMPTS[:1], options)
    assert len(whole.tokens) == 3 * LENGTH
    for limit in (1, 2, LENGTH - 1, LENGTH, LENGTH + 1, 3 * LENGTH - 1):
        (told,) = tell(talker(), PROMPTS[:1], dataclasses.replace(options, max_tokens=limit))
        assert told.tokens == whole.tokens[:limit]
        assert told.reason == "length"
        if mode == "diffusion":
            assert len(told.commits) == -(-limit // LENGTH)


def test_an_end_inside_a_canvas_ends_the_row() -> None:
    """A token of the free run is made the eos: the same text up to it, and no further, while another row goes on."""
    options = dataclasses.replace(SETTLES, seed=0, max_tokens=4 * LENGTH)
    free = [told.tokens for told in tell(talker(), PROMPTS[:3], options)]
    ended = 0
    for at in (LENGTH + 2, 2 * LENGTH - 1, 3 * LENGTH):
        eos = free[0][at]
        told = tell(talker((eos,)), PROMPTS[:3], options)
        for row, tokens in enumerate(free):
            stop = tokens.index(eos) + 1 if eos in tokens else len(tokens)
            assert told[row].tokens == tokens[:stop]
            assert told[row].reason == ("stop" if eos in tokens else "length")
            ended += eos in tokens and stop % LENGTH != 0
    assert ended >= 2
    # An eos that the token limit cuts off is no stop; one that just fits is.
    for limit, reason in ((free[0].index(eos), "length"), (free[0].index(eos) + 1, "stop")):
        (told_one,) = tell(talker((eos,)), PROMPTS[:1], dataclasses.replace(options, max_tokens=limit))
        assert (len(told_one.tokens), told_one.reason) == (limit, reason)


@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
@pytest.mark.parametrize("guard", [0, 1, 5, LENGTH, LENGTH + 3])
def test_min_tokens_guards_against_an_early_end(mode: Any, guard: int) -> None:
    """A model for which every token but one ends the turn: unguarded it answers with an end at once."""
    only = 7
    ours = talker(tuple(t for t in range(CONFIG.vocab_size) if t != only))
    options = dataclasses.replace(SETTLES, min_tokens=guard, mode=mode, max_tokens=4 * LENGTH, temperature=0.0)
    unguarded = tell(ours, PROMPTS, dataclasses.replace(options, min_tokens=0))
    assert all(told.tokens[0] != only and len(told.tokens) == 1 for told in unguarded)
    for prompt, told in zip(PROMPTS, tell(ours, PROMPTS, options), strict=True):
        assert told.tokens[:guard] == [only] * guard
        assert len(told.tokens) > guard
        if mode == "diffusion":
            assert told.reason == "stop"
        else:  # left alone behind the guard, it goes on as the model would
            assert told.tokens[guard : guard + 1] == greedy(ours, prompt + [only] * guard, 1)


def test_min_tokens_bans_only_the_ends() -> None:
    """In a run where no end comes early anyway the guard changes nothing."""
    options = dataclasses.replace(SETTLES, seed=1, max_tokens=20)
    assert not {1, 5} & set(tell(talker(), PROMPTS[:1], options)[0].tokens)
    plain, guarded = (tell(talker((1,)), PROMPTS[:1], dataclasses.replace(options, min_tokens=n))[0] for n in (0, 20))
    assert plain.tokens == guarded.tokens


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
def test_watch_ends_a_row(mode: Any, logprobs: bool) -> None:
    """The watch sees every committed token once, in order, and may keep any number of the last ones, even none."""
    options = dataclasses.replace(SETTLES, seed=5, mode=mode, max_tokens=3 * LENGTH, logprobs=logprobs)
    whole = [told.tokens for told in tell(talker(), PROMPTS[:2], options)]
    for stop in (0, 1, LENGTH - 1, LENGTH, LENGTH + 3, 2 * LENGTH):
        shown: dict[int, list[int]] = {0: [], 1: []}

        def watch(row: int, tokens: list[int], shown: Any = shown, stop: int = stop) -> int | None:
            before = len(shown[row])
            shown[row] += tokens
            return stop - before if row == 0 and len(shown[row]) > stop else None

        told = tell(talker(), PROMPTS[:2], options, watch)
        assert told[0].tokens == whole[0][:stop]
        assert told[0].reason == "stop"
        assert told[1].tokens == whole[1] == shown[1]
        assert told[1].reason == "length"
        assert shown[0] == whole[0][: len(shown[0])]
        if logprobs:
            assert len(told[0].done[0].logprobs or []) == stop
        shown[0] = []
        assert tell(talker(), PROMPTS[:1], options, watch)[0].tokens == whole[0][:stop]


def test_the_step_cap() -> None:
    for cap in (1, 2, 5):
        options = Options(max_tokens=3 * LENGTH, max_steps=cap, confidence=0.0)
        assert {c.steps for told in tell(talker(), PROMPTS, options) for c in told.commits} == {cap}
    told = tell(talker(), PROMPTS, dataclasses.replace(SETTLES, max_tokens=3 * LENGTH))
    steps = {commit.steps for row in told for commit in row.commits}
    assert min(steps) < 8
    assert max(steps) <= 8
    assert len(steps) > 2


@pytest.mark.parametrize("stability", [0, 1, 3])
def test_every_canvas_must_stand_still_anew(stability: int) -> None:
    """A network that always says the same: each canvas takes as many steps as stability asks, the second one too."""
    ours = tiny.tiny_model(tiny.tiny_config(eos_ids=()), name="fused")
    ours.norm.weight.zero_()
    options = Options(max_tokens=4 * LENGTH, max_steps=9, stability=stability, confidence=5.0)
    for told in tell(ours, PROMPTS[:2], [options, dataclasses.replace(options, stability=2, confidence=4.0)]):
        assert told.tokens == [0] * 4 * LENGTH
        # Entropies are log 61, about 4.11: sure enough for the first row, never for the second.
        assert [commit.steps for commit in told.commits] == [stability + 1 if told.done[0].row == 0 else 9] * 4


def test_the_schedule_does_not_depend_on_the_cap() -> None:
    """A lower cap with temperature_steps kept sees the same first steps; by default it cools faster."""
    assert [Schedule(0.4, 0.8, 4).temperature(step) for step in range(4)] == pytest.approx([0.8, 0.7, 0.6, 0.5])
    assert [Schedule(0.4, 0.8, 4).temperature(step) for step in (4, 9)] == pytest.approx([0.5, 0.5])
    assert Rules.of(Options(max_steps=5)).schedule == Schedule(0.4, 0.8, 5)
    assert Rules.of(Options(max_steps=5, temperature_steps=48)).schedule == Schedule(0.4, 0.8, 48)
    assert Rules.of(Options(max_steps=60, temperature_steps=3)).schedule.temperature(59) == pytest.approx(0.4 + 0.4 / 3)
    long = Options(max_tokens=LENGTH, max_steps=12, confidence=0.0, drafts=True, t_max=1.5)
    short = dataclasses.replace(long, max_steps=4, temperature_steps=12)
    tied = dataclasses.replace(long, max_steps=4)
    first, same, other = (tell(talker(), PROMPTS[:1], options)[0].drafts[:4] for options in (long, short, tied))
    assert same == first
    assert other[0] == first[0]
    assert other != first


def test_a_schedule_beyond_the_cap_and_a_cap_beyond_the_schedule() -> None:
    """Every step of the engine is read out at its row's own temperature."""
    ours = talker()
    used: list[list[float]] = []

    def read_out(hidden: Tensor, embed: Tensor, softcap: float, temperature_B: Tensor, **more: Any) -> Any:
        used.append(temperature_B.tolist())
        return reference(hidden, embed, softcap, temperature_B, **more)

    reference = ours.ops.read_out
    spied = Model(ours.config, dataclasses.replace(ours.ops, read_out=read_out)).requires_grad_(False)
    spied.load_state_dict(ours.state_dict())
    base = Options(max_tokens=2 * LENGTH, max_steps=3, t_min=0.5, t_max=1.0, confidence=0.0)
    tell(spied, PROMPTS[:2], [base, dataclasses.replace(base, temperature_steps=2)])
    assert used == [pytest.approx(pair) for pair in [[1.0, 1.0], [5 / 6, 0.75], [4 / 6, 0.75]] * 2]


def test_drafts_show_every_step() -> None:
    options = dataclasses.replace(SETTLES, max_tokens=2 * LENGTH + 3, seed=2)
    told = tell(talker((1, 5)), PROMPTS, dataclasses.replace(options, drafts=True))
    for row, silent in zip(told, tell(talker((1, 5)), PROMPTS, options), strict=True):
        assert row.tokens == silent.tokens
        assert silent.drafts == []
        for commit in row.commits:
            drafts = [draft for draft in row.drafts if draft.canvas == commit.canvas]
            assert [draft.step for draft in drafts] == list(range(1, commit.steps + 1))
            assert drafts[-1].tokens[: len(commit.tokens)] == commit.tokens
            for draft in drafts:
                assert len(draft.tokens) == len(draft.entropies) == len(draft.accepted) == LENGTH
                assert all(type(token) is int and 0 <= token < CONFIG.vocab_size for token in draft.tokens)
                assert all(0 <= h < 4.2 for h in draft.entropies)  # log 61 is 4.11
                assert all(type(flag) is bool for flag in draft.accepted)
                assert draft.accepted[draft.entropies.index(min(draft.entropies))], "the surest one is always accepted"


@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
@pytest.mark.parametrize("guard", [0, 6])
def test_logprobs_are_those_of_a_fresh_encode(mode: Any, guard: int) -> None:
    """Of every committed token, in cut and in stopped answers, whatever the sampling did to the distribution."""
    eos = tuple(range(1, 25))  # so many that the guard has something to forbid
    options = [
        dataclasses.replace(SETTLES, seed=s, max_tokens=2 * LENGTH + 3, logprobs=True, mode=mode, min_tokens=guard)
        for s in range(4)
    ]
    ours = talker(eos)
    told = tell(ours, PROMPTS, options)
    assert {"stop", "length"} >= {row.reason for row in told}
    for row, prompt in zip(told, PROMPTS, strict=True):
        whole = prompt + row.tokens
        cache = KVCache.allocate(ours.config, 1, len(whole))
        log_p = ours.logits(ours.encode(torch.tensor([whole]), cache)).log_softmax(-1)[0]
        wanted = [float(log_p[len(prompt) + n - 1, token]) for n, token in enumerate(row.tokens)]
        assert row.done[0].logprobs == pytest.approx(wanted, abs=1e-3)
        assert row.done[0].logprobs == [p for commit in row.commits for p in commit.logprobs or []]
    silent = tell(ours, PROMPTS, [dataclasses.replace(o, logprobs=False) for o in options])
    assert [row.tokens for row in silent] == [row.tokens for row in told]
    assert all(commit.logprobs is None for row in silent for commit in row.commits)


# ---- the autoregressive baseline ----------------------------------------------------------------------------------


def greedy(ours: Model, prompt: list[int], count: int) -> list[int]:
    """Argmax after argmax, the whole text encoded anew for each token."""
    whole = list(prompt)
    for _ in range(count):
        cache = KVCache.allocate(ours.config, 1, len(whole))
        whole.append(int(ours.logits(ours.encode(torch.tensor([whole]), cache))[0, -1].argmax()))
    return whole[len(prompt) :]


def test_greedy_is_the_argmax_of_a_full_recompute() -> None:
    ours = talker()
    told = tell(ours, PROMPTS, Options(max_tokens=12, mode="autoregressive", temperature=0.0))
    assert [row.tokens for row in told] == [greedy(ours, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-3}, {"temperature": 1e-40}])
def test_the_narrowest_choice_is_greedy(narrow: dict[str, Any]) -> None:
    plain = Options(max_tokens=12, mode="autoregressive", temperature=2.0, seed=1)
    wide = [row.tokens for row in tell(talker(), PROMPTS, plain)]
    got = [row.tokens for row in tell(talker(), PROMPTS, dataclasses.replace(plain, **narrow))]
    assert got == [greedy(talker(), prompt, 12) for prompt in PROMPTS]
    assert got != wide


def test_a_token_is_picked_with_its_probability() -> None:
    """Over a fine grid of uniform numbers each token comes as often as temperature, top-k and top-p say."""
    logits = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0])
    grid = (torch.arange(2000) + 0.5) / 2000

    def shares(**options: Any) -> list[float]:
        count = Counter(pick_token(logits, Options(**options), uniform) for uniform in grid)
        return [count[token] / 2000 for token in range(5)]

    def wanted(temperature: float, kept: Sequence[int]) -> list[float]:
        p = torch.softmax(logits / temperature, -1) * torch.tensor([float(token in kept) for token in range(5)])
        return (p / p.sum()).tolist()

    everything = range(5)
    assert shares() == pytest.approx(wanted(1.0, everything), abs=2e-3)
    assert shares(temperature=2.5) == pytest.approx(wanted(2.5, everything), abs=2e-3)
    assert shares(top_k=2) == pytest.approx(wanted(1.0, [1, 3]), abs=2e-3)
    assert shares(top_k=50) == pytest.approx(wanted(1.0, everything), abs=2e-3)
    p = torch.softmax(logits, -1)
    assert shares(top_p=float(p[1]) + 1e-3) == pytest.approx(wanted(1.0, [1, 3]), abs=2e-3)
    assert shares(top_p=float(p[1]) - 1e-3) == pytest.approx(wanted(1.0, [1]), abs=2e-3)
    # top_p counts within what top_k left, as in transformers: 0.73 of the two best is the best alone.
    assert shares(top_k=2, top_p=0.73) == pytest.approx(wanted(1.0, [1]), abs=2e-3)
    assert shares(temperature=0.0) == [0, 1, 0, 0, 0]


# ---- length ------------------------------------------------------------------------------------------------------


def test_without_a_limit_the_answer_runs_to_the_end_of_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache grows on the way, and growth changes nothing."""
    ours = talker(max_position=100)
    for mode in ("diffusion", "autoregressive"):
        options = dataclasses.replace(SETTLES, seed=1, mode=mode)
        with monkeypatch.context() as small:
            small.setattr(requests, "FIRST_ROOM", 4 * LENGTH)
            small.setattr(runs, "ROUND", 1)
            run = Run(ours, PROMPTS[:2], options)
        assert run.cache.capacity == len(PROMPTS[1]) + 4 * LENGTH
        done = {event.row: event for event in run if isinstance(event, Done)}
        assert run.cache.capacity > len(PROMPTS[1]) + 4 * LENGTH
        limited = tell(ours, PROMPTS[:2], dataclasses.replace(options, max_tokens=90))
        for row, prompt in enumerate(PROMPTS[:2]):
            room = 100 - len(prompt)
            assert len(done[row].tokens) == (room // LENGTH * LENGTH if mode == "diffusion" else room)
            assert done[row].finish_reason == "length"
            assert limited[row].tokens == done[row].tokens[:90]


def test_a_prompt_must_leave_room_for_a_canvas() -> None:
    ours = talker(max_position=40)
    assert len(tell(ours, [text(40 - LENGTH)], SETTLES)[0].tokens) == LENGTH
    with pytest.raises(
        CapacityError, match=r"prompt 1 has 33 tokens and a canvas needs 8 more, beyond the context of 40"
    ):
        generate(ours, [text(4), text(41 - LENGTH)], SETTLES)
    assert len(tell(ours, [text(39)], Options(mode="autoregressive"))[0].tokens) == 1
    with pytest.raises(CapacityError, match="context of 40"):
        generate(ours, [text(40)], Options(mode="autoregressive"))


# ---- pins ---------------------------------------------------------------------------------------------------------


def test_pins_stay() -> None:
    """In every draft and in the commit, on the first canvas only; a row without pins is as if alone."""
    options = dataclasses.replace(SETTLES, max_tokens=2 * LENGTH, drafts=True, seed=9)
    free = tell(talker(), PROMPTS[:2], options)
    pins = {0: 11, 3: 12, LENGTH - 1: 13}
    assert not set(pins.values()) & set(free[0].tokens)
    told = tell(talker(), PROMPTS[:2], options, pins=[pins, {}])
    for draft in told[0].drafts:
        if draft.canvas == 0:
            assert all(draft.tokens[at] == token and draft.accepted[at] for at, token in pins.items())
            assert all(draft.entropies[at] == 0 for at in pins)
        else:
            assert [draft.tokens[at] for at in pins] != list(pins.values())
    assert all(told[0].tokens[at] == token for at, token in pins.items())
    assert told[0].tokens != free[0].tokens
    assert [draft.tokens for draft in told[1].drafts] == [draft.tokens for draft in free[1].drafts]
    assert told[1].commits == free[1].commits


def test_pinned_positions_are_seen_as_certain() -> None:
    """The network sees a pin at its place in every canvas, and as its exact embedding, not as what it guessed."""
    ours = talker()
    seen_canvases: list[Tensor] = []
    seen_soft: list[Tensor] = []
    denoise, both = ours.denoise, ours.encode_and_denoise

    class Spy(Model):
        def denoise(self, canvas_BL: Tensor, cache: KVCache, soft_BLD: Tensor | None = None, **more: Any) -> Tensor:
            seen_canvases.append(canvas_BL.clone())
            if soft_BLD is not None:
                seen_soft.append(soft_BLD.clone())
            return denoise(canvas_BL, cache, soft_BLD, **more)

        def encode_and_denoise(
            self, tokens_BT: Tensor, counts: Any, canvas_BL: Tensor, *more: Any, **named: Any
        ) -> Any:
            seen_canvases.append(canvas_BL.clone())
            return both(tokens_BT, counts, canvas_BL, *more, **named)

    spy = Spy(ours.config, ours.ops).requires_grad_(False)
    spy.load_state_dict(ours.state_dict())
    options = Options(max_tokens=LENGTH, max_steps=4, confidence=0.0)
    tell(spy, PROMPTS[:1], options, pins=[{2: 11, 5: 12}])
    assert len(seen_canvases) == 4
    assert len(seen_soft) == 3
    assert all(canvas[0, [2, 5]].tolist() == [11, 12] for canvas in seen_canvases)
    exact = ours.embed_tokens.weight[[11, 12]] * ours.embed_scale
    assert all(torch.equal(soft[0, [2, 5]], exact) for soft in seen_soft)


def test_a_canvas_of_pins_is_that_canvas() -> None:
    tokens = text(LENGTH, 77)
    (told,) = tell(
        talker(), PROMPTS[:1], dataclasses.replace(SETTLES, max_tokens=LENGTH), pins=[dict(enumerate(tokens))]
    )
    assert told.tokens == tokens
    assert told.commits[0].steps == 2  # stable at its second step


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "more", "sentence"),
    [
        ([], {}, r"0 prompts with 0 sets of options"),
        ([[3], [4]], {"options": [Options()]}, r"2 prompts with 1 sets of options; give one set for each prompt"),
        ([[3], []], {}, r"prompt 1 is empty; give at least one token"),
        ([[3, 61]], {}, r"prompt 0 holds token 61; the vocabulary has ids from 0 to 60"),
        ([[3, -1]], {}, r"prompt 0 holds token -1; the vocabulary has ids from 0 to 60"),
        ([[3]], {"pins": [{10**6: 1}]}, r"pin 1 at position 1000000 of prompt 0 .* positions go to \d+, tokens to 60"),
        ([[3]], {"pins": [{0: 61}]}, r"pin 61 at position 0 of prompt 0 does not fit"),
    ],
)
def test_bad_input_is_named_before_any_work(prompts: Any, more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        generate(talker(), prompts, **more)


def test_a_cache_that_holds_the_whole_prompt_is_refused() -> None:
    ours = talker()
    cache = encode(ours, PROMPTS[0])
    with pytest.raises(InputError, match=r"the cache holds 4 tokens of a prompt of 4; truncate it to fewer first"):
        generate(ours, PROMPTS[:1], SETTLES, cache=cache)


def test_an_abandoned_run_leaves_no_mode_behind() -> None:
    events = generate(talker(), PROMPTS[:1], SETTLES)
    next(events)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


# ---- the rules ----------------------------------------------------------------------------------------------------


@examples(100)
@given(entropies=st.lists(st.integers(0, 32), min_size=1, max_size=12), bound=st.integers(0, 64))
def test_accept_takes_the_surest_while_those_before_fit(entropies: list[int], bound: int) -> None:
    """Against the plain rule, one position after the other; in eighths, whose float sums are exact."""
    ordered = sorted(entropies)
    count = sum(sum(ordered[:n]) <= bound for n in range(len(ordered)))
    got = accept(torch.tensor([entropies]) / 8, torch.tensor([bound]) / 8)[0].tolist()
    assert sorted(entropy for entropy, flag in zip(entropies, got, strict=True) if flag) == ordered[:count]


def test_stable_looks_back_as_far_as_asked() -> None:
    canvas = torch.tensor([[1, 2]] * 5)
    same, other, none = [1, 2], [1, 3], [-1, -1]
    history = torch.tensor([[same, same], [other, same], [none, same], [same, other], [none, none]])
    seen, last = torch.zeros_like(canvas), torch.full_like(canvas, -1)
    for step in (*history.unbind(1), canvas):
        seen, last = count_still(step, last, seen), step
    assert is_stable(seen, torch.full((5,), 1)).tolist() == [True, True, True, False, False]
    assert is_stable(seen, torch.full((5,), 2)).tolist() == [True, False, False, False, False]
    assert is_stable(seen, torch.full((5,), 0)).tolist() == [True] * 5
    assert is_stable(seen, torch.tensor([2, 1, 2, 0, 1])).tolist() == [True, True, False, True, False]


def test_confident_is_strictly_below() -> None:
    entropies = torch.tensor([[0.25, 0.75], [0.0, 0.0], [0.25, 0.75]])
    assert is_confident(entropies, torch.tensor([0.5, 0.0, 0.51])).tolist() == [False, False, True]


# ---- dice ---------------------------------------------------------------------------------------------------------


def dice(
    seeds: Sequence[int] = (0,), requests: Sequence[int] | None = None, length: int = 64, v: int = 61
) -> CountedNoise:
    return CountedNoise(seeds, requests or [0] * len(seeds), length, v)


def chi_square(counts: Tensor) -> float:
    """How many standard deviations the chi-square statistic lies from its mean: beyond 5 never happens by chance."""
    expected = counts.sum() / counts.numel()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return abs(statistic - (counts.numel() - 1)) / (2 * (counts.numel() - 1)) ** 0.5


@pytest.mark.parametrize("vocabulary", [2, 61, 262_144])
def test_tokens_are_uniform(vocabulary: int) -> None:
    d = dice(v=vocabulary)
    steps = list(range(400))
    for tokens in (
        d.renoise([0] * 400, [0] * 400, steps),
        d.canvas([0] * 400, steps),
        d.renoise([0] * 400, steps, steps),
    ):
        assert tokens.dtype == torch.int64
        assert tokens.shape == (400, 64)
        assert int(tokens.min()) >= 0
        assert int(tokens.max()) < vocabulary
        bins = torch.bincount((tokens.flatten() * min(vocabulary, 61)) // vocabulary, minlength=min(vocabulary, 61))
        assert chi_square(bins.float()) < 5
        for position in (0, 63):  # and at each position by itself, over the steps
            bins = torch.bincount(tokens[:, position] * 2 // vocabulary, minlength=2)
            assert chi_square(bins.float()) < 5


def test_uniforms_are_uniform() -> None:
    uniform = dice().sample([0] * 400, [1] * 400, list(range(400)))["uniform_BL"]
    assert uniform.dtype == torch.float32
    assert float(uniform.min()) >= 0
    assert float(uniform.max()) < 1
    assert chi_square(torch.histc(uniform, 100, 0, 1)) < 5
    pairs = (uniform[:, :-1] * 10).long() * 10 + (uniform[:, 1:] * 10).long()
    assert chi_square(torch.bincount(pairs.flatten(), minlength=100).float()) < 5
    pairs = (uniform[:-1] * 10).long() * 10 + (uniform[1:] * 10).long()
    assert chi_square(torch.bincount(pairs.flatten(), minlength=100).float()) < 5


def test_every_place_has_its_own_noise() -> None:
    """Seeds (beyond 32 bits too), requests, canvases, steps and the three streams: no two share their noise."""
    seeds = [0, 1, 2, 1 << 32, (1 << 32) + 1, 1 << 61, 1 << 62]
    vocabulary = 1 << 20
    drawn: dict[tuple[Any, ...], Tensor] = {}
    for seed in seeds:
        for request in (0, 1, 7):
            d = dice([seed], [request], v=vocabulary)
            for canvas in (0, 1, 2, 30):
                drawn["canvas", seed, request, canvas] = d.canvas([0], [canvas])[0]
                for step in (0, 1, 2, 47):
                    drawn["renoise", seed, request, canvas, step] = d.renoise([0], [canvas], [step])[0]
                    uniform = d.sample([0], [canvas], [step])["uniform_BL"][0]
                    drawn["sample", seed, request, canvas, step] = (uniform * vocabulary).long()
    every = torch.stack(list(drawn.values()))
    assert len(every.unique(dim=0)) == len(drawn) == len(seeds) * 3 * 4 * 9
    # 48,384 numbers of 20 bits: about 1,100 coincidences by chance; shared noise would make whole rows of them.
    coincidences = every.numel() - every.unique().numel()
    assert coincidences < 1400
    shifted = every[:, :-1].unsqueeze(1) == every[:60, 1:].unsqueeze(0)  # nor is one place another's neighbour
    assert int(shifted.all(-1).sum()) == 0


@examples(30)
@given(rows=st.lists(st.integers(0, 4), min_size=1, max_size=8), canvas=st.integers(0, 9), step=st.integers(0, 47))
def test_noise_does_not_depend_on_the_batch(rows: list[int], canvas: int, step: int) -> None:
    seeds, requests = [5, 9, 1 << 40, 5, 0], [0, 0, 3, 1, 2]
    d = dice(seeds, requests)
    places = [canvas + n for n in range(len(rows))], [step + 2 * n for n in range(len(rows))]
    together = (d.canvas(rows, places[0]), d.renoise(rows, *places), d.sample(rows, *places)["uniform_BL"])
    for n, row in enumerate(rows):
        one = dice([seeds[row]], [requests[row]])
        c, s = [places[0][n]], [places[1][n]]
        assert torch.equal(together[0][n], one.canvas([0], c)[0])
        assert torch.equal(together[1][n], one.renoise([0], c, s)[0])
        assert torch.equal(together[2][n], one.sample([0], c, s)["uniform_BL"][0])


def test_noise_is_what_it_was() -> None:
    """A seed is a promise across versions and machines: these numbers never change."""
    d = dice([1234567890123], [2], length=6)
    assert d.canvas([0], [0])[0].tolist() == FROZEN["canvas"]
    assert d.renoise([0], [3], [7])[0].tolist() == FROZEN["renoise"]
    assert (d.sample([0], [3], [7])["uniform_BL"][0] * 2**24).long().tolist() == FROZEN["sample"]


FROZEN = {
    "canvas": [12, 36, 21, 57, 50, 49],
    "renoise": [42, 15, 57, 48, 59, 30],
    "sample": [2969677, 12074727, 2159499, 6509112, 1036879, 11069452],
}


def test_the_inverse_of_the_distribution() -> None:
    """Over a fine grid each token comes with its probability; impossible tokens never, at either end."""
    p = torch.tensor([0.0, 0.3, 0.0, 0.45, 0.25, 0.0])
    grid = torch.cat([torch.tensor([0.0]), (torch.arange(4000) + 0.5) / 4000, torch.tensor([1 - 2**-24])])
    got = inverse_cdf(p.expand(1, len(grid), -1), grid[None])[0]
    assert torch.bincount(got, minlength=6).tolist() == [0, 1201, 0, 1800, 1001, 0]
    assert bool((got.diff() >= 0).all())


# ---- arguments that do not fit together ------------------------------------------------------------------------------


def test_pins_and_cache_must_fit_the_prompts() -> None:
    model = tiny.tiny_model()
    with pytest.raises(InputError, match="1 prompts came with 2 sets of pins"):
        Run(model, [[3, 4]], Options(max_tokens=8), pins=[{}, {}])
    cache = KVCache.allocate(model.config, 3, 64)
    with pytest.raises(InputError, match="a cache of 3 rows"):
        Run(model, [[3, 4]], Options(max_tokens=8), cache=cache)
    with pytest.raises(InputError, match="autoregressive"):
        Run(model, [[3, 4]], Options(max_tokens=8, mode="autoregressive"), pins=[{0: 7}])
