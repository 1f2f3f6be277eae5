"""Answers as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sfumato.server.backend import where
from sfumato.server.http.errors import ClientGone, refusal
from sfumato.server.http.service import Service, log, record_of

END = "data: [DONE]\n\n"
"""The last event of a stream in OpenAI's form."""


def data(value: Any, event: str | None = None) -> str:
    """One server-sent event."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"event: {event}\ndata: {text}\n\n" if event else f"data: {text}\n\n"


class EventStream(Response):
    """A stream of server-sent events.

    Until the first event, or some seconds of silence, an error is an answer of its own; from then on it is one more
    event, and the last."""

    def __init__(self, service: Service, texts: AsyncGenerator[str, None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._service, self._texts = service, texts
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await self._service.watched(receive, self._write(send))
        except ClientGone:
            raise
        except Exception as error:
            answer = refusal(error)
            if answer.status == 500:
                log.error("%s failed: %s", record_of(scope).id, where(error))
            if not self._has_begun:
                return await answer.response()(scope, receive, send)
            await self._send(send, data(answer.body))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, send: Send) -> None:
        async with aclosing(self._texts) as texts:
            while True:
                following = asyncio.ensure_future(anext(texts, None))
                try:
                    while not (await asyncio.wait({following}, timeout=self._service.settings.keep_alive))[0]:
                        await self._send(send, ": keep-alive\n\n")
                finally:
                    following.cancel()
                    await asyncio.gather(following, return_exceptions=True)
                if (text := following.result()) is None:
                    return
                await self._send(send, text)

    async def _send(self, send: Send, text: str) -> None:
        if not self._has_begun:
            self._has_begun = True
            headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
            headers += [pair for pair in self.raw_headers if pair[0] != b"content-length"]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
