"""Who may call the server, as plain ASGI: host, origin and key of every request."""

from __future__ import annotations

import hmac
import itertools
import re
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sfumato.server.http.access_log import IDS, is_page
from sfumato.server.http.errors import Refusal
from sfumato.server.http.service import Service
from sfumato.server.settings import LOCAL

OPEN = ("/", "/health", "/ready")
"""Paths that need no key, beside the page's files."""


class Authentication:
    """Refuses requests of other hosts, of pages that `cors` does not name, and without a key where keys are set.

    It also counts the requests to /v1 and /api that are under way, which a stop waits for."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service, self.settings = app, service, service.settings
        self.keys = [key.encode() for key in self.settings.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that may come; refuse another."""
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
                    "access-control-expose-headers": ", ".join((*IDS, "retry-after", "x-sfumato-ignored")),
                    "vary": "Origin",
                }
                if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                    return await _preflight(headers, allowed, send)
            if self.keys and path not in OPEN and not is_page(path):
                self._check_key(headers)
            if path.startswith(("/v1/", "/api/")):
                self.service.enter()
                is_counted = True

            async def sending(message: Message) -> None:
                if message["type"] == "http.response.start":
                    MutableHeaders(scope=message).update(allowed)
                await send(message)

            await self.app(scope, receive, sending)
        except Refusal as error:
            response = self.service.error_answer(error, scope)
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
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        candidates = [headers.get("x-api-key", ""), bearer if scheme.lower() == "bearer" else ""]
        pairs = itertools.product(candidates, self.keys)
        matches = [hmac.compare_digest(key.strip().encode(), one) for key, one in pairs]  # all, in constant time
        if not any(matches):
            message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'"
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
    names = headers.get("access-control-request-headers", "authorization, content-type")
    answer = allowed | {
        "access-control-allow-methods": "GET, POST",
        "access-control-allow-headers": names,
        "access-control-max-age": "600",
    }
    start: dict[str, Any] = {"type": "http.response.start", "status": 204, "headers": []}
    MutableHeaders(scope=start).update(answer)
    await send(start)
    await send({"type": "http.response.body", "body": b""})
