"""The backend over a worker process: starts it, sends it jobs, yields their events, and starts it again when it dies.

The asyncio side never waits for the pipe: one thread writes what is in the outbox, another reads and hands each message
to the event loop. The reader waits for the process's end too, so that a death is known at once, however it came.

A job is sent once. When the worker dies under it, the client gets an error and may send it again: parts of an answer
may have been read already, and a second run need not give the same parts.
"""

from __future__ import annotations

import asyncio
import atexit
import multiprocessing
import pickle
import signal
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import Any

from sfumato.engine.limits import BatchLimits
from sfumato.errors import BusyError, InputError, SfumatoError, WorkerError
from sfumato.events import Commit, Draft, Event
from sfumato.model.loaded import AdapterList
from sfumato.options import LoadOptions
from sfumato.server.backend import Job, ModelCard, Outcome, Result, Stats, where
from sfumato.server.worker import child as worker_child
from sfumato.server.worker.messages import unpacked
from sfumato.templates.requests import LoadAdapter, UnloadAdapter

PATIENCE = 30.0
"""Seconds that a job waits for a worker that is being started."""
STEADY = 5.0
"""A worker that lived so many seconds is followed by another at once; one that did not, after a pause."""
PAUSES = (1.0, 30.0)
"""The first pause in seconds, which doubles, and the longest."""
SILENCE = 300.0
"""Seconds without a message from a worker that has jobs, after which it is taken for hung and killed. More than its
longest turn (a long prompt of a large model on a slow processor, kernels that are compiled first), less than the
longest request, which then gets the error."""
ENDING = 1.0
"""Seconds that a worker has to end by itself."""

COUNTERS = ("steps", "canvases", "tokens", "passes", "prefix_hits", "prefix_tokens")
"""The figures of `Stats` that only grow."""

OnMessage = Callable[[tuple[Any, ...]], object]
"""Called in another thread with each message of a worker, and with ("ended", exit code) at last."""
ChildMain = Callable[[Connection, LoadOptions, BatchLimits], None]
"""What a worker process runs: a function that a fresh interpreter can import."""


class Worker:
    """`Backend` over one worker process.

    `loading(done, all)` is called with bytes while the first worker loads. `silence`: seconds without a message after
    which a worker that has jobs is killed."""

    def __init__(
        self,
        load: LoadOptions,
        limits: BatchLimits,
        loading: Callable[[int, int], None] | None = None,
        child: ChildMain = worker_child.main,
        silence: float = SILENCE,
    ) -> None:
        self.load, self.limits, self.loading, self.child = load, limits, loading, child
        self.silence = silence
        self._inboxes: dict[str, asyncio.Queue[Outcome]] = {}
        """Of the jobs that the worker has."""
        self._waiting = 0
        """Jobs that wait for a worker."""
        self._process: _Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._card: ModelCard | None = None
        self._is_open = False
        self._is_loaded = False
        self._news = asyncio.Event()
        """Set while there is nothing to wait for: a worker is there, or none will come."""
        self._last_sign = 0.0
        """When the worker last sent a message, or got a job after it had none."""
        self._idle = asyncio.Event()
        """Set while the worker has no job."""
        self._idle.set()
        self._before, self._now = Stats(), Stats()
        """Figures of the workers that have ended, and of this one."""

    # ---- what the routes call ----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Return when the model is loaded; raise what the worker says where it cannot be."""
        self._is_open = True
        self._keeper = asyncio.create_task(self._keep())
        news = asyncio.create_task(self._news.wait())
        try:
            await asyncio.wait([self._keeper, news], return_when=asyncio.FIRST_COMPLETED)
        finally:
            news.cancel()
        if self._keeper.done() and not self._keeper.cancelled():
            self._keeper.result()

    async def stop(self, drain_seconds: float) -> None:
        """Take no more jobs, wait so long for those under way, then end the worker."""
        self._is_open = False
        self._news.set()
        try:
            await asyncio.wait_for(self._idle.wait(), drain_seconds)
        except TimeoutError:
            self._fail("the server stops, and this request took longer than it waits; send it to another, or later")
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        if self._process is not None:
            await asyncio.to_thread(self._process.end)

    async def card(self) -> ModelCard:
        """The loaded model's card; WorkerError before the first load."""
        if self._card is None:
            raise WorkerError("the model is still being loaded; ask again when the server is ready")
        return self._card

    async def run(self, job: Job) -> AsyncGenerator[Event | Result, None]:
        """The events of a job; closing the iterator cancels it."""
        process = await self._admitted()
        if job.id in self._inboxes:
            raise InputError(f"a job with the id {job.id!r} is under way; give each its own")
        inbox = asyncio.Queue[Outcome]()
        process.send(("job", job.id, pickle.dumps(job, pickle.HIGHEST_PROTOCOL)))
        if not self._inboxes:
            self._last_sign = asyncio.get_running_loop().time()
        self._inboxes[job.id] = inbox
        self._idle.clear()
        try:
            while True:
                outcome = await inbox.get()
                if isinstance(outcome, Exception):
                    raise outcome
                yield outcome
                if _is_last(outcome):
                    return
        finally:
            if self._inboxes.pop(job.id, None) is not None:
                process.send(("cancel", job.id))
                self._check_idle()

    async def change_adapters(self, job: Job) -> ModelCard:
        """Load or unload an adapter in the worker, and in those that may follow it."""
        async with aclosing(self.run(job)) as outcomes:
            (outcome,) = [outcome async for outcome in outcomes]
        assert isinstance(outcome, AdapterList)
        folders = dict(self.load.adapters or {})
        match job.query:
            case LoadAdapter(name=name, folder=folder):
                folders[name] = folder
            case UnloadAdapter(name=name):
                folders.pop(name, None)
        self.load = replace(self.load, adapters=folders)
        self._card = replace(await self.card(), adapters=outcome.adapters)
        return self._card

    def is_ready(self) -> bool:
        """Whether the worker takes jobs."""
        return self._is_open and self._is_loaded

    def stats(self) -> Stats:
        """The figures of all workers so far."""
        counts = {name: getattr(self._before, name) + getattr(self._now, name) for name in COUNTERS}
        return replace(self._now, **counts, queue=self._now.queue + self._waiting)

    # ---- jobs --------------------------------------------------------------------------------------------------------

    async def _admitted(self) -> _Process:
        """The worker, once it takes jobs; BusyError where too many wait for it, WorkerError where none comes."""
        queue, rows = self.limits.queue, self.limits.rows
        if self._waiting >= queue or len(self._inboxes) >= rows + queue:
            raise BusyError(f"{queue} requests are waiting, as many as the queue holds; send the request again later")
        self._waiting += 1
        try:
            async with asyncio.timeout(PATIENCE):
                while self._is_open and not self._is_loaded:
                    await self._news.wait()
        except TimeoutError:
            raise WorkerError(f"there was no worker for {PATIENCE:.0f} s; send the request again later") from None
        finally:
            self._waiting -= 1
        if not self._is_open or self._process is None:
            raise WorkerError("the server takes no requests: it is stopping; send the request to another, or later")
        return self._process

    def _deliver(self, id: str, outcome: Outcome) -> None:
        inbox = self._inboxes.get(id)
        if inbox is None:  # cancelled
            return
        inbox.put_nowait(outcome)
        if _is_last(outcome):
            del self._inboxes[id]
            self._check_idle()

    def _fail(self, sentence: str) -> None:
        for inbox in self._inboxes.values():
            inbox.put_nowait(WorkerError(sentence))
        self._inboxes.clear()
        self._check_idle()

    def _check_idle(self) -> None:
        if not self._inboxes:
            self._idle.set()

    # ---- the process -------------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """Keep a worker alive; raises where the first one could not load."""
        pause = 0.0
        while True:
            steady, why = await self._live()
            if self._card is None:
                raise why
            self._fail(f"{why} under this request; send the request again")
            if not self._is_open:
                return
            pause = 0.0 if steady >= STEADY else min(max(PAUSES[0], 2 * pause), PAUSES[1])
            print(f"sfumato: {why}; it is started again" + f" in {pause:.0f} s" * (pause > 0), file=sys.stderr)
            await asyncio.sleep(pause)

    async def _live(self) -> tuple[float, SfumatoError]:
        """One worker, from its start to its end: the seconds in which it took jobs, and why it ended."""
        loop = asyncio.get_running_loop()
        messages: asyncio.Queue[Any] = asyncio.Queue()

        def on_message(message: tuple[Any, ...]) -> None:
            loop.call_soon_threadsafe(messages.put_nowait, message)

        try:
            self._process = _Process(on_message, self.child, self.load, self.limits)
        except OSError as error:
            return 0.0, WorkerError(f"no process can be started for the engine: {error.strerror}")
        ready_at = loop.time()
        failure: SfumatoError | None = None
        while True:
            message, self._last_sign = await self._message(messages), loop.time()
            match message:
                case None:
                    failure = WorkerError(f"the engine's worker was silent for {self.silence:g} s and was killed")
                    self._process.process.kill()
                case ("loading", int(done), int(total)):
                    if self.loading is not None and self._card is None:
                        self.loading(done, total)
                case ("failed", SfumatoError() as reason):
                    failure = failure or reason
                case ("left out", str(name), SfumatoError() as reason):
                    if self._card is None:  # the first one must have them all
                        failure = failure or reason
                        self._process.process.kill()
                    else:
                        self._leave_out(name, reason)
                case ("ready", ModelCard() as card) if failure is None:
                    ready_at, self._card, self._is_loaded = loop.time(), card, True
                    self._news.set()
                case ("ready", ModelCard()):  # it lacks an adapter, and is killed
                    pass
                case ("events", list(outcomes)) if all(isinstance(one, tuple) and len(one) == 2 for one in outcomes):
                    for id, pickled in outcomes:
                        self._deliver(id, unpacked(pickled))
                case ("stats", Stats() as figures):
                    self._now = replace(figures, restarts=self._before.restarts)
                case ("ended", int(code)):
                    break
                case _:
                    print("sfumato: a message of the worker is of no known kind; it is left out", file=sys.stderr)
        steady = loop.time() - ready_at if self._is_loaded else 0.0
        self._is_loaded = False
        if self._is_open:
            self._news.clear()
        self._before = replace(self.stats(), restarts=self._before.restarts + 1, stalled=0.0)
        self._now = Stats(restarts=self._before.restarts)
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return steady, failure or WorkerError(f"the engine's worker ended ({how})")

    def _leave_out(self, name: str, why: SfumatoError) -> None:
        """An adapter of before cannot be loaded any more, by a worker that follows another."""
        print(f"sfumato: adapter {name!r} is left out: {why}", file=sys.stderr)
        folders = self.load.adapters or {}
        self.load = replace(self.load, adapters={other: folders[other] for other in folders if other != name})

    async def _message(self, messages: asyncio.Queue[Any]) -> Any:
        """The next message; None where a worker that has jobs is silent for too long."""
        loop = asyncio.get_running_loop()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self.silence):
                    return await messages.get()
            if self._is_loaded and self._inboxes and loop.time() - self._last_sign >= self.silence:
                return None


class _Process:
    """A worker process, and the two threads that write to it and read from it."""

    def __init__(self, on_message: OnMessage, child: ChildMain, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other_end = context.Pipe()
        self.process = context.Process(target=child, args=(other_end, *arguments), name="sfumato worker")
        self.outbox: SimpleQueue[bytes | None] = SimpleQueue()
        # The worker begins with the signals blocked that it then ignores. The tracker, which comes along with the first
        # process, lets them through again as it starts, so it starts before.
        resource_tracker.ensure_running()
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, worker_child.SIGNALS)
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)
            other_end.close()
        atexit.register(self.process.kill)  # multiprocessing would wait for it
        self.writer = threading.Thread(target=self._write, daemon=True, name="worker's writer")
        self.reader = threading.Thread(target=self._read, args=(on_message,), daemon=True, name="worker's reader")
        self.writer.start()
        self.reader.start()

    def send(self, message: tuple[Any, ...]) -> None:
        """Return at once. A message that cannot be pickled is the caller's error; a dead worker is not."""
        self.outbox.put(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    def end(self) -> None:
        """End the process, by itself or killed; waits for it."""
        self.send(("stop",))
        self.reader.join(ENDING)
        self.process.kill()
        self.reader.join()

    def _read(self, on_message: OnMessage) -> None:
        try:
            with suppress(EOFError, OSError):
                while self.connection in wait([self.connection, self.process.sentinel]):
                    data = self.connection.recv_bytes()
                    try:
                        message = pickle.loads(data)
                        if not isinstance(message, tuple):
                            raise TypeError
                    except Exception as error:  # no message may end this thread
                        print(f"sfumato: a message could not be read: {where(error)}", file=sys.stderr)
                    else:
                        on_message(message)
        finally:
            self.process.join(ENDING)  # it may have closed its end and live
            self.process.kill()
            self.process.join()
            atexit.unregister(self.process.kill)
            self.outbox.put(None)
            self.writer.join()
            self.connection.close()
            on_message(("ended", self.process.exitcode))

    def _write(self) -> None:
        with suppress(OSError):
            while (data := self.outbox.get()) is not None:
                self.connection.send_bytes(data)


def _is_last(outcome: Outcome) -> bool:
    return not isinstance(outcome, (Draft, Commit))
