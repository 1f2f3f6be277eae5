"""The adapters of a model as plain values: what a prompt keeps of one, and what is said of all. No torch here."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sfumato.errors import InputError

if TYPE_CHECKING:
    from sfumato.ops.lowrank import LanePair

LONGEST_NAME = 256
"""Characters of an adapter's name, which clients ask for as a model's."""


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter as it was loaded once: what is loaded later under the same name is another one.

    Its lanes stay its own as long as anybody holds this, whether it is still to be had by its name or not."""

    name: str
    lanes: LanePair
    """Those of the model's weights that its rows have."""
    temperatures: Mapping[str, float] = field(default_factory=dict)
    """How sure decisions with it are, by kind of question."""


@dataclass(frozen=True)
class AdapterSize:
    """What an adapter takes that is loaded."""

    name: str
    rank: int
    """The largest of its weights'."""
    bytes: int
    """Of its own factors, as they lie beside the weights."""


@dataclass(frozen=True)
class AdapterList:
    """The adapters that are loaded."""

    adapters: tuple[AdapterSize, ...] = ()
    """By name."""
    bytes: int = 0
    """What all factors beside the weights take; there is room for a few adapters more than are loaded."""


def check_adapter_name(name: object) -> None:
    """InputError for a name that no client could ask for."""
    is_name = isinstance(name, str) and 0 < len(name) <= LONGEST_NAME and name.isprintable() and name == name.strip()
    if not is_name:
        raise InputError(
            f"an adapter is called {reprlib.repr(name)}; give a name of 1 to {LONGEST_NAME} printable characters, "
            "without a space at an end",
            option="adapter",
        )
