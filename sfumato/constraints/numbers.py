"""The rules of numbers: digits between two bounds, as regular expressions.

A number has so few digits that reading it as a float cannot carry it past a bound: at most 19 for whole numbers, 15
where there is a fraction. An exponent is allowed only where there are no bounds.
"""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

from sfumato.constraints.rules import Place, RuleWriter, short

GREATEST = 10**300
"""The greatest size of a bound or a constant: what a float holds."""

Bound = tuple[Decimal, bool] | None
"""A bound, and whether it is itself excluded; None where there is none."""

_INTEGER = "0|[1-9][0-9]{0,18}"
_DECIMAL = r"0(\.[0-9]{1,15})?|[1-9][0-9]{0,8}(\.[0-9]{1,6})?|[1-9][0-9]{9,18}"
"""At most 15 digits where there is a fraction: two such numbers are never the same float."""
ANY_NUMBER = rf"/-?({_DECIMAL})([eE][+-]?[0-9]{{1,2}})?/"
"""The terminal of a number without bounds."""


def number_rule(rules: RuleWriter, schema: dict[str, Any], place: Place, is_whole: bool) -> str:
    """The rule of the numbers, or whole numbers, between the bounds of a schema."""
    low, high = _bound(schema, "inimum", place), _bound(schema, "aximum", place)
    form = _INTEGER if is_whole else _DECIMAL
    if low is None and high is None:
        return rules.rule(rules.terminal(f"/-?({form})/" if is_whole else ANY_NUMBER))
    if is_whole:  # the first whole number within, and the last
        low = low and _whole_bound(low, upwards=True)
        high = high and _whole_bound(high, upwards=False)
    options = []
    above = between(low, high)
    below = between(_negated(high), _negated(low)) if low is None or low[0] < 0 else None
    if above is not None:
        options.append(f"{rules.terminal(f'/{form}/ & {above}' if above else f'/{form}/')}")
    if below is not None:
        positive = f"/{form}/ & {below}" if below else f"/{form}/"
        options.append(rules.terminal(f'"-" ({positive})'))
    if (low and high and (low[0] > high[0] or (low[0] == high[0] and (low[1] or high[1])))) or not options:
        place.refuse("no number lies between the bounds")
    return rules.rule(" | ".join(options))


def between(low: Bound, high: Bound) -> str | None:
    """Terminals for numbers without a sign between two bounds, joined by &.

    "" where every number without a sign lies between them, None where none does.
    """
    if high is not None and (high[0] < 0 or (high[0] == 0 and high[1])):
        return None
    parts = []
    if low is not None and (low[0] > 0 or (low[0] == 0 and low[1])):
        parts.append(f"/{_at_least(*low)}/")
    if high is not None:
        parts.append(f"/{_at_most(*high)}/")
    return " & ".join(parts)


def _bound(schema: dict[str, Any], word: str, place: Place) -> Bound:
    """The narrower of the inclusive and the exclusive bound; `word` is "inimum" or "aximum"."""
    bound: Bound = None
    for name, is_strict in ((f"m{word}", False), (f"exclusiveM{word}", True)):
        value = schema.get(name)
        if value is None:
            continue
        is_number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
        if isinstance(value, bool) or not is_number or abs(value) > GREATEST:
            place.at(name).refuse(f"{name} is {short(value)}; give a number")
        new = (Decimal(str(value)), is_strict)
        if bound is None or (new[0] > bound[0]) == (word == "inimum") or new[0] == bound[0]:
            bound = new
    if bound is not None and abs(bound[0]) >= Decimal(10) ** 19:
        if (bound[0] > 0) == (word == "inimum"):
            place.refuse(f"a m{word} of {bound[0]:.3e} is beyond the 19 digits that are written")
        return None
    return bound


def _whole_bound(bound: tuple[Decimal, bool], upwards: bool) -> tuple[Decimal, bool]:
    value, is_strict = bound
    whole = Decimal(math.ceil(value) if upwards else math.floor(value))
    if is_strict and whole == value:
        whole += 1 if upwards else -1
    return whole, False


def _negated(bound: Bound) -> Bound:
    return bound and (-bound[0], bound[1])


def _digits(bound: Decimal) -> tuple[str, str]:
    whole, _, fraction = f"{bound:f}".partition(".")
    return whole.lstrip("0") or "0", fraction.rstrip("0")


_FRACTION = r"(\.[0-9]+)?"


def _at_least(bound: Decimal, is_strict: bool) -> str:
    """A regex of the decimal numbers from `bound` (not negative) up.

    They have more digits than it, or a greater one at the first place where they differ, or begin with all its digits.
    """
    whole, fraction = _digits(bound)
    options = [f"[1-9][0-9]{{{len(whole)},}}{_FRACTION}"]
    for at, digit in enumerate(whole):
        if digit < "9":
            options.append(f"{whole[:at]}[{int(digit) + 1}-9][0-9]{{{len(whole) - at - 1}}}{_FRACTION}")
    for at, digit in enumerate(fraction):
        if digit < "9":
            options.append(rf"{whole}\.{fraction[:at]}[{int(digit) + 1}-9][0-9]*")
    if is_strict:
        options.append(rf"{whole}\.{fraction}[0-9]*[1-9][0-9]*")
    else:
        options.append(rf"{whole}\.{fraction}[0-9]*" if fraction else f"{whole}{_FRACTION}")
    return "|".join(options)


def _at_most(bound: Decimal, is_strict: bool) -> str:
    """A regex of the decimal numbers from 0 up to `bound` (not negative)."""
    whole, fraction = _digits(bound)
    options = []
    if len(whole) > 1:
        options.append(f"(0|[1-9][0-9]{{0,{len(whole) - 2}}}){_FRACTION}")
    for at, digit in enumerate(whole):
        first = "1" if at == 0 and len(whole) > 1 else "0"
        if digit > first:
            options.append(f"{whole[:at]}[{first}-{int(digit) - 1}][0-9]{{{len(whole) - at - 1}}}{_FRACTION}")
    for at, digit in enumerate(fraction):
        options.append(rf"{whole}\.{fraction[:at]}" if at else whole)
        if digit > "0":
            options.append(rf"{whole}\.{fraction[:at]}[0-{int(digit) - 1}][0-9]*")
    if not is_strict:
        options.append(rf"{whole}\.{fraction}0*" if fraction else rf"{whole}(\.0+)?")
    return "|".join(options)
