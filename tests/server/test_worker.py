"""server/worker/: the worker process with a scripted engine in it, what arrives, what a death leaves, how it stops."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import pickle
import pkgutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, cast

import pytest

import sfumato
from sfumato.engine.limits import BatchLimits
from sfumato.errors import BusyError, CapacityError, InputError, SfumatoError, WorkerError
from sfumato.events import Commit, Decision, Done, Draft, Usage
from sfumato.options import LoadOptions, Options
from sfumato.server.backend import Job, ModelCard, Outcome, Stats
from sfumato.server.worker import child, loop, supervisor
from sfumato.server.worker.messages import packed, unpacked
from sfumato.server.worker.supervisor import Worker
from sfumato.templates.requests import Chat, Query

CARD = ModelCard("scripted", 32, 512, 100, True, True, 12, "float32", "reference")
COUNTERS = supervisor.COUNTERS


# ---- the engine in the child -----------------------------------------------------------------------------------------


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
    """`loop.Jobs`, where each job's query says what happens to it: its first message is a record of what to do."""

    active: dict[str, dict[str, Any]] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    tokens: int = 0

    def begin(self, id: str, query: Query) -> None:
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

    def is_slow(self, query: Query) -> bool:
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
                    outcomes.append((self._over(id), {"colour": Decision("red", {"red": 1.0})}))
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


def wishes_of(query: Query) -> dict[str, Any]:
    assert isinstance(query, Chat)
    return dict(query.messages[0])


def scripted(wishes: dict[str, Any], connection: Connection, load: LoadOptions, limits: BatchLimits) -> None:
    """What the worker process runs. `wishes` say what becomes of which load: the number of loads is kept in a file."""
    assert load == LOAD

    def open_jobs(send: child.Send) -> tuple[loop.Jobs, ModelCard]:
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
        send(("loading", 5, 10))
        return Script(), CARD

    loop.PREPARE_SECONDS = wishes.get("prepare_seconds", loop.PREPARE_SECONDS)
    loop.MOST_STUCK = wishes.get("most_stuck", loop.MOST_STUCK)
    child.run(connection, open_jobs)


def garbled(wishes: dict[str, Any], connection: Connection, load: LoadOptions, limits: BatchLimits) -> None:
    """A worker that first sends what cannot be read: no pickle, one cut short, one of a class that is nowhere."""
    for data in (b"", b"garbage", pickle.dumps(("ready", CARD))[:-3], b"csfumato.nowhere\nThing\n."):
        connection.send_bytes(data)
    scripted(wishes, connection, load, limits)


def deaf(connection: Connection, load: LoadOptions, limits: BatchLimits) -> None:
    """A worker that never reads."""
    connection.send(("ready", CARD))
    threading.Event().wait()


# ---- the test's side -------------------------------------------------------------------------------------------------


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


def test_events_arrive_in_order_and_a_done_or_a_result_is_the_last(opened: Open) -> None:
    async def test() -> None:
        async with opened() as one:
            assert one.is_ready() and await one.card() == CARD
            received = await events(one, job(left=3, drafts=True))
            assert [type(e).__name__ for e in received] == ["Draft", "Commit"] * 3 + ["Done"]
            assert [e.text for e in received if isinstance(e, Commit)] == ["3 ", "2 ", "1 "]
            assert received[0].entropies == [0.1235]
            assert await events(one, job(result="decision")) == [{"colour": Decision("red", {"red": 1.0})}]

    running(test())


def test_jobs_run_side_by_side_and_events_find_their_own(opened: Open) -> None:
    async def test() -> None:
        async with opened() as one:  # none of the three moves unless all are there
            each = await asyncio.gather(*(events(one, job(left=left, company=3)) for left in (4, 4, 4)))
            assert [[e.text for e in of if isinstance(e, Commit)] for of in each] == [["4 ", "3 ", "2 ", "1 "]] * 3
            each = await asyncio.gather(*(events(one, job(prompt="x" * n)) for n in range(3)))
            assert [of[-1].text for of in each] == ["0", "1", "2"]

    running(test())


@pytest.mark.parametrize(
    ("wishes", "kind", "part"),
    [
        ({"begin": "refuse"}, CapacityError, "900 tokens"),
        ({"turn": "fail"}, CapacityError, "the cache is full"),
        ({"begin": "break"}, SfumatoError, "ValueError < test_worker.py:"),
        ({"turn": "break"}, SfumatoError, "(KeyError)"),
        ({"begin": "panic"}, SfumatoError, "Panic < test_worker.py:"),
        ({"begin": "exit"}, SfumatoError, "SystemExit < test_worker.py:"),
        ({"begin": "strange"}, InputError, "the prompt is strange"),
        ({"turn": "strange"}, InputError, "the prompt is strange"),
        ({"turn": "unsendable"}, SfumatoError, "TypeError"),
        ({"turn": "unreadable"}, SfumatoError, "ValueError"),
    ],
)
def test_an_error_of_one_job_is_its_own_and_tells_no_prompt(
    opened: Open, capfd: pytest.CaptureFixture[str], wishes: dict[str, Any], kind: type[Exception], part: str
) -> None:
    async def test() -> None:
        async with opened() as one:
            with pytest.raises(kind) as refused:
                await events(one, job(**wishes))
            assert type(refused.value) is kind and part in str(refused.value) and "secret" not in str(refused.value)
            assert await state_of(one) and one.stats().restarts == 0

    running(test())
    log = capfd.readouterr().err
    assert "secret" not in log and log.count("a request failed") == (kind is SfumatoError)


def test_a_small_job_does_not_wait_behind_one_that_is_slow_to_prepare(opened: Open) -> None:
    async def test() -> None:
        async with opened() as one:
            slow = asyncio.create_task(events(one, job(begin="wait")))
            await asyncio.sleep(0)
            assert isinstance((await events(one, job(begin="release")))[-1], Done)
            assert isinstance((await slow)[-1], Done)

    running(test())


def test_a_cancel_reaches_the_engine_whether_the_iterator_is_closed_or_its_task_cancelled(opened: Open) -> None:
    async def test() -> None:
        async with opened() as one:
            closed = one.run(job(turn="forever"))
            assert isinstance(await anext(closed), Commit)
            await closed.aclose()
            now = await state_of(one)
            assert now["cancelled"] == ["r0"] and now["active"] == ["r1"]

            has_begun = asyncio.Event()

            async def read() -> None:
                async for _ in one.run(job(turn="forever")):
                    has_begun.set()

            task = asyncio.create_task(read())
            await has_begun.wait()
            task.cancel()
            await asyncio.wait([task])
            now = await state_of(one)
            assert now["cancelled"] == ["r0", "r2"] and now["active"] == ["r3"]

    running(test())


def test_a_job_cancelled_while_it_is_prepared_does_not_stay(opened: Open) -> None:
    async def test() -> None:
        async with opened() as one:
            task = asyncio.create_task(events(one, job(begin="wait", turn="forever")))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            await events(one, job(begin="release"))
            while True:  # it is gone as soon as it has been prepared, unless it never was
                now = await state_of(one)
                if "r0" not in now["active"] and one.stats().queue == 0:
                    break

    running(test())


def test_a_killed_worker_fails_its_jobs_at_once_and_another_takes_the_next(
    opened: Open, impatient: None, capfd: pytest.CaptureFixture[str]
) -> None:
    async def test() -> None:
        async with opened() as one:
            pid = (await state_of(one))["pid"]
            streams = [one.run(job(turn="forever")) for _ in range(3)]
            for stream in streams:
                await anext(stream)
            killed = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            for stream in streams:
                with pytest.raises(WorkerError, match=r"ended \(signal 9\).*again"):
                    async for _ in stream:
                        pass
            assert time.monotonic() - killed < 2
            assert not one.is_ready() and await one.card() == CARD
            assert (await state_of(one))["pid"] != pid
            assert one.is_ready() and one.stats().restarts == 1

    running(test())
    assert "sfumato: the engine's worker ended (signal 9); it is started again" in capfd.readouterr().err


def test_an_engine_that_raises_ends_its_process(
    opened: Open, impatient: None, capfd: pytest.CaptureFixture[str]
) -> None:
    async def test() -> None:
        async with opened() as one:
            with pytest.raises(WorkerError, match=r"exit code 1\)"):
                await events(one, job(turn="raise"))
            assert await state_of(one)

    running(test())
    assert "the engine failed: the device is lost (RuntimeError < test_worker.py:" in capfd.readouterr().err


def test_a_worker_that_hangs_is_killed_and_another_takes_the_next(
    opened: Open, impatient: None, capfd: pytest.CaptureFixture[str]
) -> None:
    async def test() -> None:
        async with opened(silence=1.0) as one:
            before = (await state_of(one))["pid"]
            await asyncio.sleep(1.3)  # silence without jobs is no reason
            assert (await state_of(one))["pid"] == before
            slow = asyncio.create_task(events(one, job(left=1, turn="hang")))
            with pytest.raises(WorkerError, match=r"was silent for 1 s and was killed under this request"):
                await slow
            assert (await state_of(one))["pid"] != before
            assert one.stats().restarts == 1

    running(test())
    assert "silent for 1 s" in capfd.readouterr().err


async def kill(one: Worker) -> None:
    pid = (await state_of(one))["pid"]
    stream = one.run(job(turn="forever"))
    await anext(stream)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerError):
        async for _ in stream:
            pass


def test_a_worker_that_lived_long_is_followed_at_once_and_others_after_pauses_that_double(
    opened: Open, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    async def test() -> None:
        deaths: dict[str, Any] = {"load_2": "die", "load_3": "refuse", "load_4": "break"}
        deaths |= {"load_5": "die", "load_6": "die", "load_7": "die"}
        async with opened(**deaths) as one:
            with monkeypatch.context() as patch:
                patch.setattr(asyncio, "sleep", noted)
                await kill(one)
                assert await state_of(one)  # it waited
            assert one.stats().restarts == 7

    monkeypatch.setattr(supervisor, "STEADY", 1e-9)
    running(test())
    assert pauses == [0, 1, 2, 4, 8, 16, 30]
    assert "there is no model 'nano2'; give a folder; it is started again in 2 s" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("how", "kind", "part"),
    [
        ("refuse", InputError, "there is no model 'nano2'"),
        ("break", SfumatoError, "cannot be loaded: the device has 3 GB (RuntimeError < test_worker.py:"),
        ("die", WorkerError, "(exit code 7)"),
    ],
)
def test_a_first_load_that_fails_is_raised_by_start(opened: Open, how: str, kind: type[Exception], part: str) -> None:
    async def test() -> None:
        with pytest.raises(kind) as refused:
            async with opened(load_1=how):
                pass
        assert type(refused.value) is kind and part in str(refused.value)

    running(test())


def test_loading_is_reported_once(tmp_path: Path, impatient: None) -> None:
    reports: list[tuple[int, int]] = []

    async def test() -> None:
        (tmp_path / "loads").touch()
        child = partial(scripted, {"loads": str(tmp_path / "loads")})
        one = Worker(LOAD, ONE, lambda done, total: reports.append((done, total)), child)
        with pytest.raises(WorkerError, match="still being loaded"):
            await one.card()
        with pytest.raises(WorkerError, match="takes no requests"):
            await events(one, job())
        await one.start()
        await kill(one)
        await state_of(one)
        await one.stop(0)

    running(test())
    assert reports == [(5, 10)]


def test_jobs_wait_for_a_worker_within_the_queue_and_not_for_ever(
    opened: Open, impatient: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def test() -> None:
        async with opened(queue=2, load_2="wait") as one:
            await kill(one)
            with monkeypatch.context() as patch:
                patch.setattr(supervisor, "PATIENCE", 0.01)
                with pytest.raises(WorkerError, match="no worker"):
                    await state_of(one)
            waiting = [asyncio.create_task(state_of(one)) for _ in range(2)]
            await until(lambda: one.stats().queue == 2)
            with pytest.raises(BusyError, match="2 requests are waiting"):
                await state_of(one)
            (tmp_path / "gate").touch()
            assert all(await asyncio.gather(*waiting))

    running(test())


def test_more_jobs_than_rows_and_queue_are_refused_before_any_event(opened: Open) -> None:
    async def test() -> None:
        async with opened(rows=1, queue=1) as one:
            streams = [one.run(job(turn="forever")) for _ in range(2)]
            for stream in streams:
                await anext(stream)
            with pytest.raises(BusyError):
                await state_of(one)
            await streams[0].aclose()
            assert await state_of(one)

    running(test())


def test_figures_only_grow(opened: Open, impatient: None) -> None:
    async def test() -> None:
        async with opened() as one:
            all_stats: list[Stats] = []

            def has(tokens: int) -> bool:
                all_stats.append(one.stats())
                return all_stats[-1].tokens >= tokens

            await events(one, job(left=3))
            await until(lambda: has(3))
            await kill(one)
            all_stats.append(one.stats())
            await events(one, job(left=2))
            await until(lambda: has(5))
            for name in COUNTERS:
                figures = [getattr(stats, name) for stats in all_stats]
                assert figures == sorted(figures) and figures[-1] == 5
            assert all_stats[-1].restarts == 1 and all_stats[-1].memory_bytes > 1e6 and all_stats[-1].rows_max == 4

    running(test())


def test_a_stop_waits_for_what_is_under_way_and_takes_no_more(opened: Open, tmp_path: Path) -> None:
    async def test() -> None:
        async with opened() as one:
            stream = one.run(job(until=str(tmp_path / "enough")))
            await anext(stream)
            stopping = asyncio.create_task(one.stop(30))
            await until(lambda: not one.is_ready())
            with pytest.raises(WorkerError, match="stopping"):
                await state_of(one)
            (tmp_path / "enough").touch()
            assert isinstance([event async for event in stream][-1], Done)
            await stopping
            assert one._process is not None and not one._process.process.is_alive()

    running(test())


def test_a_stop_that_has_waited_long_enough_cuts_and_one_during_a_load_is_quick(opened: Open, tmp_path: Path) -> None:
    async def test() -> None:
        async with opened() as one:
            stream = one.run(job(turn="forever"))
            await anext(stream)
            await one.stop(0.01)
            with pytest.raises(WorkerError, match="stops"):
                async for _ in stream:
                    pass
        wishes = {"loads": str(tmp_path / "loads"), "gate": str(tmp_path / "gate"), "load_2": "wait"}
        one = Worker(LOAD, ONE, child=partial(scripted, wishes))
        starting = asyncio.create_task(one.start())
        await until(lambda: one._process is not None)
        await one.stop(30)
        await starting
        assert not one.is_ready()

    running(test())


def test_a_worker_that_does_not_read_holds_up_neither_the_loop_nor_the_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        one = Worker(LOAD, ONE, child=deaf)
        await one.start()
        task = asyncio.create_task(events(one, job(prompt="x" * (8 << 20))))
        done, _ = await asyncio.wait([task], timeout=0.05)
        assert not done
        await one.stop(0.01)
        with pytest.raises(WorkerError):
            await task

    monkeypatch.setattr(supervisor, "ENDING", 0.05)
    running(test())


def test_an_id_under_way_is_refused_and_free_again_behind_its_job(opened: Open) -> None:
    async def test() -> None:
        async with opened() as one:
            first = one.run(what := job(turn="forever"))
            await anext(first)
            with pytest.raises(InputError, match="a job with the id 'r0' is under way"):
                await anext(one.run(what))
            assert isinstance(await anext(first), Commit)
            await first.aclose()
            assert isinstance((await events(one, replace(what, query=job().query)))[-1], Done)

    running(test())


def test_a_large_job_arrives_whole(opened: Open) -> None:
    async def test() -> None:
        async with opened() as one:
            assert (await events(one, job(prompt="x" * (8 << 20))))[-1].text == str(8 << 20)

    running(test())


class Slept(BaseException):
    """Ends a loop that has none."""


def test_freed_memory_goes_back_now_and_then_and_once_when_there_is_nothing_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float | None] = []

    class News:
        def clear(self) -> None: ...

        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            if timeout is None:
                raise Slept
            return False

    trimmed: list[int] = []
    one = loop.WorkerLoop(cast(Connection, SimpleNamespace(send_bytes=lambda data: None)))
    script = Script({"r1": {"turn": "forever"}})
    one.jobs, one.news = script, cast(threading.Event, News())
    monkeypatch.setattr(loop, "TRIM_SECONDS", 0.3)

    def trim() -> None:
        trimmed.append(len(waits))
        if len(trimmed) == 2:
            script.cancel("r1")  # from here on it is idle

    monkeypatch.setattr(loop, "trim", trim)
    with pytest.raises(Slept):
        one.serve()
    assert trimmed == [0, 0, 1]  # twice at work, and once after a while without any
    assert waits == [0.3, None]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_a_heap_with_holes_is_given_back() -> None:
    script = """
import os
from sfumato.server.worker import loop
held = [bytearray(100_000) for _ in range(2000)]  # below the size for which malloc asks the system
del held[::2], held[:-1]
before = loop.memory_bytes()
loop.trim()
print(before - loop.memory_bytes())
"""
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert int(done.stdout) > 100_000_000


def test_signals_to_all_leave_the_worker_to_its_parent(opened: Open) -> None:
    async def test() -> None:
        async with opened() as one:
            pid = (await state_of(one))["pid"]
            for number in child.SIGNALS:
                os.kill(pid, number)
            assert (await state_of(one))["pid"] == pid and one.stats().restarts == 0

    running(test())


@pytest.mark.parametrize("ending", ["os.kill(os.getpid(), 9)", "sys.exit(3)", "raise ValueError('a bug')"])
def test_a_worker_does_not_outlive_its_server(tmp_path: Path, ending: str) -> None:
    """However that ends. The pipe to this test closes when both have."""
    (tmp_path / "loads").touch()
    script = tmp_path / "server.py"
    script.write_text(
        "import asyncio, os, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import functools, test_worker\n"
        "async def serve():\n"
        f"    child = functools.partial(test_worker.scripted, {{'loads': {str(tmp_path / 'loads')!r}}})\n"
        "    one = test_worker.Worker(test_worker.LOAD, test_worker.ONE, child=child)\n"
        "    await one.start()\n"
        "    print((await test_worker.state_of(one))['pid'], flush=True)\n"
        f"    {ending}\n"
        "if __name__ == '__main__':\n"
        "    asyncio.run(serve())\n"
    )
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert ended.stdout.strip().isdigit() and ended.returncode != 0


def test_the_server_side_imports_no_torch() -> None:
    code = "import sys, sfumato.server.worker.supervisor; print('torch' in sys.modules, 'numpy' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.stdout.split() == ["False", "False"]


# ---- what one job cannot do to the others ----------------------------------------------------------------------------


def test_every_error_of_ours_crosses_the_border() -> None:
    """As itself where `errors` has it, else as the nearest that it has, words and option too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that others wrote
        for name in (name for _, name, _ in pkgutil.walk_packages(sfumato.__path__, "sfumato.")):
            if "triton" not in name:
                with suppress(ImportError, OSError):
                    importlib.import_module(name)
    kinds, level = {SfumatoError}, [SfumatoError]
    while level := [kind for above in level for kind in above.__subclasses__()]:
        kinds |= set(level)
    assert len(kinds) >= 9
    for kind in kinds:
        error = kind.__new__(kind)
        Exception.__init__(error, "the value 7 is above 5; give less")
        arrived = unpacked(packed(error))
        assert isinstance(error, type(arrived)) and type(arrived).__module__ == "sfumato.errors"
        assert str(arrived) == str(error)
    arrived = unpacked(packed(Strange("steps is 9; give less", 7, option="steps")))
    assert type(arrived) is InputError and arrived.option == "steps"


def test_no_message_ends_the_reader(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        (tmp_path / "loads").touch()
        one = Worker(LOAD, ONE, child=partial(garbled, {"loads": str(tmp_path / "loads")}))
        await one.start()
        assert (await state_of(one))["active"] == ["r0"] and one.stats().restarts == 0
        await one.stop(0)

    running(test())
    assert capfd.readouterr().err.count("a message could not be read") == 4


def test_after_jobs_that_fail_in_any_way_the_same_process_goes_on(opened: Open) -> None:
    async def test() -> None:
        async with opened() as one:
            before = (await state_of(one))["pid"]
            for _ in range(4):  # more than there are threads
                for how in ("panic", "exit", "strange", "break"):
                    with pytest.raises(SfumatoError):
                        await events(one, job(begin=how))
                for how in ("strange", "unsendable", "unreadable", "break"):
                    with pytest.raises(SfumatoError):
                        await events(one, job(turn=how))
            assert (await state_of(one))["pid"] == before and one.stats().restarts == 0

    running(test())


def test_a_job_that_is_never_prepared_is_given_up_and_its_thread_replaced(opened: Open) -> None:
    async def test() -> None:
        async with opened(prepare_seconds=0.3) as one:
            before = (await state_of(one))["pid"]
            for _ in range(2):  # both threads each time
                stuck = [asyncio.create_task(events(one, job(begin="never"))) for _ in range(2)]
                await asyncio.sleep(0.1)
                start = time.monotonic()
                for task in stuck:
                    with pytest.raises(
                        InputError, match=r"was not prepared within 0.3 seconds; make its texts smaller"
                    ):
                        await task
                assert time.monotonic() - start < 5
                assert (await state_of(one))["pid"] == before
            assert one.stats().restarts == 0

    running(test())


def test_a_process_that_has_lost_too_many_threads_is_replaced(opened: Open, impatient: None) -> None:
    async def test() -> None:
        async with opened(prepare_seconds=0.2, most_stuck=1) as one:
            before = (await state_of(one))["pid"]
            for _ in range(2):
                with pytest.raises((InputError, WorkerError)):
                    await events(one, job(begin="never"))
            while not one.stats().restarts:
                await asyncio.sleep(0.01)
            assert (await state_of(one))["pid"] != before

    running(test())


def test_who_waits_to_be_prepared_shows_in_the_figures_and_is_no_silence(opened: Open) -> None:
    async def test() -> None:
        async with opened(silence=1.5) as one:
            stuck = [asyncio.create_task(events(one, job(begin="never"))) for _ in range(3)]
            await asyncio.sleep(2.5)
            assert 1.5 < one.stats().stalled < 4 and one.stats().queue == 3
            assert one.is_ready() and one.stats().restarts == 0
            for task in stuck:
                task.cancel()
            await asyncio.gather(*stuck, return_exceptions=True)

    running(test())


def test_what_is_slow_to_prepare_or_large_holds_up_nothing_small(opened: Open) -> None:
    async def test() -> None:
        async with opened() as one:
            await state_of(one)
            slow = [asyncio.create_task(events(one, job(begin="never", slow=True))) for _ in range(4)]
            large = asyncio.create_task(events(one, job(prompt="x" * 100_000)))
            await asyncio.sleep(0.2)
            start = time.monotonic()
            for _ in range(10):
                await state_of(one)
            assert time.monotonic() - start < 2 and not large.done()  # it waits behind the slow ones
            for task in (*slow, large):
                task.cancel()
            await asyncio.gather(*slow, large, return_exceptions=True)

    running(test())


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads cannot be kept to cores here")
def test_the_server_leaves_the_first_core_to_the_engine_and_its_worker_may_run_anywhere(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = os.sched_getaffinity(0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(child, "holds_cores", lambda: True)

    async def test() -> None:
        async with opened() as one:
            assert os.sched_getaffinity(0) == (every - {min(every)} or every)
            assert os.sched_getaffinity((await state_of(one))["pid"]) == every

    try:
        running(test())
    finally:
        os.sched_setaffinity(0, every)
