"""What this machine is and can do at best, measured while all cores compile what the other steps will launch."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.gpu.compile import Compiling, chip_of, of_nano, of_steps
from benchmarks.gpu.setting import Row, Setting, tried
from sfumato.measure.machine import environment, products
from sfumato.measure.work import number, size
from sfumato.ops import survey

SHAPES = {
    "queries, keys, values": (256, 2816, 8192),
    "output": (256, 4096, 2816),
    "gate and up": (256, 2816, 4224),
    "down": (256, 2112, 2816),
    "queries, keys, values of 16 rows": (4096, 2816, 8192),
    "vocabulary": (256, 2816, 262144),
}
"""Products of a step: rows, inputs, outputs."""
TINY = {"queries": (8, 64, 96), "output": (8, 96, 64)}
KINDS = ("int4", "fp8", "int4-fp8", "bf16")
MOVED = 512 * 2**20
"""Bytes of weights that a measurement goes through, so that none is still in the L2 cache."""


def run(setting: Setting, _: str) -> Iterator[Row]:
    obstacle = None
    if not setting.is_dry and not torch.cuda.is_available():
        obstacle = "there is no CUDA device; --dry runs on any machine"
    for one in survey("cpu" if obstacle else setting.device):
        if one.name == "triton":
            obstacle = obstacle or (None if setting.is_dry else one.obstacle)
    if obstacle:
        yield {"name": "machine", "ok": False, "says": obstacle, "stop": f"cannot run: {obstacle}"}
        return
    compiling = None
    if find_spec("triton") is None:
        yield {"name": "compile", "skipped": "triton is not installed"}
    else:
        two = setting.config(2)
        each = of_nano() + of_steps(two, KINDS) + of_steps(two, ("int8", "nvfp4", "int4-small"), (1,))
        each += of_steps(two, ("int4",), rank=16)
        each = each[::9] if setting.is_dry else each
        compiling = Compiling(each, chip_of(setting), setting.until - 2, most=1 if setting.is_dry else None)
    place = environment(setting.device)
    yield {"name": "machine", "says": place["hardware"]["gpu"] or place["hardware"]["cpu"], "environment": place}
    yield tried("ceilings", lambda: ceilings(setting))
    if compiling is not None:
        row = compiling.wait()
        says = f"{row['compiled']} kernels compiled"
        if row["left_kernels"] or row["left_steps"]:
            says += f", {len(row['left_kernels'])} kernels and {row['left_steps']} of {len(each)} steps left"
        yield {"name": "compile", "ok": not row.get("errors"), "says": says, **row}


def ceilings(setting: Setting) -> dict[str, Any]:
    """As `sfumato.measure.machine.ceilings`, but of calls in graphs: bytes a second, operations a second by kind."""
    copied, read = _bandwidth(setting, 2**22 if setting.is_dry else 2**32)
    rates: dict[str, Any] = {}
    for kind in ("bf16", "fp8", "int8"):
        for means, make in products(kind, torch.device(setting.device)).items():
            for name, (rows, inner, outer) in (TINY if setting.is_dry else SHAPES).items():
                try:
                    rate = 2e3 * rows * inner * outer / _product(setting, make, rows, inner, outer)
                except (RuntimeError, NotImplementedError):  # this build of torch, this shape
                    continue
                rates.setdefault(kind, {}).setdefault(means, {})[name] = rate
    for by_means in rates.values():
        best = {means: max(each.values()) for means, each in by_means.items()}
        by_means |= {"best": max(best.values()), "by": max(best, key=lambda means: best[means])}
    says = f"copy {size(copied)}/s, read {size(read)}/s"
    says += "".join(f", {kind} {number(rate['best'], 'FLOP')}/s" for kind, rate in rates.items())
    most = {
        "bytes_per_second": {"best": max(copied, read), "copy": copied, "read": read},
        "flops_per_second": rates,
    }
    return {"says": says, "ceilings": most}


def _bandwidth(setting: Setting, count: int) -> tuple[float, float]:
    """Bytes a second of a copy, both ways counted, and of a sum over so many bytes."""
    source, target = (torch.full((count // 4,), n, dtype=torch.float32, device=setting.device) for n in (1.0, 0.0))
    copied = setting.milliseconds(lambda: target.copy_(source), 0.3)
    return 2e3 * count / copied, 1e3 * count / setting.milliseconds(lambda: source.sum(), 0.3)


def _product(setting: Setting, make: Any, rows: int, inner: int, outer: int) -> float:
    """Milliseconds of one product, of several with weights of their own in one graph."""
    x, w = (torch.randn(n, inner, device=setting.device).mul_(0.1) for n in (rows, outer))
    count = 1 if setting.is_dry else max(1, min(16, MOVED // (2 * inner * outer)))
    calls = [make(x, w) for _ in range(count)]

    def all_of_them() -> None:
        for call in calls:
            call()

    return setting.milliseconds(setting.recorded(all_of_them), 0.05) / count
