"""How sure decisions are: temperatures by kind of question, kept in a small file beside a checkpoint.

    {"temperature": {"noul": 1.31, "choice": 0.94}, "labels": {"noul": 812, "choice": 640}, "before": {"noul": {…}}, …}

`sfumato calibrate` fits them (`evals.calibration`) and writes the file; decisions divide the logarithms of their
probabilities by them. They belong to the weights that they were fitted on: an adapter has a file of its own in its
folder, and weights that are trained have none until they are calibrated again.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfumato.errors import CheckpointError, SfumatoError
from sfumato.model.config import read_json
from sfumato.questions import KINDS
from sfumato.system.files import replacing

FILE = "decisions.json"
"""The file of a checkpoint's folder, or of an adapter's."""
LEAST, MOST = 0.05, 20.0
"""The temperatures that may be: outside of them a probability says nothing."""
_MOST_COUNT = 1 << 40
_LONGEST = 500
_FIGURES = 20


@dataclass(frozen=True)
class Calibration:
    """Temperatures, and what they were fitted on."""

    temperatures: Mapping[str, float] = field(default_factory=dict)
    """By kind of question; a kind that is missing stays as it is read."""
    labels: Mapping[str, int] = field(default_factory=dict)
    """Labelled answers that were read, by kind."""
    before: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Figures (accuracy, log_loss, brier, ece, …) by kind, of the probabilities as they are read."""
    after: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The same with a temperature that was fitted on other answers."""
    model: str = ""
    """What the model was called."""
    steps: int = 1
    """Denoise passes of each read."""
    samples: int = 1
    """Draws of noise of each read."""

    @classmethod
    def of(cls, raw: Mapping[str, Any], source: str) -> Calibration:
        """What such a file says. CheckpointError, which names `source`, for what is none."""
        temperatures = _by_kind(raw.get("temperature"), "temperature", source)
        for kind, value in temperatures.items():
            if not _is_number(value) or not LEAST <= value <= MOST:
                raise CheckpointError(
                    f"{source}: the temperature of {kind} is {reprlib.repr(value)}; give one from {LEAST} to {MOST:g}"
                )
        labels = _by_kind(raw.get("labels", {}), "labels", source)
        counts = labels | {name: raw.get(name, 1) for name in ("steps", "samples")}
        for name, count in counts.items():
            if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= _MOST_COUNT:
                raise CheckpointError(f"{source}: {name} is {reprlib.repr(count)}; give a whole number")
        figures = {name: _figures(raw.get(name, {}), name, source) for name in ("before", "after")}
        model = raw.get("model", "")
        if not isinstance(model, str) or len(model) > _LONGEST:
            raise CheckpointError(f"{source}: model must be a text of {_LONGEST} characters at most")
        temperatures = {kind: float(value) for kind, value in temperatures.items()}
        return cls(temperatures, labels, **figures, model=model, steps=counts["steps"], samples=counts["samples"])

    def to_dict(self) -> dict[str, Any]:
        """What the file says."""
        return {
            "temperature": dict(self.temperatures),
            "labels": dict(self.labels),
            "before": {kind: dict(figures) for kind, figures in self.before.items()},
            "after": {kind: dict(figures) for kind, figures in self.after.items()},
            "model": self.model,
            "steps": self.steps,
            "samples": self.samples,
        }

    def write(self, path: Path) -> None:
        """Write the file, beside first and then renamed. SfumatoError where the disk says no."""
        try:
            with replacing(path) as file:
                file.write((json.dumps(self.to_dict(), indent=2) + "\n").encode())
        except OSError as error:
            raise SfumatoError(f"cannot write {path}: {error.strerror or error}") from error


def beside(checkpoint: Path) -> Path:
    """Where the file of a checkpoint is: in its folder, or beside a model of one file, with its name."""
    return checkpoint.with_suffix(f".{FILE}") if checkpoint.is_file() else checkpoint / FILE


def read_calibration(path: Path) -> Calibration:
    """The calibration in a file. CheckpointError where it is none."""
    return Calibration.of(read_json(path), str(path))


def calibration_beside(checkpoint: Path) -> Calibration:
    """That of a checkpoint or of an adapter's folder; an empty one where no file is there."""
    path = beside(checkpoint)
    return read_calibration(path) if path.exists() else Calibration()


# ---- checks ---------------------------------------------------------------------------------------------------------


def _by_kind(value: Any, name: str, source: str) -> dict[str, Any]:
    """A record by kinds of questions."""
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: {name} is {reprlib.repr(value)}; give a record by kind of question")
    for kind in value:
        if kind not in KINDS:
            raise CheckpointError(f"{source}: {name} has {reprlib.repr(kind)}; the kinds are {', '.join(KINDS)}")
    return value


def _figures(value: Any, name: str, source: str) -> dict[str, dict[str, float]]:
    """Figures by their names, by kinds of questions."""
    by_kind = _by_kind(value, name, source)
    for kind, figures in by_kind.items():
        is_right = isinstance(figures, dict) and len(figures) <= _FIGURES
        if not is_right or not all(len(key) <= _LONGEST and _is_number(one) for key, one in figures.items()):
            raise CheckpointError(f"{source}: {name} of {kind} is {reprlib.repr(figures)}; give numbers by name")
    return by_kind


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number; a whole one that no float holds is none."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False
