"""engine/prefixes.py: encoded beginnings by tokens, content and blocks."""

from __future__ import annotations

import tiny_runs
from tiny_runs import CONFIG, model, text

from sfumato.engine.prefixes import Prefixes
from sfumato.model.cache import KVCache
from sfumato.model.prompt import Prompt


def encoded(tokens: list[int]) -> KVCache:
    return tiny_runs.encoded(model(), tokens, KVCache.allocate(CONFIG, 1, len(tokens)))


def test_what_was_not_used_for_longest_goes_first() -> None:
    size = encoded(text(40)).bytes
    kept = Prefixes(2 * size)
    for n in range(2):
        kept.add(Prompt.of(text(40, n)), encoded(text(40, n)))
    assert kept.find(Prompt.of([*text(40, 0), 1]))[1] == 40
    kept.add(Prompt.of(text(40, 2)), encoded(text(40, 2)))
    assert [kept.find(Prompt.of([*text(40, n), 1]))[1] for n in range(3)] == [40, 0, 40] and kept.bytes == 2 * size
    assert kept.holds(Prompt.of(text(40, 2))) and not kept.holds(Prompt.of(text(41, 2)))
    kept.clear()
    assert kept.bytes == 0 and kept.find(Prompt.of([*text(40, 0), 1])) == (None, 0)


def test_equal_tokens_with_other_content_share_no_cache() -> None:
    """Two images behind the same tokens: what stands before them may be shared, they and what follows may not."""
    tokens = text(40)
    one, other, none = (Prompt(tuple(tokens), content=content) for content in ({36: b"cat"}, {36: b"dog"}, {}))
    kept, cache = Prefixes(1 << 30), encoded(tokens)
    kept.add(one, cache)
    assert kept.find(one.extended([1])) == (cache, 40) and kept.holds(one)
    for prompt in other, none:
        assert kept.find(prompt.extended([1]))[1] == 36 and not kept.holds(prompt)
        assert prompt != one and prompt.shared(one) == 36
    kept.add(other, encoded(tokens))
    assert [kept.find(prompt.extended([1]))[1] for prompt in (one, other, none)] == [40, 40, 36]
    assert kept.find(one.extended([1]))[0] is not kept.find(other.extended([1]))[0]


def test_equal_tokens_with_other_blocks_share_no_cache() -> None:
    """Keys that were encoded in both directions are not those of a causal pass, nor the other way round."""
    tokens = text(40)
    one, plain = Prompt(tuple(tokens), blocks=((34, 37),)), Prompt(tuple(tokens))
    kept = Prefixes(1 << 30)
    kept.add(one, encoded(tokens))
    assert kept.holds(one) and not kept.holds(plain)
    assert [kept.find(prompt.extended([1]))[1] for prompt in (one, plain)] == [40, 34]
    assert kept.find(one.first(36))[1] == 34  # all but the last of 37 would cut the block
    kept.add(plain, encoded(tokens))
    assert [kept.find(prompt.extended([1]))[1] for prompt in (one, plain)] == [40, 40]
    assert kept.find(one.extended([1]))[0] is not kept.find(plain.extended([1]))[0]
