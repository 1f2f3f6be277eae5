"""`sfumato serve`: the model over HTTP, for OpenAI's clients and ours, with a page."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from sfumato.cli import options as opt
from sfumato.cli import text as texts
from sfumato.engine.limits import BatchLimits
from sfumato.errors import InputError
from sfumato.options import LoadOptions
from sfumato.server.backend import ModelCard
from sfumato.server.cluster.plan import ClusterPlan
from sfumato.server.settings import Limits, Settings
from sfumato.server.worker.supervisor import SILENCE, Worker


def command(
    model: opt.Model = "nano",
    host: Annotated[str, typer.Option(help="Address to listen on; one that others reach needs an API key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Clients must give one; repeatable. Others on this machine can see it here."),
    ] = None,
    api_key_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Keys, one a line; lines with # are left out.")
    ] = None,
    alias: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="One more name of the model; repeatable.")
    ] = None,
    cors: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="A site whose pages may call; repeatable.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Requests that run at once, at most.")] = 32,
    queue: Annotated[int, typer.Option(min=1, help="Requests that wait, at most; more are refused.")] = 256,
    memory: Annotated[
        float | None, typer.Option(metavar="GB", help="For caches and work; default: half of what is free.")
    ] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of a request and its answer, at most.")] = None,
    stall: Annotated[
        float, typer.Option(min=1, metavar="MS", help="How long a part of one prompt may hold up the others.")
    ] = 200.0,
    max_body: Annotated[float, typer.Option(metavar="MIB", help="Size of a request, at most.")] = 4.0,
    max_connections: Annotated[int, typer.Option(min=8, help="Connections at once, at most.")] = 1024,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Time for a request, at most.")] = 600.0,
    unready_after: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="/ready fails when preparing a request takes longer.")
    ] = 10.0,
    drain: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Time for what is under way when the server ends.")
    ] = 30.0,
    device: opt.Device = "auto",
    dtype: opt.Dtype = None,
    ops: opt.Ops = "auto",
    quantize: opt.Quantize = None,
    memory_limit: opt.MemoryLimit = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write to the log what requests say.")] = False,
    ray: Annotated[bool, typer.Option("--ray", help="Run on a Ray cluster.")] = False,
    replicas: Annotated[int | None, typer.Option(min=1, help="With --ray: copies of the model.")] = None,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="With --ray: as many copies, at most, while requests wait.")
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="A running cluster; auto: this machine's; default: one of its own."),
    ] = None,
) -> None:
    """Serve the model over HTTP: OpenAI's routes, those that only a canvas can offer, and a page to try them.

    Example: sfumato serve -m google/diffusiongemma-26B-A4B-it --port 8000

    Example: sfumato serve --host 0.0.0.0 --api-key-file keys.txt
    """
    for name, given in (("replicas", replicas), ("max-replicas", max_replicas), ("ray-address", ray_address)):
        if given is not None and not ray:
            raise InputError(f"{name} is {given} without --ray; give --ray too")
    for name, value, most in (("max-body", max_body, 1024), ("timeout", timeout, 1e6), ("memory", memory, 1e6)):
        if value is not None and not 0 < value <= most:
            raise InputError(f"{name} is {value:g}; give a number above 0, at most {most:g}")
    settings = Settings(
        host=host,
        keys=(*(api_key or ()), *keys_of(api_key_file)),
        aliases=tuple(alias or ()),
        cors=tuple(cors or ()),
        log_prompts=log_prompts,
        drain=drain,
        stall_limit=unready_after,
        limits=Limits(
            max_body=round(max_body * 2**20),
            max_bodies=max(Limits.max_bodies, 4 * round(max_body * 2**20)),
            max_connections=max_connections,
            timeout=timeout,
        ),
    )
    load = LoadOptions(model, device, dtype, ops, quantize, opt.in_bytes(memory_limit))
    limits = BatchLimits(rows, queue, None if memory is None else round(memory * 1e9), stall / 1e3, context)
    if ray:
        plan = ClusterPlan(load, limits, replicas or 1, max_replicas, ray_address)
        room("cluster.launch").run(plan, settings, port, tell)
        return
    http = room("http.listen")
    columns = ("loading", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading", total=None)

        def loading(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        def ready(card: ModelCard, address: str) -> None:
            bar.stop()
            tell(card, address)

        silence = min(SILENCE, timeout / 2)  # so that who waits longest is told of a hang
        http.run(Worker(load, limits, loading, silence=silence), settings, port, ready)


def keys_of(file: str | None) -> list[str]:
    """The keys in a file; InputError where there is none."""
    if file is None:
        return []
    keys = [line.strip() for line in texts.read(file).removeprefix(texts.BOM).splitlines()]
    keys = [key for key in keys if key and not key.startswith("#")]
    if not keys:
        raise InputError(f"{file} holds no key; write one a line")
    return keys


def room(name: str) -> Any:
    """A module of the server that needs an extra; InputError, which names it, where that is not installed."""
    extra = "ray" if name == "cluster.launch" else "serve"
    try:
        return import_module(f"sfumato.server.{name}")
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed; pip install 'sfumato[{extra}]'") from None


def tell(card: ModelCard, address: str) -> None:
    line = f"Sfumato serves {card.name} on {address} (page, /v1, /metrics); Ctrl-C ends it"
    print(texts.harmless(line), flush=True)
