"""Operations: mathematics with more than one implementation, in one record, chosen once and passed.

`Ops` names the mathematics; `load` picks the code. An implementation never falls back to another in silence:

    reference   plain PyTorch, the specification and the oracle
    fused       torch's own fused calls, any device; differentiable, so that training uses it
    cpu         a small compiled extension: AMX or AVX-512 for bf16, int8 and whatever has 4 or 8 bits, else vectors
    triton      CUDA kernels: bf16, int8, FP8, int4 and NVFP4 weights

`contract` has a protocol for each operation. Every implementation takes a weight in fewer bits (`packed.Packed`) in
place of a plain one, or says that it does not; reference and fused unpack it with every product. Each takes low-rank
factors beside either of them too (`lowrank.LowRank`), and gives every token those of its own lane.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import NamedTuple

import torch

from sfumato.errors import InputError
from sfumato.ops.contract import Ops
from sfumato.ops.packed import Packed

NAMES = ("reference", "fused", "cpu", "triton")


def load(
    name: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    packed: Collection[Packed] = (),
) -> Ops:
    """The implementation of this name.

    "auto" takes the fastest that this device can run with weights of this dtype, some of them packed like these; where
    neither compiler nor kernels are there, that is fused. InputError for an unknown name, and for one that this machine
    cannot run: it says why."""
    if name == "auto":
        name = _fastest(torch.device(device), dtype, packed)
    if name == "reference":
        from sfumato.ops import reference

        return reference.OPS
    if name == "fused":
        from sfumato.ops import fused

        return fused.OPS
    if name == "cpu":
        from sfumato.ops import cpu

        return cpu.load(dtype)
    if name == "triton":
        from sfumato.ops import triton

        return triton.load(device)
    raise InputError(f"there are no operations named {name!r}; choose one of auto, {', '.join(NAMES)}")


def _fastest(device: torch.device, dtype: torch.dtype | None, packed: Collection[Packed]) -> str:
    if device.type == "cpu":
        from sfumato.ops import cpu

        return "fused" if cpu.obstacle(dtype, packed) else "cpu"
    if device.type == "cuda":
        from sfumato.ops import triton

        return "fused" if triton.obstacle(device, packed) else "triton"
    return "fused"


class Standing(NamedTuple):
    """How one implementation stands on a device."""

    name: str
    obstacle: str | None
    """Why it cannot run there, or only slower than another; None where nothing is in its way."""
    is_auto: bool
    """Whether "auto" takes it."""


def survey(
    device: torch.device | str = "cpu", dtype: torch.dtype | None = None, packed: Collection[Packed] = ()
) -> tuple[Standing, ...]:
    """Every implementation on this device, for a model in this dtype with some weights packed like these.

    It says what `load` would do, and loads nothing; a warning on the way is part of the answer, and is not given
    twice."""
    device = torch.device(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = _fastest(device, dtype, packed)
        return tuple(Standing(name, _obstacle(name, device, dtype, packed), name == chosen) for name in NAMES)


def _obstacle(name: str, device: torch.device, dtype: torch.dtype | None, packed: Collection[Packed]) -> str | None:
    if name == "cpu":
        from sfumato.ops import cpu

        return cpu.obstacle(dtype, packed) if device.type == "cpu" else "they need a processor as the device"
    if name == "triton":
        from sfumato.ops import triton

        return triton.obstacle(device, packed)
    return None
