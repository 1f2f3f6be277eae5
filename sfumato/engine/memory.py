"""Bytes that rows need beside the cache, and bytes that a device has left."""

from __future__ import annotations

from pathlib import Path

import torch

from sfumato.model.config import ModelConfig


def row_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that a step takes at most for one row beside the cache.

    These are the logits in float32 and once more in the weights' dtype, with a quarter for what is made of them, and
    thirty hidden states of each position."""
    logits = config.canvas_length * config.vocab_size * (4 + dtype.itemsize) * 5 // 4
    return logits + 30 * config.canvas_length * config.hidden_size * dtype.itemsize


def free_memory(device: torch.device) -> int:
    """Bytes that a device has left: of the GPU, else of the machine or of what its container allows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    sizes = []
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            sizes.append(int(line.split()[1]) << 10)
    most, used = ("".join(_lines(f"/sys/fs/cgroup/memory.{name}")).strip() for name in ("max", "current"))
    if most.isdigit() and used.isdigit():
        sizes.append(int(most) - int(used))
    return max(min(sizes, default=4 << 30), 64 << 20)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return []
