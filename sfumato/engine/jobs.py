"""What `LLM`'s methods do, for many callers at once: their plans, carried out on one batch.

`begin` does the slow part (templates, tokens, grammars) in whatever thread it is called; `turn` belongs to one thread.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from sfumato.engine.batch import Batch, BatchLimits, Figures
from sfumato.engine.plan import Ask, Plan
from sfumato.engine.request import Failure, Row
from sfumato.errors import BusyError, contained
from sfumato.events import Decision, Done, Draft, Edited, Event, Filled
from sfumato.model.network import Model
from sfumato.options import Options
from sfumato.system import confined

PLANNING = 2
"""Threads in which plans go on."""
PAUSE = 0.005
"""Seconds that a turn waits for them where nothing else is to be done."""

Told = Event | Filled | Edited | dict[str, Decision] | Exception


@dataclass(eq=False)
class _Job:
    key: int
    plan: Plan[Any]
    asks: list[Ask]
    rows: list[Row]
    """Of the asks, in their order."""
    is_answer: bool
    """Its events are what was asked for; of other jobs the result is."""
    has_drafts: bool
    is_dropped: bool = False
    ended: dict[int, Done] = field(default_factory=dict)


class Planner(Protocol):
    """What makes plans: `LLM`."""

    model: Model

    def plan(self, kind: str, payload: Mapping[str, Any], options: Options) -> Plan[Any]: ...

    def must_compile(self, kind: str, payload: Mapping[str, Any], options: Options) -> bool: ...


class Jobs:
    """Jobs by the keys that their callers give them."""

    def __init__(self, llm: Planner, limits: BatchLimits = BatchLimits()) -> None:  # noqa: B008 - frozen
        self.llm, self.limits = llm, limits
        self.batch = Batch(llm.model, limits)
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(PLANNING, "plans")
        self._going: dict[Future[tuple[bool, Any]], _Job] = {}
        """Plans that go on in a thread of their own: they lay out, encode and compile."""
        self._begun: list[_Job] = []
        self._cancelled: set[int] = set()
        self._jobs: dict[int, _Job] = {}
        self._places: dict[str, tuple[_Job, int]] = {}
        """By the id of a request under way: its job, and its place among the job's requests."""

    def begin(self, key: int, kind: str, payload: Mapping[str, Any], options: Options) -> None:
        """Take a job (see `LLM.plan`). InputError, CapacityError; BusyError where too many wait."""
        self._check_queue(1)
        plan = self.llm.plan(kind, payload, options)
        asks = next(plan)
        rows = self._rows(key, asks)  # here rather than between two turns
        job = _Job(key, plan, asks, rows, kind in ("chat", "complete"), options.drafts)
        with self._lock:
            self._check_queue(len(job.asks))
            self._begun.append(job)

    def is_slow(self, kind: str, payload: Mapping[str, Any], options: Options) -> bool:
        """Whether `begin` may take seconds."""
        return self.llm.must_compile(kind, payload, options)

    def _rows(self, key: int, asks: list[Ask]) -> list[Row]:
        return [ask.row(self.llm.model.config, f"{key}/{place}") for place, ask in enumerate(asks)]

    def _check_queue(self, more: int) -> None:
        waiting = self.batch.figures().queue + sum(len(job.asks) for job in self._begun)
        if waiting + more > self.limits.queue:
            raise BusyError(f"{waiting} requests wait already, of {self.limits.queue} that may; try again in a moment")

    def cancel(self, key: int) -> None:
        """Forget a job; before the next step its rows are free."""
        with self._lock:
            self._cancelled.add(key)

    @property
    def is_idle(self) -> bool:
        return self.batch.is_idle and not self._begun and not self._cancelled and not self._going

    def figures(self) -> Figures:
        return self.batch.figures()

    def turn(self) -> list[tuple[int, Told]]:
        """One turn of the batch: what there is to tell of which job.

        An error, the last event of an answer, or a result is the last of its job."""
        with self._lock:
            begun, self._begun = self._begun, []
            cancelled, self._cancelled = self._cancelled, set()
        told: list[tuple[int, Told]] = []
        for job in begun:
            if job.key not in cancelled:
                self._jobs[job.key] = job
                told += self._submit(job)
        for key in cancelled & self._jobs.keys():
            self._drop(self._jobs[key])
        if self._going and self.batch.is_idle:
            wait(self._going, PAUSE, FIRST_COMPLETED)
        for going in [going for going in self._going if going.done()]:
            told += self._gone_on(self._going.pop(going), going)
        for event in self.batch.turn():
            if event.request not in self._places:  # of a job that failed at an earlier event of this turn
                continue
            job, place = self._places[event.request]
            if isinstance(event, Failure):
                self._drop(job)
                told.append((job.key, event.error))
            else:
                try:
                    told += self._tell(job, place, event)
                except BaseException as error:  # of its text or its plan, and of nobody else's
                    self._drop(job)
                    told.append((job.key, contained(error)))
        return told

    def _submit(self, job: _Job) -> list[tuple[int, Told]]:
        job.ended = {}
        try:
            for place, row in enumerate(job.rows):
                self._places[self.batch.submit(row)] = job, place
        except Exception as error:
            self._drop(job)
            return [(job.key, error)]
        return []

    def _tell(self, job: _Job, place: int, event: Event) -> list[tuple[int, Told]]:
        ask = job.asks[place]
        event = replace(ask.reader.tell(event), row=place)
        told: list[tuple[int, Told]] = []
        if job.is_answer or (isinstance(event, Draft) and ask.is_shown and job.has_drafts):
            told.append((job.key, event))
        if isinstance(event, Done):
            self._places.pop(event.request)
            job.ended[place] = event
            if len(job.ended) == len(job.asks):
                told += self._go_on(job)
        return told

    def _go_on(self, job: _Job) -> list[tuple[int, Told]]:
        """All that a plan asked for has ended. An answer has no more parts; another plan goes on in a thread."""
        if job.is_answer:
            self._jobs.pop(job.key)
            return []
        self._going[self._threads.submit(self._send, job)] = job
        return []

    def _send(self, job: _Job) -> tuple[bool, Any]:
        """Whether a plan is over, and its result or what it asks for next."""
        confined.leave_cores()
        confined.is_cancelled.set(lambda: job.is_dropped)
        try:
            asks = job.plan.send([job.ended[place] for place in range(len(job.asks))])
        except StopIteration as stop:
            return True, stop.value
        job.asks = asks
        return False, self._rows(job.key, asks)

    def _gone_on(self, job: _Job, going: Future[tuple[bool, Any]]) -> list[tuple[int, Told]]:
        if job.is_dropped:
            job.plan.close()
            return []
        try:
            is_over, what = going.result()
        except BaseException as error:
            self._drop(job)
            return [(job.key, contained(error))]
        if is_over:
            self._jobs.pop(job.key)
            return [(job.key, what)]
        job.rows = what
        return self._submit(job)

    def _drop(self, job: _Job) -> None:
        self._jobs.pop(job.key, None)
        job.is_dropped = True
        if job not in self._going.values():  # else when it comes back
            job.plan.close()
        for row in job.rows:
            if self._places.pop(row.request.id, None) is not None:
                self.batch.cancel(row.request.id)
