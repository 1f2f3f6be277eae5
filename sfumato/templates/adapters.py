"""Adapters that come and go while a model runs: what is read beforehand, and the change between two passes.

Files are `checkpoints.adapters`', and where an adapter lies beside the weights is `model.adapters`'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from sfumato.checkpoints.adapters import TENSORS, read_adapter
from sfumato.engine.arguments import check_kind
from sfumato.engine.memory import free_memory
from sfumato.engine.plan import Change, Plan, PlanEnd, advance
from sfumato.errors import CapacityError
from sfumato.model.adapters import Adapter, Adapters
from sfumato.model.loaded import AdapterList
from sfumato.system.fair import FairLock
from sfumato.templates.requests import LoadAdapter, UnloadAdapter


class Planning(Protocol):
    """What makes the plans of these queries: a planner."""

    bank: Adapters

    def plan(self, query: LoadAdapter | UnloadAdapter, /) -> Plan[Any]:
        """The plan of one."""
        ...


class ModelAdapters:
    """The adapters of a model in this process: what runs meanwhile goes on after its step.

    `forget` are called when one is unloaded: what is kept of its answers holds it."""

    def __init__(self, planner: Planning, lock: FairLock, forget: Sequence[Callable[[], None]]) -> None:
        self._planner, self._lock, self._forget = planner, lock, forget

    @property
    def names(self) -> list[str]:
        """Those that `Options.adapter` may have, sorted."""
        return self._planner.bank.names

    def load(self, name: str, adapter: str | Path | Adapter) -> AdapterList:
        """Load an adapter, in a folder or in memory, under a name; all that are loaded then.

        InputError for what does not fit the model and for a name that is taken, CapacityError where memory lacks."""
        if not isinstance(adapter, Adapter):
            check_kind("the adapter", adapter, (str, Path), "a folder, or an Adapter")
            return self._carry_out(LoadAdapter(name, str(adapter)))
        with self._lock:
            return load(self._planner.bank, name, adapter)

    def unload(self, name: str) -> AdapterList:
        """Unload an adapter; all that are loaded then. Answers under way end with it, and its memory is free then.

        InputError for a name that is not loaded."""
        listed = self._carry_out(UnloadAdapter(name))
        for forget in self._forget:
            forget()
        with self._lock:
            self._planner.bank.settle()
        return listed

    def _carry_out(self, query: LoadAdapter | UnloadAdapter) -> AdapterList:
        end = advance(self._planner.plan(query))
        assert isinstance(end, PlanEnd) and isinstance(end.result, Change)
        with self._lock:
            changed: AdapterList = end.result.carry_out()
        return changed


def loading(bank: Adapters, query: LoadAdapter) -> Plan[Change]:
    """The plan that reads an adapter, whose change then loads it. InputError for what does not fit, or a name taken."""
    yield from ()
    bank.check_name(query.name)
    folder = Path(query.folder).expanduser()
    _check_size(folder)
    adapter = read_adapter(folder, bank.model)
    bank.check(query.name, adapter)
    return Change(lambda: load(bank, query.name, adapter))


def _check_size(folder: Path) -> None:
    """CapacityError for a file that memory cannot hold; what else may be wrong with it the reader says."""
    try:
        size, free = (folder / TENSORS).stat().st_size, free_memory(torch.device("cpu"))
    except OSError:
        return
    if size > free:
        raise CapacityError(
            f"{folder / TENSORS} has {size / 1e9:.2f} GB, and {free / 1e9:.2f} are free; unload another "
            "one, or merge it: sfumato convert MODEL --adapter DIR",
            option="adapter",
        )


def unloading(bank: Adapters, query: UnloadAdapter) -> Plan[Change]:
    """The plan whose change unloads an adapter. InputError for one that is not loaded."""
    yield from ()
    bank.get(query.name)

    def unload() -> AdapterList:
        bank.unload(query.name)
        return bank.listed()

    return Change(unload)


def load(bank: Adapters, name: str, adapter: Adapter) -> AdapterList:
    """Load an adapter while no pass is under way; all that are loaded then. CapacityError where memory lacks."""
    bank.check(name, adapter)
    growth, free = bank.growth(adapter), free_memory(bank.model.device)
    if growth > free:
        raise CapacityError(
            f"{adapter.source} of rank {adapter.rank} needs {growth / 1e9:.2f} GB beside the weights, and "
            f"{free / 1e9:.2f} are free; unload another one, or merge it: sfumato convert MODEL --adapter DIR",
            option="adapter",
        )
    bank.load(name, adapter)
    return bank.listed()
