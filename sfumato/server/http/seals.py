"""Thoughts as opaque text, for clients that are not shown them and send them back: nothing is kept here for that.

It is no secret: it only has the form of one."""

from __future__ import annotations

import base64
import binascii

SEAL = "sfumato-thought-1:"
"""What opaque thoughts of this server begin with."""


def sealed(thought: str) -> str:
    """A thought as opaque text."""
    return SEAL + base64.urlsafe_b64encode(thought.encode("utf-8", "replace")).decode()


def unsealed(text: str | None) -> str | None:
    """The thought in an opaque text; None where it is another server's, or broken."""
    if text is None or not text.startswith(SEAL):
        return None
    try:
        return base64.b64decode(text.removeprefix(SEAL).encode(), altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeError):
        return None
