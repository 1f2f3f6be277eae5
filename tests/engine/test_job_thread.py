"""engine/job_thread.py: queries from several threads on one thread's batch: their order, cancelling, what is kept."""

from __future__ import annotations

import threading
import time
from queue import SimpleQueue
from typing import Any

import pytest

from sfumato import LLM, Complete, Decide, Decisions, Done, InputError, Noul, Options
from sfumato.engine.job_thread import JobThread
from sfumato.engine.limits import BatchLimits
from sfumato.system.fair import FairLock

QUICK = Options(seed=1, max_tokens=5, max_steps=2)
LONG = Options(seed=1, max_tokens=4000, min_tokens=3999, max_steps=4000, confidence=0.0, drafts=True)


@pytest.fixture(scope="module")
def nano() -> LLM:
    return LLM.load("nano", ops="fused")


@pytest.fixture
def jobs() -> JobThread[Any]:
    return JobThread(BatchLimits(rows=2), FairLock())


def ended(jobs: JobThread[Any]) -> bool:
    until = time.monotonic() + 10
    while jobs._thread is not None and time.monotonic() < until:
        time.sleep(0.005)
    return jobs._thread is None


def test_more_queries_than_rows_are_all_answered(nano: LLM, jobs: JobThread[Any]) -> None:
    outcomes: SimpleQueue[tuple[int, Any]] = SimpleQueue()
    threads = [
        threading.Thread(
            target=lambda n=n: jobs.begin(Complete(f"{n}", QUICK), nano, lambda event: outcomes.put((n, event)))
        )
        for n in range(5)
    ]
    for thread in threads:
        thread.start()
    texts: dict[int, str] = {}
    while len(texts) < 5:
        number, event = outcomes.get(timeout=30)
        if isinstance(event, Done):
            texts[number] = event.text
    assert texts == {n: nano.complete(f"{n}", options=QUICK).text for n in range(5)}
    assert ended(jobs)


def test_what_is_cancelled_is_heard_of_no_more(nano: LLM, jobs: JobThread[Any]) -> None:
    outcomes: SimpleQueue[Any] = SimpleQueue()
    cancel = jobs.begin(Complete("1", LONG), nano, outcomes.put)
    outcomes.get(timeout=30)
    cancel()
    cancel()  # again is no error
    while not outcomes.empty():
        outcomes.get()
    assert ended(jobs) and outcomes.empty()
    jobs.begin(Complete("1", QUICK), nano, outcomes.put)()  # before it has begun
    assert ended(jobs)


def test_what_is_kept_is_forgotten_when_all_have_ended(nano: LLM, jobs: JobThread[Any]) -> None:
    outcomes: SimpleQueue[Any] = SimpleQueue()
    cancel = jobs.begin(Complete("1", LONG), nano, outcomes.put)
    outcomes.get(timeout=30)
    jobs.forget()
    assert jobs._jobs is not None  # it is at work
    cancel()
    assert ended(jobs) and jobs._jobs is None
    jobs.begin(Complete("1", QUICK), nano, outcomes.put)
    assert ended(jobs) and jobs._jobs is not None
    jobs.forget()
    assert jobs._jobs is None


def test_closing_tells_every_listener(nano: LLM, jobs: JobThread[Any]) -> None:
    queues: list[SimpleQueue[Any]] = [SimpleQueue() for _ in range(3)]
    for outcomes in queues:
        jobs.begin(Complete("1", LONG), nano, outcomes.put)
    queues[0].get(timeout=30)
    jobs.close(InputError("closed"))
    assert jobs._thread is None and jobs._jobs is None
    for outcomes in queues:
        last = None
        while not outcomes.empty():
            last = outcomes.get()
        assert isinstance(last, InputError)
    with pytest.raises(InputError, match="closed"):
        jobs.begin(Complete("1", QUICK), nano, queues[0].put)
    assert jobs._thread is None


def test_a_query_that_cannot_begin_harms_no_other(nano: LLM, jobs: JobThread[Any]) -> None:
    outcomes: SimpleQueue[Any] = SimpleQueue()
    jobs.begin(Complete("9" * 5000, QUICK), nano, outcomes.put)
    assert isinstance(outcomes.get(timeout=30), InputError)
    jobs.begin(Complete("9", QUICK), nano, outcomes.put)
    outcomes.get(timeout=30)
    assert isinstance(outcomes.get(timeout=30), Done)


def test_reads_that_arrive_together_share_passes(nano: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that have arrived begin before the next turn, not one in each."""
    lock, outcomes, rows = FairLock(), SimpleQueue[Any](), list[int]()
    jobs: JobThread[Any] = JobThread(BatchLimits(rows=32), lock)
    read = nano.model.read

    def counted(*args: Any) -> Any:
        rows.append(len(args[4]))
        return read(*args)

    monkeypatch.setattr(nano.model, "read", counted)
    with lock:  # as if a turn were under way
        for n in range(16):
            jobs.begin(Decide(f"The order {n}.", {"late": Noul("Is it late?")}), nano, outcomes.put)
    assert all(isinstance(outcomes.get(timeout=30), Decisions) for _ in range(16))
    assert sum(rows) == 16 and len(rows) <= 4
    assert ended(jobs)
