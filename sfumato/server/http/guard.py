"""What every request passes on its way in, as plain ASGI: the log, who may come, how much may be sent.

`Rest` reads what is left of a body that was answered early. `Access` gives each request an id and writes one line about
it, whatever becomes of it. `Door` checks host, origin and key. `Bounds` counts the body and the time while it is read,
and cuts off a client that neither reads nor writes. What comes before a request is whole is `connection`'s.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
from contextlib import suppress
from time import monotonic
from typing import Any
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sfumato.server.backend import where
from sfumato.server.http.errors import RETRY, ClientGone, Refusal, refusal, short
from sfumato.server.http.service import Record, Service, log
from sfumato.server.settings import LOCAL

OPEN = ("/", "/health", "/ready")
"""Paths that need no key, beside the page's files."""
POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
CLOSE = {"connection": "close"}
"""For a body that is not read to its end: what follows is no request."""
LINGER = 10.0
"""Seconds for which the rest of a body is read behind its answer."""
REST = 64 << 20
"""Bytes of it, at most."""
GONE = 499
"""The status in the log and the metrics of a request whose client left; nobody is sent it."""


def is_page(path: str) -> bool:
    return path == "/" or path.startswith("/ui/")


class Rest:
    """Reads on behind an answer that came before its request's body was over, for a while: a connection closed with
    bytes unread is reset, and a client that still sends would lose the answer."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
                    while not is_over and size < REST:
                        size += len((await receiving()).get("body", b""))
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


class Access:
    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begun = monotonic()
        given = Headers(scope=scope).get("x-request-id", "")
        record = Record(given if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", given) else f"req_{secrets.token_hex(12)}")
        scope.setdefault("state", {})["record"] = record

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = record.id
                headers["x-content-type-options"] = "nosniff"
                if is_page(scope["path"]):
                    headers["content-security-policy"] = POLICY
                    headers["referrer-policy"] = "no-referrer"
                    headers["cache-control"] = "no-cache"
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except (ClientGone, ClientDisconnect):
            record.status = GONE
        except Exception as error:
            log.error("%s failed: %s", record.id, where(error))
            if not record.status:
                await refusal(error).response()(scope, receive, sending)
            record.status = 500
        finally:
            seconds = monotonic() - begun
            self.service.metrics.requests.labels(_route(scope), str(record.status)).inc()
            self.service.metrics.request_seconds.observe(seconds)
            log.info(
                "%s %s %s %d tokens=%d ms=%.0f %s",
                *(
                    record.id,
                    scope["method"],
                    short(quote(scope["path"]), 500),
                    record.status,
                    record.tokens,
                    seconds * 1000,
                ),
                (scope.get("client") or ("-",))[0],
            )


def _route(scope: Scope) -> str:
    """A request's route: one of few, whatever paths are asked for."""
    if scope["path"].startswith("/ui/"):
        return "/ui"
    return getattr(scope.get("route"), "path", "other")


class Door:
    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service, self.settings = app, service, service.settings
        self.keys = [key.encode() for key in self.settings.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path, headers = scope["path"], Headers(scope=scope)
        origin, allowed = headers.get("origin"), {}
        is_counted = False
        try:
            self._check_host(headers)
            if origin is not None and self._is_foreign(origin, headers):
                allowed = {
                    "access-control-allow-origin": origin,
                    "access-control-expose-headers": "x-request-id, retry-after",
                    "vary": "Origin",
                }
                if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                    return await _preflight(headers, allowed, send)
            if self.keys and path not in OPEN and not is_page(path):
                self._check_key(headers)
            if path.startswith("/v1/"):
                self.service.enter()
                is_counted = True

            async def sending(message: Message) -> None:
                if message["type"] == "http.response.start":
                    MutableHeaders(scope=message).update(allowed)
                await send(message)

            await self.app(scope, receive, sending)
        except Refusal as error:
            response = error.response()
            response.headers.update(allowed)
            await response(scope, receive, send)
        finally:
            if is_counted:
                self.service.leave()

    def _check_host(self, headers: Headers) -> None:
        """A page elsewhere whose name was made to point here (DNS rebinding) still names itself."""
        host = headers.get("host", "")
        if self.settings.is_local and _name(host) not in LOCAL:
            raise Refusal(403, f"the host is {host!r}; this server answers to localhost alone", "permission_error")

    def _is_foreign(self, origin: str, headers: Headers) -> bool:
        """Whether a page of another origin asks; a Refusal where that one may not."""
        if (host := _host_of(origin)) and host == headers.get("host", "").lower():
            return False
        if origin in self.settings.cors or "*" in self.settings.cors:
            return True
        raise Refusal(403, f"pages of {origin!r} may not call this server; --cors allows an origin", "permission_error")

    def _check_key(self, headers: Headers) -> None:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode()
        # All of them, so that the time says nothing of which.
        found = [hmac.compare_digest(given, one) for one in self.keys]
        if scheme.lower() != "bearer" or not any(found):
            message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
            challenge = {"www-authenticate": "Bearer"}
            raise Refusal(401, message, "authentication_error", code="invalid_api_key", headers=challenge)


def _host_of(origin: str) -> str:
    """Host and port of an origin; "" where it names none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _name(host: str) -> str:
    """A Host header without its port."""
    if match := re.fullmatch(r"\[([0-9a-fA-F:.]*)\](:[0-9]*)?", host):
        return match[1]
    return host.rpartition(":")[0] if ":" in host else host


async def _preflight(headers: Headers, allowed: dict[str, str], send: Send) -> None:
    wanted = headers.get("access-control-request-headers", "authorization, content-type")
    answer = allowed | {
        "access-control-allow-methods": "GET, POST",
        "access-control-allow-headers": wanted,
        "access-control-max-age": "600",
    }
    start: dict[str, Any] = {"type": "http.response.start", "status": 204, "headers": []}
    MutableHeaders(scope=start).update(answer)
    await send(start)
    await send({"type": "http.response.body", "body": b""})


class Bounds:
    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service, self.settings = app, service, service.settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        limits, patience = self.settings.limits, self.settings.write_timeout
        length = Headers(scope=scope).get("content-length", "0")
        if length.isascii() and length.isdigit() and (len(length) > 20 or int(length) > limits.max_body):
            raise _too_large(limits.max_body)
        begun, size, is_over = monotonic(), 0, False

        async def receiving() -> Message:
            nonlocal size, is_over
            if is_over:
                return await receive()
            left = begun + self.settings.body_timeout + size / self.settings.body_rate - monotonic()
            try:
                async with asyncio.timeout(min(patience, left)):
                    message = await receive()
            except TimeoutError:
                raise _too_slow(patience if patience < left else None) from None
            part = len(message.get("body", b""))
            size += part
            self.service.body_bytes += part
            is_over = not message.get("more_body", False)
            if size > limits.max_body:
                raise _too_large(limits.max_body)
            if self.service.body_bytes > limits.max_bodies:
                text = "the bodies of all requests take more memory than the server has for them; try again in a while"
                raise Refusal(503, text, "overloaded_error", headers=CLOSE | RETRY)
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
            self.service.body_bytes -= size


def _too_large(limit: int) -> Refusal:
    return Refusal(413, f"the body is larger than the {limit} bytes allowed; send less", headers=CLOSE)


def _too_slow(pause: float | None) -> Refusal:
    why = "the body came too slowly" if pause is None else f"nothing more of the body came within {pause:g} seconds"
    return Refusal(408, f"{why}; send it without a pause", "timeout_error", headers=CLOSE)
