"""What every request passes on its way in, as plain ASGI: the log, who may come, how much may be sent.

`Access` gives each request an id and writes one line about it, whatever becomes of it. `Door` checks host, origin and
key. `Bounds` counts the body while it is read, and cuts off a client that neither reads nor writes.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
from time import monotonic
from typing import Any
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sfumato.server.backend import where
from sfumato.server.errors import ClientGone, Refusal, refusal
from sfumato.server.service import Record, Service, log
from sfumato.server.settings import LOCAL

OPEN = ("/", "/health", "/ready")
"""Paths that need no key, beside the page's files."""
POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
CLOSE = {"connection": "close"}
"""For a body that is not read to its end: what follows is no request."""
GONE = 499
"""The status in the log and the metrics of a request whose client left; nobody is sent it."""


def is_page(path: str) -> bool:
    return path == "/" or path.startswith("/ui/")


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
                *(record.id, scope["method"], quote(scope["path"]), record.status, record.tokens, seconds * 1000),
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
        if urlsplit(origin).netloc.lower() == headers.get("host", "").lower():
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


def _name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[1 : host.find("]")]
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
        self.app, self.settings = app, service.settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        limit, patience = self.settings.limits.max_body, self.settings.write_timeout
        length = Headers(scope=scope).get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length) > limit:
            raise _too_large(limit)
        size, is_over = 0, False

        async def receiving() -> Message:
            nonlocal size, is_over
            if is_over:
                return await receive()
            try:
                async with asyncio.timeout(patience):
                    message = await receive()
            except TimeoutError:
                text = f"nothing more of the body came within {patience:g} seconds; send it without a pause"
                raise Refusal(408, text, "timeout_error", headers=CLOSE) from None
            size += len(message.get("body", b""))
            is_over = not message.get("more_body", False)
            if size > limit:
                raise _too_large(limit)
            return message

        async def sending(message: Message) -> None:
            try:
                async with asyncio.timeout(patience):
                    await send(message)
            except TimeoutError:
                raise ClientGone from None

        await self.app(scope, receiving, sending)


def _too_large(limit: int) -> Refusal:
    return Refusal(413, f"the body is larger than the {limit} bytes allowed; send less", headers=CLOSE)
