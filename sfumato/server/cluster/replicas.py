"""Copies of the model on a Ray cluster, as one `Backend`.

A `Replica` is an actor with a `Worker` of its own, so that nothing of the engine changes. Ray Serve places replicas,
watches and replaces them, adds some while requests wait, and drains those that it ends. A `Router`, which Serve runs
beside the server, sends a conversation to the replica that has read its beginning, unless others have much less to do.

A job whose replica ends under it is sent once more, to another. Its seed is set before the first try, so the second
gives the same events; those that have been handed out are compared and left out.

What Ray Serve does is not done here: there is no scheduler. Its HTTP proxy is not used, as ours has the limits, and
what replicas print stays in Ray's logs; what matters of it is told by `RayBackend`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import re
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from typing import Any, cast

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from ray.serve.schema import LoggingConfig

from sfumato import events as family
from sfumato.errors import BusyError, SfumatoError, WorkerError
from sfumato.events import Commit, Draft, Event
from sfumato.server.backend import Job, ModelCard, Result, Stats
from sfumato.server.worker.supervisor import COUNTERS, Worker

log = logging.getLogger("sfumato.server")

APP = "sfumato"
BEGINNING = 512
"""Characters, or tokens, of a prompt by which its replica is chosen."""
STATS_SECONDS = 1.0
ANSWER_SECONDS = 5.0
"""A replica that does not tell its figures for so long is counted as not there."""
HEALTH_SECONDS = 5.0
GIVES_UP = 4
"""Ends of a replica's worker, one after another without one that took jobs, after which another replica is better."""
STORE_BYTES = 80 << 20
"""Ray's object store on this machine, which takes no less. Events are smaller than what it is for."""


# ---- one copy of the model -------------------------------------------------------------------------------------------


class Replica:
    """What runs in the actor. Errors are handed over as values: one that is raised, Ray would log and wrap."""

    async def __init__(self, load: dict[str, Any], limits: dict[str, Any]) -> None:  # type: ignore[misc]
        # The worker's process would import this actor's main file, which is Ray's own and of no use there.
        vars(sys.modules["__main__"]).pop("__file__", None)
        self.name = serve.get_replica_context().replica_id.unique_id
        self.worker = Worker(load, limits)
        self.restarts = 0
        """Of the worker, when it was last seen ready."""
        try:
            await self.worker.start()
        except SfumatoError as error:
            raise RuntimeError(told(error)) from None

    async def run(self, job: Job, avoid: str | None) -> AsyncIterator[str | Event | Result | SfumatoError]:
        """The replica's name, then what comes of the job. `avoid` is for the router."""
        yield self.name
        try:
            async with aclosing(cast(Any, self.worker.run(job))) as happened:
                async for what in happened:
                    yield what
        except SfumatoError as error:
            yield error

    async def figures(self) -> tuple[str, ModelCard, bool, Stats]:
        return self.name, await self.worker.card(), self.worker.is_ready(), self.worker.stats()

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises."""
        restarts = self.worker.stats().restarts
        if self.worker.is_ready():
            self.restarts = restarts
        elif restarts - self.restarts >= GIVES_UP:
            raise RuntimeError(f"the engine's worker ended {GIVES_UP} times before it took a request")

    async def __del__(self) -> None:
        """Called by Ray Serve when the replica has no more requests."""
        await self.worker.stop(0)


def told(error: SfumatoError) -> str:
    """An error as a line that survives in Ray's long account of it."""
    return f"<{type(error).__name__}> {error} </>".replace("\n", " ")


def heard(account: str) -> SfumatoError:
    """The error in that account."""
    found = re.search(r"<(\w+)> (.*?) </>", account)
    if found is None:
        lines = account.strip().splitlines() or ["no reason was given"]
        return SfumatoError(f"Ray cannot start the model: {lines[-1].strip()}")
    return cast(type[SfumatoError], getattr(family, found[1]))(found[2])


# ---- which copy ------------------------------------------------------------------------------------------------------


def key_of(job: Job) -> str:
    """What a job's prompt begins with: of messages the system's and the first user's, of another the first characters.
    Jobs with the same may share what has been encoded."""
    payload = job.payload
    names = {"complete": "prompt", "infill": "prefix", "edit": "text"}
    beginning = payload.get("messages") or payload.get("prompt") or payload.get(names.get(job.kind, "template"))
    if isinstance(beginning, list) and beginning and isinstance(beginning[0], dict) and "role" in beginning[0]:
        users = [place for place, message in enumerate(beginning) if message.get("role") == "user"]
        beginning = beginning[: users[0] + 1 if users else 1]
    elif isinstance(beginning, (str, list)):
        beginning = beginning[:BEGINNING]
    if not beginning:
        return ""
    return blake2b(json.dumps(beginning, sort_keys=True).encode(), digest_size=16).hexdigest()


def home(key: str, names: list[str]) -> str:
    """The replica for that beginning: always the same one, and of those that stay when others come or go (rendezvous
    hashing)."""
    return max(names, key=lambda name: blake2b(f"{key} {name}".encode()).digest())


def ranks(key: str, queues: Mapping[str, int], bound: int) -> list[list[str]]:
    """Replicas to try, in groups of which the shortest queue is taken. `queues`: jobs of each replica.

    The prompt's home, and if it is full, or has over `bound` more to do than another, two at random."""
    two = random.sample(sorted(queues), min(2, len(queues)))
    if not key:
        return [two]
    first = home(key, sorted(queues))
    return [two] if queues[first] - min(queues.values()) > bound else [[first], two]


class Router(RequestRouter):  # type: ignore[misc]
    """Asked by Ray Serve, in the server's process, which replica a job goes to."""

    bound: int

    def initialize_state(self, bound: int) -> None:  # type: ignore[override]
        self.bound = bound

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        found = {one.replica_id.unique_id: one for one in candidate_replicas}
        if pending_request is None:
            return [list(found.values())]
        pending_request.routing_context.should_backoff = True  # when all are full: else Serve asks again at once
        job, avoid = pending_request.args
        if len(found) > 1:
            found.pop(avoid, None)
        cached = self.replica_queue_len_cache
        queues = {name: cached.get(one.replica_id) or 0 for name, one in found.items()}
        return [[found[name] for name in group] for group in ranks(key_of(job), queues, self.bound)] if found else []


# ---- all of them -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What is to run where. Its methods wait for Ray, so they are called in other threads."""

    load: dict[str, Any]
    limits: dict[str, Any]
    least: int
    most: int
    drain: float
    address: str | None

    def join(self) -> None:
        """Join the cluster, or start one."""
        try:
            self._join()
        except (ConnectionError, ValueError, RuntimeError, RayError) as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            where = "on this machine" if self.address is None else f"at {self.address}"
            raise SfumatoError(f"there is no Ray cluster {where}: {first}") from None

    def deploy(self) -> Any:
        """Ask for the replicas. Returns their handle, before they are loaded."""
        quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(proxy_location="Disabled", logging_config=quiet)
        rows, queue = self.limits["rows"], self.limits["queue"]
        count: dict[str, Any] = {"num_replicas": self.least}
        if self.most > self.least:
            scaling = AutoscalingConfig(
                min_replicas=self.least, max_replicas=self.most, target_ongoing_requests=float(rows)
            )
            count = {"autoscaling_config": scaling}
        deployment: Any = serve.deployment(
            Replica,
            name="replica",
            # A replica holds what comes next as well, so that no row waits for the way here; the rest waits on this
            # side, where a replica that is added can take it.
            max_ongoing_requests=rows + min(rows, queue),
            max_queued_requests=queue,
            ray_actor_options=self._share(),
            health_check_period_s=HEALTH_SECONDS,
            graceful_shutdown_timeout_s=self.drain,
            graceful_shutdown_wait_loop_s=0.5,
            max_constructor_retry_count=1,
            request_router_config=cast(Any, RequestRouterConfig)(
                request_router_class=f"{__name__}:Router", request_router_kwargs={"bound": max(1, rows // 4)}
            ),
            logging_config=quiet,
            **count,
        )
        target = serve.RunTarget(deployment.bind(self.load, self.limits), name=APP, route_prefix=None)
        serve.run_many([target], wait_for_ingress_deployment_creation=True, wait_for_applications_running=False)
        return serve.get_deployment_handle("replica", APP)

    def check(self) -> None:
        """Raise what keeps the replicas from loading, if Ray has given up on them."""
        app = serve.status().applications.get(APP)
        if app is not None and app.status == "DEPLOY_FAILED":
            raise heard("\n".join([app.message, *(one.message for one in app.deployments.values())]))

    def end(self) -> None:
        """End the replicas, and with them a cluster that was started for them."""
        if not ray.is_initialized():
            return
        if self.address is not None:
            with suppress(RayError, RayServeException):
                serve.delete(APP)
        ray.shutdown()

    def _join(self) -> None:
        if self.address is not None:
            ray.init(self.address, logging_level=logging.ERROR, log_to_driver=False)
            return
        ray.init(
            "local",
            num_cpus=max(os.cpu_count() or 1, self.most),
            include_dashboard=False,
            object_store_memory=STORE_BYTES,
            logging_level=logging.ERROR,
            log_to_driver=False,
            # One idle process for each core otherwise.
            _system_config={"prestart_worker_first_driver": False},
        )

    def _share(self) -> dict[str, float]:
        """What each replica asks for: a GPU, where the device is one; else as many cores as all of them can have, which
        Ray makes the number of its threads."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        device = self.load["device"]
        if device.startswith("cuda") or (device == "auto" and any(node.get("GPU") for node in nodes)):
            return {"num_cpus": 1, "num_gpus": 1}
        cores = [int(node.get("CPU", 0)) for node in nodes]
        fitting = [each for each in range(1, max(cores) + 1) if sum(n // each for n in cores) >= self.most]
        return {"num_cpus": max(fitting, default=1)}


class Lost(Exception):
    """The replica ended under a job; its name, if it had begun."""

    def __init__(self, replica: str | None, why: str) -> None:
        super().__init__(why)
        self.replica = replica


class RayBackend:
    """`Backend` over the replicas of a plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.handle: Any = None
        """Ray Serve's, of the replicas."""
        self._starting: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._card: ModelCard | None = None
        self._is_open = False
        self._waiting = self._running = 0
        self._quiet = asyncio.Event()
        self._ready: set[str] = set()
        self._figures: dict[str, Stats] = {}
        """Of each replica that is there, as it last told."""
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
        await asyncio.to_thread(self.plan.end)

    async def card(self) -> ModelCard:
        if self._card is None:
            raise WorkerError("the model is still being loaded; ask again when the server is ready")
        return self._card

    async def run(self, job: Job) -> AsyncIterator[Event | Result]:
        if not self._is_open:
            raise WorkerError("the server takes no requests: it is stopping; send the request to another, or later")
        if job.options.seed is None:
            job = replace(job, options=replace(job.options, seed=secrets.randbits(32)))
        given: list[tuple[type, int]] = []
        """Marks of the events handed out."""
        self._running += 1
        try:
            avoid = None
            for is_last_try in (False, True):
                try:
                    async with aclosing(cast(Any, self._sent(job, avoid))) as happened:
                        number = 0
                        async for what in happened:
                            mark = _mark(what)
                            if number == len(given):
                                yield what
                                given.append(mark)
                            elif given[number] != mark:
                                raise WorkerError(
                                    "a replica ended under this request, and another goes on differently; send it again"
                                )
                            number += 1
                    return
                except Lost as lost:
                    if is_last_try:
                        raise WorkerError(f"{lost}, and before that another one; send the request again") from None
                    log.warning("%s is sent again: %s", job.request, lost)
                    avoid = lost.replica
        finally:
            self._running -= 1
            self._quiet.set()

    def is_ready(self) -> bool:
        return self._is_open and bool(self._ready)

    def stats(self) -> Stats:
        total = _sum([self._before, *self._figures.values()])
        return replace(total, queue=total.queue + self._waiting)

    # ---- the replicas ------------------------------------------------------------------------------------------------

    async def _sent(self, job: Job, avoid: str | None) -> AsyncIterator[Event | Result]:
        """What comes of a job on one replica; Lost where that ends before the job."""
        response = self.handle.options(method_name="run", stream=True).remote(job, avoid)
        replica: str | None = None
        self._waiting += 1
        try:
            async for what in response:
                match what:
                    case str():
                        replica = what
                        self._waiting -= 1
                    case WorkerError():
                        raise Lost(replica, f"replica {replica}: {str(what).partition(';')[0]}")
                    case Exception():
                        raise what
                    case _:
                        yield what
                        if not isinstance(what, (Draft, Commit)):
                            return
            raise Lost(replica, f"replica {replica} stopped in the middle")
        except BackPressureError:
            queue = self.plan.limits["queue"]
            raise BusyError(
                f"{queue} requests are waiting, as many as the queue holds; send the request again later"
            ) from None
        except RayTaskError as error:
            kind = type(error.cause).__name__
            raise SfumatoError(
                f"replica {replica} failed at this request ({kind}); it is a fault of the server"
            ) from None
        except (RayError, RayServeException) as error:
            raise Lost(replica, f"replica {replica or 'unknown'} is gone ({type(error).__name__})") from None
        finally:
            if replica is None:
                self._waiting -= 1
            response.cancel()

    async def _start(self) -> None:
        await asyncio.to_thread(self.plan.join)
        for number in (signal.SIGINT, signal.SIGTERM):  # Ray has put one of its own below Python's handlers
            signal.signal(number, signal.getsignal(number))
        if self._is_open:
            self.handle = await asyncio.to_thread(self.plan.deploy)
        while self._is_open and not self._ready:
            await asyncio.to_thread(self.plan.check)
            await self._look()
            await asyncio.sleep(STATS_SECONDS / 4)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(STATS_SECONDS)
            await self._look()

    async def _look(self) -> None:
        """Ask every replica for its figures."""
        try:
            asked = self.handle.broadcast("figures")
            told = await asked.results_async(timeout_s=ANSWER_SECONDS, return_exceptions=True)
        except (TimeoutError, RayError, RayServeException):
            told = []  # none is there, or one does not answer
        self._note([one for one in told if not isinstance(one, Exception)])

    def _note(self, told: list[tuple[str, ModelCard, bool, Stats]]) -> None:
        for name in self._figures.keys() - {name for name, *_ in told}:
            log.warning("replica %s is no longer there", name)
            counted = {counter: getattr(self._figures[name], counter) for counter in (*COUNTERS, "restarts")}
            self._before = _sum([self._before, Stats(**counted)])
            del self._figures[name]
        for name, card, _, stats in told:
            if name not in self._figures:
                log.info("replica %s takes requests", name)
            elif stats.restarts > self._figures[name].restarts:
                log.warning("replica %s: the engine's worker ended and is started again", name)
            self._card, self._figures[name] = self._card or card, stats
        self._ready = {name for name, _, is_ready, _ in told if is_ready}


def _mark(what: Event | Result) -> tuple[type, int]:
    """What two runs of the same job have in common at the same place."""
    return type(what), hash(tuple(what.tokens)) if isinstance(what, (Draft, Commit)) else 0


def _sum(parts: list[Stats]) -> Stats:
    total: dict[str, Any] = {one.name: sum(getattr(part, one.name) for part in parts) for one in fields(Stats)}
    rates = [part.tokens_per_pass for part in parts if part.tokens_per_pass]
    stalled = max((part.stalled for part in parts), default=0.0)
    return Stats(**total | {"tokens_per_pass": sum(rates) / len(rates) if rates else 0.0, "stalled": stalled})
