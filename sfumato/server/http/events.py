"""Answers as streams: server-sent events, or what another dialect writes in their place."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sfumato.server.backend import where
from sfumato.server.http.errors import ClientGone, Refusal, refusal
from sfumato.server.http.service import Service, log, record_of

END = "data: [DONE]\n\n"
"""The last event of a stream in OpenAI's form."""


def data(value: Any, event: str | None = None) -> str:
    """One server-sent event."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"event: {event}\ndata: {text}\n\n" if event else f"data: {text}\n\n"


@dataclass(frozen=True)
class StreamForm:
    """How a dialect writes a stream. By default server-sent events in OpenAI's form."""

    media: str = "text/event-stream; charset=utf-8"
    silence: str = ": keep-alive\n\n"
    """What is sent when nothing was for a while."""
    error: Callable[[Refusal], str] = lambda refusal: data(refusal.body)
    """The last text of a stream that fails."""


SERVER_SENT = StreamForm()


class EventStream(Response):
    """A stream of texts, in the form of its dialect.

    Until the first event, or some seconds of silence, an error is an answer of its own; from then on it is one more
    event, and the last."""

    def __init__(self, service: Service, texts: AsyncGenerator[str, None], form: StreamForm = SERVER_SENT) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._service, self._texts, self._form = service, texts, form
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
                return await self._service.error_answer(answer, scope)(scope, receive, send)
            await self._send(send, self._form.error(answer))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, send: Send) -> None:
        async with aclosing(self._texts) as texts:
            while True:
                following = asyncio.ensure_future(anext(texts, None))
                try:
                    while not (await asyncio.wait({following}, timeout=self._service.settings.keep_alive))[0]:
                        await self._send(send, self._form.silence)
                finally:
                    following.cancel()
                    await asyncio.gather(following, return_exceptions=True)
                if (text := following.result()) is None:
                    return
                await self._send(send, text)

    async def _send(self, send: Send, text: str) -> None:
        if not self._has_begun:
            self._has_begun = True
            headers = [(b"content-type", self._form.media.encode())]
            headers += [pair for pair in self.raw_headers if pair[0] != b"content-length"]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
