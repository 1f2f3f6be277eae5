"""Sfumato, the local engine for DiffusionGemma: text that emerges from noise, a whole canvas at a time.

The public names. Each is imported when it is first used, so that `import sfumato` itself costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfumato.errors import (
        BusyError,
        CapacityError,
        CheckpointError,
        InputError,
        NumericError,
        SfumatoError,
        WorkerError,
    )
    from sfumato.events import (
        Commit,
        Completion,
        Decision,
        Decisions,
        Done,
        Draft,
        Edited,
        Event,
        Filled,
        Scored,
        ScoredToken,
        TokenCount,
        Usage,
    )
    from sfumato.llm import LLM
    from sfumato.options import LoadOptions, Options
    from sfumato.presets import Preset
    from sfumato.questions import Choice, Noul, Score, Span
    from sfumato.remote import Remote
    from sfumato.templates.interface import LanguageModel
    from sfumato.templates.requests import Chat, Complete, CountTokens, Decide, Edit, Fill, Infill, Likelihood
    from sfumato.templates.slots import Slot

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "BusyError",
    "CapacityError",
    "Chat",
    "CheckpointError",
    "Choice",
    "Commit",
    "Complete",
    "Completion",
    "CountTokens",
    "Decide",
    "Decision",
    "Decisions",
    "Done",
    "Draft",
    "Edit",
    "Edited",
    "Event",
    "Fill",
    "Filled",
    "Infill",
    "InputError",
    "LanguageModel",
    "Likelihood",
    "LoadOptions",
    "Noul",
    "NumericError",
    "Options",
    "Preset",
    "Remote",
    "Score",
    "Scored",
    "ScoredToken",
    "SfumatoError",
    "Slot",
    "Span",
    "TokenCount",
    "Usage",
    "WorkerError",
]

_HOME = {
    "LLM": "llm",
    "BusyError": "errors",
    "CapacityError": "errors",
    "Chat": "templates.requests",
    "CheckpointError": "errors",
    "Choice": "questions",
    "Commit": "events",
    "Complete": "templates.requests",
    "Completion": "events",
    "CountTokens": "templates.requests",
    "Decide": "templates.requests",
    "Decision": "events",
    "Decisions": "events",
    "Done": "events",
    "Draft": "events",
    "Edit": "templates.requests",
    "Edited": "events",
    "Event": "events",
    "Fill": "templates.requests",
    "Filled": "events",
    "Infill": "templates.requests",
    "InputError": "errors",
    "LanguageModel": "templates.interface",
    "Likelihood": "templates.requests",
    "LoadOptions": "options",
    "Noul": "questions",
    "NumericError": "errors",
    "Options": "options",
    "Preset": "presets",
    "Remote": "remote",
    "Score": "questions",
    "Scored": "events",
    "ScoredToken": "events",
    "SfumatoError": "errors",
    "Slot": "templates.slots",
    "Span": "questions",
    "TokenCount": "events",
    "Usage": "events",
    "WorkerError": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sfumato' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"sfumato.{_HOME[name]}"), name)
    globals()[name] = value  # looked up once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__} - {"TYPE_CHECKING", "Any", "annotations"})
