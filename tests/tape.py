"""Stands in for a CUDA graph.

It notes a step's operations and repeats them in the same memory, keeping none of it alive. What Python decided while
the step was noted is repeated too, as by a graph. It lacks on purpose what a driver does.

    Engine(model, settings=EngineSettings(record=True, capture=Tape()))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from sfumato.measure.capture import tensors


class _Weak:
    """A tensor without its memory."""

    def __init__(self, x: Tensor) -> None:
        self.memory = StorageWeakRef(x.untyped_storage())
        self.form = x.dtype, x.shape, x.stride(), x.storage_offset()

    def again(self) -> Tensor:
        assert not self.memory.expired(), f"a graph reads memory that is gone: {self.form}"
        storage = torch.UntypedStorage._new_with_weak_ptr(self.memory.cdata)
        dtype, shape, stride, offset = self.form
        return torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)


class Tape:
    """A `Capture`. Twice before it is noted, as on a GPU, the function is only run."""

    def __call__(self, run: Callable[[], Tensor | None]) -> tuple[Callable[[], object], Tensor | None]:
        for _ in range(2):
            run()
        noting = _Noting()
        try:
            from sfumato.ops.triton.launches import noted
        except ImportError:
            with noting:
                result = run()
        else:
            with noted(noting.launch), noting:
                result = run()
        return noting.replay, result


class _Noting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.own: dict[int, Tensor] = {}
        self.calls: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        known = {x.untyped_storage()._cdata for x in (*tensors(args), *tensors(kwargs))}
        for x in tensors(out):
            if x.untyped_storage()._cdata not in known:
                self.own.setdefault(x.untyped_storage()._cdata, x)
        weak_args, weak_kwargs, results = self._weak(args), self._weak(kwargs), list(tensors(out))

        def again() -> None:
            repeated = func(*_strong(weak_args), **_strong(weak_kwargs))
            for old, new in zip(results, tensors(repeated), strict=True):
                if old.untyped_storage()._cdata != new.untyped_storage()._cdata and old.numel():
                    old.copy_(new)

        self.calls.append(again)
        return out

    def launch(self, launch: Any) -> None:
        with _disable_current_modes():
            launch.again()
        weak, again = self._weak(launch.arguments), launch.again

        def replay() -> None:
            _strong(weak)  # alive; `again` holds them too, which a graph does not
            again()

        self.calls.append(replay)

    def replay(self) -> None:
        for call in self.calls:
            call()

    def _weak(self, value: Any) -> Any:
        """With what was there before in place of what holds it."""
        if isinstance(value, Tensor):
            return value if value.untyped_storage()._cdata in self.own else _Weak(value)
        if isinstance(value, (list, tuple)):
            return type(value)([self._weak(one) for one in value])
        if isinstance(value, dict):
            return {name: self._weak(one) for name, one in value.items()}
        return value


def _strong(value: Any) -> Any:
    if isinstance(value, _Weak):
        return value.again()
    if isinstance(value, (list, tuple)):
        return type(value)([_strong(one) for one in value])
    if isinstance(value, dict):
        return {name: _strong(one) for name, one in value.items()}
    return value
