"""How torch's own threads wait: asleep, so that a core is free for whoever has something to do.

torch computes on the threads of GNU's OpenMP runtime, which wait awake for some milliseconds: for each other, and for
the next operation. Ours are others (`threads.h`), so that on a busy machine, and between two of our operations, threads
that wait would hold the cores of those that compute. The runtime waits for two microseconds only where it has more
threads than there are cores (libgomp's manual, GOMP_SPINCOUNT). So it gets one thread more, or a few, which do nothing.

It lacks other runtimes: the operations of this folder are built on Linux alone. Who has set OMP_WAIT_POLICY or
GOMP_SPINCOUNT has said how threads wait.
"""

from __future__ import annotations

import functools
import os
import threading

import torch

MOST = 8
"""Threads that may be added: with torch on less than an eighth of the cores, others are free."""


@functools.cache
def shorten() -> None:
    """Let torch's threads wait asleep, once for this process."""
    size, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    if size < 2 or "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return
    is_ready = threading.Barrier(1 + min(MOST, (cores - 1) // (size - 1)))

    def hold() -> None:
        torch.ones(1 << 20).add_(1)  # makes threads for this one, which stay as long as it does
        is_ready.wait()
        threading.Event().wait()

    for _ in range(is_ready.parties - 1):
        threading.Thread(target=hold, name="sfumato waits", daemon=True).start()
    is_ready.wait()
