"""The worker loop: jobs between the connection and the engine.

Three kinds of thread run its methods. `read` takes messages from the connection, from before the model is loaded, so
that the process ends with its parent whatever it is doing. `prepare` prepares jobs (template, tokens, grammar) in two
lanes, so that small ones need not wait for a new grammar or a long text. `serve`, in the main thread, runs the engine's
turns, and sends the outcomes of each as one message.

An error of a job ends that job alone. A job that is not prepared in time is given up; its thread is stuck, and another
one takes its place.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from sfumato.errors import InputError
from sfumato.server.backend import Job, Outcome, Stats, where
from sfumato.server.worker.messages import packed
from sfumato.system import confined
from sfumato.templates.requests import AdapterQuery, Query

LARGE = 64 << 10
"""Bytes of a job from which on it goes into the slow lane."""
NICE = 19
"""How far the slow lane's threads step aside, where the system has that of threads (Linux)."""
PREPARE_SECONDS = 60.0
"""After which a job that is still being prepared is given up."""
MOST_STUCK = 8
"""Threads that may be stuck at once; with one more the process ends, and is started again."""
STACK = 16 << 20
"""Bytes of stack of a thread: what a grammar needs was measured on less."""
STATS_SECONDS = 0.5
TRIM_SECONDS = 5.0
"""How often the heap gives back what it no longer uses: tensors of ever other sizes leave holes, and it would grow by a
twelfth within minutes."""


class JobRunner(Protocol):
    """What runs the jobs: `engine.jobs.Jobs`; tests give another. `begin` and `cancel` are safe against `turn`."""

    def begin(self, id: str, query: Query | AdapterQuery) -> None:
        """Prepare a job and queue it; InputError, CapacityError, BusyError."""
        ...

    def is_slow(self, query: Query | AdapterQuery) -> bool:
        """Whether `begin` may take seconds; at once."""
        ...

    def cancel(self, id: str) -> None:
        """End a job; no effect on one that has ended."""
        ...

    def turn(self) -> Sequence[tuple[str, Outcome]]:
        """One turn of the engine: the outcomes, each with its job's id."""
        ...

    @property
    def is_idle(self) -> bool:
        """Whether a turn would do nothing."""
        ...

    def figures(self) -> object:
        """A record whose fields are among those of `Stats`."""
        ...


class Lane(Enum):
    """Jobs that are prepared by the same threads; the value is how far those step aside."""

    QUICK = 0
    SLOW = NICE


@dataclass(eq=False)
class _Preparation:
    """A job that has arrived and has not begun."""

    lane: Lane
    arrival: float = field(default_factory=time.monotonic)
    is_cancelled: bool = False
    is_given_up: bool = False


class WorkerLoop:
    """Jobs between the connection and the engine. `read`, `prepare` and `serve` are what the threads run."""

    jobs: JobRunner
    """Set when the model is loaded; no job arrives before."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.send_lock = threading.Lock()
        self.news = threading.Event()
        self.queues: dict[Lane, SimpleQueue[Job]] = {lane: SimpleQueue() for lane in Lane}
        self.lock = threading.Lock()
        self.preparing: dict[str, _Preparation] = {}
        self.starts: dict[str, float] = {}
        """Of these, when a thread took each one up."""
        self.stuck = 0
        """Threads that are still at a job that was given up."""

    def send(self, message: Any) -> None:
        """Send a message, from any thread; the process ends where the parent no longer reads."""
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        try:
            with self.send_lock:
                self.connection.send_bytes(data)
        except OSError:
            os._exit(0)

    def send_outcomes(self, outcomes: Sequence[tuple[str, Outcome | BaseException]]) -> None:
        """Send each pickled by itself: one that cannot be sent, or read, is an error of its own job."""
        self.send(("events", [(id, packed(outcome)) for id, outcome in outcomes]))

    def read(self) -> None:
        """Take messages from the parent until it ends."""
        while True:
            try:
                data = self.connection.recv_bytes()
            except (EOFError, OSError):  # the parent has ended
                os._exit(0)
            try:
                message = pickle.loads(data)
            except Exception as error:
                print(f"sfumato: a message could not be read: {where(error)}", file=sys.stderr, flush=True)
                continue
            match message:
                case ("job", str(id), bytes(pickled)):
                    self._receive(id, pickled)
                case ("cancel", str(id)):
                    self._cancel(id)
                case ("stop",):
                    os._exit(0)

    def _receive(self, id: str, pickled: bytes) -> None:
        try:
            job = pickle.loads(pickled)
        except Exception as error:
            self.send_outcomes([(id, error)])
            return
        lane = self.lane_of(job, len(pickled))
        with self.lock:
            self.preparing[id] = _Preparation(lane)
        self.queues[lane].put(job)
        self.news.set()

    def _cancel(self, id: str) -> None:
        with self.lock:
            if (preparation := self.preparing.get(id)) is not None:
                preparation.is_cancelled = True
        if preparation is None:
            self.jobs.cancel(id)
            self.news.set()

    def lane_of(self, job: Job, size: int) -> Lane:
        """The lane for a job of so many bytes."""
        try:
            return Lane.SLOW if size >= LARGE or self.jobs.is_slow(job.query) else Lane.QUICK
        except Exception:  # `begin` raises it again, for the client
            return Lane.SLOW

    def prepare(self, lane: Lane) -> None:
        """Prepare jobs of a lane, until one takes so long that another thread has taken this one's place."""
        if lane.value:
            with suppress(AttributeError, OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), lane.value)
        while True:
            job = self.queues[lane].get()
            with self.lock:
                preparation, self.starts[job.id] = self.preparing[job.id], time.monotonic()
            failure = self._begin(job, preparation)
            if preparation.is_given_up:  # and this thread is not stuck any more
                with self.lock:
                    self.stuck -= 1
            elif failure is not None:
                self.send_outcomes([(job.id, failure)])
            self.news.set()
            if preparation.is_given_up:
                return

    def _begin(self, job: Job, preparation: _Preparation) -> BaseException | None:
        """Begin a job, unless it was cancelled before; returns its error."""
        confined.is_cancelled.set(lambda: preparation.is_cancelled or preparation.is_given_up)
        has_begun, failure = False, None
        try:
            if not preparation.is_cancelled:
                self.jobs.begin(job.id, job.query)
                has_begun = True
        except BaseException as error:  # a panic of a Rust library is no Exception
            failure = error
        with self.lock:
            self.preparing.pop(job.id)
            self.starts.pop(job.id)
        if has_begun and (preparation.is_cancelled or preparation.is_given_up):
            self.jobs.cancel(job.id)
        return failure

    def give_up(self) -> None:
        """Give up jobs that are not prepared in time; another thread takes the place of each one that is stuck."""
        latest = time.monotonic() - PREPARE_SECONDS
        with self.lock:
            late = {id: self.preparing[id] for id, start in self.starts.items() if start < latest}
            overdue = {id: preparation for id, preparation in late.items() if not preparation.is_given_up}
            for preparation in overdue.values():
                preparation.is_given_up = True
        for id, preparation in overdue.items():
            text = f"the request was not prepared within {PREPARE_SECONDS:g} seconds; make its texts smaller"
            self.send_outcomes([(id, InputError(text))])
            with self.lock:
                self.stuck += 1
            if self.stuck > MOST_STUCK:
                text = f"{MOST_STUCK} threads are lost to requests that take too long"
                print(f"sfumato: {text}", file=sys.stderr, flush=True)
                os._exit(1)
            start_thread(self.prepare, preparation.lane)

    def serve(self) -> None:
        """Run the engine's turns for ever; while there is nothing to do, wait."""
        last_stats, last_trim = 0.0, time.monotonic()
        while True:
            self.news.clear()  # before the look, so that what comes after it is not missed
            is_idle = self.jobs.is_idle
            outcomes = [] if is_idle else self.jobs.turn()
            if outcomes:
                self.send_outcomes(outcomes)
            self.give_up()
            if is_idle or time.monotonic() - last_stats >= STATS_SECONDS:
                self.send(("stats", self.stats()))
                last_stats = time.monotonic()
            if is_idle and self.preparing:  # say so now and then: a parent that gets no message takes this for a hang
                self.news.wait(STATS_SECONDS)
            elif time.monotonic() - last_trim >= TRIM_SECONDS or (is_idle and not self.news.wait(TRIM_SECONDS)):
                trim()
                last_trim = time.monotonic()
                if is_idle:
                    self.news.wait()

    def stats(self) -> Stats:
        """The figures of this process."""
        figures = vars(self.jobs.figures())
        with self.lock:
            arrivals = [one.arrival for one in self.preparing.values() if not one.is_given_up]
        more = {
            "queue": figures["queue"] + len(arrivals),
            "memory_bytes": memory_bytes(),
            "stalled": time.monotonic() - min(arrivals) if arrivals else 0.0,
        }
        return Stats(**figures | more)


def start_thread(run: Callable[..., None], *arguments: Any) -> None:
    """Start a thread with room on its stack for what a grammar needs."""
    before = threading.stack_size(STACK)
    threading.Thread(target=run, args=arguments, daemon=True, name=run.__name__).start()
    threading.stack_size(before)


def trim() -> None:
    """Give freed memory back to the system, where the C library can (glibc)."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def memory_bytes() -> int:
    """Resident memory of this process; the most it ever was, where the system does not say what it is."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
