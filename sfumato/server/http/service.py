"""What the routes share: the backend, the settings, and how a request's jobs are run side by side and watched.

A job lives exactly as long as somebody waits for it: when the client goes, does not read, or its time is up, the jobs
of its request are cancelled at once.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from time import monotonic
from typing import Any, TypeVar, cast

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sfumato.errors import WorkerError
from sfumato.events import Draft, Event, Usage
from sfumato.server.backend import Backend, Job, ModelCard, Result, where
from sfumato.server.http.body import Body, read
from sfumato.server.http.errors import RETRY, ClientGone, Refusal, refusal
from sfumato.server.http.metrics import Metrics
from sfumato.server.settings import Settings

log = logging.getLogger("sfumato.server")

T = TypeVar("T")
B = TypeVar("B", bound=Body)

SMALL = 64 << 10
"""Bytes of a body that are read at once, in milliseconds; a larger one is read in a thread, beside the others."""


@dataclass
class Record:
    """One request, as the log tells it."""

    id: str
    status: int = 0
    tokens: int = 0


def record_of(scope: Scope) -> Record:
    """Kept in the request's state by `guard.Access`, the outermost of all."""
    return cast(Record, scope["state"]["record"])


class Service:
    def __init__(self, backend: Backend, settings: Settings) -> None:
        self.backend, self.settings = backend, settings
        self.metrics = Metrics(backend)
        self.is_draining = False
        self.has_been_ready = False
        self.running = 0
        """Requests to /v1 under way."""
        self.body_bytes = 0
        """Of the bodies of requests under way."""
        self._idle, self._cut = asyncio.Event(), asyncio.Event()
        self._reading = asyncio.Semaphore(2)
        """For large bodies: each thread that reads one takes time from the loop."""
        self._card: ModelCard | None = None
        self.starting: asyncio.Task[None] | None = None
        """The backend's start; over when the model is loaded, or cannot be."""

    # ---- the model ----------------------------------------------------------------------------------------------

    async def card(self, name: str | None = None) -> ModelCard:
        """The loaded model's; a Refusal where another is asked for. Known once, it holds while a worker starts anew."""
        if self._card is None:
            self._card = await self.backend.card()
        if name is not None and name not in self.names(self._card):
            message = f"there is no model {name!r} here; this server has {', '.join(self.names(self._card))}"
            raise Refusal(404, message, param="model", code="model_not_found")
        return self._card

    def names(self, card: ModelCard) -> list[str]:
        """What the model is called here, first of all in answers."""
        return list(dict.fromkeys([self.settings.name or card.name, card.name, *self.settings.aliases]))

    def state(self) -> str:
        """In one word, for GET /ready."""
        if self.has_failed():
            return "failed"
        if self.is_draining:
            return "draining"
        if self.backend.is_ready():
            self.has_been_ready = True
            return "stalled" if self.backend.stats().stalled > self.settings.stall_limit else "ready"
        return "restarting" if self.has_been_ready or self.backend.stats().restarts else "loading"

    # ---- start and end ------------------------------------------------------------------------------------------

    def start(self) -> None:
        self.starting = asyncio.create_task(self.backend.start())
        self.starting.add_done_callback(lambda task: task.cancelled() or task.exception())  # whoever waits says it

    def has_failed(self) -> bool:
        """Whether the model could not be loaded."""
        task = self.starting
        return task is not None and task.done() and not task.cancelled() and task.exception() is not None

    def enter(self) -> None:
        """A request to /v1 begins; Refusal while the server stops."""
        if self.is_draining:
            raise Refusal(503, "the server is draining and takes no more requests", "overloaded_error", headers=RETRY)
        self.running += 1

    def leave(self) -> None:
        self.running -= 1
        if not self.running:
            self._idle.set()

    async def drain(self, seconds: float) -> None:
        """Take no more requests, wait so long for those under way, then cut them off, each with an error."""
        self.is_draining = True
        if not await self._emptied(seconds):
            self._cut.set()
            await self._emptied(1.0)

    async def _emptied(self, seconds: float) -> bool:
        """Whether the last request under way ends within so many seconds."""
        self._idle.clear()
        try:
            async with asyncio.timeout(seconds):
                while self.running:
                    await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def ended(self) -> None:
        """After the backend's stop: its start is over, whatever became of it."""
        if self.starting is not None:
            self.starting.cancel()
            await asyncio.gather(self.starting, return_exceptions=True)

    # ---- requests -----------------------------------------------------------------------------------------------

    async def read(self, request: Request, kind: type[B]) -> B:
        """The request's body, checked."""
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json":
            raise Refusal(415, f"the content type is {media or 'not given'!r}; send application/json")
        data = await request.body()
        if len(data) <= SMALL:
            body = read(data, kind, self.settings.limits)
        else:
            async with self._reading:
                body = await asyncio.to_thread(read, data, kind, self.settings.limits)
        if self.settings.log_prompts:
            log.info("%s says %s", record_of(request.scope).id, json.dumps(body.plain()))
        return body

    async def events(self, scope: Scope, jobs: Sequence[Job]) -> AsyncGenerator[tuple[int, Event | Result], None]:
        """The events of jobs that run side by side, each with its job's number; the first error ends them all."""
        queue: asyncio.Queue[tuple[int, Event | Result | Exception | None]] = asyncio.Queue(16)
        record, begun = record_of(scope), monotonic()

        async def pump(number: int, job: Job) -> None:
            try:
                async with aclosing(self.backend.run(job)) as events:
                    async for event in events:
                        await queue.put((number, event))
            except Exception as error:
                await queue.put((number, error))
            else:
                await queue.put((number, None))

        tasks = [asyncio.create_task(pump(number, job)) for number, job in enumerate(jobs)]
        waiting, left = set(range(len(jobs))), len(jobs)
        try:
            while left:
                number, event = await queue.get()
                if event is None:
                    left -= 1
                    continue
                if isinstance(event, Exception):
                    raise event
                if number in waiting and not isinstance(event, Draft):
                    waiting.remove(number)
                    self.metrics.first_commit_seconds.observe(monotonic() - begun)
                if isinstance(usage := getattr(event, "usage", None), Usage):
                    record.tokens += usage.tokens
                    if usage.canvases:
                        self.metrics.steps_per_canvas.observe(usage.steps / usage.canvases)
                yield number, event
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def result(self, scope: Scope, job: Job) -> Result:
        """What a job on a template ends with."""
        async with aclosing(self.events(scope, [job])) as events:
            async for _, event in events:
                if not isinstance(event, Event):
                    return event
        raise WorkerError("the engine's worker ended a job without a result; send the request again")

    async def watched(self, receive: Receive, work: Coroutine[Any, Any, T]) -> T:
        """What the work returns, unless its client goes first, its time is up, or the server is cut off."""
        task = asyncio.create_task(work)
        gone = asyncio.create_task(_gone(receive))
        cut = asyncio.create_task(self._cut.wait())
        limit = self.settings.limits.timeout
        try:
            await asyncio.wait({task, gone, cut}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise ClientGone
            if cut.done():
                raise Refusal(503, "the server stops; send the request again", "overloaded_error", headers=RETRY)
            message = f"the answer took more than the {limit:g} seconds allowed; ask for fewer tokens or steps"
            raise Refusal(504, message, "timeout_error")
        finally:
            for one in (task, gone, cut):
                one.cancel()
            await asyncio.gather(task, gone, cut, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. Until the first, or some seconds of silence, an error is still an answer of its own; from
    then on it is one more event, and the last."""

    def __init__(self, service: Service, texts: AsyncGenerator[str, None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._service, self._texts = service, texts
        self._is_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._service.watched(receive, self._write(send))
        except ClientGone:
            raise
        except Exception as error:
            answer = refusal(error)
            if answer.status == 500:
                log.error("%s failed: %s", record_of(scope).id, where(error))
            if not self._is_begun:
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
        if not self._is_begun:
            self._is_begun = True
            headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
            headers += [pair for pair in self.raw_headers if pair[0] != b"content-length"]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": text.encode(), "more_body": True})


def data(value: Any, event: str | None = None) -> str:
    """One server-sent event."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"event: {event}\ndata: {text}\n\n" if event else f"data: {text}\n\n"


END = "data: [DONE]\n\n"


def draft_of(number: int, draft: Draft) -> dict[str, Any]:
    """A draft, as every stream sends it."""
    return {
        "index": number,
        "canvas": draft.canvas,
        "step": draft.step,
        "pieces": draft.pieces,
        "entropies": [round(entropy, 4) for entropy in draft.entropies],
        "accepted": draft.accepted,
        "end": draft.end,
    }


def usage_of(usages: Sequence[Usage], n: int = 1) -> dict[str, Any]:
    """What a request took: of each prompt's `n` answers the first counts the prompt."""
    prompt = sum(usage.prompt_tokens for usage in usages[::n])
    tokens, passes = sum(usage.tokens for usage in usages), sum(usage.passes for usage in usages)
    firsts = [usage.first_commit_seconds for usage in usages if usage.first_commit_seconds is not None]
    return {
        "prompt_tokens": prompt,
        "completion_tokens": tokens,
        "total_tokens": prompt + tokens,
        "prompt_tokens_details": {"cached_tokens": sum(usage.reused_tokens for usage in usages[::n])},
        "steps": sum(usage.steps for usage in usages),
        "passes": passes,
        "canvases": sum(usage.canvases for usage in usages),
        "tokens_per_pass": round(tokens / passes, 4) if passes else 0.0,
        "seconds": round(max((usage.seconds for usage in usages), default=0.0), 6),
        "first_commit_seconds": round(min(firsts), 6) if firsts else None,
    }
