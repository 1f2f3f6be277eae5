"""This machine: what it is, how long a call takes on it, and what it can do at best.

The ceiling under every figure of `bench` is measured in the same run: bytes a second of a large copy and of a streaming
read, operations a second of matrix products. It lacks power, clocks and anything that needs rights or tools beyond
torch.
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
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from sfumato import __version__

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
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


def measure(
    function: Callable[..., Any],
    seconds: float,
    device: torch.device,
    repeats: int = 10,
    setup: Callable[[], Any] | None = None,
) -> Timing:
    """Time a call: once to warm up, then `repeats` times or until `seconds` have passed in all, but at least once.
    What `setup` returns is handed to each call; its own time does not count."""
    wait = (lambda: None) if device.type == "cpu" else torch.accelerator.synchronize
    until, found = time.perf_counter() + seconds, []
    for call in range(repeats + 1):
        given = () if setup is None else (setup(),)
        wait()
        began = time.perf_counter()
        function(*given)
        wait()
        if call:
            found.append(time.perf_counter() - began)
            if time.perf_counter() > until:
                break
    return Timing.of(found)


def ceilings(shapes: dict[str, Shape], seconds: float, device: torch.device, most: int = 2**30) -> dict[str, Any]:
    """What this machine does at best: bytes a second of a copy and of a streaming read of `most` bytes (beyond any
    cache, if memory allows), and operations a second of matrix products of these shapes, in float32 and bf16."""
    return {
        "bytes_per_second": _bandwidth(seconds, device, min(most, free_bytes(device) // 8)),
        "flops_per_second": {
            "float32": _products(shapes, torch.float32, seconds, device),
            "bf16": _products(shapes, torch.bfloat16, seconds, device),
        },
    }


def _bandwidth(seconds: float, device: torch.device, count: int) -> dict[str, float]:
    source_RC = torch.ones(max(1, count // 2**14), 2**12, device=device)
    target_RC, one_C = torch.empty_like(source_RC), torch.ones(2**12, device=device)
    count = source_RC.numel() * source_RC.element_size()
    summed = measure(source_RC.sum, seconds, device).median
    multiplied = measure(lambda: torch.mv(source_RC, one_C), seconds, device).median
    copied = measure(lambda: target_RC.copy_(source_RC), seconds, device).median
    found = {"read": count / min(summed, multiplied), "copy": 2 * count / copied}
    return {"best": max(found.values()), **found}


def _products(shapes: dict[str, Shape], dtype: torch.dtype, seconds: float, device: torch.device) -> dict[str, float]:
    found = {}
    for name, (rows, inner, outer) in shapes.items():
        x, w = torch.randn(rows, inner, device=device).to(dtype), torch.randn(outer, inner, device=device).to(dtype)
        timing = measure(lambda x=x, w=w: F.linear(x, w), seconds, device, repeats=50)  # type: ignore[misc]
        found[name] = 2.0 * rows * inner * outer / timing.median
    return {"best": max(found.values()), **found}


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
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    """Of the checkout that this package lies in, with "+" where files have changed since; None elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
        return run.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "") or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # not on this system
        return 2**32


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
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None
