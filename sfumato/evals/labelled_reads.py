"""Labelled questions, read by a model: several states at a time, kept as they come, so that a long run can go on.

Each state has a seed of its own, made of its content: an answer is the same whatever stands beside it in the file and
however the model is reached, and the noise of one state is not that of the next. What is read is without calibration.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sfumato.errors import InputError
from sfumato.evals.calibration import LabelledRead
from sfumato.evals.labelled import LabelledState
from sfumato.events import Decisions
from sfumato.options import BIG, Options, differences
from sfumato.questions import record_of
from sfumato.templates.interface import LanguageModel
from sfumato.templates.patience import run_patiently
from sfumato.templates.requests import Decide

AT_ONCE = 8
"""States that are read together, whose questions share passes."""


@dataclass(frozen=True)
class ReadingPlan:
    """How states are read."""

    steps: int = 1
    samples: int = 1
    options: Options = Options()  # noqa: RUF009 - frozen
    model: str = ""
    """What tells the model and its weights from any other, so that reads of another are not taken for its own."""

    def key(self, state: LabelledState) -> str:
        """What is read, as a digest."""
        questions = {id: record_of(question) for id, question in state.questions.items()}
        reading = [self.model, self.steps, self.samples, repr(differences(self.options))]
        return _digest([*reading, state.state, questions, dict(state.answers)])

    def query(self, state: LabelledState) -> Decide:
        """What is asked of the model; the seed is of the state alone, so that any model sees the same noise."""
        seed = ((self.options.seed or 0) + int(_digest(state.state)[:15], 16)) % BIG
        reading: dict[str, Any] = {"steps": self.steps, "samples": self.samples, "calibrated": False}
        return Decide(state.state, state.questions, **reading, options=replace(self.options, seed=seed))


@dataclass(frozen=True)
class StateReads:
    """What was read of one state."""

    reads: tuple[LabelledRead, ...]
    skipped: int = 0
    """Labels of questions that were not asked, as the model's answer to another one did not call for them."""


class KeptReads:
    """Reads by their keys, in a file to which each is added as it comes; without a path in memory alone."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._records: dict[str, StateReads] = {}
        if path is not None and path.is_file():
            for line in path.read_bytes().splitlines():
                try:
                    record = json.loads(line)
                    self._records[record["key"]] = _reads_of(record)
                except (ValueError, KeyError, TypeError, IndexError):
                    continue  # a line that was cut off: it is read again

    def get(self, key: str) -> StateReads | None:
        """What was read, if it was."""
        return self._records.get(key)

    def put(self, key: str, result: StateReads) -> None:
        """Keep what was read."""
        self._records[key] = result
        if self.path is not None:
            reads = [[read.kind, read.label, read.state, read.probabilities] for read in result.reads]
            line = json.dumps({"key": key, "reads": reads, "skipped": result.skipped})
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"\n{line}\n")  # behind what may be half a line

    def remove(self) -> None:
        """Take the file away."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


async def read_states(
    llm: LanguageModel, states: Iterable[LabelledState], plan: ReadingPlan, kept: KeptReads, problems: list[str]
) -> AsyncGenerator[StateReads]:
    """What the model says of each state, as it comes, in any order; what is kept is not read again.

    A sentence about each state that the model cannot read, too long for it perhaps, goes to `problems`."""

    async def read(state: LabelledState, key: str) -> StateReads | None:
        try:
            decisions = await run_patiently(llm, plan.query(state))
        except InputError as error:
            problems.append(f"{state.place}: {error}")
            return None
        kept.put(key, result := _result_of(state, decisions))
        return result

    under_way: set[asyncio.Task[StateReads | None]] = set()
    try:
        for state in states:
            key = plan.key(state)
            if (known := kept.get(key)) is not None:
                yield known
                continue
            under_way.add(asyncio.create_task(read(state, key)))
            if len(under_way) >= AT_ONCE:
                done, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if (result := task.result()) is not None:
                        yield result
        for one in asyncio.as_completed(under_way):
            if (result := await one) is not None:
                yield result
    finally:
        for task in under_way:
            task.cancel()


def _result_of(state: LabelledState, decisions: Decisions) -> StateReads:
    reads, skipped, digest = [], 0, _digest(state.state)
    for id, label in state.answers.items():
        if id not in decisions:
            skipped += 1
            continue
        chances: Mapping[str, float] = decisions[id].probabilities
        reads.append(LabelledRead(decisions[id].kind, (*chances.values(),), [*chances].index(label), digest))
    return StateReads(tuple(reads), skipped)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _reads_of(record: Mapping[str, Any]) -> StateReads:
    """What a line of the file says. ValueError and its like for one that is none."""
    reads = [_read_of(*one) for one in record["reads"]]
    return StateReads(tuple(reads), int(record["skipped"]))


def _read_of(kind: str, label: int, state: str, probabilities: Sequence[float]) -> LabelledRead:
    read = LabelledRead(str(kind), tuple(map(float, probabilities)), int(label), str(state))
    _ = read.probabilities[read.label]
    return read
