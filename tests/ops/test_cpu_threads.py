"""ops/cpu/threads.h and waiting.py: threads that share a call, beside other threads, in other processes, asleep."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from torch import Tensor

from sfumato.ops import cpu
from sfumato.ops.cpu import build

pytestmark = pytest.mark.skipif(build.obstacle() is not None, reason=f"the library cannot be built: {build.obstacle()}")

ROWS, WIDTH, OUTPUTS = 300, 96, 200
RUN = """
import os, threading, time
import torch
torch.set_num_threads({threads})
from sfumato.ops import cpu
x = torch.randn({rows}, {width}, generator=torch.Generator().manual_seed(1))
weight = cpu.pack(torch.randn({outputs}, {width}, generator=torch.Generator().manual_seed(2)))
def total():
    return hash(cpu.rms_norm(*cpu.linear(x, weight), None, 1e-6).numpy().tobytes())
def tasks():
    return len(os.listdir("/proc/self/task"))
first = total()
"""


def run(code: str, threads: int = 3, **variables: str) -> str:
    """What a process prints: it runs this code on the library, with so many threads."""
    code = RUN.format(threads=threads, rows=ROWS, width=WIDTH, outputs=OUTPUTS) + textwrap.dedent(code)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment | variables
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def operands() -> tuple[Tensor, Tensor]:
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    return x, torch.randn(OUTPUTS, WIDTH, generator=torch.Generator().manual_seed(2))


def test_any_number_of_threads_gives_the_same_bits() -> None:
    x, weight = operands()
    packed, before = cpu.pack(weight), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7, 40):  # more than there are cores, and than there is work for some loops
            torch.set_num_threads(threads)
            results += [cpu.rms_norm(cpu.linear(x[:rows], packed)[0], None, 1e-6) for rows in (1, 17, ROWS)]
    finally:
        torch.set_num_threads(before)
    for place, result in enumerate(results):
        assert torch.equal(result, results[place % 3]), place


def test_callers_in_several_threads_do_not_meet() -> None:
    x, weight = operands()
    packed, before = cpu.pack(weight), torch.get_num_threads()
    expected = cpu.linear(x, packed)[0]
    wrong: list[int] = []

    def call(number: int) -> None:
        torch.set_num_threads(3)
        wrong.extend(number for _ in range(50) if not torch.equal(cpu.linear(x, packed)[0], expected))

    callers = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    try:
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    finally:
        torch.set_num_threads(before)
    assert wrong == []


def test_workers_end_with_their_caller() -> None:
    code = """
    before, counts = tasks(), []
    def call():
        torch.set_num_threads(3)
        total()
        counts.append(tasks() - before)
    for _ in range(3):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        until = time.time() + 20
        while tasks() > before and time.time() < until:
            time.sleep(0.01)
    print(*counts, tasks() - before)
    """
    assert run(code).split() == ["3", "3", "3", "0"]  # the caller and its two workers; none is left over


def test_a_child_that_is_forked_has_workers_of_its_own() -> None:
    code = """
    pid = os.fork()
    if pid == 0:
        os._exit(0 if total() == first and tasks() == 3 else 1)
    print(os.waitpid(pid, 0)[1], total() == first)
    """
    assert run(code) == "0 True"


def test_workers_of_a_caller_that_is_bound_to_a_core_are_not() -> None:
    code = """
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    def call():
        total()
        print(max(len(os.sched_getaffinity(int(task))) for task in os.listdir("/proc/self/task")))
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    """
    assert int(run(code, threads=2)) >= min(2, len(os.sched_getaffinity(0)))


IDLE = """
from sfumato.ops.cpu import waiting
torch.ones(1 << 20).add_(1)
began = time.process_time()
for _ in range(20):
    torch.ones(1 << 16).add_(1)
    time.sleep(0.004)
print(sum(thread.name == "sfumato waits" for thread in threading.enumerate()), time.process_time() - began)
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core, so that torch has one thread")
def test_torchs_threads_wait_asleep() -> None:
    """Beside each of 20 short operations a thread that waits awake would compute for milliseconds."""
    cores = len(os.sched_getaffinity(0))
    count, seconds = run(IDLE, threads=cores).split()
    awake_count, awake_seconds = run(IDLE, threads=cores, OMP_WAIT_POLICY="active").split()
    assert count == "1" and awake_count == "0"
    assert 5 * float(seconds) < float(awake_seconds), (seconds, awake_seconds)
