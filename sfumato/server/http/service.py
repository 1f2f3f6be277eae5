"""What the routes share: the backend, the settings, and how a request's jobs run side by side and are watched.

A job lives exactly as long as a client waits for it: when the client goes, does not read, or its time is up, the jobs
of its request are cancelled at once.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any, TypeVar, cast

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope

from sfumato.errors import WorkerError
from sfumato.events import Draft, Event, Usage
from sfumato.server.backend import NUMBER, Backend, Job, ModelCard, Result
from sfumato.server.http.bodies import Body, BodyReading, read
from sfumato.server.http.encodings import decoded
from sfumato.server.http.errors import CLOSE, RETRY, ClientGone, ErrorForm, Refusal, refusal, short
from sfumato.server.http.metrics import Metrics
from sfumato.server.settings import Settings
from sfumato.templates.requests import AdapterQuery, LoadAdapter, Query

log = logging.getLogger("sfumato.server")

T = TypeVar("T")
B = TypeVar("B", bound=Body)

JSON = "application/json"
SMALL = 64 << 10
"""Bytes of a body that are read at once, in milliseconds; a larger one is read in a thread, beside the others."""


@dataclass
class Record:
    """One request: its id, and what the log says of it."""

    id: str
    is_clients: bool = False
    """Whether the client chose the id; it may choose the same again."""
    status: int = 0
    tokens: int = 0
    expanded: int = 0
    """Bytes of its body, where that came compressed."""
    ignored: list[str] = field(default_factory=list)
    """Names of fields that the request has and that have no effect; a header of the answer holds them."""


def record_of(scope: Scope) -> Record:
    """The record of a request, which `AccessLog` keeps in the request's state."""
    return cast(Record, scope["state"]["record"])


class Service:
    """The backend and the settings of one application, and its requests under way."""

    def __init__(self, backend: Backend, settings: Settings) -> None:
        self.backend, self.settings = backend, settings
        self.metrics = Metrics(backend)
        self.error_forms: dict[str, ErrorForm] = {}
        """The forms of errors of dialects that are not OpenAI's, by what their paths begin with."""
        self.is_draining = False
        self.has_been_ready = False
        self.running = 0
        """Requests to /v1 under way."""
        self.body_bytes = 0
        """Of the bodies of requests under way."""
        self._numbers = itertools.count()
        self._idle, self._cut = asyncio.Event(), asyncio.Event()
        self._reading = asyncio.Semaphore(2)
        """For large bodies: each thread that reads one takes time from the loop."""
        self._changing, self._changes = asyncio.Lock(), set[asyncio.Task[ModelCard]]()
        """Of adapters: one after the other, each kept until it is over."""
        self._card: ModelCard | None = None
        self.starting: asyncio.Task[None] | None = None
        """The backend's start; over when the model is loaded, or cannot be."""

    # ---- the model ----------------------------------------------------------------------------------------------

    async def card(self, name: str | None = None) -> ModelCard:
        """The loaded model's card; a Refusal where another model is asked for.

        It stays known while a worker starts anew."""
        try:
            self._card = replace(await self.backend.card(), preset=self.settings.preset)
        except WorkerError:
            if self._card is None:
                raise
        card = self._card
        if name is None or name in self.names(card):
            return card
        if name in self.adapters(card):
            return replace(card, adapter=name)
        known = short(", ".join([*self.names(card), *self.adapters(card)]), 1000)
        raise Refusal(
            404, f"there is no model {name!r} here; this server has {known}", param="model", code="model_not_found"
        )

    def adapters(self, card: ModelCard) -> list[str]:
        """The adapters that a client can ask for as a model: the model's own names go first."""
        own = self.names(replace(card, adapter=None))
        return [adapter.name for adapter in card.adapters if adapter.name not in own]

    def names(self, card: ModelCard) -> list[str]:
        """The names of what a request asks for here, the model's or its adapter's; answers have the first."""
        if card.adapter is not None:
            return [card.adapter]
        return list(dict.fromkeys([self.settings.name or card.name, card.name, *self.settings.aliases]))

    def state(self) -> str:
        """The state of the server in one word, for GET /ready."""
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
        """Start the backend, in a task of its own."""
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
        """A request to /v1 ends."""
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

    def error_answer(self, error: Exception, scope: Scope) -> JSONResponse:
        """An error as the answer of a path, in the form of its dialect."""
        path = scope["path"]
        form = next((form for start, form in self.error_forms.items() if path.startswith(start)), None)
        return refusal(error).response(form)

    async def read(self, request: Request, kind: type[B], medias: Sequence[str] = (JSON,)) -> B:
        """The request's body, checked; its media type is one of these."""
        media = media_of(request)
        if media not in medias:
            raise Refusal(415, f"the content type is {media or 'not given'!r}; send application/json")
        return await self.parsed(request, await self.body(request), kind)

    async def body(self, request: Request) -> bytes:
        """The bytes of a request's body, which may have come compressed."""
        data, encoding = await request.body(), request.headers.get("content-encoding", "")
        if not encoding:
            return data
        async with self._reading:
            text = await asyncio.to_thread(decoded, data, encoding, self.settings.limits.max_body)
        record_of(request.scope).expanded = len(text)
        self.count_bytes(len(text))
        return text

    def count_bytes(self, size: int) -> None:
        """Count bytes that a body takes until its request is over; Refusal where all of them take too many."""
        self.body_bytes += size
        if self.body_bytes > self.settings.limits.max_bodies:
            text = "the bodies of all requests take more memory than the server has for them; try again in a while"
            raise Refusal(503, text, "overloaded_error", headers=CLOSE | RETRY)

    async def parsed(self, request: Request, data: bytes, kind: type[B]) -> B:
        """The JSON of a request, checked."""
        reading = BodyReading(self.settings.limits, self.settings.strict_params)
        if len(data) <= SMALL:
            body = read(data, kind, reading)
        else:
            async with self._reading:
                body = await asyncio.to_thread(read, data, kind, reading)
        record_of(request.scope).ignored = reading.ignored
        if self.settings.log_prompts:
            log.info("%s says %s", record_of(request.scope).id, json.dumps(body.plain()))
        return body

    async def change_adapters(self, request: Request, query: AdapterQuery) -> ModelCard:
        """Load or unload an adapter; the card with what is asked for then.

        It is carried out to its end, one at a time, whether its client waits or not."""

        id = f"{record_of(request.scope).id}{NUMBER}{next(self._numbers)}"

        async def change() -> ModelCard:
            async with self._changing:
                return await self.backend.change_adapters(Job(id, query))

        async def wait() -> ModelCard:
            return await asyncio.shield(task)

        task = asyncio.create_task(change())
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # its client may have gone
        card = await self.watched(request.receive, wait())
        return replace(card, adapter=query.name) if isinstance(query, LoadAdapter) else card

    def jobs(self, record: Record, queries: Sequence[Query]) -> list[Job]:
        """A request's queries under ids that no other job ever has.

        An id that a client chose gets a number, as it may be chosen again while the worker still ends the job before;
        several queries of one request get their place besides."""
        id = f"{record.id}{NUMBER}{next(self._numbers)}" if record.is_clients else record.id
        ids = [id] if len(queries) == 1 else [f"{id}/{place}" for place in range(len(queries))]
        return [Job(*pair) for pair in zip(ids, queries, strict=True)]

    async def events(self, scope: Scope, queries: Sequence[Query]) -> AsyncGenerator[tuple[int, Event | Result], None]:
        """The events of queries that run side by side, each with its query's place; the first error ends them all."""
        queue: asyncio.Queue[tuple[int, Event | Result | Exception | None]] = asyncio.Queue(16)
        record, start = record_of(scope), monotonic()
        jobs = self.jobs(record, queries)

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
        waiting, running = set(range(len(jobs))), len(jobs)
        try:
            while running:
                number, event = await queue.get()
                if event is None:
                    running -= 1
                    continue
                if isinstance(event, Exception):
                    raise event
                if number in waiting and not isinstance(event, Draft):
                    waiting.remove(number)
                    self.metrics.first_commit_seconds.observe(monotonic() - start)
                if isinstance(usage := getattr(event, "usage", None), Usage):
                    record.tokens += usage.tokens
                    if usage.canvases:
                        self.metrics.steps_per_canvas.observe(usage.steps / usage.canvases)
                yield number, event
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def result(self, scope: Scope, query: Query) -> Result:
        """What a query on a template ends with."""
        async with aclosing(self.events(scope, [query])) as events:
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
            for waiter in (task, gone, cut):
                waiter.cancel()
            await asyncio.gather(task, gone, cut, return_exceptions=True)


def media_of(request: Request) -> str:
    """The media type of a request's body; "" where it names none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
