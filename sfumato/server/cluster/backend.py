"""The replicas of a cluster as one `Backend`.

A job whose replica ends under it is sent once more, to another. Its seed is set before the first try, so the second
gives the same events; those that the client already has are compared and left out.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import fields, replace
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from sfumato.errors import BusyError, InputError, SfumatoError, WorkerError
from sfumato.events import Commit, Draft, Event
from sfumato.server.backend import Job, ModelCard, Result, Stats
from sfumato.server.cluster.plan import ClusterPlan
from sfumato.server.cluster.replicas import Cluster
from sfumato.server.worker.supervisor import COUNTERS
from sfumato.templates.requests import LoadAdapter, UnloadAdapter

log = logging.getLogger("sfumato.server")

STATS_SECONDS = 1.0
WAIT_SECONDS = {"figures": 5.0, "set_adapters": 120.0}
"""A replica that does not answer for so long is counted as not there."""


class ReplicaEnded(Exception):
    """The replica ended under a job. `replica` is its name, if the job had begun."""

    def __init__(self, replica: str | None, why: str) -> None:
        super().__init__(why)
        self.replica = replica


class RayBackend:
    """`Backend` over the replicas of a plan. `drain`: seconds that a replica has for its jobs when it is ended."""

    def __init__(self, plan: ClusterPlan, drain: float) -> None:
        self.plan, self.cluster = plan, Cluster(plan, drain)
        self.handle: Any = None
        """Ray Serve's, of the replicas."""
        self._starting: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._card: ModelCard | None = None
        self._is_open = False
        self._waiting = self._running = 0
        self._quiet = asyncio.Event()
        self._ready: set[str] = set()
        self._adapters = dict(plan.load.adapters or {})
        """Folders by name, of what every replica is to have."""
        self._figures: dict[str, Stats] = {}
        """Of each replica that is there, as it last sent them."""
        self._before = Stats()
        """Figures of those that have ended."""

    async def start(self) -> None:
        """Return when the first replica is loaded; raise what it says where none can be."""
        self._is_open = True
        self._starting = asyncio.create_task(self._start())
        await asyncio.shield(self._starting)
        if self._is_open:
            self._watching = asyncio.create_task(self._watch())

    async def stop(self, drain_seconds: float) -> None:
        """Take no more jobs, wait so long for those under way, then end the replicas."""
        self._is_open = False
        with suppress(TimeoutError):
            async with asyncio.timeout(drain_seconds):
                while self._running:
                    self._quiet.clear()
                    await self._quiet.wait()
        if self._starting is not None:  # its threads speak with Ray, so it ends by itself
            await asyncio.gather(self._starting, return_exceptions=True)
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await asyncio.to_thread(self.cluster.end)

    async def card(self) -> ModelCard:
        """The loaded model's card; WorkerError before the first load."""
        if self._card is None:
            raise WorkerError("the model is still being loaded; ask again when the server is ready")
        return self._card

    async def run(self, job: Job) -> AsyncGenerator[Event | Result, None]:
        """The events of a job, on one replica or, if that ends, on a second one."""
        if not self._is_open:
            raise WorkerError("the server takes no requests: it is stopping; send the request to another, or later")
        if (options := job.query.options).seed is None:
            seeded = replace(options, seed=secrets.randbits(32))
            job = replace(job, query=replace(job.query, options=seeded))
        marks: list[tuple[type, int]] = []
        """Of the events that the client has."""
        self._running += 1
        try:
            avoid = None
            for is_last_try in (False, True):
                try:
                    async with aclosing(self._events(job, avoid)) as events:
                        number = 0
                        async for event in events:
                            mark = _mark(event)
                            if number == len(marks):
                                yield event
                                marks.append(mark)
                            elif marks[number] != mark:
                                raise WorkerError(
                                    "a replica ended under this request, and another goes on differently; send it again"
                                )
                            number += 1
                    return
                except ReplicaEnded as end:
                    if is_last_try:
                        raise WorkerError(f"{end}, and before that another one; send the request again") from None
                    log.warning("%s is sent again: %s", job.request, end)
                    avoid = end.replica
        finally:
            self._running -= 1
            self._quiet.set()

    async def change_adapters(self, job: Job) -> ModelCard:
        """Load or unload an adapter in every replica; those that are started later do so by themselves."""
        folders = dict(self._adapters)
        match job.query:
            case LoadAdapter(name=name, folder=folder) if name in folders:
                raise InputError(f"an adapter {name!r} is loaded already; unload it first, or give another name")
            case LoadAdapter(name=name, folder=folder):
                folders[name] = folder
            case UnloadAdapter(name=name):
                folders.pop(name, None)
        replies = await self._broadcast("set_adapters", folders)
        errors = [reply for reply in replies if isinstance(reply, SfumatoError)]
        if errors or not replies:
            await self._broadcast("set_adapters", self._adapters)
            raise errors[0] if errors else WorkerError("there is no replica; send the request again later")
        self._adapters = folders
        self._card = next(reply for reply in replies if isinstance(reply, ModelCard))
        return self._card

    def is_ready(self) -> bool:
        """Whether a replica takes jobs."""
        return self._is_open and bool(self._ready)

    def stats(self) -> Stats:
        """The figures of all replicas together, those that have ended included."""
        total = _sum([self._before, *self._figures.values()])
        return replace(total, queue=total.queue + self._waiting)

    # ---- the replicas ------------------------------------------------------------------------------------------------

    async def _events(self, job: Job, avoid: str | None) -> AsyncGenerator[Event | Result, None]:
        """The events of a job on one replica; ReplicaEnded where that ends before the job."""
        response = self.handle.options(method_name="run", stream=True).remote(job, avoid)
        replica: str | None = None
        self._waiting += 1
        try:
            async for item in response:
                match item:
                    case str():
                        replica = item
                        self._waiting -= 1
                    case WorkerError():
                        raise ReplicaEnded(replica, f"replica {replica}: {str(item).partition(';')[0]}")
                    case Exception():
                        raise item
                    case _:
                        yield item
                        if not isinstance(item, (Draft, Commit)):
                            return
            raise ReplicaEnded(replica, f"replica {replica} stopped in the middle")
        except BackPressureError:
            queue = self.plan.limits.queue
            raise BusyError(
                f"{queue} requests are waiting, as many as the queue holds; send the request again later"
            ) from None
        except RayTaskError as error:
            kind = type(error.cause).__name__
            raise SfumatoError(
                f"replica {replica} failed at this request ({kind}); it is a fault of the server"
            ) from None
        except (RayError, RayServeException) as error:
            raise ReplicaEnded(replica, f"replica {replica or 'unknown'} is gone ({type(error).__name__})") from None
        finally:
            if replica is None:
                self._waiting -= 1
            response.cancel()

    async def _start(self) -> None:
        await asyncio.to_thread(self.cluster.join)
        for number in (signal.SIGINT, signal.SIGTERM):  # Ray has put one of its own below Python's handlers
            signal.signal(number, signal.getsignal(number))
        if self._is_open:
            self.handle = await asyncio.to_thread(self.cluster.deploy)
        while self._is_open and not self._ready:
            await asyncio.to_thread(self.cluster.check)
            await self._look()
            await asyncio.sleep(STATS_SECONDS / 4)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(STATS_SECONDS)
            await self._look()

    async def _look(self) -> None:
        """Ask every replica for its figures; one that lacks an adapter, as it was started since, loads it."""
        replies = [reply for reply in await self._broadcast("figures") if not isinstance(reply, Exception)]
        if any({one.name for one in card.adapters} != self._adapters.keys() for _, card, *_ in replies):
            await self._broadcast("set_adapters", self._adapters)
        self._note(replies)

    async def _broadcast(self, method: str, *arguments: Any) -> list[Any]:
        """What every replica returns; nothing where none is there, or one does not answer."""
        try:
            call = self.handle.broadcast(method, *arguments)
            replies: list[Any] = await call.results_async(timeout_s=WAIT_SECONDS[method], return_exceptions=True)
        except (TimeoutError, RayError, RayServeException):
            return []
        return replies

    def _note(self, replies: list[tuple[str, ModelCard, bool, Stats]]) -> None:
        for name in self._figures.keys() - {name for name, *_ in replies}:
            log.warning("replica %s is no longer there", name)
            counts = {counter: getattr(self._figures[name], counter) for counter in (*COUNTERS, "restarts")}
            self._before = _sum([self._before, Stats(**counts)])
            del self._figures[name]
        for name, card, _, stats in replies:
            if name not in self._figures:
                log.info("replica %s takes requests", name)
            elif stats.restarts > self._figures[name].restarts:
                log.warning("replica %s: the engine's worker ended and is started again", name)
            self._card, self._figures[name] = self._card or card, stats
        self._ready = {name for name, _, is_ready, _ in replies if is_ready}


def _mark(event: Event | Result) -> tuple[type, int]:
    """What two runs of the same job have in common at the same place."""
    return type(event), hash(tuple(event.tokens)) if isinstance(event, (Draft, Commit)) else 0


def _sum(parts: list[Stats]) -> Stats:
    total: dict[str, Any] = {one.name: sum(getattr(part, one.name) for part in parts) for one in fields(Stats)}
    rates = [part.tokens_per_pass for part in parts if part.tokens_per_pass]
    stalled = max((part.stalled for part in parts), default=0.0)
    total["adapters"] = max((part.adapters for part in parts), default=0)  # every replica has them
    return Stats(**total | {"tokens_per_pass": sum(rates) / len(rates) if rates else 0.0, "stalled": stalled})
