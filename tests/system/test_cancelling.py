"""system/cancelling.py: work that is called off."""

from __future__ import annotations

from sfumato.system import cancelling
from sfumato.system.cancelling import Cancellation


def test_actions_are_done_once_when_the_work_is_called_off() -> None:
    cancellation, actions = Cancellation(), []
    cancellation.then(lambda: actions.append(1))
    assert not cancellation.is_set and actions == []
    cancellation.set()
    cancellation.set()
    assert cancellation.is_set and actions == [1]
    cancellation.then(lambda: actions.append(2))
    assert actions == [1, 2]  # at once, as it is called off already


def test_a_thread_knows_what_can_call_its_work_off() -> None:
    assert cancelling.current.get() is None
    cancellation = Cancellation()
    with cancellation.applied():
        assert cancelling.current.get() is cancellation
    assert cancelling.current.get() is None
