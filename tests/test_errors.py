"""errors.py: one family, the option that an error names, and the panics of Rust libraries."""

from __future__ import annotations

import pytest

from sfumato.errors import (
    BusyError,
    CapacityError,
    CheckpointError,
    InputError,
    NumericError,
    SfumatoError,
    WorkerError,
    contained,
    is_panic,
)


def test_one_family_of_errors() -> None:
    for kind in (CheckpointError, CapacityError):
        assert issubclass(kind, InputError)
    assert issubclass(InputError, SfumatoError)
    assert issubclass(InputError, ValueError)


@pytest.mark.parametrize("kind", [BusyError, CapacityError, CheckpointError, InputError, NumericError, WorkerError])
def test_an_error_names_the_option_at_fault(kind: type[SfumatoError]) -> None:
    assert kind("it is wrong").option is None
    error = kind("seed is wrong", option="seed")
    assert (str(error), error.option, error.args) == ("seed is wrong", "seed", ("seed is wrong",))


def test_a_panic_ends_one_request_and_an_exit_the_program() -> None:
    panic = type("PanicException", (BaseException,), {})("unreachable code")
    assert is_panic(panic) and not is_panic(ValueError())
    assert isinstance(contained(panic), InputError)
    error = ValueError("as it is")
    assert contained(error) is error
    with pytest.raises(KeyboardInterrupt):
        contained(KeyboardInterrupt())
