"""model/network.py: encode and denoise, whatever the chunks, the batch and the padding.

Equal means: within float32 rounding for numbers, exactly for the bytes of a cache.
"""

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
    OPS,
    SAME,
    WINDOW,
    cache_of,
    canvas_tokens,
    content,
    encoded,
    examples,
    keys_and_values,
    model,
    near,
    padded,
    probe,
    same,
    text,
    unchanged,
)
from torch import Tensor

from sfumato import ops
from sfumato.model import passes
from sfumato.model.cache import KVCache
from sfumato.model.network import Model
from sfumato.model.passes import Pass


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_angles_that_are_kept_are_those_of_the_position(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked up or worked out: the same bits, for rows before, at and beyond the last position that is kept."""
    ours = Model(CONFIG, ops.load("reference")).to(dtype)
    cache = KVCache.allocate(CONFIG, 4, 200)
    cache.lengths = [0, 100, 109, 140]
    rows, counts = [2, 0, 3, 1], [1, 3, 0, 2]
    plain = [Pass(ours, cache, [row], [count], 3, LENGTH) for row, count in zip(rows, counts, strict=True)]
    for limit in (121, 120, 0):  # the longest of the first three brings positions up to 119
        monkeypatch.setattr(passes, "NEAR", limit)
        passes._table.cache_clear()
        for some in (slice(0, 4), slice(0, 2)):
            run = Pass(ours, cache, rows[some], counts[some], 3, LENGTH)
            for kind, (_, *angles) in run.kinds.items():
                for n, one in enumerate(plain[some]):
                    assert all(torch.equal(a[n], b[0]) for a, b in zip(angles, one.kinds[kind][1:], strict=True))
    passes._table.cache_clear()


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
    denoised = probe(ours, cache)
    for row, tokens in enumerate(texts):
        alone = KVCache.allocate(CONFIG, 1, len(tokens))
        assert near(torch.cat(hidden[row]), ours.encode(torch.tensor([tokens]), alone)[0])
        assert near(denoised[row : row + 1], probe(ours, alone))


@pytest.mark.parametrize("name", OPS)
def test_a_row_alone_is_the_row_in_a_batch(name: str) -> None:
    """Encode and denoise, with a soft embedding, for subsets and orders of the rows of one cache."""
    ours = model(name)
    texts = [text(length, length) for length in (3, 20, 7, 12)]
    cache = KVCache.allocate(CONFIG, 4, 40)
    for row, tokens in enumerate(texts):
        ours.encode(torch.tensor([tokens]), cache, [row])
    canvas = canvas_tokens(4, 1)
    soft = torch.randn(4, LENGTH, CONFIG.hidden_size, generator=torch.Generator().manual_seed(0))
    whole = ours.denoise(canvas, cache, soft)
    for rows in ([0], [3], [2, 0], [3, 1, 2, 0], [1, 3]):
        assert near(ours.denoise(canvas[rows], cache, soft[rows], rows), whole[rows])
    for row, tokens in enumerate(texts):
        assert near(ours.denoise(canvas[[row]], encoded(ours, tokens), soft[[row]]), whole[[row]])


@pytest.mark.parametrize("name", OPS)
def test_no_soft_embedding_is_one_of_zeros(name: str) -> None:
    cache = encoded(model(name), text(9))
    zeros = torch.zeros(1, LENGTH, CONFIG.hidden_size)
    ours = model(name)
    assert near(ours.denoise(canvas_tokens(1), cache), ours.denoise(canvas_tokens(1), cache, zeros), 1e-6)
    assert not near(ours.denoise(canvas_tokens(1), cache), ours.denoise(canvas_tokens(1), cache, zeros + 1), 0.1)


@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, 3 * WINDOW])
def test_denoise_leaves_every_byte_of_the_cache(length: int) -> None:
    ours = model()
    cache = KVCache.allocate(CONFIG, 2, 40)
    ours.encode(torch.tensor([text(length), text(length, 1)]), cache)
    before, lengths = content(cache), list(cache.lengths)
    for soft in (None, torch.ones(2, LENGTH, CONFIG.hidden_size)):
        ours.denoise(canvas_tokens(2), cache, soft)
        ours.denoise(canvas_tokens(1), cache, None if soft is None else soft[:1], [1])
    assert unchanged(cache, before)
    assert cache.lengths == lengths


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
        out.append((read, probe(ours, cache), ours.encode(torch.tensor([[9], [9], [9]]), cache)))
    assert all(near(one, two) for one, two in zip(*out, strict=True))


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
    expected = ours.encode(tokens[bring], apart, [rows[place] for place in bring], some)
    assert same(
        [encoded[place, :count] for place, count in zip(bring, some, strict=True)],
        [expected[n, :count] for n, count in enumerate(some)],
        SAME,
    )
    expected = ours.denoise(canvas, apart, None, rows)
    assert same([denoised], [expected], SAME)
    assert torch.equal(ours.logits(denoised).argmax(-1), ours.logits(expected).argmax(-1))
    assert cache.lengths == apart.lengths
    assert same(keys_and_values(cache), keys_and_values(apart), SAME)
