"""Operations: mathematics with more than one implementation, in one record, chosen once and passed.

`Ops` names the mathematics; `load` picks the code. An implementation never falls back to another in silence.
`reference` is plain PyTorch: the specification and the oracle. `fused` uses torch's own fused calls, on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sfumato.events import InputError


@dataclass(frozen=True)
class Ops:
    """One implementation of every operation. Shapes and meaning are documented in `reference.py`."""

    name: str
    rms_norm: Callable[..., Any]
    rope: Callable[..., Any]
    attention: Callable[..., Any]
    gated: Callable[..., Any]
    experts: Callable[..., Any]
    read_out: Callable[..., Any]
    soft_embedding: Callable[..., Any]


NAMES = ("reference", "fused")


def load(name: str = "auto") -> Ops:
    """The implementation of this name; "auto" takes the fastest. InputError for an unknown name."""
    if name == "auto":
        name = "fused"
    if name == "reference":
        from sfumato.ops import reference

        return reference.OPS
    if name == "fused":
        from sfumato.ops import fused, reference

        return replace(
            reference.OPS, name="fused", rms_norm=fused.rms_norm, attention=fused.attention, experts=fused.experts
        )
    raise InputError(f"there are no operations named {name!r}; choose one of auto, {', '.join(NAMES)}")
