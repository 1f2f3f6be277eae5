"""Answers kept while they come, a line each, so that a run that was stopped goes on where it stood.

The first line says what was run; a file of other settings is not gone on with. It stays when the run is done: what
the model wrote, item by item, is what one looks at next.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sfumato.errors import InputError
from sfumato.evals.tasks import TaskAnswer

_FORMAT = "sfumato answers"


class KeptAnswers:
    """Answers by run and task, in a file to which each is added; without a path in memory alone.

    InputError where the file there is none of these, or is of other settings, and `force` does not begin anew."""

    def __init__(self, path: Path | None, settings: Mapping[str, Any], force: bool = False) -> None:
        self.path = path
        self._answers: dict[tuple[str, str], list[TaskAnswer]] = {}
        if path is None:
            return
        head = {"format": _FORMAT, "settings": json.loads(json.dumps(settings))}
        if force or not path.exists() or not path.stat().st_size:
            path.write_text(json.dumps(head) + "\n", encoding="utf-8")
        else:
            self._read(path, head)

    def of(self, run: str, task: str) -> list[TaskAnswer]:
        """The answers that are there, in the order of the items."""
        return self._answers.setdefault((run, task), [])

    def add(self, run: str, task: str, *answers: TaskAnswer) -> None:
        """Keep more answers; several of them together."""
        self.of(run, task).extend(answers)
        if self.path is not None:
            lines = [json.dumps({"run": run, "task": task, **asdict(answer)}) for answer in answers]
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in lines))

    def tasks(self, run: str) -> list[str]:
        """The tasks that have answers of this run."""
        return [task for name, task in self._answers if name == run]

    @property
    def count(self) -> int:
        """Answers, of all runs and tasks."""
        return sum(map(len, self._answers.values()))

    def _read(self, path: Path, head: Mapping[str, Any]) -> None:
        """Take what is there; a last line that was cut off is taken away."""
        whole = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    record = json.loads(line)
                    if number == 1:
                        _check_head(path, record, head)
                    else:
                        self._answers.setdefault((record.pop("run"), record.pop("task")), []).append(
                            TaskAnswer(**record)
                        )
                except InputError:
                    raise
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    if number > 1 and not line.endswith(b"\n"):
                        break
                    raise InputError(
                        f"line {number} of {path} is no answer of an evaluation; give another -o, or --force to "
                        "begin anew"
                    ) from None
                whole += len(line)
        os.truncate(path, whole)


def _check_head(path: Path, record: Any, head: Mapping[str, Any]) -> None:
    if not isinstance(record, dict) or record.get("format") != _FORMAT or not isinstance(record.get("settings"), dict):
        raise InputError(f"{path} holds no answers of an evaluation; give another -o, or --force to replace it")
    ours, theirs = head["settings"], record["settings"]
    changed = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    if changed:
        raise InputError(
            f"{path} holds answers of other settings ({', '.join(changed)} changed); give another -o, or --force to "
            "begin anew"
        )
