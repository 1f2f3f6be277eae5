"""A connection, from its first byte to a request's whole head: its time, its size, and how many there are.

What comes after the head is limited in `limits`.

It is uvicorn's protocol over h11, with the limits that uvicorn leaves open; h11 and not httptools, which bounds no
head.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Collection
from time import monotonic
from typing import Any, cast

import h11
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from sfumato.server.http.errors import RETRY, Refusal
from sfumato.server.settings import Settings

log = logging.getLogger("sfumato.server")

LINGER = 3.0
"""Seconds for which a client may go on sending behind a refusal, so that it can read it."""
REMAINDER = 16 << 20
"""Bytes that it may send then."""
PARTS = 16384
"""Chunks of a body, beside one for every KiB: each costs as much as a KiB of one that is large."""
AGAIN = 60.0
"""Seconds after which the log repeats that the process is out of files."""


class Connection(H11Protocol):
    """One client's connection. At most `most` are served at once; the longest idle makes room for a new one."""

    def __init__(self, settings: Settings, most: int, **options: Any) -> None:
        super().__init__(**options)
        self.settings, self.most = settings, most
        self.conn = self._reader = _RequestReader(settings.limits.max_head)
        self.since = monotonic()
        """When it began, or when its last request was answered."""
        self._timer: asyncio.TimerHandle | None = None
        """Of a head that is awaited, or of a refusal that is read."""
        self._is_closing, self._remainder = False, REMAINDER

    # ---- how many ---------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a new connection: serve it, refuse it, or close it where far too many are open."""
        super().connection_made(cast(Any, _Transport(transport, self.loop, self.settings.write_timeout)))
        count = len(self.connections)
        if count > self.most + max(8, self.most // 8):
            transport.abort()
        elif count > self.most and not close_idle(self.connections, 1, self):
            text = (
                f"the server has {self.most} connections, as many as it takes, and none is idle; try again in a while"
            )
            self._refuse(Refusal(503, text, "overloaded_error", headers=RETRY))
        else:
            self._watch_head()

    @property
    def is_idle(self) -> bool:
        """Whether no request of it is under way."""
        is_free = self.cycle is None or self.cycle.response_complete
        return is_free and not self._is_closing and not self.transport.is_closing()

    # ---- requests --------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Read what the client sends; behind a refusal only count it."""
        if not self._is_closing:
            super().data_received(data)
            self._watch_head()
            return
        self._remainder -= len(data)
        if self._remainder < 0:
            self.transport.close()

    def on_response_complete(self) -> None:
        """A request is answered; the next may come."""
        self.since = monotonic()
        super().on_response_complete()

    def _watch_head(self) -> None:
        is_awaited = self.conn.their_state is h11.IDLE and not self._is_closing
        if is_awaited and self._timer is None:
            self._timer = self.loop.call_later(self.settings.head_timeout, self._end_silence)
        elif not is_awaited and not self._is_closing:
            self._stop_timer()

    def _end_silence(self) -> None:
        self._timer = None
        if self.conn.trailing_data[0]:
            seconds = self.settings.head_timeout
            self._refuse(
                Refusal(408, f"the head did not come within {seconds:g} seconds; send it at once", "timeout_error")
            )
        else:
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # ---- refusals ---------------------------------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        """Refuse what h11 cannot read; uvicorn calls this."""
        fault = self._reader.fault
        if fault.error_status_hint == 431:
            text = f"the head is larger than the {self.settings.limits.max_head} bytes allowed; send fewer headers"
        else:
            text = f"the request is not HTTP/1.1 as it should be ({fault}); mend the client"
        self._refuse(Refusal(fault.error_status_hint, text))

    def _refuse(self, error: Refusal) -> None:
        """Answer outside any request, then only wait for the client to close."""
        self._stop_timer()
        has_begun = False
        if self.cycle is not None and not self.cycle.response_complete:
            has_begun = self.cycle.response_started
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if has_begun:  # another answer in its midst would be read as a part of it
            self.transport.close()
            return
        response = JSONResponse(error.body, error.status, {**(error.headers or {}), "connection": "close"})
        lines = [b"HTTP/1.1 %d %s" % (error.status, STATUS_PHRASES[error.status])]
        lines += [name + b": " + value for name, value in response.raw_headers]
        self.transport.write(b"\r\n".join([*lines, b"", bytes(response.body)]))
        self._is_closing = True
        self.transport.write_eof()
        self.flow.resume_reading()
        self._timer = self.loop.call_later(LINGER, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._stop_timer()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Close the connection as soon as its request is answered; uvicorn calls this as it ends."""
        if self._is_closing:
            self.transport.close()
        else:
            super().shutdown()


class _RequestReader(h11.Connection):
    """Reads requests, with the limits that h11 leaves to others; `fault` is what it last could not read."""

    def __init__(self, max_head: int) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size=max_head)
        self._max_head, self._parts, self._size = max_head, 0, 0
        self.fault = h11.RemoteProtocolError("")

    def next_event(self) -> Any:
        try:
            event = super().next_event()
            match event:
                case h11.Request():
                    self._parts = self._size = 0
                    self._check_head(event)
                case h11.Data():
                    self._parts, self._size = self._parts + 1, self._size + len(event.data)
                    if self._parts > PARTS + self._size // 1024:
                        raise h11.RemoteProtocolError("the body is in too many small chunks")
            return event
        except h11.RemoteProtocolError as error:
            self.fault = error
            raise

    def _check_head(self, head: h11.Request) -> None:
        size = len(head.method) + len(head.target) + sum(len(name) + len(value) + 4 for name, value in head.headers)
        if size > self._max_head:  # h11 measures only a head that comes in several pieces
            raise h11.RemoteProtocolError("too long a head", error_status_hint=431)
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in head.headers}:
            raise h11.RemoteProtocolError("both Content-Length and Transfer-Encoding")


class _Transport:
    """A transport that ends: asyncio's close waits for a client that reads nothing as long as that likes."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, patience: float) -> None:
        self._transport, self._loop, self._patience = transport, loop, patience

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        """Close, at the latest when the client has not read for so many seconds."""
        if self._transport.get_write_buffer_size() and not self._transport.is_closing():
            self._loop.call_later(self._patience, self._transport.abort)
        self._transport.close()


def close_idle(connections: Collection[Any], count: int, besides: Any = None, age: float = 0.0) -> int:
    """Close `count` of the longest idle, of those idle for at least `age` seconds; returns how many it closed."""
    before = monotonic() - age
    idle = [one for one in connections if one is not besides and one.is_idle and one.since <= before]
    for one in sorted(idle, key=lambda one: one.since)[:count]:
        one.transport.abort()
    return min(len(idle), count)


class LoopErrors:
    """The event loop's handler of errors.

    Where the process may open no more files, asyncio calls it for every connection that waits, and tries again in a
    second; idle connections make room, and the log says it once."""

    def __init__(self, connections: Collection[Any]) -> None:
        self._connections = connections
        self._last_closing = self._last_warning = float("-inf")

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Handle an error that the loop met."""
        error, now = context.get("exception"), monotonic()
        if not (
            isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
        ):
            loop.default_exception_handler(context)
            return
        if now - self._last_closing < 0.5:
            return
        self._last_closing = now
        close_idle(self._connections, len(self._connections), age=0.5)
        if now - self._last_warning >= AGAIN:
            self._last_warning = now
            log.warning("no more connections: %s; idle ones are closed, new ones wait", error.strerror)
