"""What a batch may take, as a record of plain values. Nothing here imports torch.

A server gives it to the process that runs the model; `Batch` keeps within it.
"""

from __future__ import annotations

from dataclasses import dataclass

from sfumato.errors import InputError


@dataclass(frozen=True)
class BatchLimits:
    """What a batch may take."""

    rows: int = 32
    """Most rows under way at once."""
    queue: int = 256
    """Most requests that wait; one more is a BusyError."""
    memory: int | None = None
    """Bytes for the cache, kept prefixes and the rows' read-outs; None: half of what is free."""
    stall: float = 0.2
    """Seconds that encoding a prompt may hold up the others in one turn."""
    context: int | None = None
    """Most tokens of one request, prompt and answer; None: the model's own limit."""
    prefixes: int | None = None
    """Bytes of the memory for kept prefixes; None: an eighth."""

    def __post_init__(self) -> None:
        for name in ("rows", "queue", "context", "memory"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name} is {value}; give a number from 1 up")
        if self.stall <= 0:
            raise InputError(f"stall is {self.stall}; give seconds above 0")
