"""A lock that goes to whoever has waited longest.

`threading.Lock` goes to whoever comes first, which is mostly the thread that has just given it up: of two threads that
take it for every step of a model, one would wait until the other has no more steps. It deliberately lacks reentrance.
"""

from __future__ import annotations

import threading
from collections import deque


class FairLock:
    """A lock for a `with` statement; threads get it in the order in which they asked."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._is_held = False
        self._gates: deque[threading.Lock] = deque()
        """Of those who wait, in their order: each is opened when its turn has come."""

    def __enter__(self) -> None:
        with self._guard:
            if not self._is_held:
                self._is_held = True
                return
            gate = threading.Lock()
            gate.acquire()
            self._gates.append(gate)
        try:
            gate.acquire()
        except BaseException:  # KeyboardInterrupt, which may come when the turn has come too
            with self._guard:
                is_waiting = gate in self._gates
                if is_waiting:
                    self._gates.remove(gate)
            if not is_waiting:
                self._pass_on()
            raise

    def __exit__(self, *_: object) -> None:
        self._pass_on()

    def _pass_on(self) -> None:
        with self._guard:
            if self._gates:
                self._gates.popleft().release()
            else:
                self._is_held = False
