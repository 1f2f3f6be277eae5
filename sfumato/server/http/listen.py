"""Runs the application on a port, with uvicorn, from the first signal to the last answer.

The port is taken before the model is loaded, so that a wrong one is known at once, and answers health checks from then
on. A signal does not close it: what is under way ends first, while whoever asks is told that the server is stopping.
There is no TLS here; a proxy in front has it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any, cast

import uvicorn
from fastapi import FastAPI

from sfumato.errors import InputError, SfumatoError
from sfumato.server.app import create
from sfumato.server.backend import Backend, ModelCard
from sfumato.server.http.connections import Connection, LoopErrors
from sfumato.server.settings import Settings

OnReady = Callable[[ModelCard, str], None]
"""Called with the model and the server's address when it takes requests."""
RESERVED_FILES = 64
"""Files that the process needs beside its connections."""
BACKLOG = 2048
"""Connections that may wait to be accepted."""
AT_ONCE = 32
"""Of these, so many are accepted before any is served."""
CLOSING = 3
"""Seconds that connections have to close when no request is left."""


def run(backend: Backend, settings: Settings, port: int, ready: OnReady) -> None:
    """Serve until SIGINT or SIGTERM; a second one cuts off what is under way. Port 0 takes a free one.

    Raises what the backend's start raises, and SfumatoError where the port cannot be had."""
    log_to_stderr()
    with listen(settings.host, port) as listener:
        asyncio.run(_serve(create(backend, settings), backend, settings, listener, ready))


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to that address; the first one that a name stands for."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
        # What it accepts inherits this. asyncio sets it only on sockets that name their protocol, and without it an
        # answer in two parts waits 40 ms for the client's delayed acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except socket.gaierror:
        raise InputError(f"host is {host!r}; give an address of this machine, such as 127.0.0.1 or 0.0.0.0") from None
    except OSError as error:
        match error.errno:
            case errno.EADDRINUSE:
                why = f"port {port} on {host} is in use; give another with --port, or 0 for any that is free"
            case errno.EACCES:
                why = f"port {port} is only for the administrator; give one from 1024 on with --port"
            case _:
                why = f"cannot listen on port {port} of {host}: {error.strerror}; give another --host or --port"
        raise SfumatoError(why) from None


def log_to_stderr() -> None:
    """One line a request, with its time."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log = logging.getLogger("sfumato.server")
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)


def descriptors() -> int:
    """Files that this process may open, which is raised as far as the system lets it; many, where it does not say."""
    try:
        import resource  # here: there is none on Windows
    except ImportError:
        return 1 << 20
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):  # macOS calls a limit infinite that is not
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft


async def _serve(app: FastAPI, backend: Backend, settings: Settings, listener: socket.socket, ready: OnReady) -> None:
    # The lifespan is entered here, where a load that fails can be raised.
    async with app.router.lifespan_context(app):
        service, server = app.state.service, Server(app, lifespan="off", timeout_graceful_shutdown=CLOSING)
        serving = asyncio.create_task(server.serve([listener]))
        stopping, cutting = (asyncio.create_task(event.wait()) for event in (server.stop, server.cut))
        try:
            await asyncio.wait([serving, stopping, service.starting], return_when=asyncio.FIRST_COMPLETED)
            if service.starting.done():
                service.starting.result()
                ready(await backend.card(), address(listener))
                await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
            draining = asyncio.create_task(service.drain(settings.drain))
            await asyncio.wait([draining, cutting], return_when=asyncio.FIRST_COMPLETED)
            draining.cancel()
            await service.drain(0)
        finally:
            server.should_exit = True
            for task in (stopping, cutting):
                task.cancel()
            await serving


def address(listener: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn's server, with our `Connection`s. A signal sets `stop`, a second one `cut`; neither ends it.

    It is made in the loop that it runs in. `more` is uvicorn's configuration."""

    def __init__(self, app: FastAPI, **more: Any) -> None:
        settings = app.state.service.settings
        most = max(8, min(settings.limits.max_connections, (descriptors() - RESERVED_FILES) * 3 // 4))
        config = uvicorn.Config(
            app,
            http=cast(Any, partial(Connection, settings, most)),
            log_config=None,
            log_level="critical",  # the application logs for itself, and without what requests say
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            backlog=AT_ONCE,
            **more,
        )
        super().__init__(config)
        self.stop, self.cut = asyncio.Event(), asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(LoopErrors(self.server_state.connections))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)  # asyncio set it to what it accepts at a time

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal, in whichever thread it comes."""
        self.loop.call_soon_threadsafe((self.cut if self.stop.is_set() else self.stop).set)
