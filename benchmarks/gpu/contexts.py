"""The released size behind long contexts."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.gpu import cells
from benchmarks.gpu.setting import Row, Setting


def run(setting: Setting, kind: str) -> Iterator[Row]:
    yield from cells.run(setting, kind, (8192, 32768, 131072), (1,))
