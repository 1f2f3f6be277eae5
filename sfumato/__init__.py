"""Sfumato, the local engine for DiffusionGemma: text that emerges from noise, a whole canvas at a time.

The public names. Each is imported when it is first used, so that `import sfumato` itself costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfumato.events import Commit, Completion, Done, Draft, Usage
    from sfumato.llm import LLM
    from sfumato.options import Options
    from sfumato.templates.slots import Slot

__version__ = "0.1.0"
__all__ = ["LLM", "Commit", "Completion", "Done", "Draft", "Options", "Slot", "Usage"]

_HOME = {
    "LLM": "llm",
    "Commit": "events",
    "Completion": "events",
    "Done": "events",
    "Draft": "events",
    "Options": "options",
    "Slot": "templates.slots",
    "Usage": "events",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sfumato' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"sfumato.{_HOME[name]}"), name)
    globals()[name] = value  # looked up once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
