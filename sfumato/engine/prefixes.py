"""Encoded beginnings of prompts, kept by their tokens, content, blocks and adapter: nobody encodes them again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sfumato.model.cache import KVCache
from sfumato.model.loaded import LoadedAdapter
from sfumato.model.prompt import Prompt

KEPT_FROM = 32
"""Tokens from which on a beginning is worth keeping."""

MOST_KEPT = 256
"""Beginnings that are kept at most, however short: each one is looked at that could be a prompt's."""

_Key = tuple[bytes, tuple[tuple[int, bytes], ...], tuple[tuple[int, int], ...], LoadedAdapter | None]
"""All tokens of a beginning, its content, its blocks, and what has encoded it."""


class _Prefix(NamedTuple):
    prompt: Prompt
    tokens: npt.NDArray[np.int64]
    """Those of the prompt."""
    cache: KVCache


class Prefixes:
    """Encoded beginnings within so many bytes; those that were not used for longest go first.

    Two beginnings are alike as far as `Prompt.alike` says: equal tokens with other content (two images) or other blocks
    share nothing from there on, and those of two adapters nothing at all."""

    def __init__(self, room: int) -> None:
        self.room, self.bytes = room, 0
        self._kept: OrderedDict[_Key, _Prefix] = OrderedDict()
        self._alike: dict[bytes, list[_Key]] = {}  # the first tokens -> what begins with them

    def find(self, prompt: Prompt) -> tuple[KVCache | None, int]:
        """A cache of one row, and how many of its tokens the prompt begins with; of a row, `Row.reusable`."""
        tokens, best, most = _array(prompt.tokens), None, 0
        for key in self._alike.get(tokens[:KEPT_FROM].tobytes(), ()):
            prefix = self._kept[key]
            size = min(len(prefix.tokens), len(tokens))
            differs = np.flatnonzero(prefix.tokens[:size] != tokens[:size])
            count = int(differs[0]) if len(differs) else size
            count = prefix.prompt.alike(prompt, count)
            if count > most and prefix.cache.can_truncate(0, count):
                best, most = key, count
        if best is None:
            return None, 0
        self._kept.move_to_end(best)
        return self._kept[best].cache, most

    def holds(self, prompt: Prompt) -> bool:
        """Whether all of this is kept already."""
        return self.find(prompt)[1] == len(prompt)

    def add(self, prompt: Prompt, cache: KVCache) -> None:
        """Keep a cache of one row that holds this prompt, of at least `KEPT_FROM` tokens."""
        tokens = _array(prompt.tokens)
        for key in list(self._alike.get(tokens[:KEPT_FROM].tobytes(), ())):  # what the new one holds as well
            other = self._kept[key].prompt
            if len(other) <= len(prompt) and other.shared(prompt) == len(other) and cache.can_truncate(0, len(other)):
                self._drop(key)
        key = tokens.tobytes(), tuple(sorted(prompt.content.items())), prompt.blocks, prompt.adapter
        self._kept[key] = _Prefix(prompt, tokens, cache)
        self._alike.setdefault(tokens[:KEPT_FROM].tobytes(), []).append(key)
        self.bytes += cache.bytes
        while self.bytes > self.room or len(self._kept) > MOST_KEPT:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: _Key) -> None:
        _, tokens, cache = self._kept.pop(key)
        self.bytes -= cache.bytes
        alike = tokens[:KEPT_FROM].tobytes()
        self._alike[alike].remove(key)
        if not self._alike[alike]:
            del self._alike[alike]

    def keep_adapters(self, is_kept: Callable[[LoadedAdapter], bool]) -> None:
        """Forget those of all other adapters, and with them the adapters."""
        for key in [key for key in self._kept if key[-1] is not None and not is_kept(key[-1])]:
            self._drop(key)

    def clear(self) -> None:
        """Forget all of them."""
        self._kept.clear()
        self._alike.clear()
        self.bytes = 0


def _array(tokens: tuple[int, ...]) -> npt.NDArray[np.int64]:
    return np.asarray(tokens, dtype=np.int64)
