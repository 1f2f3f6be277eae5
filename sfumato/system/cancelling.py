"""Work in a thread that another one can call off: a flag, and what is to be done at once when it is raised."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class Cancellation:
    """Whether some work is called off. `current` is that of the work which this thread does."""

    def __init__(self) -> None:
        self.is_set = False
        self._lock = threading.Lock()
        self._actions: list[Callable[[], None]] = []

    def set(self) -> None:
        """Call the work off, and do what `then` left to be done; no effect a second time."""
        with self._lock:
            self.is_set, actions, self._actions = True, self._actions, []
        for action in actions:
            action()

    def then(self, action: Callable[[], None]) -> None:
        """Do this, in whatever thread, when the work is called off; at once where it is already."""
        with self._lock:
            if not self.is_set:
                self._actions.append(action)
                return
        action()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """For the time of a `with` statement this thread's work is that which can be called off here."""
        token = current.set(self)
        try:
            yield
        finally:
            current.reset(token)


current: ContextVar[Cancellation | None] = ContextVar("current", default=None)
"""What can call off the work of this thread; None: nothing can."""
