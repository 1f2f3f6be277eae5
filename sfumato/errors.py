"""The error family: what Sfumato raises on purpose. Nothing here imports anything."""

from __future__ import annotations


class SfumatoError(Exception):
    """The root of the family: catch this to catch everything that Sfumato raises on purpose.

    `option` is the name of the option or argument that is at fault, where one is; `item` which of its values, where it
    has several by name.
    """

    def __init__(self, message: str = "", *, option: str | None = None, item: str | None = None) -> None:
        super().__init__(message)
        self.option, self.item = option, item


class InputError(SfumatoError, ValueError):
    """An argument, option or file of the caller is wrong; the sentence names the value, the limit and the remedy.

    The command line exits with code 2, a server answers with a 4xx.
    """


class CheckpointError(InputError):
    """A checkpoint, config or tokenizer file is missing, damaged or of another kind; the sentence names it."""


class CapacityError(InputError):
    """The request is larger than the context, the cache or the memory allows."""


class BusyError(SfumatoError):
    """More requests wait than the queue holds; the same request can succeed a moment later."""


class NumericError(SfumatoError):
    """The model's numbers are not finite: weights or activations are NaN or infinite."""


class WorkerError(SfumatoError):
    """The process or host that runs the model is not there, or ended while it worked; the request can be sent again."""


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust has panicked: pyo3's exception, which is no Exception and which no module exports."""
    return type(error).__name__ == "PanicException"


def contained(error: BaseException) -> Exception:
    """An error that ends one request alone: the error itself, or an InputError for the panic of a Rust library.

    A panic is no Exception. What ends the program (KeyboardInterrupt, SystemExit) is raised again.
    """
    if isinstance(error, Exception):
        return error
    if not is_panic(error):
        raise error
    return InputError("a library failed at this request, which it should have refused; change its text or constraint")


def missing_extra(package: str | None, extra: str) -> InputError:
    """The error for a package that only an extra of Sfumato brings."""
    return InputError(
        f"{package} is not installed; it comes with the extra {extra}: pip install '.[{extra}]' in Sfumato's checkout"
    )
