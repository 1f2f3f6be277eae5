"""Every launch of a kernel: noted instead of run, or noted and run; and what it compiles to.

For checks without a GPU (`measure.capture`) and for counting: which kernels a step launches, with which grid and sizes,
and, `as_if` some architecture were there, what the compiler makes of exactly these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Launch:
    """One launch: what is launched, and how to make it again."""

    name: str
    """The kernel's."""
    grid: tuple[int, ...]
    sizes: dict[str, Any]
    """What it was compiled for: names in capitals, warps, stages."""
    arguments: tuple[Any, ...] = field(repr=False)
    again: Callable[[], object] = field(repr=False)
    compiled: Callable[[], Any] = field(repr=False)
    """The compiled kernel, of the architecture that `as_if` names; nothing is launched."""


_PLAIN: dict[Any, Callable[..., Any]] = {}
"""How each kind of function runs when launches are not noted."""


@contextmanager
def noted(note: Callable[[Launch], None], runs: bool = False) -> Iterator[None]:
    """Within, each launch goes to `note`; where it `runs`, it is made as well."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    kept = {kind: kind.run for kind in (JITFunction, InterpretedFunction)}
    for kind, run in kept.items():
        _PLAIN.setdefault(kind, run)

    def of(kind: Any) -> Callable[..., Any]:
        def run(self: Any, *arguments: Any, grid: Any = None, **more: Any) -> Any:
            def again() -> Any:
                return _PLAIN[kind](self, *arguments, grid=grid, **more)

            def compiled() -> Any:
                return _PLAIN[kind](self, *arguments, **{**more, "grid": grid, "warmup": True})

            sizes = {name: value for name, value in more.items() if name != "warmup"}
            whole = grid(dict(zip(self.arg_names, arguments, strict=False)) | more) if callable(grid) else grid
            note(Launch(self.fn.__name__, tuple(whole), sizes, arguments, again, compiled))
            return again() if runs else None

        return run

    for kind in kept:
        kind.run = of(kind)
    try:
        yield
    finally:
        for kind, before in kept.items():
            kind.run = before


@contextmanager
def as_if(arch: int) -> Iterator[None]:
    """Within, tensors that are on no GPU count as on one of this architecture, and kernels are compiled for it."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from sfumato.ops.triton import tuning

    class Claimed:
        def get_current_device(self) -> int:
            return arch  # kernels are kept by device

        def get_current_stream(self, device: object = None) -> int:
            return 0

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", arch, 32)

    before, standing = driver._active, tuning.STAND_IN
    driver.set_active(Claimed())
    tuning.STAND_IN = arch
    try:
        yield
    finally:
        driver._active, tuning.STAND_IN = before, standing
