"""The models inside this package, by the names under which they are loaded. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]

EMBEDDED: Mapping[str, Path] = {
    "nano": _PACKAGE / "nano",
    "nano-decide": _PACKAGE / "nano_decide",
    "nano-skills": _PACKAGE / "nano_skills",
}
"""Name -> folder."""
