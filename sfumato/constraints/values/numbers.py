"""The terminals of numbers: digits between two bounds, as regular expressions.

A number has so few digits that reading it as a float cannot carry it past a bound: at most 15 that count where there is
a fraction, and for whole numbers at most 19, or as many as a bound has. An exponent is allowed only where there are no
bounds. Steps (`multipleOf`) are decimal and exact.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction

from sfumato.constraints.values.equality import canonical
from sfumato.constraints.values.facets import Bound, Facets
from sfumato.constraints.values.notation import ANY_NUMBER
from sfumato.constraints.values.rules import RuleWriter, literal

MAX_LISTED = 256
"""Multiples of a step that are listed one by one."""
_GREATEST_STEP = 2**16
"""The greatest step of which the library keeps the remainder, without its point."""
_MOST_DIGITS = 15
"""Digits of multiples of a step: all that a float holds exactly."""


class NoNumber(Exception):
    """No number lies between the bounds, or none that can be written; the message says which."""


def number_rule(rules: RuleWriter, facets: Facets) -> str:
    """The rule of the numbers that facets allow; `NoNumber` where there is none."""
    has_fractions = "fraction" in facets.kinds
    step = _common_step(facets.multiples, has_fractions)
    if step is not None and step.denominator == 1 and "whole" in facets.kinds:
        has_fractions = False
    low, high = facets.low, facets.high
    if not has_fractions:  # the first whole number within, and the last
        low = low and _whole_bound(low, upwards=True)
        high = high and _whole_bound(high, upwards=False)
    if low and high and (low[0] > high[0] or (low[0] == high[0] and (low[1] or high[1]))):
        raise NoNumber("no number lies between the bounds")
    if step is not None and not (step.numerator == 1 and not has_fractions):
        digits = _digits_of_step(step)
        if not has_fractions or digits is None:
            return _multiples_rule(rules, facets, (low, high), step)
        form = rf"(0|[1-9][0-9]{{0,{14 - digits}}})(\.[0-9]{{1,{digits}}})?"
    elif low is None and high is None and has_fractions and "whole" in facets.kinds and not facets.excluded:
        return rules.terminal(ANY_NUMBER)
    else:
        form = _form((low, high), has_fractions)
    if "whole" not in facets.kinds:
        form = _FRACTIONS_ONLY
    return _between_rule(rules, form, (low, high), facets.excluded)


def _between_rule(rules: RuleWriter, form: str, bounds: tuple[Bound, Bound], excluded: Sequence[object]) -> str:
    low, high = bounds
    options = []
    for sign, parts in (
        ("", between(low, high)),
        ("-", between(_negated(high), _negated(low)) if low is None or low[0] < 0 else None),
    ):
        if parts is None:
            continue
        body = f"/{form}/ & {parts}" if parts else f"/{form}/"
        options.append(f'"-" ({body})' if sign else f"({body})")
    if not options:
        raise NoNumber("no number lies between the bounds")
    body = " | ".join(options)
    numbers = [value for value in excluded if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if numbers:
        body = f"({body}) & ~/{'|'.join(map(_spellings, numbers))}/"
    return rules.terminal(body)


def _spellings(value: float) -> str:
    """A regex of the ways to write a number without an exponent."""
    whole, fraction = _digits(Decimal(str(value)).copy_abs())
    sign = "-?" if value == 0 else "-" if value < 0 else ""
    return sign + (rf"{whole}\.{fraction}0*" if fraction else rf"{whole}(\.0+)?")


_FRACTIONS_ONLY = r"(0|[1-9][0-9]{0,8})\.[0-9]{0,5}[1-9]"


def _form(bounds: tuple[Bound, Bound], has_fractions: bool) -> str:
    """A regex of numbers without a sign, with as many digits as the bounds need."""
    sizes = [_digits(bound[0].copy_abs()) for bound in bounds if bound]
    whole = max([18, *(len(digits) for digits, _ in sizes)])
    if not has_fractions:
        return f"0|[1-9][0-9]{{0,{whole}}}"
    zeros = max([0, *(len(digits) - len(digits.lstrip("0")) for _, digits in sizes)])
    deep = rf"|0\.0{{0,{zeros + 1}}}[1-9][0-9]{{0,14}}" if zeros > 10 else ""
    return rf"0(\.[0-9]{{1,15}})?|[1-9][0-9]{{0,8}}(\.[0-9]{{1,6}})?|[1-9][0-9]{{9,{whole}}}{deep}"


# ---- multiples ------------------------------------------------------------------------------------------------------


def _common_step(multiples: Sequence[Decimal], has_fractions: bool) -> Fraction | None:
    """The least common multiple of the steps; where only whole numbers count, of 1 as well."""
    if not multiples:
        return None
    steps = [Fraction(step) for step in multiples] + ([] if has_fractions else [Fraction(1)])
    bottom = math.lcm(*(step.denominator for step in steps))
    return Fraction(math.lcm(*(int(step * bottom) for step in steps)), bottom)


def _digits_of_step(step: Fraction) -> int | None:
    """The digits behind the point where the step is 0.1, 0.01 and so on; else None."""
    for digits in range(1, 13):
        if step == Fraction(1, 10**digits):
            return digits
    return None


def _multiples_rule(rules: RuleWriter, facets: Facets, bounds: tuple[Bound, Bound], step: Fraction) -> str:
    """The rule of the multiples of a step: listed where they are few, else by the library's own arithmetic."""
    low, high = bounds
    decimals = next((digits for digits in range(7) if (step * 10**digits).denominator == 1), 7)
    greatest = 10 ** (_MOST_DIGITS - decimals) - 1
    first = math.ceil(Fraction(low[0]) / step) if low else -math.floor(greatest / step)
    last = math.floor(Fraction(high[0]) / step) if high else math.floor(greatest / step)
    first += bool(low and low[1] and first * step == low[0])
    last -= bool(high and high[1] and last * step == high[0])
    if last < first:
        raise NoNumber("no multiple of the step lies between the bounds")
    excluded = {canonical(value) for value in facets.excluded}
    if last - first < MAX_LISTED:
        values = [_decimal(number * step) for number in range(first, last + 1)]
        values = [value for value in values if canonical(json.loads(value)) not in excluded]
        if "whole" not in facets.kinds:
            values = [value for value in values if "." in value]
        if not values:
            raise NoNumber("no multiple of the step lies between the bounds")
        return rules.terminal(" | ".join(map(literal, values)))
    least, most = first * step, last * step
    is_simple = max(abs(least), abs(most)) <= greatest and not excluded and "whole" in facets.kinds
    if not is_simple or decimals > 6 or step * 10**decimals > _GREATEST_STEP:
        raise NoNumber(f"multiples of {float(step)} cannot be told apart here; give bounds with at most 256 between")
    schema = {
        "type": "number" if step.denominator > 1 else "integer",
        "multipleOf": _plain_number(step),
        "minimum": _plain_number(least),
        "maximum": _plain_number(most),
    }
    return rules.rule(f"%json {json.dumps(schema)}")


def _plain_number(value: Fraction) -> float:
    return int(value) if value.denominator == 1 else float(value)


def _decimal(value: Fraction) -> str:
    """A number with its decimals, of which it has finitely many."""
    if value.denominator == 1:
        return str(int(value))
    return f"{Decimal(value.numerator) / Decimal(value.denominator):f}"


# ---- bounds ---------------------------------------------------------------------------------------------------------


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


def _whole_bound(bound: tuple[Decimal, bool], upwards: bool) -> tuple[Decimal, bool]:
    value, is_strict = bound
    whole = Decimal(math.ceil(value) if upwards else math.floor(value))
    if is_strict and whole == value:
        whole = Decimal(int(whole) + (1 if upwards else -1))
    return whole, False


def _negated(bound: Bound) -> Bound:
    return bound and (bound[0].copy_negate() if bound[0] else bound[0].copy_abs(), bound[1])


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
