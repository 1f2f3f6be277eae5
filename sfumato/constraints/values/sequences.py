"""Rules of lists in which some elements may be left out: the fields of an object, the values of a set.

Without counting, the elements are halved again and again, so that the rules are nested no deeper than the logarithm of
their number. With a count, each element has a rule that carries the number so far: a parameter of llguidance's rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sfumato.constraints.values.rules import RuleWriter

MAX_COUNTED = 400
"""Elements of a list whose number is counted: each rule needs the next, and the library follows them on its stack."""


@dataclass(frozen=True)
class ListElement:
    """One element of a list, in Lark, and whether it must be there."""

    body: str
    is_required: bool = False


class NotWritten(Exception):
    """A list that cannot be written; the message says why."""


def list_body(rules: RuleWriter, comma: str, elements: Sequence[ListElement], further: str = "") -> tuple[str, bool]:
    """(the body of a list of at least one element, whether there may be none); a body of "" where no element is.

    `further` is another element, in Lark, that may come any number of times behind the others.
    """
    may_be_none = not any(element.is_required for element in elements)
    more = f"({comma} {further})*"
    if not elements:
        return (f"{further} {more}" if further else ""), True
    body = _halves(rules, comma, elements)
    if further:
        body = f"{body} {more}" if not may_be_none else f"({body} {more} | {further} {more})"
    return body, may_be_none


def _halves(rules: RuleWriter, comma: str, elements: Sequence[ListElement]) -> str:
    """The rule of at least one of the elements, all that are required among them."""
    if len(elements) == 1:
        return elements[0].body if elements[0].body.isidentifier() else rules.rule(elements[0].body)
    if all(element.is_required for element in elements):
        return rules.rule(f" {comma} ".join(element.body for element in elements))
    middle = len(elements) // 2
    left, right = elements[:middle], elements[middle:]
    first, second = _halves(rules, comma, left), _halves(rules, comma, right)
    is_left = any(element.is_required for element in left)
    is_right = any(element.is_required for element in right)
    if is_left and is_right:
        return rules.rule(f"{first} {comma} {second}")
    if is_left:
        return rules.rule(f"{first} ({comma} {second})?")
    if is_right:
        return rules.rule(f"({first} {comma})? {second}")
    return rules.rule(f"{first} ({comma} {second})? | {second}")


def counted_body(
    rules: RuleWriter,
    comma: str,
    elements: Sequence[ListElement],
    further: str,
    counts: tuple[int, int | None],
) -> str:
    """The body of a list with so many elements at least and at most, which may be empty where 0 are enough.

    `further` is another element, as in `list_body`. The parameter of each rule is the number of elements before it.
    """
    low, high = counts
    most = len(elements) if not further else None
    high = most if high is None else high if most is None else min(high, most)
    if high is not None and low > high:
        raise NotWritten(f"at least {low} are needed and at most {high} possible")
    if len(elements) > MAX_COUNTED or low > MAX_COUNTED:
        raise NotWritten(f"more than the {MAX_COUNTED} allowed where they are counted")
    end = rules.new_name("c")
    options = [f'"" %if ge(_, {low})']
    if further:
        options.append(f"{comma} {further} {end}::incr(_){'' if high is None else f' %if lt(_, {high})'}")
    rules.define(end, " | ".join(options), "::_")
    heads = []
    if further and (high is None or high > 0):
        heads.append(f"{further} {end}::1")
    tail, following = end, 0
    for at in range(len(elements) - 1, -1, -1):
        element, behind = elements[at], len(elements) - 1 - at
        here = _conditions(low, high, behind if not further else None, following, element.is_required)
        options = [f"{comma} {element.body} {tail}::incr(_){here}"]
        if not element.is_required:
            options.append(f"{tail}::_")
        head = f"{element.body} {tail}::1"
        can_begin = further or low <= 1 + behind
        fits = high is None or high >= 1 + following
        if element.is_required:
            heads = [head] if can_begin and fits else []
        elif can_begin and fits:
            heads.insert(0, head)
        name = rules.new_name("c")
        rules.define(name, " | ".join(options), "::_")
        following += element.is_required
        tail = name
    if not heads and (low or following):
        raise NotWritten("no number of them fits")
    return f"({' | '.join(heads)}){'' if low or following else '?'}" if heads else ""


def _conditions(low: int, high: int | None, behind: int | None, following: int, is_required: bool) -> str:
    """When an element may come: enough can still follow, and room is left for those that must."""
    parts = []
    if behind is not None and low - 1 - behind > 0:
        parts.append(f"ge(_, {low - 1 - behind})")
    if high is not None and not is_required:
        parts.append(f"lt(_, {max(high - following, 0)})")
    return f" %if {_all_of(parts)}" if parts else ""


def _all_of(parts: Sequence[str]) -> str:
    body = parts[0]
    for part in parts[1:]:
        body = f"and({body}, {part})"
    return body


def subset_body(rules: RuleWriter, comma: str, values: Sequence[str], counts: tuple[int, int | None]) -> str:
    """The body of a list of different values, at most 64, in any order; the parameter is the set of those before."""
    low, high = counts
    high = len(values) if high is None else min(high, len(values))
    if low > high:
        raise NotWritten(f"at least {low} are needed and at most {high} possible")
    if high == 0:
        return ""
    name = rules.new_name("s")
    options = [f'"" %if bit_count_ge(_, {low})']
    options += [
        f"{comma} {value} {name}::set_bit({bit}) %if and(bit_clear({bit}), bit_count_lt(_, {high}))"
        for bit, value in enumerate(values)
    ]
    rules.define(name, " | ".join(options), "::_")
    heads = " | ".join(f"{value} {name}::{1 << bit}" for bit, value in enumerate(values))
    return f"({heads}){'' if low else '?'}"
