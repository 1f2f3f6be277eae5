"""server/worker/supervisor.py and child.py: what arrives, what a death leaves behind, how a worker stops."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import scripted_worker
from scripted_worker import (
    CARD,
    COUNTERS,
    LOAD,
    ONE,
    Open,
    deaf,
    events,
    garbled,
    job,
    kill,
    running,
    scripted,
    state_of,
    until,
)

from sfumato.errors import BusyError, CheckpointError, InputError, SfumatoError, WorkerError
from sfumato.events import Commit, Done
from sfumato.server.backend import Stats
from sfumato.server.worker import child, supervisor
from sfumato.server.worker.supervisor import Worker

opened, impatient = scripted_worker.opened, scripted_worker.impatient
count_from_0 = scripted_worker.count_from_0


def test_events_arrive_in_order_and_a_done_or_a_result_is_the_last(opened: Open) -> None:
    async def test() -> None:
        async with opened() as one:
            assert one.is_ready() and await one.card() == CARD
            received = await events(one, job(left=3, drafts=True))
            assert [type(e).__name__ for e in received] == ["Draft", "Commit"] * 3 + ["Done"]
            assert [e.text for e in received if isinstance(e, Commit)] == ["3 ", "2 ", "1 "]
            assert received[0].entropies == [0.1235]
            assert await events(one, job(result="decision")) == [scripted_worker.DECIDED]

    running(test())


def test_a_worker_that_follows_leaves_out_adapters_that_cannot_be_loaded_any_more(
    opened: Open, impatient: None, capsys: pytest.CaptureFixture[str]
) -> None:
    async def test() -> None:
        with pytest.raises(CheckpointError, match="b is no adapter"):  # the first worker must have them all
            async with opened(load_1="lack"):
                pass
        async with opened(load_3="lack") as one:
            one.load = replace(one.load, adapters={"a": "x", "b": "y"})
            await kill(one)
            assert isinstance((await events(one, job(left=1)))[-1], Done)
            assert one.load.adapters == {"a": "x"}

    running(test())
    assert "adapter 'b' is left out: b is no adapter" in capsys.readouterr().err


def test_jobs_run_side_by_side_and_events_find_their_own(opened: Open) -> None:
    async def test() -> None:
        async with opened() as one:  # none of the three moves unless all are there
            each = await asyncio.gather(*(events(one, job(left=left, company=3)) for left in (4, 4, 4)))
            assert [[e.text for e in of if isinstance(e, Commit)] for of in each] == [["4 ", "3 ", "2 ", "1 "]] * 3
            each = await asyncio.gather(*(events(one, job(prompt="x" * n)) for n in range(3)))
            assert [of[-1].text for of in each] == ["0", "1", "2"]

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
            assert time.monotonic() - killed < 10
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
    assert "the engine failed: the device is lost (RuntimeError < scripted_worker.py:" in capfd.readouterr().err


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
        ("break", SfumatoError, "cannot be loaded: the device has 3 GB (RuntimeError < scripted_worker.py:"),
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
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "import functools, scripted_worker\n"
        "async def serve():\n"
        f"    child = functools.partial(scripted_worker.scripted, {{'loads': {str(tmp_path / 'loads')!r}}})\n"
        "    one = scripted_worker.Worker(scripted_worker.LOAD, scripted_worker.ONE, child=child)\n"
        "    await one.start()\n"
        "    print((await scripted_worker.state_of(one))['pid'], flush=True)\n"
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


def test_no_message_ends_the_reader(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        (tmp_path / "loads").touch()
        one = Worker(LOAD, ONE, child=partial(garbled, {"loads": str(tmp_path / "loads")}))
        await one.start()
        assert (await state_of(one))["active"] == ["r0"] and one.stats().restarts == 0
        await one.stop(0)

    running(test())
    log = capfd.readouterr().err
    assert log.count("a message could not be read") == 5 and log.count("of no known kind") == 6
