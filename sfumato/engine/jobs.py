"""Plans for many callers at once, carried out on one batch.

`begin` does the slow part (templates, tokens, grammars) in whatever thread it is called; `turn` belongs to one thread.
It deliberately lacks any knowledge of queries: a planner (`LLM`) makes plans of them.
"""

from __future__ import annotations

import threading
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

from sfumato.engine.batch import Batch, Figures
from sfumato.engine.limits import BatchLimits
from sfumato.engine.plan import Ask, Change, Plan, PlanEnd, advance
from sfumato.engine.request import Failure, Row
from sfumato.errors import BusyError, contained
from sfumato.events import Decisions, Done, Draft, Edited, Event, Filled, Scored, TokenCount
from sfumato.model.adapters import Adapters
from sfumato.model.loaded import AdapterList
from sfumato.model.network import Model
from sfumato.system import confined

PLANNING = 2
"""Threads in which plans go on."""
PAUSE = 0.005
"""Seconds that a turn waits for them where nothing else is to be done."""

JobOutcome = Event | Filled | Edited | Decisions | Scored | TokenCount | AdapterList | Exception
"""What a turn says about a job: an event, the result that it ends with, or the error that ends it."""

AnyQuery = TypeVar("AnyQuery", contravariant=True)


@dataclass(eq=False)
class _PlannedJob:
    id: str
    plan: Plan[Any]
    asks: list[Ask] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    """Of the asks, in their order."""
    end: PlanEnd[Any] | None = None
    """Of a plan that ended before it asked for anything."""
    is_dropped: bool = False
    endings: dict[int, Done] = field(default_factory=dict)
    """Place of an ask -> what it ended with."""


_NextStep = PlanEnd[Any] | tuple[list[Ask], list[Row]]
"""What comes of a plan that goes on: its end, or what it asks for next and the rows of that."""


class PlanMaker(Protocol[AnyQuery]):
    """What makes plans of queries: `LLM`."""

    model: Model

    @property
    def bank(self) -> Adapters:
        """The adapters beside the model's weights."""
        ...

    def plan(self, query: AnyQuery, /) -> Plan[Any]:
        """The plan of a query; InputError or CapacityError for one that is wrong, here or at its first step."""
        ...

    def must_compile(self, query: AnyQuery, /) -> bool:
        """Whether the plan's first step may take seconds."""
        ...


class Jobs(Generic[AnyQuery]):
    """Jobs by the ids that their callers give them."""

    def __init__(self, planner: PlanMaker[AnyQuery], limits: BatchLimits = BatchLimits()) -> None:  # noqa: B008 - frozen
        self.planner, self.limits = planner, limits
        self.batch = Batch(planner.model, limits)
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(PLANNING, "plans")
        self._planning: dict[Future[_NextStep], _PlannedJob] = {}
        """Plans that go on in a thread of their own: they lay out, encode and compile."""
        self._waiting: list[_PlannedJob] = []
        """Jobs that the next turn submits."""
        self._cancelled: set[str] = set()
        self._jobs: dict[str, _PlannedJob] = {}
        self._bank_version = planner.bank.version
        """Of the adapters that the batch knows of."""
        self.batch.count_adapters(planner.bank)
        self._places: dict[str, tuple[_PlannedJob, int]] = {}
        """By the id of a request under way: its job, and its place among the job's requests."""

    def begin(self, id: str, query: AnyQuery) -> None:
        """Take a job. InputError, CapacityError; BusyError where too many wait."""
        self._check_queue(1)
        plan = self.planner.plan(query)
        job = _PlannedJob(id, plan)
        match advance(plan):
            case PlanEnd() as end:
                job.end = end
            case asks:
                job.asks, job.rows = asks, self._rows(id, asks)  # checked here rather than between two turns
        with self._lock:
            self._check_queue(len(job.asks))
            self._waiting.append(job)

    def is_slow(self, query: AnyQuery) -> bool:
        """Whether `begin` may take seconds."""
        return self.planner.must_compile(query)

    def _rows(self, id: str, asks: list[Ask]) -> list[Row]:
        return [ask.row(self.planner.model.config, f"{id}/{place}") for place, ask in enumerate(asks)]

    def _check_queue(self, more: int) -> None:
        waiting = self.batch.figures().queue + sum(len(job.asks) for job in self._waiting)
        if waiting + more > self.limits.queue:
            raise BusyError(f"{waiting} requests wait already, of {self.limits.queue} that may; try again in a moment")

    def cancel(self, id: str) -> None:
        """Forget a job; before the next step its rows are free."""
        with self._lock:
            self._cancelled.add(id)

    def close(self) -> None:
        """Free the threads in which plans go on; no turn may follow."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def is_idle(self) -> bool:
        """Whether a turn has nothing to do."""
        is_quiet = not self._waiting and not self._cancelled and not self._planning
        return self.batch.is_idle and is_quiet and not self._must_note_adapters()

    def _must_note_adapters(self) -> bool:
        """Whether adapters have come or gone, or the last row of one that is unloaded has ended."""
        bank = self.planner.bank
        return bank.version != self._bank_version or not bank.is_settled

    def figures(self) -> Figures:
        """The batch's figures."""
        return self.batch.figures()

    def turn(self) -> list[tuple[str, JobOutcome]]:
        """One turn of the batch: job ids, each with what has come of it.

        An error, the last event of an answer, or a result is the last of its job."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
            cancelled, self._cancelled = self._cancelled, set()
        outcomes: list[tuple[str, JobOutcome]] = []
        for job in waiting:
            if job.id in cancelled:
                continue
            if job.end is not None:
                outcomes.append((job.id, _result_of(job.end)))
            else:
                self._jobs[job.id] = job
                outcomes += self._submit(job)
        for id in cancelled & self._jobs.keys():
            self._drop(self._jobs[id])
        if self._planning and self.batch.is_idle:
            wait(self._planning, PAUSE, FIRST_COMPLETED)
        for future in [future for future in self._planning if future.done()]:
            outcomes += self._continue(self._planning.pop(future), future)
        if self._must_note_adapters():
            self._bank_version = self.planner.bank.version
            self.batch.prefixes.keep_adapters(self.planner.bank.holds)
            self.planner.bank.settle()
            self.batch.count_adapters(self.planner.bank)
        for event in self.batch.turn():
            if event.request not in self._places:  # of a job that failed at an earlier event of this turn
                continue
            job, place = self._places[event.request]
            if isinstance(event, Failure):
                self._drop(job)
                outcomes.append((job.id, event.error))
            else:
                try:
                    outcomes += self._take_event(job, place, event)
                except BaseException as error:  # of its text or its plan, and of nobody else's
                    self._drop(job)
                    outcomes.append((job.id, contained(error)))
        return outcomes

    def _submit(self, job: _PlannedJob) -> list[tuple[str, JobOutcome]]:
        job.endings = {}
        try:
            for place, row in enumerate(job.rows):
                self._places[self.batch.submit(row)] = job, place
        except Exception as error:
            self._drop(job)
            return [(job.id, error)]
        return []

    def _take_event(self, job: _PlannedJob, place: int, event: Event) -> list[tuple[str, JobOutcome]]:
        ask = job.asks[place]
        event = replace(ask.reader.with_text(event), row=place)
        outcomes: list[tuple[str, JobOutcome]] = []
        if ask.is_answer or isinstance(event, Draft):
            outcomes.append((job.id, event))
        if isinstance(event, Done):
            self._places.pop(event.request)
            job.endings[place] = event
            if len(job.endings) == len(job.asks):
                self._advance(job)
        return outcomes

    def _advance(self, job: _PlannedJob) -> None:
        """After all that a plan asked for has ended: an answer is over; another plan goes on in a thread."""
        if all(ask.is_answer for ask in job.asks):
            self._jobs.pop(job.id)
            return
        self._planning[self._threads.submit(self._send, job)] = job

    def _send(self, job: _PlannedJob) -> _NextStep:
        confined.is_cancelled.set(lambda: job.is_dropped)
        asks = advance(job.plan, [job.endings[place] for place in range(len(job.asks))])
        return asks if isinstance(asks, PlanEnd) else (asks, self._rows(job.id, asks))

    def _continue(self, job: _PlannedJob, future: Future[_NextStep]) -> list[tuple[str, JobOutcome]]:
        """After a plan went on in a thread: its result, or its next requests."""
        if job.is_dropped:
            job.plan.close()
            return []
        try:
            following = future.result()
        except BaseException as error:
            self._drop(job)
            return [(job.id, contained(error))]
        if isinstance(following, PlanEnd):
            self._jobs.pop(job.id)
            return [(job.id, following.result)]
        job.asks, job.rows = following
        return self._submit(job)

    def _drop(self, job: _PlannedJob) -> None:
        self._jobs.pop(job.id, None)
        job.is_dropped = True
        if job not in self._planning.values():  # else when it comes back
            job.plan.close()
        for row in job.rows:
            if self._places.pop(row.request.id, None) is not None:
                self.batch.cancel(row.request.id)


def _result_of(end: PlanEnd[Any]) -> Any:
    """What a plan has ended with; of a change of the model, what comes of it, an error too."""
    if not isinstance(end.result, Change):
        return end.result
    try:
        return end.result.carry_out()
    except BaseException as error:
        return contained(error)
