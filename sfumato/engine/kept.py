"""The engine that stays between two calls of one caller: warm, its steps recorded, a conversation still encoded.

One call at a time has it; a second call at the same time gets none and makes its own. It deliberately lacks a second
conversation: many callers share a `batch`, which keeps prefixes.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from sfumato.engine.engine import Engine
from sfumato.model.network import Model
from sfumato.model.prompt import Prompt

NOTHING = Prompt(())
"""No conversation."""

MOST_IDLE = 1 << 30
"""Bytes of a cache that holds nothing, above which it is given back between two calls."""


@dataclass(frozen=True, eq=False)
class KeptEngine:
    """An engine without rows, and what its first seat still holds: the beginning of the last conversation."""

    engine: Engine
    prompt: Prompt


class EngineKeeper:
    """Keeps the engine of the last call for the next one."""

    def __init__(self) -> None:
        self.kept: KeptEngine | None = None
        self._lock = threading.Lock()

    def take(self, model: Model, prompts: Sequence[Prompt]) -> Engine | None:
        """The engine of the last call; None where there is none, another call has it, or it ran another model.

        Its first seat keeps what it has in common with the prompt, if there is one; of a row, `Row.reusable`."""
        with self._lock:  # or two threads take the same
            kept, self.kept = self.kept, None
        if kept is None or kept.engine.model is not model:
            return None
        shared = kept.prompt.shared(prompts[0]) if len(prompts) == 1 else 0
        engine = kept.engine
        engine.leave(0, shared if engine.cache.can_truncate(0, shared) else 0)
        return engine

    def put_back(self, engine: Engine, conversation: Prompt = NOTHING) -> None:
        """Keep an engine for the next call, and this conversation in its first seat."""
        for seat in range(len(engine.rows)):
            engine.leave(seat, len(conversation) if seat == 0 else 0)
        if engine.cache.bytes > MOST_IDLE and not len(conversation):
            engine.resize(1, 1)
        self.kept = KeptEngine(engine, conversation)

    def forget(self) -> None:
        """Free the engine: its cache, and the steps that were recorded for it."""
        self.kept = None
