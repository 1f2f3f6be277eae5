"""The worker process, with a scripted engine in it: what arrives, what a death leaves behind, how it stops."""

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
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import sfumato
from sfumato.errors import BusyError, CapacityError, InputError, SfumatoError, WorkerError
from sfumato.events import Commit, Decision, Done, Draft, Event, Usage
from sfumato.options import Options
from sfumato.server.backend import Job, ModelCard, Result, Stats
from sfumato.server.worker import child as desk
from sfumato.server.worker import supervisor as worker
from sfumato.server.worker.supervisor import Worker

CARD = ModelCard("scripted", 32, 512, 100, True, True, 12, "float32", "reference")
COUNTERS = worker.COUNTERS


# ---- the engine in the child -----------------------------------------------------------------------------------------


class Strange(InputError):
    """An error that pickles, and cannot be made anew from what it pickles to."""

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row


class Panic(BaseException):
    """As a Rust library's: no Exception."""


class Unreadable:
    def __reduce__(self) -> Any:
        return int, ("no number",)


@dataclass
class Script:
    """`sfumato.engine.jobs.Jobs`, of which every job is told in its payload what happens to it."""

    active: dict[int, dict[str, Any]] = field(default_factory=dict)
    cancelled: list[int] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    tokens: int = 0

    def begin(self, key: int, kind: str, payload: dict[str, Any], options: Options) -> None:
        match payload.get("begin"):
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
        self.active[key] = {"left": 0, "kind": kind, "drafts": options.drafts} | payload

    def is_slow(self, kind: str, payload: dict[str, Any], options: Options) -> bool:
        return bool(payload.get("slow"))

    def cancel(self, key: int) -> None:
        self.cancelled.append(key)
        self.active.pop(key, None)

    @property
    def is_idle(self) -> bool:
        return all(len(self.active) < job.get("company", 1) for job in list(self.active.values()))

    def turn(self) -> list[tuple[int, Event | Result | Exception]]:
        happened: list[tuple[int, Event | Result | Exception]] = []
        for key, job in list(self.active.items()):
            match job:
                case {"turn": "raise"}:
                    raise RuntimeError("the device is lost")
                case {"turn": "hang"}:
                    time.sleep(60)
                case {"turn": "fail"}:
                    happened.append((self._over(key), CapacityError("the cache is full")))
                case {"turn": "strange"}:
                    happened.append((self._over(key), Strange("the prompt is strange", 7)))
                case {"turn": "unsendable"}:
                    happened.append((self._over(key), Decision("red", {"red": threading.Lock()})))  # type: ignore
                case {"turn": "unreadable"}:
                    happened.append((self._over(key), Unreadable()))  # type: ignore[arg-type]
                case {"turn": "break"}:
                    happened.append((self._over(key), KeyError("a secret of the prompt")))
                case {"turn": "forever"} | {"until": _} if not Path(job.get("until", "/none")).exists():
                    time.sleep(0.001)
                    happened.append((key, Commit(0, 0, 1, [1])))
                case {"kind": "decide"}:
                    happened.append((self._over(key), {"colour": Decision("red", {"red": 1.0})}))
                case {"left": left} if left > 0:
                    if job["drafts"]:
                        happened.append((key, Draft(0, 0, 1, [5], [0.123456789], [True])))
                    happened.append((key, Commit(0, 0, 1, [left], text=f"{left} ")))
                    job["left"] -= 1
                    self.tokens += 1
                case _:
                    told = {"pid": os.getpid(), "active": list(self.active), "cancelled": self.cancelled}
                    text = str(len(job["prompt"])) if "prompt" in job else json.dumps(told)
                    happened.append((self._over(key), Done(0, "stop", [], Usage(), text=text)))
        return happened

    def _over(self, key: int) -> int:
        del self.active[key]
        return key

    def figures(self) -> Stats:
        return Stats(rows=len(self.active), rows_max=4, **dict.fromkeys(COUNTERS, self.tokens))


def scripted(connection: Connection, load: dict[str, Any], limits: Mapping[str, Any]) -> None:
    """What the worker process runs. `load` says what becomes of which load: the number of loads is kept in a file."""

    def open_jobs(send: desk.Send) -> tuple[desk.Jobs, ModelCard]:
        loads = Path(load["loads"])
        loads.write_text(loads.read_text() + "x")
        match load.get(f"load {len(loads.read_text())}"):
            case "refuse":
                raise InputError("there is no model 'nano2'; give a folder")
            case "break":
                raise RuntimeError("the device has 3 GB")
            case "die":
                os._exit(7)
            case "wait":
                while not Path(load["gate"]).exists():
                    time.sleep(0.005)
        send(("loading", 5, 10))
        return Script(), CARD

    desk.PREPARE_SECONDS = load.get("prepare_seconds", desk.PREPARE_SECONDS)
    desk.LOST = load.get("lost", desk.LOST)
    desk.run(connection, open_jobs)


def garbled(connection: Connection, load: dict[str, Any], limits: Mapping[str, Any]) -> None:
    """A worker that first says what cannot be read: no pickle, one cut short, one of a class that is nowhere."""
    for data in (b"", b"garbage", pickle.dumps(("ready", CARD))[:-3], b"csfumato.nowhere\nThing\n."):
        connection.send_bytes(data)
    scripted(connection, load, limits)


def deaf(connection: Connection, load: dict[str, Any], limits: Mapping[str, Any]) -> None:
    """A worker that never reads."""
    connection.send(("ready", CARD))
    threading.Event().wait()


# ---- the test's side -------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Any]:
    """Opens a worker around a test, and ends it."""

    @asynccontextmanager
    async def open_worker(
        rows: int = 4, queue: int = 8, silence: float = worker.SILENCE, **load: Any
    ) -> AsyncIterator[Worker]:
        (tmp_path / "loads").touch()
        load |= {"loads": str(tmp_path / "loads"), "gate": str(tmp_path / "gate")}
        one = Worker(load, {"rows": rows, "queue": queue}, child=scripted, silence=silence)
        try:
            await one.start()
            yield one
        finally:
            await one.stop(0)

    return open_worker


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "PAUSES", (0.01, 0.02))


def running(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def job(kind: Any = "complete", drafts: bool = False, **payload: Any) -> Job:
    return Job(kind, "r1", payload, Options(drafts=drafts))


async def events(one: Worker, what: Job) -> list[Any]:
    return [event async for event in one.run(what)]


async def told(one: Worker) -> dict[str, Any]:
    """What the engine says of itself."""
    return json.loads((await events(one, job()))[-1].text)


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.005)


def test_events_arrive_in_order_and_a_done_or_a_result_is_the_last(opened) -> None:
    async def test() -> None:
        async with opened() as one:
            assert one.is_ready() and await one.card() == CARD
            found = await events(one, job(left=3, drafts=True))
            assert [type(e).__name__ for e in found] == ["Draft", "Commit"] * 3 + ["Done"]
            assert [e.text for e in found if isinstance(e, Commit)] == ["3 ", "2 ", "1 "]
            assert found[0].entropies == [0.1235]
            assert await events(one, job("decide")) == [{"colour": Decision("red", {"red": 1.0})}]

    running(test())


def test_jobs_run_side_by_side_and_events_find_their_own(opened) -> None:
    async def test() -> None:
        async with opened() as one:  # none of the three moves unless all are there
            found = await asyncio.gather(*(events(one, job(left=left, company=3)) for left in (4, 4, 4)))
            assert [[e.text for e in of if isinstance(e, Commit)] for of in found] == [["4 ", "3 ", "2 ", "1 "]] * 3
            found = await asyncio.gather(*(events(one, job(prompt="x" * n)) for n in range(3)))
            assert [of[-1].text for of in found] == ["0", "1", "2"]

    running(test())


@pytest.mark.parametrize(
    ("payload", "kind", "part"),
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
def test_an_error_of_one_job_is_its_own_and_tells_no_prompt(opened, capfd, payload, kind, part) -> None:
    async def test() -> None:
        async with opened() as one:
            with pytest.raises(kind) as refused:
                await events(one, job(**payload))
            assert type(refused.value) is kind and part in str(refused.value) and "secret" not in str(refused.value)
            assert await told(one) and one.stats().restarts == 0

    running(test())
    log = capfd.readouterr().err
    assert "secret" not in log and log.count("a request failed") == (kind is SfumatoError)


def test_a_small_job_does_not_wait_behind_one_that_is_slow_to_prepare(opened) -> None:
    async def test() -> None:
        async with opened() as one:
            slow = asyncio.create_task(events(one, job(begin="wait")))
            await asyncio.sleep(0)
            assert isinstance((await events(one, job(begin="release")))[-1], Done)
            assert isinstance((await slow)[-1], Done)

    running(test())


def test_a_cancel_reaches_the_engine_whether_the_iterator_is_closed_or_its_task_cancelled(opened) -> None:
    async def test() -> None:
        async with opened() as one:
            closed = one.run(job(turn="forever"))
            assert isinstance(await anext(closed), Commit)
            await closed.aclose()
            now = await told(one)
            assert now["cancelled"] == [0] and now["active"] == [1]

            begun = asyncio.Event()

            async def read() -> None:
                async for _ in one.run(job(turn="forever")):
                    begun.set()

            task = asyncio.create_task(read())
            await begun.wait()
            task.cancel()
            await asyncio.wait([task])
            now = await told(one)
            assert now["cancelled"] == [0, 2] and now["active"] == [3]

    running(test())


def test_a_job_cancelled_while_it_is_prepared_does_not_stay(opened) -> None:
    async def test() -> None:
        async with opened() as one:
            task = asyncio.create_task(events(one, job(begin="wait", turn="forever")))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            await events(one, job(begin="release"))
            while True:  # it is gone as soon as it has been prepared, unless it never was
                now = await told(one)
                if 0 not in now["active"] and one.stats().queue == 0:
                    break

    running(test())


def test_a_killed_worker_fails_its_jobs_at_once_and_another_takes_the_next(opened, impatient, capfd) -> None:
    async def test() -> None:
        async with opened() as one:
            pid = (await told(one))["pid"]
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
            assert (await told(one))["pid"] != pid
            assert one.is_ready() and one.stats().restarts == 1

    running(test())
    assert "sfumato: the engine's worker ended (signal 9); it is started again" in capfd.readouterr().err


def test_an_engine_that_raises_ends_its_process(opened, impatient, capfd) -> None:
    async def test() -> None:
        async with opened() as one:
            with pytest.raises(WorkerError, match=r"exit code 1\)"):
                await events(one, job(turn="raise"))
            assert await told(one)

    running(test())
    assert "the engine failed: the device is lost (RuntimeError < test_worker.py:" in capfd.readouterr().err


def test_a_worker_that_hangs_is_killed_and_another_takes_the_next(opened, impatient, capfd) -> None:
    async def test() -> None:
        async with opened(silence=1.0) as one:
            before = (await told(one))["pid"]
            await asyncio.sleep(1.3)  # silence without jobs is no reason
            assert (await told(one))["pid"] == before
            slow = asyncio.create_task(events(one, job(left=1, turn="hang")))
            with pytest.raises(WorkerError, match=r"was silent for 1 s and was killed under this request"):
                await slow
            assert (await told(one))["pid"] != before
            assert one.stats().restarts == 1

    running(test())
    assert "silent for 1 s" in capfd.readouterr().err


async def kill(one: Worker) -> None:
    pid = (await told(one))["pid"]
    stream = one.run(job(turn="forever"))
    await anext(stream)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerError):
        async for _ in stream:
            pass


def test_a_worker_that_lived_long_is_followed_at_once_and_others_after_pauses_that_double(
    opened, monkeypatch, capfd
) -> None:
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    async def test() -> None:
        deaths = {2: "die", 3: "refuse", 4: "break", 5: "die", 6: "die", 7: "die"}
        async with opened(**{f"load {number}": how for number, how in deaths.items()}) as one:
            with monkeypatch.context() as patch:
                patch.setattr(asyncio, "sleep", noted)
                await kill(one)
                assert await told(one)  # it waited
            assert one.stats().restarts == 7

    monkeypatch.setattr(worker, "STEADY", 1e-9)
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
def test_a_first_load_that_fails_is_told_by_start(opened, how, kind, part) -> None:
    async def test() -> None:
        with pytest.raises(kind) as refused:
            async with opened(**{"load 1": how}):
                pass
        assert type(refused.value) is kind and part in str(refused.value)

    running(test())


def test_loading_is_heard_once(tmp_path: Path, impatient) -> None:
    heard: list[tuple[int, int]] = []

    async def test() -> None:
        (tmp_path / "loads").touch()
        load = {"loads": str(tmp_path / "loads")}
        one = Worker(load, {"rows": 1, "queue": 1}, lambda done, total: heard.append((done, total)), scripted)
        with pytest.raises(WorkerError, match="still being loaded"):
            await one.card()
        with pytest.raises(WorkerError, match="takes no requests"):
            await events(one, job())
        await one.start()
        await kill(one)
        await told(one)
        await one.stop(0)

    running(test())
    assert heard == [(5, 10)]


def test_jobs_wait_for_a_worker_within_the_queue_and_not_for_ever(
    opened, impatient, monkeypatch, tmp_path: Path
) -> None:
    async def test() -> None:
        async with opened(queue=2, **{"load 2": "wait"}) as one:
            await kill(one)
            with monkeypatch.context() as patch:
                patch.setattr(worker, "PATIENCE", 0.01)
                with pytest.raises(WorkerError, match="no worker"):
                    await told(one)
            waiting = [asyncio.create_task(told(one)) for _ in range(2)]
            await until(lambda: one.stats().queue == 2)
            with pytest.raises(BusyError, match="2 requests are waiting"):
                await told(one)
            (tmp_path / "gate").touch()
            assert all(await asyncio.gather(*waiting))

    running(test())


def test_more_jobs_than_rows_and_queue_are_refused_before_any_event(opened) -> None:
    async def test() -> None:
        async with opened(rows=1, queue=1) as one:
            streams = [one.run(job(turn="forever")) for _ in range(2)]
            for stream in streams:
                await anext(stream)
            with pytest.raises(BusyError):
                await told(one)
            await streams[0].aclose()
            assert await told(one)

    running(test())


def test_figures_only_grow(opened, impatient) -> None:
    async def test() -> None:
        async with opened() as one:
            seen: list[Stats] = []

            def has(tokens: int) -> bool:
                seen.append(one.stats())
                return seen[-1].tokens >= tokens

            await events(one, job(left=3))
            await until(lambda: has(3))
            await kill(one)
            seen.append(one.stats())
            await events(one, job(left=2))
            await until(lambda: has(5))
            for name in COUNTERS:
                figures = [getattr(stats, name) for stats in seen]
                assert figures == sorted(figures) and figures[-1] == 5
            assert seen[-1].restarts == 1 and seen[-1].memory_bytes > 1e6 and seen[-1].rows_max == 4

    running(test())


def test_a_stop_waits_for_what_is_under_way_and_takes_no_more(opened, tmp_path: Path) -> None:
    async def test() -> None:
        async with opened() as one:
            stream = one.run(job(until=str(tmp_path / "enough")))
            await anext(stream)
            stopping = asyncio.create_task(one.stop(30))
            await until(lambda: not one.is_ready())
            with pytest.raises(WorkerError, match="stopping"):
                await told(one)
            (tmp_path / "enough").touch()
            assert isinstance([event async for event in stream][-1], Done)
            await stopping
            assert one._process is not None and not one._process.process.is_alive()

    running(test())


def test_a_stop_that_has_waited_long_enough_cuts_and_one_during_a_load_is_quick(opened, tmp_path: Path) -> None:
    async def test() -> None:
        async with opened() as one:
            stream = one.run(job(turn="forever"))
            await anext(stream)
            await one.stop(0.01)
            with pytest.raises(WorkerError, match="stops"):
                async for _ in stream:
                    pass
        load = {"loads": str(tmp_path / "loads"), "gate": str(tmp_path / "gate"), "load 2": "wait"}
        one = Worker(load, {"rows": 1, "queue": 1}, child=scripted)
        starting = asyncio.create_task(one.start())
        await until(lambda: one._process is not None)
        await one.stop(30)
        await starting
        assert not one.is_ready()

    running(test())


def test_a_worker_that_does_not_read_holds_up_neither_the_loop_nor_the_stop(monkeypatch) -> None:
    async def test() -> None:
        one = Worker({}, {"rows": 1, "queue": 1}, child=deaf)
        await one.start()
        task = asyncio.create_task(events(one, job(prompt="x" * (8 << 20))))
        done, _ = await asyncio.wait([task], timeout=0.05)
        assert not done
        await one.stop(0.01)
        with pytest.raises(WorkerError):
            await task

    monkeypatch.setattr(worker, "PARTING", 0.05)
    running(test())


def test_a_large_job_arrives_whole(opened) -> None:
    async def test() -> None:
        async with opened() as one:
            assert (await events(one, job(prompt="x" * (8 << 20))))[-1].text == str(8 << 20)

    running(test())


class Slept(BaseException):
    """Ends a loop that has none."""


def test_freed_memory_goes_back_now_and_then_and_once_when_there_is_nothing_to_do(monkeypatch) -> None:
    waits: list[float | None] = []

    class News:
        def clear(self) -> None: ...

        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            if timeout is None:
                raise Slept
            return False

    trimmed: list[int] = []
    one = desk.Desk(SimpleNamespace(send_bytes=lambda data: None))  # type: ignore[arg-type]
    script = Script({1: {"turn": "forever"}})
    one.jobs, one.news = script, News()  # type: ignore[assignment]
    monkeypatch.setattr(desk, "TRIM_SECONDS", 0.3)

    def trim() -> None:
        trimmed.append(len(waits))
        if len(trimmed) == 2:
            script.cancel(1)  # from here on it is idle

    monkeypatch.setattr(desk, "trim", trim)
    with pytest.raises(Slept):
        one.serve()
    assert trimmed == [0, 0, 1]  # twice at work, and once after a while without any
    assert waits == [0.3, None]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_a_heap_with_holes_is_given_back() -> None:
    script = """
import os
from sfumato.server import desk
held = [bytearray(100_000) for _ in range(2000)]  # below the size for which malloc asks the system
del held[::2], held[:-1]
before = desk._memory_bytes()
desk.trim()
print(before - desk._memory_bytes())
"""
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert int(done.stdout) > 100_000_000


def test_signals_to_all_leave_the_worker_to_its_parent(opened) -> None:
    async def test() -> None:
        async with opened() as one:
            pid = (await told(one))["pid"]
            for number in desk.SIGNALS:
                os.kill(pid, number)
            assert (await told(one))["pid"] == pid and one.stats().restarts == 0

    running(test())


@pytest.mark.parametrize("ending", ["os.kill(os.getpid(), 9)", "sys.exit(3)", "raise ValueError('a bug')"])
def test_a_worker_does_not_outlive_its_server(tmp_path: Path, ending: str) -> None:
    """However that ends. The pipe to this test closes when both have."""
    (tmp_path / "loads").touch()
    script = tmp_path / "server.py"
    script.write_text(
        "import asyncio, os, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_worker\n"
        "async def serve():\n"
        f"    load = {{'loads': {str(tmp_path / 'loads')!r}}}\n"
        "    one = test_worker.Worker(load, {'rows': 1, 'queue': 1}, child=test_worker.scripted)\n"
        "    await one.start()\n"
        "    print((await test_worker.told(one))['pid'], flush=True)\n"
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
    """As itself where `events` has it, else as the nearest that it has, words and all."""
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
        arrived = desk.unpacked(desk._parcel(error))
        assert isinstance(error, type(arrived)) and type(arrived).__module__ == "sfumato.events"
        assert str(arrived) == str(error)


def test_no_message_ends_the_reader(tmp_path: Path, capfd) -> None:
    async def test() -> None:
        (tmp_path / "loads").touch()
        one = Worker({"loads": str(tmp_path / "loads")}, {"rows": 1, "queue": 1}, child=garbled)
        await one.start()
        assert (await told(one))["active"] == [0] and one.stats().restarts == 0
        await one.stop(0)

    running(test())
    assert capfd.readouterr().err.count("a message could not be read") == 4


def test_after_jobs_that_fail_in_any_way_the_same_process_goes_on(opened) -> None:
    async def test() -> None:
        async with opened() as one:
            before = (await told(one))["pid"]
            for _ in range(4):  # more than there are threads
                for payload in (
                    *({"begin": how} for how in ("panic", "exit", "strange", "break")),
                    *({"turn": how} for how in ("strange", "unsendable", "unreadable", "break")),
                ):
                    with pytest.raises(SfumatoError):
                        await events(one, job(**payload))
            assert (await told(one))["pid"] == before and one.stats().restarts == 0

    running(test())


def test_a_job_that_is_never_prepared_is_given_up_and_its_thread_replaced(opened) -> None:
    async def test() -> None:
        async with opened(prepare_seconds=0.3) as one:
            before = (await told(one))["pid"]
            for _ in range(2):  # both threads each time
                stuck = [asyncio.create_task(events(one, job(begin="never"))) for _ in range(2)]
                await asyncio.sleep(0.1)
                begun = time.monotonic()
                for task in stuck:
                    with pytest.raises(
                        InputError, match=r"was not prepared within 0.3 seconds; make its texts smaller"
                    ):
                        await task
                assert time.monotonic() - begun < 5
                assert (await told(one))["pid"] == before
            assert one.stats().restarts == 0

    running(test())


def test_a_process_that_has_lost_too_many_threads_is_replaced(opened, impatient) -> None:
    async def test() -> None:
        async with opened(prepare_seconds=0.2, lost=1) as one:
            before = (await told(one))["pid"]
            for _ in range(2):
                with pytest.raises((InputError, WorkerError)):
                    await events(one, job(begin="never"))
            while not one.stats().restarts:
                await asyncio.sleep(0.01)
            assert (await told(one))["pid"] != before

    running(test())


def test_who_waits_to_be_prepared_shows_in_the_figures_and_is_no_silence(opened) -> None:
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


def test_what_is_slow_to_prepare_or_large_holds_up_nothing_small(opened) -> None:
    async def test() -> None:
        async with opened() as one:
            await told(one)
            slow = [asyncio.create_task(events(one, job(begin="never", slow=True))) for _ in range(4)]
            large = asyncio.create_task(events(one, job(prompt="x" * 100_000)))
            await asyncio.sleep(0.2)
            begun = time.monotonic()
            for _ in range(10):
                await told(one)
            assert time.monotonic() - begun < 2 and not large.done()  # it waits behind the slow ones
            for task in (*slow, large):
                task.cancel()
            await asyncio.gather(*slow, large, return_exceptions=True)

    running(test())


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads cannot be kept to cores here")
def test_the_server_leaves_the_first_core_to_the_engine_and_its_worker_may_run_anywhere(opened, monkeypatch) -> None:
    every = os.sched_getaffinity(0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(desk, "holds_cores", lambda: True)

    async def test() -> None:
        async with opened() as one:
            assert os.sched_getaffinity(0) == (every - {min(every)} or every)
            assert os.sched_getaffinity((await told(one))["pid"]) == every

    try:
        running(test())
    finally:
        os.sched_setaffinity(0, every)
