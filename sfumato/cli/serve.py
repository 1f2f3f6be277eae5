"""`sfumato serve`: the model over HTTP, for OpenAI's clients and ours, with a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from sfumato.cli import files, flags, loading
from sfumato.cli import options as opt
from sfumato.cli.output import harmless
from sfumato.engine.limits import BatchLimits
from sfumato.errors import InputError, missing_extra
from sfumato.options import LoadOptions
from sfumato.questions import MOST_OPTIONS
from sfumato.server.backend import ModelCard
from sfumato.server.cluster.plan import ClusterPlan
from sfumato.server.settings import Limits, Settings
from sfumato.server.worker.supervisor import SILENCE, Worker


@dataclass(frozen=True)
class HttpFlags:
    """Where the server listens, who may call it, and what one request may ask for."""

    host: Annotated[str, typer.Option(help="Address to listen on; one that others reach needs an API key.")] = (
        Settings.host
    )
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000
    api_key: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Clients must give one; repeatable. Others on this machine can see it here."),
    ] = None
    api_key_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Keys, one a line; lines with # are left out.")
    ] = None
    alias: Annotated[list[str] | None, typer.Option(metavar="NAME", help="One more name of the model; repeatable.")] = (
        None
    )
    cors: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="A site whose pages may call; repeatable.")
    ] = None
    max_body: Annotated[float, typer.Option(metavar="MIB", help="Size of a request, at most.")] = (
        Limits.max_body / 2**20
    )
    max_connections: Annotated[int, typer.Option(min=8, help="Connections at once, at most.")] = Limits.max_connections
    max_questions: Annotated[int, typer.Option(min=1, help="Questions of one request, at most.")] = Limits.max_questions
    max_options: Annotated[int, typer.Option(min=2, max=MOST_OPTIONS, help="Options of one question, at most.")] = (
        Limits.max_options
    )
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Time for a request, at most.")] = Limits.timeout
    unready_after: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="/ready fails when preparing a request takes longer.")
    ] = Settings.stall_limit
    drain: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Time for what is under way when the server ends.")
    ] = Settings.drain
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write to the log what requests say.")] = False
    adapter_folder: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Clients may load adapters from this folder, and unload any, while it runs."),
    ] = None
    strict_params: Annotated[
        bool, typer.Option("--strict-params", help="Refuse fields that have no effect, instead of leaving them out.")
    ] = False
    keep_responses: Annotated[
        int, typer.Option(min=0, max=100_000, help="Answers of /v1/responses kept in memory to go on from.")
    ] = Settings.kept_responses

    def settings(self) -> Settings:
        """The server's settings; InputError for a value out of range."""
        _check_range("max-body", self.max_body, 1024)
        _check_range("timeout", self.timeout, 1e6)
        if self.adapter_folder is not None and not Path(self.adapter_folder).expanduser().is_dir():
            raise InputError(f"--adapter-folder is {self.adapter_folder}, which is no folder; make it, or name another")
        body = round(self.max_body * 2**20)
        return Settings(
            host=self.host,
            keys=(*(self.api_key or ()), *keys_of(self.api_key_file)),
            aliases=tuple(self.alias or ()),
            cors=tuple(self.cors or ()),
            log_prompts=self.log_prompts,
            strict_params=self.strict_params,
            adapter_folder=self.adapter_folder,
            kept_responses=self.keep_responses,
            drain=self.drain,
            stall_limit=self.unready_after,
            limits=Limits(
                max_body=body,
                max_bodies=max(Limits.max_bodies, 4 * body),
                max_connections=self.max_connections,
                max_questions=self.max_questions,
                max_options=self.max_options,
                timeout=self.timeout,
            ),
        )


@dataclass(frozen=True)
class BatchFlags:
    """How many requests run at once, and how much memory they may take."""

    rows: Annotated[int, typer.Option(min=1, help="Requests that run at once, at most.")] = 32
    queue: Annotated[int, typer.Option(min=1, help="Requests that wait, at most; more are refused.")] = 256
    memory: Annotated[
        float | None, typer.Option(metavar="GB", help="For caches and work; default: half of what is free.")
    ] = None
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of a request and its answer, at most.")] = None
    stall: Annotated[
        float, typer.Option(min=1, metavar="MS", help="How long a part of one prompt may hold up the others.")
    ] = 200.0

    def limits(self) -> BatchLimits:
        """The limits of a batch; InputError for a value out of range."""
        memory = None
        if self.memory is not None:
            _check_range("memory", self.memory, 1e6)
            memory = round(self.memory * 1e9)
        return BatchLimits(self.rows, self.queue, memory, self.stall / 1e3, self.context)


@dataclass(frozen=True)
class RayFlags:
    """Whether copies of the model run on a Ray cluster, and how many."""

    ray: Annotated[bool, typer.Option("--ray", help="Run on a Ray cluster.")] = False
    replicas: Annotated[int | None, typer.Option(min=1, help="With --ray: copies of the model.")] = None
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="With --ray: as many copies, at most, while requests wait.")
    ] = None
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="A running cluster; auto: this machine's; default: one of its own."),
    ] = None

    def check(self) -> None:
        """InputError for a flag of the cluster without --ray."""
        for name in ("replicas", "max_replicas", "ray_address"):
            if (value := getattr(self, name)) is not None and not self.ray:
                raise InputError(f"--{name.replace('_', '-')} is {value} without --ray; give --ray too")


@flags.takes(
    model=loading.positional(loading.MODEL),
    load=opt.load_flags_of(has_decisions=True),
    preset=opt.PRESET_OPTIONS,
    http=flags.group_of(HttpFlags, "HTTP"),
    batch=flags.group_of(BatchFlags, "Many requests at once"),
    cluster=flags.group_of(RayFlags, "Several machines"),
)
def command(
    *,
    model: loading.ModelFlag,
    load: LoadOptions,
    preset: Mapping[str, Any],
    http: HttpFlags,
    batch: BatchFlags,
    cluster: RayFlags,
) -> None:
    """Serve the model over HTTP: OpenAI's routes, those that only a canvas can offer, and a page to try them.

    Example: sfumato serve google/diffusiongemma-26B-A4B-it --port 8000

    Example: sfumato serve --host 0.0.0.0 --api-key-file keys.txt

    Example: sfumato serve --preset fast.json
    """
    cluster.check()
    load = replace(load, model=model.name)
    for name in http.alias or ():
        if name in (load.adapters or {}):
            raise InputError(f"--alias and --adapter are both called {name!r}; rename one of them")
    settings, limits = replace(http.settings(), preset=preset), batch.limits()
    for name in load.adapters or {}:
        if name in (model.name, Path(model.name).resolve().name):
            raise InputError(f"--adapter has the model's own name {name!r}; give the adapter another one")
    if cluster.ray:
        plan = ClusterPlan(load, limits, cluster.replicas or 1, cluster.max_replicas, cluster.ray_address)
        server_module("cluster.launch").run(plan, settings, http.port, tell)
    else:
        _serve_here(load, limits, settings, http.port)


def _serve_here(load: LoadOptions, limits: BatchLimits, settings: Settings, port: int) -> None:
    """Serve from this process and one worker, with a bar of progress while the worker loads the model."""
    listen = server_module("http.listen")
    columns = ("loading", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading", total=None)

        def loading(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        def ready(card: ModelCard, address: str) -> None:
            bar.stop()
            tell(card, address)

        silence = min(SILENCE, settings.limits.timeout / 2)  # the request that waits longest is told of a hang
        listen.run(Worker(load, limits, loading, silence=silence), settings, port, ready)


def _check_range(name: str, value: float, most: float) -> None:
    if not 0 < value <= most:
        raise InputError(f"--{name} is {value:g}; give a number above 0, at most {most:g}")


def keys_of(file: str | None) -> list[str]:
    """The keys in a file; InputError where there is none."""
    if file is None:
        return []
    keys = [line.strip() for line in files.read(file).removeprefix(files.BOM).splitlines()]
    keys = [key for key in keys if key and not key.startswith("#")]
    if not keys:
        raise InputError(f"{file} holds no key; write one a line")
    return keys


def server_module(name: str) -> Any:
    """A module of the server that needs an extra; InputError, which names the extra, where that is not installed."""
    extra = "ray" if name.startswith("cluster") else "serve"
    try:
        return import_module(f"sfumato.server.{name}")
    except ModuleNotFoundError as error:
        raise missing_extra(error.name, extra) from None


def tell(card: ModelCard, address: str) -> None:
    """Say on standard output which model the server has, and where."""
    adapters = ", ".join(adapter.name for adapter in card.adapters)
    name = f"{card.name} with {adapters}" if adapters else card.name
    line = f"Sfumato serves {name} on {address} (page, /v1, /metrics); Ctrl-C ends it"
    print(harmless(line), flush=True)
