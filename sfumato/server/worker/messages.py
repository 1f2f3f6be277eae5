"""What the worker process sends of its jobs: each outcome pickled by itself, errors of our own family alone."""

from __future__ import annotations

import pickle
import sys
from dataclasses import replace
from typing import cast

from sfumato.errors import SfumatoError, contained, is_panic
from sfumato.events import Draft
from sfumato.server.backend import Outcome, where


def packed(outcome: Outcome | BaseException) -> bytes:
    """An outcome as it is sent; where it cannot be pickled, the error of that."""
    if isinstance(outcome, Draft):
        outcome = replace(outcome, entropies=[round(entropy, 4) for entropy in outcome.entropies])
    try:
        value = plain(outcome) if isinstance(outcome, BaseException) else outcome
        return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        return pickle.dumps(plain(error), pickle.HIGHEST_PROTOCOL)


def unpacked(data: bytes) -> Outcome:
    """The outcome that `packed` made, on the parent's side; where it cannot be read, the error of that."""
    try:
        return cast(Outcome, pickle.loads(data))
    except Exception as error:
        return plain(error)


def plain(error: BaseException) -> SfumatoError:
    """An error that any process can read: one that `errors` defines.

    Of another error only its kind and place are sent: its words may be a prompt's."""
    if isinstance(error, SfumatoError):
        kind = next(kind for kind in type(error).__mro__ if kind.__module__ == SfumatoError.__module__)
        names = {name: getattr(error, name, None) for name in ("option", "item")}  # nothing else crosses the border
        texts = {name: value for name, value in names.items() if isinstance(value, str)}
        return cast(SfumatoError, kind(words_of(error), **texts))
    print(f"sfumato: a request failed: {where(error)}", file=sys.stderr, flush=True)
    if is_panic(error):
        return plain(contained(error))
    return SfumatoError(f"the engine failed at this request ({where(error, 1)}); it is a fault of the server")


def words_of(error: BaseException) -> str:
    """What an error says; its kind, where it cannot say anything."""
    try:
        return str(error)
    except Exception:
        return type(error).__name__


def in_full(error: BaseException) -> str:
    """The first line of an error, its kind and its place, for errors that hold nothing of a prompt."""
    return f"{next(iter(words_of(error).splitlines()), '')} ({where(error)})"
