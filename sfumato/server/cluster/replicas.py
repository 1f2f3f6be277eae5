"""One copy of the model, and all of them on a Ray cluster.

A `Replica` is an actor with a `Worker` of its own, so that the engine is as it is elsewhere. Ray Serve places replicas,
watches and replaces them, adds some while requests wait, and drains those that it ends. There is no scheduler here. Its
HTTP proxy is not used, as ours has the limits, and what replicas print stays in Ray's logs; `RayBackend` logs what
matters of it.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from typing import Any, cast

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from sfumato import errors
from sfumato.engine.limits import BatchLimits
from sfumato.errors import SfumatoError
from sfumato.events import Event
from sfumato.options import LoadOptions
from sfumato.server.backend import Job, ModelCard, Result, Stats
from sfumato.server.cluster import routing
from sfumato.server.cluster.plan import ClusterPlan
from sfumato.server.worker.messages import plain
from sfumato.server.worker.supervisor import Worker
from sfumato.templates.requests import AdapterQuery, LoadAdapter, UnloadAdapter

APP = "sfumato"
HEALTH_SECONDS = 5.0
MOST_RESTARTS = 4
"""Ends of a replica's worker, one after another without one that took jobs, after which another replica is better."""
STORE_BYTES = 80 << 20
"""Ray's object store on this machine, which takes no less. Events are smaller than what it is for."""


class Replica:
    """What runs in the actor. Errors are yielded as values: one that is raised, Ray would log and wrap."""

    async def __init__(self, load: LoadOptions, limits: BatchLimits) -> None:  # type: ignore[misc]
        # The worker's process would import this actor's main file, which is Ray's own and of no use there.
        vars(sys.modules["__main__"]).pop("__file__", None)
        self.name = serve.get_replica_context().replica_id.unique_id
        self.worker = Worker(load, limits)
        self.numbers = itertools.count()
        self.restarts = 0
        """Of the worker, when it was last ready."""
        try:
            await self.worker.start()
        except SfumatoError as error:
            raise RuntimeError(marked(error)) from None

    async def run(self, job: Job, avoid: str | None) -> AsyncGenerator[str | Event | Result | SfumatoError, None]:
        """The replica's name, then the job's events, its result or its error. `avoid` is for the router."""
        yield self.name
        try:
            async with aclosing(self.worker.run(job)) as events:
                async for event in events:
                    yield event
        except SfumatoError as error:
            yield error

    async def figures(self) -> tuple[str, ModelCard, bool, Stats]:
        """Its name, the model's card, whether it takes jobs, and its figures."""
        return self.name, await self.worker.card(), self.worker.is_ready(), self.worker.stats()

    async def set_adapters(self, folders: Mapping[str, str]) -> ModelCard | SfumatoError:
        """Load and unload adapters until these are there, each from its folder; the card, or the first error."""
        card = await self.worker.card()
        loaded = {one.name for one in card.adapters}
        changes: list[AdapterQuery] = [UnloadAdapter(name) for name in sorted(loaded - folders.keys())]
        changes += [LoadAdapter(name, folder) for name, folder in folders.items() if name not in loaded]
        first: SfumatoError | None = None
        for query in changes:  # one that fails does not keep the others away
            try:
                card = await self.worker.change_adapters(Job(f"adapter-{next(self.numbers)}", query))
            except SfumatoError as error:
                first = first or error
        return first or card

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises."""
        restarts = self.worker.stats().restarts
        if self.worker.is_ready():
            self.restarts = restarts
        elif restarts - self.restarts >= MOST_RESTARTS:
            raise RuntimeError(f"the engine's worker ended {MOST_RESTARTS} times before it took a request")

    async def __del__(self) -> None:
        """Called by Ray Serve when the replica has no more requests."""
        await self.worker.stop(0)


def marked(error: SfumatoError) -> str:
    """An error as a line that `error_in` finds in Ray's long report."""
    error = plain(error)
    return f"<{type(error).__name__}> {error} </>".replace("\n", " ")


def error_in(report: str) -> SfumatoError:
    """The error that `marked` put into Ray's report."""
    match = re.search(r"<(\w+)> (.*?) </>", report)
    if match is None:
        lines = report.strip().splitlines() or ["no reason was given"]
        return SfumatoError(f"Ray cannot start the model: {lines[-1].strip()}")
    kind = getattr(errors, match[1], SfumatoError)  # of a replica with another version, it may be unknown here
    return cast(type[SfumatoError], kind)(match[2])


class Cluster:
    """A plan on Ray. The methods wait for Ray, so they are called in other threads.

    `drain`: seconds that a replica has for its jobs when it is ended."""

    def __init__(self, plan: ClusterPlan, drain: float) -> None:
        self.plan, self.drain = plan, drain

    def join(self) -> None:
        """Join the cluster, or start one."""
        try:
            self._join()
        except (ConnectionError, ValueError, RuntimeError, RayError) as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            where = "on this machine" if self.plan.address is None else f"at {self.plan.address}"
            raise SfumatoError(f"there is no Ray cluster {where}: {first}") from None

    def deploy(self) -> Any:
        """Ask for the replicas. Returns their handle, before they are loaded."""
        quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(proxy_location="Disabled", logging_config=quiet)
        rows, queue = self.plan.limits.rows, self.plan.limits.queue
        count: dict[str, Any] = {"num_replicas": self.plan.replicas}
        if self.plan.most > self.plan.replicas:
            scaling = AutoscalingConfig(
                min_replicas=self.plan.replicas, max_replicas=self.plan.most, target_ongoing_requests=float(rows)
            )
            count = {"autoscaling_config": scaling}
        deployment: Any = serve.deployment(
            Replica,
            name="replica",
            # A replica holds the next jobs as well, so that no row waits for the way here; the rest waits on this
            # side, where a replica that is added can take it.
            max_ongoing_requests=rows + min(rows, queue),
            max_queued_requests=queue,
            ray_actor_options=self._share(),
            health_check_period_s=HEALTH_SECONDS,
            graceful_shutdown_timeout_s=self.drain,
            graceful_shutdown_wait_loop_s=0.5,
            max_constructor_retry_count=1,
            request_router_config=cast(Any, RequestRouterConfig)(
                request_router_class=f"{routing.__name__}:ReplicaRouter",
                request_router_kwargs={"bound": max(1, rows // 4)},
            ),
            logging_config=quiet,
            **count,
        )
        target = serve.RunTarget(deployment.bind(self.plan.load, self.plan.limits), name=APP, route_prefix=None)
        serve.run_many([target], wait_for_ingress_deployment_creation=True, wait_for_applications_running=False)
        return serve.get_deployment_handle("replica", APP)

    def check(self) -> None:
        """Raise what keeps the replicas from loading, if Ray has given up on them."""
        app = serve.status().applications.get(APP)
        if app is not None and app.status == "DEPLOY_FAILED":
            raise error_in("\n".join([app.message, *(one.message for one in app.deployments.values())]))

    def end(self) -> None:
        """End the replicas, and with them a cluster that was started for them."""
        if not ray.is_initialized():
            return
        if self.plan.address is not None:
            with suppress(RayError, RayServeException):
                serve.delete(APP)
        ray.shutdown()

    def _join(self) -> None:
        if self.plan.address is not None:
            ray.init(self.plan.address, logging_level=logging.ERROR, log_to_driver=False)
            return
        ray.init(
            "local",
            num_cpus=max(os.cpu_count() or 1, self.plan.most),
            include_dashboard=False,
            object_store_memory=STORE_BYTES,
            logging_level=logging.ERROR,
            log_to_driver=False,
            # One idle process for each core otherwise.
            _system_config={"prestart_worker_first_driver": False},
        )

    def _share(self) -> dict[str, float]:
        """What each replica asks for: a GPU, where the device is one; else as many cores as all of them can have.

        Ray makes that the number of its threads."""
        nodes = [node["Resources"] for node in _nodes() if node["Alive"]]
        device = self.plan.load.device
        if device.startswith("cuda") or (device == "auto" and any(node.get("GPU") for node in nodes)):
            return {"num_cpus": 1, "num_gpus": 1}
        cores = [int(node.get("CPU", 0)) for node in nodes]
        fitting = [each for each in range(1, max(cores) + 1) if sum(n // each for n in cores) >= self.plan.most]
        return {"num_cpus": max(fitting, default=1)}


def _nodes() -> list[dict[str, Any]]:
    return cast(list[dict[str, Any]], cast(Any, ray).nodes())
