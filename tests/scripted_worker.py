"""A worker process with a scripted engine in it, and what its tests share."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, cast

import pytest

from sfumato.engine.limits import BatchLimits
from sfumato.errors import CapacityError, CheckpointError, InputError, WorkerError
from sfumato.events import Commit, Decision, Decisions, Done, Draft, Usage
from sfumato.options import LoadOptions, Options
from sfumato.server.backend import Job, ModelCard, Outcome, Stats
from sfumato.server.worker import child, loop, supervisor
from sfumato.server.worker.supervisor import Worker
from sfumato.templates.requests import AdapterQuery, Chat, Query

CARD = ModelCard("scripted", 32, 512, 100, True, True, 12, "float32", "reference")
COUNTERS = supervisor.COUNTERS
DECIDED = Decisions({"colour": Decision("red", {"red": 1.0})}, Usage.total([]), 0)


class Strange(InputError):
    """An error that pickles, and cannot be made anew from what it pickles to."""

    def __init__(self, message: str, row: int, option: str | None = None) -> None:
        super().__init__(message, option=option)
        self.row = row


class Panic(BaseException):
    """As a Rust library's: no Exception."""


class Unreadable:
    def __reduce__(self) -> Any:
        return int, ("no number",)


@dataclass
class Script:
    """`loop.JobRunner`, where each job's query says what happens to it: its first message is a record of what to do."""

    active: dict[str, dict[str, Any]] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    tokens: int = 0

    def begin(self, id: str, query: Query | AdapterQuery) -> None:
        wishes = wishes_of(query)
        match wishes.get("begin"):
            case "refuse":
                raise CapacityError("the prompt has 900 tokens; at most 512 fit")
            case "break":
                raise ValueError("a secret of the prompt")
            case "panic":
                raise Panic("a secret of the prompt")
            case "exit":
                raise SystemExit(3)
            case "strange":
                raise Strange("the prompt is strange", 7)
            case "never":
                time.sleep(60)
            case "wait" if not self.released.wait(20):
                raise InputError("nobody released this job")
            case "release":
                self.released.set()
        self.active[id] = {"left": 0, "drafts": query.options.drafts} | wishes

    def is_slow(self, query: Query | AdapterQuery) -> bool:
        return bool(wishes_of(query).get("slow"))

    def cancel(self, id: str) -> None:
        self.cancelled.append(id)
        self.active.pop(id, None)

    @property
    def is_idle(self) -> bool:
        return all(len(self.active) < job.get("company", 1) for job in list(self.active.values()))

    def turn(self) -> list[tuple[str, Outcome]]:
        outcomes: list[tuple[str, Outcome]] = []
        for id, job in list(self.active.items()):
            match job:
                case {"turn": "raise"}:
                    raise RuntimeError("the device is lost")
                case {"turn": "hang"}:
                    time.sleep(60)
                case {"turn": "fail"}:
                    outcomes.append((self._over(id), CapacityError("the cache is full")))
                case {"turn": "strange"}:
                    outcomes.append((self._over(id), Strange("the prompt is strange", 7)))
                case {"turn": "unsendable"}:
                    outcomes.append((self._over(id), cast(Any, Decision("red", {"red": cast(Any, threading.Lock())}))))
                case {"turn": "unreadable"}:
                    outcomes.append((self._over(id), cast(Any, Unreadable())))
                case {"turn": "break"}:
                    outcomes.append((self._over(id), KeyError("a secret of the prompt")))
                case {"turn": "forever"} | {"until": _} if not Path(job.get("until", "/none")).exists():
                    time.sleep(0.001)
                    outcomes.append((id, Commit(0, 0, 1, [1])))
                case {"result": "decision"}:
                    outcomes.append((self._over(id), DECIDED))
                case {"left": left} if left > 0:
                    if job["drafts"]:
                        outcomes.append((id, Draft(0, 0, 1, [5], [0.123456789], [True])))
                    outcomes.append((id, Commit(0, 0, 1, [left], text=f"{left} ")))
                    job["left"] -= 1
                    self.tokens += 1
                case _:
                    state = {"pid": os.getpid(), "active": list(self.active), "cancelled": self.cancelled}
                    text = str(len(job["prompt"])) if "prompt" in job else json.dumps(state)
                    outcomes.append((self._over(id), Done(0, "stop", [], Usage(), text=text)))
        return outcomes

    def _over(self, id: str) -> str:
        del self.active[id]
        return id

    def figures(self) -> Stats:
        return Stats(rows=len(self.active), rows_max=4, **dict.fromkeys(COUNTERS, self.tokens))


def wishes_of(query: Query | AdapterQuery) -> dict[str, Any]:
    assert isinstance(query, Chat)
    return dict(query.conversation[0])


def scripted(wishes: dict[str, Any], connection: Connection, load: LoadOptions, limits: BatchLimits) -> None:
    """What the worker process runs. `wishes` say what becomes of which load: the number of loads is kept in a file."""
    assert replace(load, adapters=None) == LOAD

    def open_jobs(send: child.Send) -> tuple[loop.JobRunner, ModelCard]:
        loads = Path(wishes["loads"])
        loads.write_text(loads.read_text() + "x")
        match wishes.get(f"load_{len(loads.read_text())}"):
            case "refuse":
                raise InputError("there is no model 'nano2'; give a folder")
            case "break":
                raise RuntimeError("the device has 3 GB")
            case "die":
                os._exit(7)
            case "wait":
                while not Path(wishes["gate"]).exists():
                    time.sleep(0.005)
            case "lack":
                send(("left out", "b", CheckpointError("b is no adapter")))
        send(("loading", 5, 10))
        return Script(), CARD

    loop.PREPARE_SECONDS = wishes.get("prepare_seconds", loop.PREPARE_SECONDS)
    loop.MOST_STUCK = wishes.get("most_stuck", loop.MOST_STUCK)
    child.run(connection, open_jobs)


def garbled(wishes: dict[str, Any], connection: Connection, load: LoadOptions, limits: BatchLimits) -> None:
    """A worker that first sends what cannot be read: no pickle, one cut short, one of a class that is nowhere, no
    message; and messages of no known kind."""
    for data in (
        b"",
        b"garbage",
        pickle.dumps(("ready", CARD))[:-3],
        b"csfumato.nowhere\nThing\n.",
        pickle.dumps(None),
    ):
        connection.send_bytes(data)
    for message in ("stats", None), ("events", 7), ("events", [7]), ("ready", "yes"), ("failed", "no"), ():
        connection.send(message)
    scripted(wishes, connection, load, limits)


def deaf(connection: Connection, load: LoadOptions, limits: BatchLimits) -> None:
    """A worker that never reads."""
    connection.send(("ready", CARD))
    threading.Event().wait()


LOAD = LoadOptions("scripted", device="cpu")
ONE = BatchLimits(rows=1, queue=1)


class Open(Protocol):
    def __call__(
        self, rows: int = 4, queue: int = 8, silence: float = supervisor.SILENCE, **wishes: Any
    ) -> AbstractAsyncContextManager[Worker]: ...


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    """Opens a worker around a test, and ends it."""

    @asynccontextmanager
    async def open_worker(
        rows: int = 4, queue: int = 8, silence: float = supervisor.SILENCE, **wishes: Any
    ) -> AsyncIterator[Worker]:
        (tmp_path / "loads").touch()
        wishes |= {"loads": str(tmp_path / "loads"), "gate": str(tmp_path / "gate")}
        one = Worker(LOAD, BatchLimits(rows=rows, queue=queue), child=partial(scripted, wishes), silence=silence)
        try:
            await one.start()
            yield one
        finally:
            await one.stop(0)

    return open_worker


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "PAUSES", (0.01, 0.02))


def running(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


numbers = count()
"""Of jobs; each test begins with 0."""


@pytest.fixture(autouse=True)
def count_from_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "numbers", count())


def job(drafts: bool = False, **wishes: Any) -> Job:
    return Job(f"r{next(numbers)}", Chat([wishes], options=Options(drafts=drafts)))


async def events(one: Worker, what: Job) -> list[Any]:
    return [event async for event in one.run(what)]


async def state_of(one: Worker) -> dict[str, Any]:
    """The state of the engine."""
    state: dict[str, Any] = json.loads((await events(one, job()))[-1].text)
    return state


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.005)


async def kill(one: Worker) -> None:
    pid = (await state_of(one))["pid"]
    stream = one.run(job(turn="forever"))
    await anext(stream)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerError):
        async for _ in stream:
            pass
