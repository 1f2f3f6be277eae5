"""A `Backend` without a model: what it answers follows from the query alone, so that tests can know it.

A chat is answered with `reply(query)`, three words a canvas. With tools, and no result of one as the last message, it
calls the first tool with `sample` arguments; a thought comes with `thinking`, a sample of the schema with `schema`.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from queue import SimpleQueue
from typing import Any, TypeVar

from fastapi import FastAPI

from sfumato.errors import SfumatoError
from sfumato.events import (
    Commit,
    Decision,
    Decisions,
    Done,
    Draft,
    Edited,
    Event,
    Filled,
    Scored,
    ScoredToken,
    TokenCount,
    Usage,
)
from sfumato.model.loaded import AdapterSize
from sfumato.server.backend import Job, ModelCard, Result, Stats
from sfumato.server.http.listen import Server
from sfumato.templates.requests import (
    AnswerQuery,
    Chat,
    Complete,
    CountTokens,
    Decide,
    Edit,
    Fill,
    Infill,
    Likelihood,
    LoadAdapter,
    Query,
    UnloadAdapter,
)
from sfumato.templates.slots import Slot, check_template
from sfumato.text.replies import Reply

T = TypeVar("T")

CARD = ModelCard(
    name="fake",
    canvas_length=16,
    max_position=4096,
    vocab_size=1000,
    is_diffusion=True,
    has_chat=True,
    parameters=1234,
    dtype="float32",
    ops="reference",
    defaults={"max_steps": 24, "t_max": 0.7},
)
WORDS = 3
"""Of a canvas."""
STEPS = 3
"""Of a canvas."""


class FakeBackend:
    """Counts its jobs; `pause` is slept before every event, `error` raised by every job after `error_after` events.
    While `hold` is cleared, every job stops behind its first commit (a job on a template: before its result)."""

    def __init__(
        self,
        card: ModelCard = CARD,
        pause: float = 0.0,
        error: Exception | None = None,
        error_after: int = 0,
        text: str | None = None,
        script: Script | None = None,
    ) -> None:
        self.model, self.pause, self.error, self.error_after, self.text = card, pause, error, error_after, text
        self.script = script
        self.jobs: list[Job] = []
        """Every job so far."""
        self.finished = self.cancelled = self.running = self.most_running = 0
        self.is_loaded = True
        self.start_error: SfumatoError | None = None
        self.restarts = 0
        self.hold = asyncio.Event()
        self.hold.set()
        self.changed = asyncio.Event()
        """Pulses when a job begins, waits at `hold`, or ends."""

    @property
    def queries(self) -> list[Any]:
        """The queries of its jobs."""
        return [job.query for job in self.jobs]

    async def start(self) -> None:
        if self.start_error is not None:
            raise self.start_error

    async def stop(self, drain_seconds: float) -> None:
        self.is_loaded = False

    async def card(self) -> ModelCard:
        return self.model

    async def change_adapters(self, job: Job) -> ModelCard:
        self.jobs.append(job)
        assert isinstance(job.query, LoadAdapter | UnloadAdapter)
        kept = tuple(one for one in self.model.adapters if one.name != job.query.name)
        if isinstance(job.query, LoadAdapter):
            kept = (*kept, AdapterSize(job.query.name, 4, 1000))
        self.model = replace(self.model, adapters=kept)
        return self.model

    def is_ready(self) -> bool:
        return self.is_loaded

    def stats(self) -> Stats:
        done = self.finished
        return Stats(rows=self.running, rows_max=8, tokens=6 * done, passes=4 * done, restarts=self.restarts)

    async def until(self, name: str, value: int) -> None:
        """Wait until a count has this value."""
        while getattr(self, name) != value:
            self.changed.clear()
            async with asyncio.timeout(10):
                await self.changed.wait()

    async def run(self, job: Job) -> AsyncGenerator[Event | Result, None]:
        assert isinstance(job.query, Query)
        self.jobs.append(job)
        self._count("running", 1)
        self.most_running = max(self.most_running, self.running)
        try:
            for number, event in enumerate(events_of(job.query, self.text, self.script)):
                if self.error is not None and number >= self.error_after:
                    raise self.error
                await asyncio.sleep(self.pause)
                if not isinstance(event, Draft | Commit | Done):
                    await self.hold.wait()
                yield event
                if isinstance(event, Commit):
                    await self.hold.wait()
            if self.error is not None:
                raise self.error
            self._count("finished", 1)
        except (asyncio.CancelledError, GeneratorExit):
            self._count("cancelled", 1)
            raise
        finally:
            self._count("running", -1)

    def _count(self, name: str, by: int) -> None:
        setattr(self, name, getattr(self, name) + by)
        self.changed.set()


Script = Callable[[AnswerQuery], Reply | None]
"""What a query is answered with; None: with what any other backend of this kind says."""


def events_of(query: Query, text: str | None = None, script: Script | None = None) -> list[Event | Result]:
    """All events of a query, or its drafts and its result."""
    usage, seed = Usage(5, 6, 2, 6, 8, 0.5, 0.2, 3), query.options.seed or 0
    drafts: list[Event | Result] = []
    if query.options.drafts:
        drafts = [_draft(0, step, ["ab", " cd", ""]) for step in range(STEPS)]
    match query:
        case Infill(prefix=prefix, suffix=suffix):
            middle = " middle "
            return [*drafts, Filled(prefix + middle + suffix, {"middle": middle}, usage, seed, {"middle": 2})]
        case Edit(text=before):
            return [*drafts, Edited(before.upper(), before, usage, seed)]
        case Fill(template=template):
            return [*drafts, _filled(check_template(template), usage, seed)]
        case Decide(questions=questions):
            return [Decisions({id: _decided(question) for id, question in questions.items()}, usage, seed)]
        case Likelihood(prompt=prompt):
            return [_scored(prompt, usage, seed)]
        case CountTokens(query=counted):
            return [TokenCount(_size(counted))]
        case _:
            return _answer(query, text, script(query) if script else None)


def _answer(query: AnswerQuery, text: str | None, scripted: Reply | None) -> list[Event | Result]:
    options = query.options
    calls: list[dict[str, Any]] = []
    thought = None
    if scripted is not None:
        text, thought, calls = scripted.text, scripted.thought, scripted.tool_calls
    elif isinstance(query, Chat) and query.tools and query.conversation[-1]["role"] != "tool":
        function = query.tools[0]["function"]
        calls = [{"name": function["name"], "arguments": sample(function.get("parameters") or {"type": "object"})}]
        calls *= 2 if "twice" in str(query.conversation[-1].get("content")) else 1
        text = ""
    elif text is None:
        text = reply(query)
    if options.thinking and scripted is None:
        thought = "Let me think."
    stop = next((s for s in options.stop if s in text), None)
    if stop is not None:
        text = text[: text.index(stop)]
    pieces = re.findall(r"\s*\S+|\s+$", text)
    is_cut = options.max_tokens is not None and len(pieces) > options.max_tokens
    pieces = pieces[: options.max_tokens]
    events: list[Event | Result] = []
    canvases = [pieces[i : i + WORDS] for i in range(0, len(pieces), WORDS)] or [[]]
    for canvas, words in enumerate(canvases):
        if options.drafts:
            events += [_draft(canvas, step, words) for step in range(STEPS)]
        is_first, is_last = canvas == 0, canvas == len(canvases) - 1
        logprobs = [-0.5 * (i + 1) for i in range(len(words))] if options.logprobs else None
        tops = None
        if options.top_logprobs:
            tops = [{word: -0.5, " other": float("-inf")} for word in words]
        events.append(
            Commit(
                row=0,
                canvas=canvas,
                steps=STEPS,
                tokens=list(range(len(words))),
                logprobs=logprobs,
                text="".join(words),
                thought=thought or "" if is_first else "",
                tool_calls=calls if is_last else [],
                pieces=words if options.logprobs else None,
                top_logprobs=tops,
            )
        )
    n = len(canvases)
    usage = Usage(_size(query), len(pieces), n, STEPS * n, STEPS * n + 1, 0.5, 0.2, 1)
    reason: Any = "length" if is_cut else "stop"
    done = Done(0, reason, list(range(len(pieces))), usage, options.seed or 0, "".join(pieces), stop)
    return [*events, replace(done, thought=thought, tool_calls=calls)]


def reply(query: AnswerQuery) -> str:
    """The text of an answer: a sample of the schema, the result of a tool, or the question and the seed."""
    options = query.options
    if options.schema is not None:
        return json.dumps(sample(options.schema if isinstance(options.schema, dict) else {}))
    if options.choices:
        return options.choices[0]
    if isinstance(query, Complete):
        return f" one two three four five (seed {options.seed})."
    last = query.conversation[-1]
    content = last.get("content") or ""
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return f"The tool says {text}" if last["role"] == "tool" else f"You said: {text} (seed {options.seed})."


def sample(schema: Any, root: Any = None) -> Any:
    """A small value that a simple schema allows."""
    root = schema if root is None else root
    if "$ref" in schema:
        inner = root
        for step in schema["$ref"].removeprefix("#/").split("/"):
            inner = inner[step]
        return sample(inner, root)
    if "const" in schema:
        return schema["const"]
    for word in ("enum", "anyOf", "oneOf"):
        if word in schema:
            return schema["enum"][0] if word == "enum" else sample(schema[word][0], root)
    kind = schema.get("type", "object")
    if kind == "object":
        return {name: sample(inner, root) for name, inner in schema.get("properties", {}).items()}
    if kind == "array":
        return [sample(schema.get("items", {"type": "string"}), root)]
    return {"string": "text", "integer": 7, "number": 0.5, "boolean": True, "null": None}[kind]


def _draft(canvas: int, step: int, words: list[str]) -> Draft:
    n = len(words)
    certain = [i * STEPS < n * (step + 1) for i in range(n)]
    entropies = [0.01 if sure else 1.23456 for sure in certain]
    pieces = [word if sure else " ?" for word, sure in zip(words, certain, strict=True)]
    return Draft(0, canvas, step, list(range(n)), entropies, certain, "".join(pieces), pieces, n)


def _filled(template: Sequence[str | Slot], usage: Usage, seed: int) -> Filled:
    text = ""
    values: dict[str, str] = {}
    for piece in template:
        if isinstance(piece, str):
            text += piece
        else:
            name = piece.name or str(len(values) + 1)
            values[name] = piece.choices[0] if piece.choices else f"<{name}>"
            text += values[name]
    return Filled(text, values, usage, seed, dict.fromkeys(values, 1))


def _scored(prompt: Any, usage: Usage, seed: int) -> Scored:
    """A token a word, or an id."""
    words = prompt.split(" ") if isinstance(prompt, str) else [f"[{token}]" for token in prompt]
    tokens = [ScoredToken(2, "<bos>", 0)]
    for number, word in enumerate(words):
        offset = sum(len(one.piece) for one in tokens[1:])
        tokens.append(ScoredToken(number, f" {word}"[not number :], offset, -number - 0.5, {word: -0.25, "x": -9.0}))
    text = "".join(one.piece for one in tokens[1:])
    return Scored(tokens, text, ScoredToken(9, " next", len(text), -0.5, {" next": -0.5}), " next", usage, seed)


def _size(query: AnswerQuery) -> int:
    """A number that grows with the prompt."""
    if isinstance(query, Complete) and not isinstance(query.prompt, str):
        return len(query.prompt)
    fields = {name: value for name, value in asdict(query).items() if name != "options"}
    return len(json.dumps(fields).split())


@dataclass
class Served:
    """An application behind a real socket, in a thread of its own."""

    url: str
    port: int
    loop: asyncio.AbstractEventLoop

    def ask(self, work: Coroutine[Any, Any, T]) -> T:
        """What the work returns, in the server's own loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)


@contextmanager
def serving(app: FastAPI) -> Iterator[Served]:
    listener = socket.create_server(("127.0.0.1", 0))
    servers: SimpleQueue[Server] = SimpleQueue()

    async def main() -> None:
        server = Server(app, timeout_graceful_shutdown=1)
        servers.put(server)
        await server.serve(sockets=[listener])

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    server = servers.get(timeout=20)
    port = listener.getsockname()[1]
    try:
        yield Served(f"http://127.0.0.1:{port}", port, server.loop)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def _decided(question: Any) -> Decision:
    """Every option as likely as the others."""
    names = getattr(question, "options", ["passage"])
    legend = dict(zip(names, question.criteria, strict=True)) if question.kind == "score" else None
    place = (0, 7) if question.kind == "span" else None
    return Decision(names[0], dict.fromkeys(names, 1 / len(names)), question.kind, legend, place)
