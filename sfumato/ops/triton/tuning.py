"""Tile sizes: what was measured on this GPU if it is in the table, else the operation's own reasoned default.

The table, `tuned.json`, is keyed by GPU name, operation, weight shape and dtype; never by the number of rows, so that a
row's answer does not depend on its batch. `tune` measures and writes it. There is no search while the engine runs: a
call looks up a dictionary, nothing else, and may stand inside a CUDA graph.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch

Config = dict[str, int]
"""Tile sizes in capitals, as the kernel names them, and num_warps and num_stages."""

TABLE = Path(__file__).with_name("tuned.json")

SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
"""Shared memory that one block may have, by architecture (CUDA C++ Programming Guide, compute capabilities)."""

_overridden: dict[str, Config] = {}


def config(
    op: str,
    shape: Sequence[int],
    dtype: torch.dtype | str,
    device: torch.device | str,
    default: Mapping[str, int],
    small: Mapping[str, int] | None = None,
) -> Config:
    """The configuration of this operation for weights of this shape and dtype on this device.

    `default` is the operation's own; `small` takes its place on GPUs with 99 KiB of shared memory. `device` is a
    torch device, or "sm_90" where a kernel is compiled ahead of time. An entry of the table may name some keys only."""
    name, arch = chip(str(device))
    chosen = dict(small if small is not None and SHARED_KIB.get(arch, 99) <= 99 else default)
    chosen.update(_read(TABLE).get(name, {}).get(op, {}).get(key(shape, dtype), {}))
    chosen.update(_overridden.get(op, {}))
    return chosen


def key(shape: Sequence[int], dtype: torch.dtype | str) -> str:
    """How the table spells a shape and a dtype: "2816x704 bfloat16"."""
    return f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"


STAND_IN = 90
"""The architecture that devices without one count as: the processor under the interpreter, meta tensors."""


def chip(device: str) -> tuple[str, int]:
    """The GPU's name and architecture (90 for sm_90)."""
    if device.startswith("sm_"):
        return device, int(device.removeprefix("sm_"))
    return _gpu(device) if device.startswith("cuda") else (device, STAND_IN)


@cache
def _gpu(device: str) -> tuple[str, int]:
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_name(device), 10 * major + minor


@cache
def processors(device: str) -> int:
    """Multiprocessors of the GPU; an H100's or H200's where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.startswith("cuda") else 132


@contextmanager
def using(op: str, **values: int) -> Iterator[None]:
    """Within, this operation takes these values whatever the table says: for tests and for `tune`."""
    before = _overridden.get(op)
    _overridden[op] = {**(before or {}), **values}
    try:
        yield
    finally:
        if before is None:
            del _overridden[op]
        else:
            _overridden[op] = before


def candidates(default: Mapping[str, int], choices: Mapping[str, Sequence[int]]) -> list[Config]:
    """What `tune` tries: the default, then every combination of these choices over it."""
    tried = [dict(default)]
    for values in product(*choices.values()):
        one = {**default, **dict(zip(choices, values, strict=True))}
        if one not in tried:
            tried.append(one)
    return tried


def tune(
    op: str,
    shape: Sequence[int],
    dtype: torch.dtype | str,
    device: torch.device | str,
    measure: Callable[[], float],
    configs: Sequence[Config],
    table: Path = TABLE,
) -> list[tuple[float, Config]]:
    """Measure this operation under each configuration, and write the fastest to the table.

    `measure` gives the milliseconds of one call (`milliseconds`). Returns what was measured, fastest first. A
    configuration that does not fit this GPU is left out."""
    from triton.runtime.errors import OutOfResources, PTXASError

    measured: list[tuple[float, Config]] = []
    for one in configs:
        with using(op, **one):
            try:
                measured.append((measure(), one))
            except (OutOfResources, PTXASError):
                continue
    if not measured:
        raise ValueError(f"none of the {len(configs)} configurations of {op} runs on {chip(str(device))[0]}")
    measured.sort(key=lambda pair: pair[0])
    _write(table, chip(str(device))[0], op, key(shape, dtype), measured[0][1])
    return measured


def milliseconds(run: Callable[[], object]) -> float:
    """The median time of a call on the GPU."""
    from triton.testing import do_bench

    return float(do_bench(run, return_mode="median"))


@cache
def _read(table: Path) -> dict[str, Any]:
    entries: dict[str, Any] = json.loads(table.read_text()) if table.exists() else {}
    return entries


def _write(table: Path, name: str, op: str, entry: str, chosen: Config) -> None:
    """Beside, then renamed: a reader sees the old table or the new one."""
    _read.cache_clear()
    whole = _read(table)
    whole.setdefault(name, {}).setdefault(op, {})[entry] = chosen
    beside = table.with_suffix(f".{os.getpid()}.json")
    beside.write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")
    os.replace(beside, table)
