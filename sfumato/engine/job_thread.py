"""Queries of one process's own callers on one thread: those that arrive while others run share their batch.

It is how `LLM` answers when nobody waits in place: its `async` methods, and lists of conversations. The thread is
there while there is work. It deliberately lacks what a server needs, which is `server.worker`: lanes, limits on time,
figures.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Generic

from sfumato.engine.jobs import AnyQuery, JobOutcome, Jobs, PlanMaker
from sfumato.engine.limits import BatchLimits
from sfumato.errors import contained
from sfumato.events import Commit, Draft
from sfumato.system import confined
from sfumato.system.fair import FairLock

Listener = Callable[[Any], None]
"""Called in the thread with each outcome of a query: events, and last its Done, its result, or the error."""


class JobThread(Generic[AnyQuery]):
    """Jobs within these limits, and the thread that takes their turns, each of them under `lock`.

    What makes the plans comes with each query, so that nothing here holds a model that has no work."""

    def __init__(self, limits: BatchLimits, lock: FairLock) -> None:
        self._limits, self._lock = limits, lock
        self._guard = threading.Lock()
        """Of all that follows."""
        self._numbers = itertools.count()
        self._arrivals: deque[tuple[str, AnyQuery, PlanMaker[AnyQuery]]] = deque()
        self._listeners: dict[str, Listener] = {}
        """Of the queries that are not over; one that was cancelled has none."""
        self._jobs: Jobs[AnyQuery] | None = None
        self._thread: threading.Thread | None = None
        self._must_forget = False
        self._closing: Exception | None = None
        """What ended it, and ends what is begun afterwards."""

    def begin(self, query: AnyQuery, planner: PlanMaker[AnyQuery], listener: Listener) -> Callable[[], None]:
        """Take a query, which `planner` makes a plan of.

        What is returned cancels it: it stops after the step under way, and `listener` hears no more."""
        with self._guard:
            if self._closing is not None:
                raise self._closing
            id = str(next(self._numbers))
            self._listeners[id] = listener
            self._arrivals.append((id, query, planner))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="sfumato answers")
                self._thread.start()
        return lambda: self._cancel(id)

    def forget(self) -> None:
        """Free what is encoded, and the cache; while queries run, after the last of them."""
        with self._guard:
            if self._thread is None:
                self._drop_jobs()
            else:
                self._must_forget = True

    def close(self, error: Exception) -> None:
        """End every query with this error, wait for the step under way, and free all."""
        with self._guard:
            self._closing = error
            listeners, self._listeners = self._listeners, {}
            self._arrivals.clear()
            thread, self._must_forget = self._thread, True
            jobs = self._jobs
            if jobs is not None:
                for id in listeners:
                    jobs.cancel(id)
        for listener in listeners.values():
            listener(error)
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self.forget()

    def _cancel(self, id: str) -> None:
        with self._guard:
            if self._listeners.pop(id, None) is not None and self._jobs is not None:
                self._jobs.cancel(id)

    def _drop_jobs(self) -> None:
        if self._jobs is not None:
            self._jobs.close()
        self._jobs, self._must_forget = None, False

    def _work(self) -> None:
        while True:
            with self._guard:
                jobs = self._jobs
                if not self._arrivals and (jobs is None or jobs.is_idle):
                    self._thread = None
                    if self._must_forget:
                        self._drop_jobs()
                    return
            try:
                jobs = self._begin_arrivals(jobs)
                with self._lock:
                    outcomes = jobs.turn()
            except BaseException as error:  # of the engine, on which no query can go on
                self._fail(contained(error))
                continue
            for id, outcome in outcomes:
                self._tell(id, outcome)

    def _begin_arrivals(self, jobs: Jobs[AnyQuery] | None) -> Jobs[AnyQuery]:
        """Begin what has arrived, so that it shares the next turn; as much as holds nobody up for long."""
        until = time.perf_counter() + self._limits.stall
        while jobs is None or (self._arrivals and time.perf_counter() < until):
            with self._guard:
                if not self._arrivals:  # those were ended meanwhile
                    break
                id, query, planner = self._arrivals.popleft()
            if jobs is None:
                jobs = self._jobs = Jobs(planner, self._limits)
            self._begin(jobs, id, query)
        assert jobs is not None  # else nothing has arrived
        return jobs

    def _begin(self, jobs: Jobs[AnyQuery], id: str, query: AnyQuery) -> None:
        confined.is_cancelled.set(lambda: id not in self._listeners)
        try:
            if id in self._listeners:
                jobs.begin(id, query)
        except BaseException as error:
            self._tell(id, contained(error))
            return
        if id not in self._listeners:  # it was cancelled meanwhile
            jobs.cancel(id)

    def _tell(self, id: str, outcome: JobOutcome) -> None:
        with self._guard:
            is_last = not isinstance(outcome, Draft | Commit)
            listener = self._listeners.pop(id, None) if is_last else self._listeners.get(id)
        if listener is not None:
            listener(outcome)

    def _fail(self, error: Exception) -> None:
        """End every query that has begun with this error; the next ones get jobs of their own."""
        with self._guard:
            waiting = {id for id, *_ in self._arrivals}
            listeners = [self._listeners.pop(id) for id in [*self._listeners] if id not in waiting]
            self._drop_jobs()
        for listener in listeners:
            listener(error)
