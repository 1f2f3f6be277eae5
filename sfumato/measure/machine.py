"""This machine: what it is, how long a call takes on it, and what it can do at best.

The ceiling under every figure of `bench` is measured in the same run: bytes a second of a large copy and of a streaming
read, from ordinary and from huge pages; operations a second of matrix products by every means there is, torch's own,
oneDNN's on packed weights, ours. It lacks power, clocks and anything that needs rights or tools beyond torch.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from sfumato import __version__
from sfumato.ops import cpu
from sfumato.ops.cpu.memory import empty_huge
from sfumato.quant.formats import pack

ROOT = Path(__file__).resolve().parents[2]
Shape = tuple[int, int, int]
"""Rows, input width and output width of a matrix product."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median: float
    fastest: float
    slowest: float
    repeats: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """The timing of calls that took so long each."""
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


def measure(
    function: Callable[..., Any],
    seconds: float,
    device: torch.device,
    repeats: int = 10,
    setup: Callable[[], Any] | None = None,
) -> Timing:
    """Time a call: once to warm up, then `repeats` times or until `seconds` have passed in all, but at least once.

    A call that takes longer than `seconds` is not repeated. Each call gets what `setup` returns as its argument; the
    time of `setup` does not count."""
    wait: Callable[[], None] = lambda: None  # noqa: E731
    if device.type != "cpu":
        wait = partial(torch.accelerator.synchronize, device)
    until, times = time.perf_counter() + seconds, []
    for call in range(repeats + 1):
        arguments = () if setup is None else (setup(),)
        wait()
        began = time.perf_counter()
        function(*arguments)
        wait()
        took = time.perf_counter() - began
        if call or took > seconds:
            times.append(took)
            if time.perf_counter() > until:
                break
    return Timing.of(times)


def ceilings(shapes: dict[str, Shape], seconds: float, device: torch.device, most: int = 2**30) -> dict[str, Any]:
    """What this machine does at best: bytes a second of memory, and operations a second of matrix products.

    Memory is measured by a copy and by a streaming read of `most` bytes (beyond any cache, if memory allows), products
    in these shapes, by kind and by means. "best" is the fastest read (on a GPU the copy counts too) and the fastest of
    all means, our own product among them; "library" the fastest that is not ours."""
    return {
        "bytes_per_second": _bandwidth(seconds, device, min(most, free_bytes(device) // 8)),
        "flops_per_second": {kind: rates for kind in KINDS if (rates := _products(shapes, kind, seconds, device))},
    }


KINDS = ("float32", "bf16", "int8", "fp8")
"""Kinds of product; int8 is measured on a processor, fp8 on a GPU that has it."""


def _bandwidth(seconds: float, device: torch.device, count: int) -> dict[str, float]:
    source_RC = torch.ones(max(1, count // 2**14), 2**12, device=device)
    count = source_RC.numel() * source_RC.element_size()
    rates = {"read": count / _read(source_RC, seconds)}
    if device.type == "cpu":
        huge_RC = empty_huge(count).view(torch.float32).view_as(source_RC)
        huge_RC.fill_(1.0)
        rates["read from huge pages"] = count / _read(huge_RC, seconds)
        del huge_RC
    target_RC = torch.empty_like(source_RC)
    copied = 2 * count / measure(lambda: target_RC.copy_(source_RC), seconds, device).median
    best = max(rates.values()) if device.type == "cpu" else max(copied, *rates.values())
    return {"best": best, **rates, "copy": copied}


def _read(source_RC: torch.Tensor, seconds: float) -> float:
    one_C = torch.ones(source_RC.shape[1], device=source_RC.device)
    ways = (source_RC.sum, lambda: torch.mv(source_RC, one_C))
    return min(measure(way, seconds, source_RC.device).median for way in ways)


def _products(shapes: dict[str, Shape], kind: str, seconds: float, device: torch.device) -> dict[str, Any]:
    rates: dict[str, Any] = {}
    for name, (rows, inner, outer) in shapes.items():
        x, w = torch.randn(rows, inner, device=device), torch.randn(outer, inner, device=device)
        for means, make in products(kind, device).items():
            try:
                timing = measure(make(x, w), seconds, device, repeats=50)
            except (RuntimeError, NotImplementedError):  # this build of torch, this shape: one means less
                continue
            rates.setdefault(means, {})[name] = 2.0 * rows * inner * outer / timing.median
    if not rates:
        return {}
    best = {means: max(by_shape.values()) for means, by_shape in rates.items()}
    by = max(best, key=lambda means: best[means])
    library = max((rate for means, rate in best.items() if means != OURS), default=None)
    return {"best": best[by], "by": by, "library": library, **rates}


OURS = "sfumato cpu"
Make = Callable[[torch.Tensor, torch.Tensor], Callable[[], Any]]
"""(x [N, I], weight [O, I], float32) -> the product as a call, everything that is done once already done."""


def products(kind: str, device: torch.device) -> dict[str, Make]:
    """Every means that may be here for x Wᵀ of this kind."""
    if device.type != "cpu":
        plain = {"float32": torch.float32, "bf16": torch.bfloat16}
        if kind == "fp8":
            has_fp8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
            return {"torch._scaled_mm": _scaled_mm} if has_fp8 else {}
        return {"F.linear": _linear(plain[kind])} if kind in plain else {}
    own: dict[str, Make] = {}
    if kind != "fp8" and cpu.obstacle(torch.float32 if kind == "float32" else torch.bfloat16) is None:
        own = {OURS: _own(kind)}
    if kind == "float32":
        return {"F.linear": _linear(torch.float32), **own}
    if kind == "bf16":
        return {"F.linear": _linear(torch.bfloat16), "oneDNN packed": _packed, **own}
    if kind == "int8":
        return {"oneDNN packed": _quantised, "torch._int_mm": _int_mm, **own}
    return {}


def _linear(dtype: torch.dtype) -> Make:
    def make(x: torch.Tensor, w: torch.Tensor) -> Callable[[], Any]:
        x, w = x.to(dtype), w.to(dtype)
        return lambda: F.linear(x, w)

    return make


def _packed(x: torch.Tensor, w: torch.Tensor) -> Callable[[], Any]:
    x = x.bfloat16()
    packed = torch.ops.mkldnn._reorder_linear_weight(w.bfloat16(), len(x))
    return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _quantised(x: torch.Tensor, w: torch.Tensor) -> Callable[[], Any]:
    """The product alone: what is multiplied is already 8 bits wide."""
    codes = x.mul(32).add(128).clamp(0, 255).to(torch.uint8)
    packed = torch.ops.onednn.qlinear_prepack(w.mul(32).clamp(-127, 127).to(torch.int8), [*x.shape])
    scale, zero = torch.ones(len(w)), torch.zeros(len(w), dtype=torch.int32)
    to: tuple[Any, ...] = (1.0, 0, torch.bfloat16, "none", [], "")
    return lambda: torch.ops.onednn.qlinear_pointwise(codes, 1 / 32, 128, packed, scale, zero, None, *to)


def _int_mm(x: torch.Tensor, w: torch.Tensor) -> Callable[[], Any]:
    codes, weight = (t.mul(32).clamp(-127, 127).to(torch.int8) for t in (x, w))
    return lambda: torch._int_mm(codes, weight.t())


def _own(kind: str) -> Make:
    def make(x: torch.Tensor, w: torch.Tensor) -> Callable[[], Any]:
        x = x if kind == "float32" else x.bfloat16()
        packed = cpu.pack(pack(w, "int8") if kind == "int8" else w.to(x.dtype))
        return lambda: cpu.linear(x, packed)

    return make


def _scaled_mm(x: torch.Tensor, w: torch.Tensor) -> Callable[[], Any]:
    eight, one = torch.float8_e4m3fn, torch.ones((), device=x.device)
    x, w = x.to(eight), w.to(eight)
    return lambda: torch._scaled_mm(x, w.t(), one, one, out_dtype=torch.bfloat16)


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Where, when and with what: hardware, versions, commit, command, date. For the record of any benchmark."""
    device = torch.device(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return {
        "hardware": {
            "cpu": cpu,
            "cores": os.cpu_count(),
            "vector": torch.backends.cpu.get_cpu_capability(),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        },
        "versions": {"sfumato": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "commit": _commit(),
        "command": command_line(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def command_line(arguments: list[str]) -> str:
    """The command as it is typed at the root of the checkout: no path of this machine stands in it."""

    def plain(text: str) -> str:
        path = Path(text)
        if path.is_absolute():
            return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
        return text

    name = arguments[0]
    if name.endswith(".py"):
        first = ["python", plain(str(Path(name).resolve()))]
    else:
        first = [Path(name).name]
    return shlex.join([*first, *map(plain, arguments[1:])])


def _commit() -> str | None:
    """Of the checkout that this package lies in, with "+" where files have changed since; None elsewhere."""
    if not (ROOT / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10)
        return run.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "") or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def free_bytes(device: torch.device) -> int:
    """Memory that is free now: of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # not on this system
        return 2**32


def resident_bytes(device: torch.device) -> int | None:
    """Memory in use now: of the GPU, or of the process."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def forget_peak(device: torch.device) -> None:
    """Let the high-water mark of memory begin again from what is in use now, where the system can do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux


def peak_bytes(device: torch.device) -> int | None:
    """Most memory in use since `forget_peak`: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        return None
