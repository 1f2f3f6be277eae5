"""The logs of a run, a JSON line each step or look; what a kill has cut off or doubled is forgotten."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfumato.errors import SfumatoError
from sfumato.system.files import replacing

LOGS = ("log.jsonl", "evals.jsonl", "samples.jsonl")
"""A line for each step, for each look at the model, and for each text that it wrote then."""


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Add a line. SfumatoError where the disk says no; half a line is forgotten when the run goes on."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise SfumatoError(
            f"cannot write {path}: {error.strerror or error}; make room, and the same command goes on from what was "
            "saved"
        ) from error


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; none where there is no file."""
    if not path.exists():
        return []
    kept = [json.loads(line) for line in path.read_bytes().splitlines() if _step_of(line) is not None]
    return [line for line in kept if isinstance(line, dict)]


def cut(path: Path, step: int) -> None:
    """Remove a log's lines of steps after the last save, which are run again, and lines that a kill has cut off.

    Of each step only the last line stays; of each text of a step that too."""
    if not path.exists():
        return
    held = path.read_bytes()
    kept: dict[tuple[int, object], bytes] = {}
    for line in held.splitlines():
        at = _step_of(line)
        if at is not None and at <= step:
            kept[at, json.loads(line).get("number")] = line
    data = b"".join(line + b"\n" for line in kept.values())
    if data != held:
        with replacing(path) as file:
            file.write(data)


def _step_of(line: bytes) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None
