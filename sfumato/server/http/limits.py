"""Limits of a request's body, as plain ASGI: its size, its time, and its remainder behind an early answer.

What comes before the body is limited in `connections`.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from time import monotonic

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sfumato.server.http.errors import CLOSE, ClientGone, Refusal
from sfumato.server.http.service import Service, record_of

LINGER = 10.0
"""Seconds for which a body is read on behind its answer."""
REMAINDER = 64 << 20
"""Bytes that are read then, at most."""


class BodyRemainder:
    """Reads on, for a while, behind an answer that comes before the end of its request's body.

    A connection closed with bytes unread is reset, and a client that still sends would lose the answer."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, and read the remainder of its body."""
        if scope["type"] != "http" or not _has_body(Headers(scope=scope)):
            return await self.app(scope, receive, send)
        is_over = is_early = False

        async def receiving() -> Message:
            nonlocal is_over
            message = await receive()
            is_over = not message.get("more_body", False)
            return message

        async def sending(message: Message) -> None:
            nonlocal is_early
            if message["type"] == "http.response.start" and not is_over:
                MutableHeaders(scope=message).update(CLOSE)
            elif message["type"] == "http.response.body" and not (is_over or message.get("more_body", False)):
                is_early = True
                message = {**message, "more_body": True}
            await send(message)

        await self.app(scope, receiving, sending)
        if is_early:
            size = 0
            with suppress(TimeoutError):
                async with asyncio.timeout(LINGER):
                    while not is_over and size < REMAINDER:
                        size += len((await receiving()).get("body", b""))
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


class BodyLimits:
    """Counts the body and the time while it is read, and cuts off a client that neither reads nor writes."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service, self.settings = app, service, service.settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request whose body keeps within the limits; refuse another."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        limits, patience = self.settings.limits, self.settings.write_timeout
        length = Headers(scope=scope).get("content-length", "0")
        if length.isascii() and length.isdigit() and (len(length) > 20 or int(length) > limits.max_body):
            raise _too_large(limits.max_body)
        start, size, is_over = monotonic(), 0, False

        async def receiving() -> Message:
            nonlocal size, is_over
            if is_over:
                return await receive()
            seconds = start + self.settings.body_timeout + size / self.settings.body_rate - monotonic()
            try:
                async with asyncio.timeout(min(patience, seconds)):
                    message = await receive()
            except TimeoutError:
                raise _too_slow(patience if patience < seconds else None) from None
            part = len(message.get("body", b""))
            size += part
            is_over = not message.get("more_body", False)
            self.service.count_bytes(part)
            if size > limits.max_body:
                raise _too_large(limits.max_body)
            return message

        async def sending(message: Message) -> None:
            try:
                async with asyncio.timeout(patience):
                    await send(message)
            except TimeoutError:
                raise ClientGone from None

        try:
            await self.app(scope, receiving, sending)
        finally:
            self.service.body_bytes -= size + record_of(scope).expanded


def _too_large(limit: int) -> Refusal:
    return Refusal(413, f"the body is larger than the {limit} bytes allowed; send less", headers=CLOSE)


def _too_slow(pause: float | None) -> Refusal:
    why = "the body came too slowly" if pause is None else f"nothing more of the body came within {pause:g} seconds"
    return Refusal(408, f"{why}; send it without a pause", "timeout_error", headers=CLOSE)
