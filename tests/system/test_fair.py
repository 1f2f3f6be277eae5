"""system/fair.py: whoever has waited longest gets the lock."""

from __future__ import annotations

import threading
import time
from itertools import pairwise

from sfumato.system.fair import FairLock


def test_the_lock_goes_to_whoever_has_waited_longest() -> None:
    lock, order = FairLock(), []

    def take(number: int) -> None:
        with lock:
            order.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(4)]
    with lock:
        for number, thread in enumerate(threads):
            thread.start()
            while len(lock._gates) <= number:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3] and not lock._is_held


def test_two_threads_that_take_it_again_and_again_alternate() -> None:
    """With `threading.Lock` one of them would have it nearly always."""
    lock, takes = FairLock(), []
    start = threading.Barrier(2)

    def work(number: int) -> None:
        start.wait()
        for _ in range(50):
            with lock:
                takes.append(number)
                time.sleep(0.0005)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    both = takes[2:-4]
    assert sum(a != b for a, b in pairwise(both)) > 0.9 * (len(both) - 1)


def test_an_error_frees_it_and_one_thread_at_a_time_is_inside() -> None:
    lock, inside, most = FairLock(), [0], [0]

    def work() -> None:
        for _ in range(20):
            try:
                with lock:
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    time.sleep(0)
                    inside[0] -= 1
                    raise ValueError
            except ValueError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and not lock._is_held
