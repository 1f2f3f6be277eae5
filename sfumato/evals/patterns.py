"""Regular expressions of others, matched in a child process with a limit on seconds: some take years on a short text.

It imports nothing that takes long, as the child imports it too. It lacks a way to know such a pattern before it is
matched.
"""

from __future__ import annotations

import re
import warnings

from sfumato.errors import InputError
from sfumato.system.confined import ChildPool

SECONDS = 1.0
"""That one match may take."""
LONGEST = 10_000
"""Characters of a pattern."""
CHILDREN = ChildPool()


def check_pattern(pattern: str) -> None:
    """InputError for what is no regular expression of Python's, or too long a one."""
    if len(pattern) > LONGEST:
        raise InputError(f"the pattern has {len(pattern)} characters; the limit is {LONGEST}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a later Python may read otherwise: the pattern's affair
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"the pattern {pattern[:80]!r} is no regular expression: {error}") from None


def is_match(pattern: str, text: str, what: str = "the pattern") -> bool:
    """Whether the pattern matches the whole text. InputError, with `what` as its subject, where that takes too long."""
    with CHILDREN.child(what) as child:
        return bool(child.run(matches, pattern, text, seconds=SECONDS))


def matches(pattern: str, text: str) -> bool:
    """The match itself, which the child runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return re.fullmatch(pattern, text) is not None
