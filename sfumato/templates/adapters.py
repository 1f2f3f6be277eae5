"""Adapters that come and go while a model runs: what is read beforehand, and the change between two passes.

Files are `checkpoints.adapters`', and where an adapter lies beside the weights is `model.adapters`'.
"""

from __future__ import annotations

from pathlib import Path

from sfumato.checkpoints.adapters import read_adapter
from sfumato.engine.memory import free_memory
from sfumato.engine.plan import Change, Plan
from sfumato.errors import CapacityError, InputError
from sfumato.events import AdapterList
from sfumato.model.adapters import Adapter, Adapters
from sfumato.templates.requests import LoadAdapter, UnloadAdapter


def loading(bank: Adapters | None, query: LoadAdapter) -> Plan[Change]:
    """The plan that reads an adapter, whose change then loads it. InputError for what does not fit, or a name taken."""
    yield from ()
    bank = _bank(bank)
    bank.check_name(query.name)
    adapter = read_adapter(Path(query.folder).expanduser(), bank.model)
    bank.check(query.name, adapter)
    return Change(lambda: load(bank, query.name, adapter))


def unloading(bank: Adapters | None, query: UnloadAdapter) -> Plan[Change]:
    """The plan whose change unloads an adapter. InputError for one that is not loaded."""
    yield from ()
    bank = _bank(bank)
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


def _bank(bank: Adapters | None) -> Adapters:
    if bank is None:
        raise InputError("this model takes no adapters; load it again", option="adapter")
    return bank
