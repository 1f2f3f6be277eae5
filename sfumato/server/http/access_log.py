"""The outermost layer of a request, as plain ASGI: its id, one line of the log, and what becomes of its errors."""

from __future__ import annotations

import re
import secrets
from time import monotonic
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sfumato.server.backend import where
from sfumato.server.http.errors import ClientGone, short
from sfumato.server.http.service import Record, Service, log

POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
"""The content policy of the page."""
IDS = ("x-request-id", "request-id", "x-typesafe-request-id")
"""The id of a request, as clients of OpenAI's know it, of Anthropic's, and of TypeSafe's."""
GONE = 499
"""The status in the log and the metrics of a request whose client left; no client gets it."""


def is_page(path: str) -> bool:
    """Whether a path is the page or one of its files."""
    return path == "/" or path.startswith("/ui/")


class AccessLog:
    """Gives each request an id and writes one line about it, whatever becomes of it."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, and log it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start = monotonic()
        record = _record(Headers(scope=scope).get("x-request-id", ""))
        scope.setdefault("state", {})["record"] = record

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                for name in IDS:
                    headers[name] = record.id
                headers["x-content-type-options"] = "nosniff"
                if record.ignored:
                    headers["x-sfumato-ignored"] = ", ".join(record.ignored)
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
                await self.service.error_answer(error, scope)(scope, receive, sending)
            record.status = 500
        finally:
            seconds = monotonic() - start
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


def _record(id: str) -> Record:
    """A record under the id that the client chose, or a new one."""
    is_good = re.fullmatch(r"[A-Za-z0-9_-]{1,64}", id) is not None
    return Record(id, is_clients=True) if is_good else Record(f"req_{secrets.token_hex(12)}")


def _route(scope: Scope) -> str:
    """A request's route: one of few, whatever its path."""
    if scope["path"].startswith("/ui/"):
        return "/ui"
    return str(getattr(scope.get("route"), "path", "other"))
