"""model/cache.py: what a pass writes, how rows go back, are copied and grow."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import (
    CONFIG,
    LENGTH,
    WINDOW,
    content,
    encoded,
    examples,
    keys_and_values,
    model,
    near,
    padded,
    probe,
    same,
    talker,
    text,
    unchanged,
)

from sfumato.errors import CapacityError
from sfumato.model.cache import KVCache
from sfumato.model.passes import Pass, Places


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


@pytest.mark.parametrize("length", [2, WINDOW, 3 * WINDOW])
def test_encode_never_changes_what_denoise_read(length: int) -> None:
    """Neither in a fork taken before, nor in the other rows of the same cache."""
    ours = model()
    cache = KVCache.allocate(CONFIG, 2, 64)
    ours.encode(torch.tensor([text(length), text(length, 1)]), cache)
    read, read_row = probe(ours, cache), probe(ours, cache, [1])
    fork = cache.fork([0, 1])
    before = content(fork)
    for more in (1, WINDOW - 1, 2 * WINDOW):
        ours.encode(torch.tensor([text(more, 5)]), cache, [0])
        assert unchanged(fork, before)
        assert torch.equal(probe(ours, fork), read)
        assert torch.equal(probe(ours, cache, [1]), read_row)
    assert not near(probe(ours, cache, [0]), read[:1], 1e-3)


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
                    encoded(ours, more, cache)
            else:
                encoded(ours, more, cache)
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
        assert near(probe(ours, cache), probe(ours, encoded(ours, held, KVCache.allocate(CONFIG, 1, len(held)))))
        if len(held) < cache.capacity:
            fresh = KVCache.allocate(CONFIG, 1, len(held) + 1)
            encoded(ours, held, fresh)
            assert near(ours.encode(torch.tensor([[7]]), cache), ours.encode(torch.tensor([[7]]), fresh))


def test_truncating_goes_back_as_far_as_the_slack() -> None:
    ours = model()
    tokens = text(30)
    for slack in (0, 4, LENGTH):
        for back in range(slack + 1):
            cache = encoded(ours, tokens, KVCache.allocate(CONFIG, 1, 64, slack=slack))
            cache.truncate_(0, len(tokens) - back)
            encoded(ours, [*tokens[len(tokens) - back :], 9], cache)
            assert near(probe(ours, cache), probe(ours, encoded(ours, [*tokens, 9])))
        cache = encoded(ours, tokens, KVCache.allocate(CONFIG, 1, 64, slack=slack))
        assert not cache.can_truncate(0, len(tokens) - slack - 1)
        with pytest.raises(CapacityError, match=f"row 0 holds 30 tokens and cannot go back to {29 - slack}"):
            cache.truncate_(0, len(tokens) - slack - 1)
        assert cache.lengths == [30]
        assert near(probe(ours, cache), probe(ours, encoded(ours, tokens)))
    assert not cache.can_truncate(0, 31)
    assert not cache.can_truncate(0, -1)


def test_truncating_twice_is_no_way_around_the_slack() -> None:
    ours = model()
    cache = encoded(ours, text(40), KVCache.allocate(CONFIG, 1, 64, slack=4))
    cache.truncate_(0, 36)
    assert not cache.can_truncate(0, 32)
    encoded(ours, text(2, 1), cache)
    assert cache.can_truncate(0, 36)
    assert not cache.can_truncate(0, 35)
    encoded(ours, text(20, 2), cache)
    cache.truncate_(0, 54)
    assert near(probe(ours, cache), probe(ours, encoded(ours, (text(40)[:36] + text(2, 1) + text(20, 2))[:54])))


def test_a_short_row_goes_back_all_the_way() -> None:
    """Until the ring has turned once nothing is lost: a prompt that fits is reusable from its first token on."""
    ours = model()
    cache = encoded(ours, text(WINDOW - 1 + LENGTH))
    for length in (5, 1, 0):
        cache.truncate_(0, length)
        assert cache.lengths == [length]
    encoded(ours, text(9, 1), cache)
    assert near(probe(ours, cache), probe(ours, encoded(ours, text(9, 1))))


@pytest.mark.parametrize("capacity", [None, 64])
def test_a_fork_is_independent_and_equal(capacity: int | None) -> None:
    """Rows in any order, repeated; larger or not; each goes its own way afterwards."""
    ours = model()
    texts = [text(5), text(25, 1)]
    cache = KVCache.allocate(CONFIG, 2, 40)
    for row, tokens in enumerate(texts):
        ours.encode(torch.tensor([tokens]), cache, [row])
    read, before = probe(ours, cache), content(cache)
    fork = cache.fork([1, 0, 1], capacity)
    assert fork.lengths == [25, 5, 25]
    assert fork.capacity == (capacity or 40)
    assert near(probe(ours, fork), read[[1, 0, 1]], 1e-5)
    for row in range(3):
        ours.encode(torch.tensor([text(10, 7 + row)]), fork, [row])
    fork.truncate_(0, 30)
    assert unchanged(cache, before)
    assert cache.lengths == [5, 25]
    expected = [(texts[1] + text(10, 7))[:30], texts[0] + text(10, 8), texts[1] + text(10, 9)]
    for row, tokens in enumerate(expected):
        assert near(probe(ours, fork, [row]), probe(ours, encoded(ours, tokens)))
    before = content(fork)
    ours.encode(torch.tensor([text(4), text(4)]), cache)
    assert unchanged(fork, before)


def test_the_cache_says_when_it_is_full() -> None:
    ours = model()
    cache = encoded(ours, text(20), KVCache.allocate(CONFIG, 1, 24))
    before = content(cache)
    with pytest.raises(CapacityError, match=r"would hold 25 tokens, the cache has room for 24; allocate more"):
        encoded(ours, text(5), cache)
    assert unchanged(cache, before)
    assert cache.lengths == [20]
    encoded(ours, text(4), cache)
    with pytest.raises(CapacityError, match=f"257 tokens of context .* limit is {CONFIG.max_position}"):
        KVCache.allocate(CONFIG, 1, 257)


def test_sliding_layers_take_only_their_ring() -> None:
    short, long = KVCache.allocate(CONFIG, 1, 40), KVCache.allocate(CONFIG, 1, 240)
    for layer, one, two in zip(CONFIG.layers, short.k, long.k, strict=True):
        assert one.shape[1] == (WINDOW - 1 + LENGTH if layer.is_sliding else 40) + 1
        assert two.shape[1] == (WINDOW - 1 + LENGTH if layer.is_sliding else 240) + 1
    assert short.bytes == sum(t.numel() * 4 for t in (*short.k, *short.v))


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
    places = Places(torch.tensor(rows), torch.tensor(lengths)[rows], torch.tensor(counts))
    assert not Pass(model(), cache, rows, counts, 3, 0, places).is_fresh, "a recorded pass serves other lengths too"


@pytest.mark.parametrize("count", [2, WINDOW - 1 + SLACK, WINDOW + SLACK, 20])
def test_a_fresh_append_is_any_append(count: int) -> None:
    """The slice writes what the scatter writes, up to a full ring and beyond it."""
    caches = [KVCache.allocate(CONFIG, 2, 32, slack=SLACK) for _ in range(2)]
    for cache, is_fresh in zip(caches, (True, False), strict=True):
        for layer in (SLIDING, FULL):
            append(cache, layer, [0, 1], [count, count], is_fresh)
    assert same(keys_and_values(caches[0]), keys_and_values(caches[1]))
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
    assert same(keys_and_values(forks[0]), keys_and_values(forks[1]))
    assert (
        forks[0].lengths
        == forks[1].lengths
        == [
            30,
            7,
            9,
            30,
        ]
    )
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
    weights = [ours.get_parameter(f"layers.{n}.self_attn.k_proj.weight") for n in range(len(ours.layers))]
    assert all(weight.grad is not None and bool(weight.grad.any()) for weight in weights)


def test_a_cache_changes_its_shape_both_ways() -> None:
    """Rows keep what they hold as long as it fits, and go back only as far as a shorter ring can."""
    ours, tokens = talker(max_position=400), text(40)
    cache = KVCache.allocate(ours.config, 2, 300, slack=4)
    ours.encode(torch.tensor([tokens]), cache, [1])
    for capacity in (300, 60, 400, 40):
        cache = cache.fork([None, 1], capacity)
        assert cache.lengths == [0, 40]
        fresh = KVCache.allocate(ours.config, 1, 400)
        ours.encode(torch.tensor([tokens]), fresh)
        canvas = torch.tensor([text(8)])
        assert torch.allclose(ours.denoise(canvas, cache, None, [1]), ours.denoise(canvas, fresh), atol=1e-5)
    assert not cache.can_truncate(1, 20) and cache.can_truncate(1, 38)
    with pytest.raises(CapacityError, match="a row of 40 tokens does not fit a cache for 30"):
        cache.fork([1], 30)
