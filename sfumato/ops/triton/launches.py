"""Every launch of a kernel, seen as it is made: noted instead of run, or noted and run.

For checks without a GPU (`measure.capture`) and for counting: which kernels a step launches, with which grid and sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel's name, its grid, the sizes it was compiled for (those in capitals, warps, stages), and
    how to make it again."""

    name: str
    grid: tuple[int, ...]
    sizes: dict[str, Any]
    arguments: tuple[Any, ...] = field(repr=False)
    again: Callable[[], object] = field(repr=False)


@contextmanager
def noted(note: Callable[[Launch], None], runs: bool = False) -> Iterator[None]:
    """Within, each launch goes to `note`; where it `runs`, it is made as well."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    kept = {kind: kind.run for kind in (JITFunction, InterpretedFunction)}

    def of(kind: Any) -> Callable[..., Any]:
        def run(self: Any, *arguments: Any, grid: Any = None, **more: Any) -> Any:
            def again() -> Any:
                return kept[kind](self, *arguments, grid=grid, **more)

            sizes = {name: value for name, value in more.items() if name != "warmup"}
            whole = grid(dict(zip(self.arg_names, arguments, strict=False)) | more) if callable(grid) else grid
            note(Launch(self.fn.__name__, tuple(whole), sizes, arguments, again))
            return again() if runs else None

        return run

    for kind in kept:
        kind.run = of(kind)  # type: ignore[method-assign, union-attr]
    try:
        yield
    finally:
        for kind, before in kept.items():
            kind.run = before  # type: ignore[method-assign, union-attr]
