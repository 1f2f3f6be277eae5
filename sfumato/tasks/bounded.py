"""What values of `evaluate` may do: operators, built-in functions and methods, each with its limits.

A value is None, a bool, an int, a float, a string, a list, a tuple, a range, or an iterator over such. No operation
here makes a larger one than the limits below before it is refused, and each spends steps in proportion to its work.
What follows references (an equality, a sort, a text of a list) first pays for all that it may visit: a list that holds
itself, or twice the same list, forty times over, is refused, not followed.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from sfumato.errors import InputError

INTEGER_BITS = 256
LONGEST_VALUE = 10_000
"""Characters of a string, items of a list."""
DEEPEST_VALUE = 50
"""Lists within lists; iterators over iterators are at most `DEEPEST_ITERATOR`."""
DEEPEST_ITERATOR = 8
_WORK = 16
"""Characters or items that are copied or compared for one step."""
_DIGITS = 20

Value: TypeAlias = Any
"""What a program of `evaluate` works on."""


class EvaluationError(InputError):
    """A program is refused, fails, or needs more than its limits; the sentence says which."""


class Meter:
    """The steps that are left."""

    def __init__(self, steps: int) -> None:
        self.steps, self.depth = steps, 0

    def spend(self, steps: int = 1) -> None:
        """EvaluationError where there are not so many left."""
        self.steps -= steps
        if self.steps < 0:
            raise EvaluationError("the program needs more steps than its budget; give it more, or a shorter program")


class LazyItems:
    """An iterator: what `zip`, `enumerate`, `reversed` and a generator expression give. It can be read once."""

    def __init__(self, iterator: Iterator[Value]) -> None:
        self.iterator = iterator


def refused(what: str) -> EvaluationError:
    """The error for what the evaluator does not know."""
    return EvaluationError(f"the evaluator does not know {what[:80]}; use plain numbers, strings and lists")


def checked(value: Value, meter: Meter) -> Value:
    """The value itself, if its type and size are allowed; a step for every sixteen items of it."""
    kind = type(value)
    if kind is int:
        if value.bit_length() > INTEGER_BITS:
            raise EvaluationError(f"an integer is longer than {INTEGER_BITS} bits; use smaller numbers")
    elif kind in (str, list, tuple):
        _fits(len(value))
        meter.spend(len(value) // _WORK)
    elif kind not in (bool, float, type(None), range, LazyItems):
        raise refused(f"values of the type {kind.__name__}")
    return value


def _fits(length: int) -> None:
    if length > LONGEST_VALUE:
        raise EvaluationError(f"a string or list is longer than {LONGEST_VALUE}; make a shorter one")


def visit(meter: Meter, *values: Value) -> None:
    """Pay for following all references of some values, to their ends."""
    waiting = [(value, 0) for value in values]
    while waiting:
        value, depth = waiting.pop()
        meter.spend()
        checked(value, meter)
        if depth > DEEPEST_VALUE:
            raise EvaluationError(f"lists are at most {DEEPEST_VALUE} deep; make a flatter one")
        if type(value) is LazyItems:
            raise refused("an iterator as a value; make a list of it")
        if type(value) in (list, tuple):
            waiting += [(item, depth + 1) for item in value]


def copied(value: Value, meter: Meter) -> Value:
    """A value that shares nothing with this one."""
    visit(meter, value)
    return _copied(value)


def _copied(value: Value) -> Value:
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value


def is_same(one: Value, other: Value) -> bool:
    """Are they equal, and of one type, to the last item? 1 is not True, and nan is nan."""
    if type(one) is not type(other):
        return False
    if type(one) in (list, tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    return bool(one == other) or (one != one and other != other)


def iterate(value: Value, meter: Meter) -> Iterator[Value]:
    """The items of a value one by one, a step for each."""
    if type(value) not in (str, list, tuple, range, LazyItems):
        raise refused(f"a loop over the type {type(value).__name__}")
    for item in _read(value.iterator, meter) if type(value) is LazyItems else value:
        meter.spend()
        yield checked(item, meter)


def _read(iterator: Iterator[Value], meter: Meter) -> Iterator[Value]:
    """The items of an iterator; EvaluationError where one takes iterators over iterators over too many more."""
    while True:
        meter.depth += 1
        if meter.depth > DEEPEST_ITERATOR:
            raise EvaluationError(f"iterators over iterators are at most {DEEPEST_ITERATOR} deep; make a list of them")
        try:
            item = next(iterator)
        except StopIteration:
            return
        finally:
            meter.depth -= 1
        yield item


def collect(value: Value, meter: Meter) -> list[Value]:
    """The items of a value as a list."""
    items: list[Value] = []
    for item in iterate(value, meter):
        _fits(len(items) + 1)
        items.append(item)
    return items


# ---- operators -------------------------------------------------------------------------------------------------------

_NUMBERS = (bool, int, float)
_SEQUENCES = (str, list, tuple)
_BINARY: Mapping[type[ast.operator], Callable[[Value, Value], Value]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
_UNARY: Mapping[type[ast.unaryop], Callable[[Value], Value]] = {
    ast.Not: operator.not_,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Invert: operator.invert,
}
_ORDERS: Mapping[type[ast.cmpop], Callable[[Value, Value], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
OPERATORS: frozenset[type[ast.AST]] = frozenset(
    {*_BINARY, *_UNARY, *_ORDERS, ast.And, ast.Or, ast.In, ast.NotIn, ast.Is, ast.IsNot}
)
"""The operators that there are."""


def binary(kind: type[ast.operator], left: Value, right: Value, meter: Meter) -> Value:
    """Give left + right, and so on."""
    if type(left) in _NUMBERS and type(right) in _NUMBERS:
        _check_growth(kind, left, right)
    elif kind is ast.Add and type(left) is type(right) and type(left) in _SEQUENCES:
        _fits(len(left) + len(right))
    elif kind is ast.Mult and type(left) in _SEQUENCES and type(right) in (bool, int):
        _fits(len(left) * max(0, right))
    elif kind is ast.Mult and type(right) in _SEQUENCES and type(left) in (bool, int):
        _fits(len(right) * max(0, left))
    else:
        raise refused(f"{kind.__name__} of the types {type(left).__name__} and {type(right).__name__}")
    return checked(_BINARY[kind](left, right), meter)


def _check_growth(kind: type[ast.operator], left: Value, right: Value) -> None:
    """Refuse a power or a shift that would be too long, before it is worked out."""
    if type(left) is float or type(right) is float or right <= 0:
        return
    bits = left.bit_length()
    if (kind is ast.Pow and bits > 1 and bits * right > 2 * INTEGER_BITS) or (
        kind is ast.LShift and right > INTEGER_BITS
    ):
        raise EvaluationError(f"an integer is longer than {INTEGER_BITS} bits; use smaller numbers")


def changed(kind: type[ast.operator], left: Value, right: Value, meter: Meter) -> Value:
    """Give left += right, and so on: a list changes in place."""
    if type(left) is list and kind is ast.Add:
        items = collect(right, meter)
        _fits(len(left) + len(items))
        left += items
        return checked(left, meter)
    value = binary(kind, left, right, meter)
    if type(left) is list and kind is ast.Mult:
        left[:] = value
        return left
    return value


def unary(kind: type[ast.unaryop], value: Value, meter: Meter) -> Value:
    """Give -value, and so on."""
    if kind is not ast.Not and type(value) not in _NUMBERS:
        raise refused(f"{kind.__name__} of the type {type(value).__name__}")
    return checked(_UNARY[kind](value), meter)


def compare(kind: type[ast.cmpop], left: Value, right: Value, meter: Meter) -> bool:
    """Whether left < right, left in right, and so on."""
    if kind in (ast.Is, ast.IsNot):
        if not any(value is None or type(value) is bool for value in (left, right)):
            raise refused("`is` between values; use ==")
        return (left is right) == (kind is ast.Is)
    if kind in (ast.In, ast.NotIn):
        return _is_in(left, right, meter) == (kind is ast.In)
    visit(meter, left, right)
    return bool(_ORDERS[kind](left, right))


def _is_in(item: Value, place: Value, meter: Meter) -> bool:
    if type(place) is str or (type(place) is range and type(item) in (bool, int)):
        visit(meter, item, place)
        return bool(item in place)
    visit(meter, item)
    for other in iterate(place, meter):
        visit(meter, other)
        if other is item or other == item:
            return True
    return False


def at(value: Value, place: Value, meter: Meter) -> Value:
    """Give value[place], of an int or a slice."""
    if type(value) not in (*_SEQUENCES, range) or type(place) not in (bool, int, slice):
        raise refused(f"a place of the type {type(place).__name__} in the type {type(value).__name__}")
    return checked(value[place], meter)


def put(values: Value, place: Value, value: Value) -> None:
    """Do values[place] = value, of a list."""
    if type(values) is not list or type(place) not in (bool, int):
        raise refused(f"a change at the type {type(place).__name__} of the type {type(values).__name__}")
    values[place] = value


# ---- built-in functions ----------------------------------------------------------------------------------------------

Builtin: TypeAlias = Callable[[Sequence[Value], Mapping[str, Value], Meter], Value]
"""(arguments, keyword arguments, meter) -> the value."""


def _plain(function: Callable[..., Value], *kinds: type) -> Builtin:
    """A function of Python's as it is, whose arguments have these types alone."""

    def call(arguments: Sequence[Value], options: Mapping[str, Value], meter: Meter) -> Value:
        _no(options)
        for argument in arguments:
            if type(argument) not in kinds:
                raise refused(f"a call with an argument of the type {type(argument).__name__}")
            checked(argument, meter)  # pays for its size
        return checked(function(*arguments), meter)

    return call


def _no(options: Mapping[str, Value], *but: str) -> None:
    for name in options:
        if name not in but:
            raise refused(f"the keyword argument {name}")


def _visiting(function: Callable[..., Value]) -> Builtin:
    def call(arguments: Sequence[Value], options: Mapping[str, Value], meter: Meter) -> Value:
        _no(options)
        visit(meter, *arguments)
        return checked(function(*arguments), meter)

    return call


def _of_items(function: Callable[[list[Value]], Value]) -> Builtin:
    def call(arguments: Sequence[Value], options: Mapping[str, Value], meter: Meter) -> Value:
        _no(options)
        if len(arguments) > 1:
            raise refused(f"a call with {len(arguments)} arguments")
        return checked(function(collect(arguments[0], meter) if arguments else []), meter)

    return call


def _extreme(function: Callable[[list[Value]], Value]) -> Builtin:
    def call(arguments: Sequence[Value], options: Mapping[str, Value], meter: Meter) -> Value:
        _no(options, "default")
        items = collect(arguments[0], meter) if len(arguments) == 1 else list(arguments)
        if not items and "default" in options:
            return options["default"]
        visit(meter, *items)
        return function(items)

    return call


def _first(test: bool) -> Builtin:
    """Of `any` and `all`: the first item that is `test` decides."""

    def call(arguments: Sequence[Value], options: Mapping[str, Value], meter: Meter) -> Value:
        _no(options)
        (items,) = arguments
        return test if any(bool(item) is test for item in iterate(items, meter)) else not test

    return call


def _sum(arguments: Sequence[Value], options: Mapping[str, Value], meter: Meter) -> Value:
    _no(options, "start")
    items = collect(arguments[0], meter)
    start = arguments[1] if len(arguments) > 1 else options.get("start", 0)
    if len(arguments) > 2 or type(start) is str:
        raise refused("a sum of strings; join them")
    if all(type(item) in _NUMBERS for item in (start, *items)):
        return checked(sum(items, start), meter)
    for item in items:
        start = binary(ast.Add, start, item, meter)
    return start


def _sorted(arguments: Sequence[Value], options: Mapping[str, Value], meter: Meter) -> Value:
    _no(options, "reverse")
    (values,) = arguments
    items = collect(values, meter)
    for _ in range(max(1, len(items).bit_length())):
        visit(meter, *items)
    return sorted(items, reverse=bool(options.get("reverse", False)))


def _reversed(arguments: Sequence[Value], options: Mapping[str, Value], meter: Meter) -> Value:
    _no(options)
    (values,) = arguments
    if type(values) not in (*_SEQUENCES, range):
        raise refused(f"the reverse of the type {type(values).__name__}")
    return LazyItems(reversed(values))


def _enumerate(arguments: Sequence[Value], options: Mapping[str, Value], meter: Meter) -> Value:
    _no(options, "start")
    values, *rest = arguments
    start = rest[0] if rest else options.get("start", 0)
    if type(start) not in (bool, int) or len(rest) > 1:
        raise refused(f"a count from the type {type(start).__name__}")
    return LazyItems(enumerate(iterate(values, meter), start))


def _zip(arguments: Sequence[Value], options: Mapping[str, Value], meter: Meter) -> Value:
    _no(options, "strict")
    is_strict = bool(options.get("strict", False))
    return LazyItems(zip(*(iterate(values, meter) for values in arguments), strict=is_strict))


def _round(arguments: Sequence[Value], options: Mapping[str, Value], meter: Meter) -> Value:
    if len(arguments) == 2 and not (type(arguments[1]) is int and abs(arguments[1]) <= _DIGITS):
        raise refused(f"a rounding to more than {_DIGITS} digits")
    return _plain(round, *_NUMBERS)(arguments, options, meter)


BUILTINS: Mapping[str, Builtin] = {
    "len": _plain(len, str, list, tuple, range),
    "abs": _plain(abs, *_NUMBERS),
    "range": _plain(range, bool, int),
    "int": _plain(int, *_NUMBERS, str),
    "float": _plain(float, *_NUMBERS, str),
    "bool": _plain(bool, *_NUMBERS, *_SEQUENCES, range, type(None)),
    "divmod": _plain(divmod, *_NUMBERS),
    "round": _round,
    "ord": _plain(ord, str),
    "chr": _plain(chr, bool, int),
    "str": _visiting(lambda *values: str(*values[:1]) if len(values) < 2 else _too_many("str")),
    "list": _of_items(list),
    "tuple": _of_items(tuple),
    "sum": _sum,
    "min": _extreme(min),
    "max": _extreme(max),
    "any": _first(True),
    "all": _first(False),
    "sorted": _sorted,
    "reversed": _reversed,
    "enumerate": _enumerate,
    "zip": _zip,
}
"""The functions that a program may call, by name."""


def _too_many(name: str) -> Value:
    raise refused(f"{name} with so many arguments")


# ---- methods ---------------------------------------------------------------------------------------------------------


def _text_method(function: Callable[..., Value]) -> Builtin:
    """A method of strings whose arguments are strings, places and None."""
    return _plain(function, str, int, bool, type(None))


def _join(arguments: Sequence[Value], options: Mapping[str, Value], meter: Meter) -> Value:
    _no(options)
    separator, values = arguments
    items = collect(values, meter)
    if any(type(item) is not str for item in items):
        raise refused("a join of what is no string")
    _fits(sum(map(len, items)) + len(separator) * max(0, len(items) - 1))
    return checked(separator.join(items), meter)


def _replace(arguments: Sequence[Value], options: Mapping[str, Value], meter: Meter) -> Value:
    text, old, new, *_ = arguments
    if type(old) is str and type(new) is str:
        _fits(len(text) + text.count(old) * max(0, len(new) - len(old)))
    return _text_method(str.replace)(arguments, options, meter)


def _search(function: Callable[..., Value]) -> Builtin:
    """A method of lists that compares items."""
    return _visiting(function)


def _append(arguments: Sequence[Value], options: Mapping[str, Value], meter: Meter) -> None:
    _no(options)
    values, item = arguments
    _fits(len(values) + 1)
    values.append(item)


def _insert(arguments: Sequence[Value], options: Mapping[str, Value], meter: Meter) -> None:
    _no(options)
    values, place, item = arguments
    _fits(len(values) + 1)
    meter.spend(len(values) // _WORK)
    values.insert(place, item)


def _extend(arguments: Sequence[Value], options: Mapping[str, Value], meter: Meter) -> None:
    _no(options)
    values, more = arguments
    changed(ast.Add, values, more, meter)


def _sort(arguments: Sequence[Value], options: Mapping[str, Value], meter: Meter) -> None:
    (values,) = arguments
    values[:] = _sorted(arguments, options, meter)


_TEXT_METHODS = {
    **{method.__name__: _text_method(method) for method in (
        str.upper, str.lower, str.title, str.capitalize, str.swapcase, str.strip, str.lstrip, str.rstrip, str.count,
        str.index, str.find, str.split, str.startswith, str.endswith, str.isdigit, str.isalpha, str.isalnum,
        str.isupper, str.islower, str.isspace,
    )},
    "join": _join,
    "replace": _replace,
}  # fmt: skip
METHODS: Mapping[type, Mapping[str, Builtin]] = {
    str: _TEXT_METHODS,
    list: {
        "append": _append,
        "insert": _insert,
        "extend": _extend,
        "sort": _sort,
        "pop": _plain(list.pop, list, int, bool),
        "reverse": _plain(list.reverse, list),
        "copy": _plain(list.copy, list),
        "count": _search(list.count),
        "index": _search(list.index),
        "remove": _search(list.remove),
    },
    tuple: {"count": _search(tuple.count), "index": _search(tuple.index)},
}
"""Type -> name -> method; its first argument is the value."""
