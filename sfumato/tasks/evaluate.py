"""A small part of Python, run without Python's own `eval`: for source that a model or a user wrote.

`run` takes the source of one function and its arguments. It walks the parsed source itself: assignments, `if`, `for`,
`return`, arithmetic, comparisons, indexing, comprehensions, and the functions and methods that `bounded` lists. There
is no other name, no attribute that is not one of these methods, no import, no class, no function within the function,
no recursion, no `while`, no dictionary, no formatted string. What it knows gives what Python gives, and all that fails
is an `EvaluationError`. Source, steps, integers, strings, lists and depth are limited.
"""

from __future__ import annotations

import ast
import warnings
from collections import ChainMap
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from functools import lru_cache

from sfumato.tasks.bounded import (
    BUILTINS,
    METHODS,
    OPERATORS,
    EvaluationError,
    LazyItems,
    Meter,
    Value,
    at,
    binary,
    changed,
    checked,
    collect,
    compare,
    copied,
    is_same,
    iterate,
    put,
    refused,
    unary,
)

__all__ = ["EvaluationError", "Value", "function_of", "is_same", "run"]

LONGEST_SOURCE = 4000
"""Characters."""
DEEPEST_SOURCE = 30
"""Brackets within brackets, and nodes of the parsed source within nodes."""
MOST_STEPS = 100_000
"""The largest budget."""

_Names = MutableMapping[str, Value]


def run(source: str, arguments: Sequence[Value], budget: int = 10_000) -> Value:
    """What the one function in `source` returns for these arguments, which are left as they are.

    `budget` is a number of steps, up to `MOST_STEPS`: about one for each part of an expression that is worked out and
    each item that is visited. EvaluationError, and nothing else, for whatever goes wrong.
    """
    if type(budget) is not int or not 1 <= budget <= MOST_STEPS:
        raise EvaluationError(f"a budget of {budget!r:.40} steps is not from 1 to {MOST_STEPS}; give one that is")
    if type(arguments) not in (list, tuple):
        raise EvaluationError(f"the arguments are a {type(arguments).__name__}; give a list of them")
    function, local_names = _parsed(source)
    names = [parameter.arg for parameter in function.args.args]
    if len(names) != len(arguments):
        raise EvaluationError(f"the function takes {len(names)} arguments, not {len(arguments)}; give as many")
    meter = Meter(budget)
    try:
        values = [copied(argument, meter) for argument in arguments]
        program = _Program(meter, local_names)
        end = program.block(function.body, dict(zip(names, values, strict=True)))
        return copied(end.value if isinstance(end, _Return) else None, meter)
    except EvaluationError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError, MemoryError) as error:
        raise EvaluationError(f"the program fails: {type(error).__name__}: {str(error)[:80]}") from error


def function_of(source: str) -> ast.FunctionDef:
    """The one function that a source consists of, if the evaluator knows all that is in it; else EvaluationError."""
    return _parsed(source)[0]


def _parsed(source: str) -> tuple[ast.FunctionDef, frozenset[str]]:
    """The function, and the names that it assigns."""
    if type(source) is not str or len(source) > LONGEST_SOURCE:
        raise EvaluationError(f"the source is no text of at most {LONGEST_SOURCE} characters; give a shorter one")
    return _parsed_text(source)


@lru_cache(maxsize=16)
def _parsed_text(source: str) -> tuple[ast.FunctionDef, frozenset[str]]:
    _check_brackets(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "1 is 1", an unknown escape: the source's affair
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise EvaluationError(f"the source is no Python: {str(error)[:80]}") from error
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):
        raise EvaluationError("the source is not one function; write a single def")
    function = tree.body[0]
    _check(function)
    return function, _locals(function)


def _check_brackets(source: str) -> None:
    """Refuse deep nesting before Python's parser sees it: a deep one can take its stack, or very long."""
    depth = 0
    for letter in source:
        depth += (letter in "([{") - (letter in ")]}")
        if depth > DEEPEST_SOURCE:
            raise EvaluationError(f"brackets are at most {DEEPEST_SOURCE} deep; write it flatter")


_NODES = OPERATORS | {
    *(ast.Return, ast.Assign, ast.AugAssign, ast.For, ast.If, ast.Break, ast.Continue, ast.Pass, ast.Expr),
    *(ast.Constant, ast.Name, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Call, ast.Attribute),
    *(ast.Subscript, ast.Slice, ast.List, ast.Tuple, ast.ListComp, ast.GeneratorExp, ast.comprehension, ast.keyword),
    *(ast.Load, ast.Store),
}


def _check(function: ast.FunctionDef) -> None:
    """Refuse what the evaluator does not know, wherever it stands."""
    plain = function.args
    if (
        plain.posonlyargs
        or plain.kwonlyargs
        or plain.vararg
        or plain.kwarg
        or plain.defaults
        or function.decorator_list
    ):
        raise refused("such parameters or decorators")
    names = [parameter.arg for parameter in plain.args]
    if len({*names}) < len(names):
        raise EvaluationError("two parameters have one name; rename one of them")
    _check_loops(function)
    waiting: list[tuple[ast.AST, int]] = [(node, 1) for node in function.body]
    while waiting:
        node, depth = waiting.pop()
        if type(node) not in _NODES:
            raise refused(f"{type(node).__name__} in a source")
        if depth > DEEPEST_SOURCE:
            raise EvaluationError(f"expressions are at most {DEEPEST_SOURCE} deep; write it flatter")
        if isinstance(node, ast.Constant):
            checked(node.value, Meter(LONGEST_SOURCE))
        if isinstance(node, ast.comprehension) and node.is_async:
            raise refused("async in a source")
        waiting += [(child, depth + 1) for child in ast.iter_child_nodes(node)]


def _check_loops(function: ast.FunctionDef) -> None:
    """Refuse `break` and `continue` outside a loop, which Python finds after parsing."""
    waiting = [(statement, False) for statement in function.body]
    while waiting:
        statement, is_loop = waiting.pop()
        if isinstance(statement, ast.Break | ast.Continue) and not is_loop:
            raise EvaluationError("a break or continue is outside a loop; put it in one")
        if isinstance(statement, ast.For | ast.If):
            waiting += [(inner, is_loop or isinstance(statement, ast.For)) for inner in statement.body]
            waiting += [(inner, is_loop) for inner in statement.orelse]


def _locals(function: ast.FunctionDef) -> frozenset[str]:
    """The names that the function assigns, and that are therefore no built-in functions anywhere in it."""
    waiting: list[ast.AST] = [*function.body]
    names: set[str] = set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        waiting += [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.comprehension)]
    return frozenset(names)


class _Return:
    """The end of a function."""

    def __init__(self, value: Value) -> None:
        self.value = value


_End = _Return | ast.Break | ast.Continue | None
"""How a block ends: None where it goes on."""


class _Program:
    """A walk over the nodes of a function. Every node costs a step."""

    def __init__(self, meter: Meter, names: frozenset[str]) -> None:
        self.meter, self.locals = meter, names

    # ---- statements

    def block(self, statements: Sequence[ast.stmt], names: _Names) -> _End:
        for statement in statements:
            end = self.statement(statement, names)
            if end is not None:
                return end
        return None

    def statement(self, node: ast.stmt, names: _Names) -> _End:
        self.meter.spend()
        match node:
            case ast.Return(value=value):
                return _Return(None if value is None else self.value(value, names))
            case ast.Assign(targets=targets, value=expression):
                value = self.value(expression, names)
                for target in targets:
                    self.assign(target, value, names)
            case ast.AugAssign():
                self.change(node, names)
            case ast.If(test=test, body=body, orelse=orelse):
                return self.block(body if self.value(test, names) else orelse, names)
            case ast.For():
                return self.loop(node, names)
            case ast.Break() | ast.Continue():
                return node
            case ast.Expr(value=expression):
                self.value(expression, names)
        return None

    def loop(self, node: ast.For, names: _Names) -> _End:
        for item in iterate(self.value(node.iter, names), self.meter):
            self.assign(node.target, item, names)
            end = self.block(node.body, names)
            if isinstance(end, ast.Break):
                return None
            if isinstance(end, _Return):
                return end
        return self.block(node.orelse, names)

    def assign(self, target: ast.expr, value: Value, names: _Names) -> None:
        self.meter.spend()
        match target:
            case ast.Name(id=name):
                names[name] = value
            case ast.Tuple(elts=targets) | ast.List(elts=targets):
                for one, item in zip(targets, collect(value, self.meter), strict=True):
                    self.assign(one, item, names)
            case ast.Subscript(value=values, slice=place):
                put(self.value(values, names), self.value(place, names), value)
            case _:
                raise refused(f"an assignment to {type(target).__name__}")

    def change(self, node: ast.AugAssign, names: _Names) -> None:
        kind = type(node.op)
        match node.target:
            case ast.Name(id=name):
                value = self.name(name, names)
                names[name] = changed(kind, value, self.value(node.value, names), self.meter)
            case ast.Subscript(value=expression, slice=index):
                values, place = self.value(expression, names), self.value(index, names)
                value = at(values, place, self.meter)
                put(values, place, changed(kind, value, self.value(node.value, names), self.meter))
            case _:
                raise refused(f"a change of {type(node.target).__name__}")

    # ---- expressions

    def value(self, node: ast.expr, names: _Names) -> Value:
        self.meter.spend()
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                return self.name(name, names)
            case ast.BinOp(left=left, op=op, right=right):
                return binary(type(op), self.value(left, names), self.value(right, names), self.meter)
            case ast.UnaryOp(op=sign, operand=operand):
                return unary(type(sign), self.value(operand, names), self.meter)
            case ast.BoolOp():
                return self.either(node, names)
            case ast.Compare():
                return self.comparison(node, names)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return self.value(body if self.value(test, names) else orelse, names)
            case ast.Call():
                return self.call(node, names)
            case ast.Subscript(value=values, slice=place):
                return at(self.value(values, names), self.value(place, names), self.meter)
            case ast.Slice(lower=lower, upper=upper, step=step):
                return slice(*(None if end is None else self.place(end, names) for end in (lower, upper, step)))
            case ast.List(elts=items):
                return [self.value(item, names) for item in items]
            case ast.Tuple(elts=items):
                return tuple(self.value(item, names) for item in items)
            case ast.ListComp(elt=item, generators=loops):
                return collect(self.items(item, loops, names), self.meter)
            case ast.GeneratorExp(elt=item, generators=loops):
                return self.items(item, loops, names)
        raise refused(f"{type(node).__name__} here")

    def name(self, name: str, names: _Names) -> Value:
        if name not in names:
            raise EvaluationError(f"the name {name[:40]} has no value here; assign it before")
        return names[name]

    def place(self, node: ast.expr, names: _Names) -> int | None:
        value = self.value(node, names)
        if type(value) not in (int, bool, type(None)):
            raise refused(f"a slice to the type {type(value).__name__}")
        return value if value is None else int(value)

    def either(self, node: ast.BoolOp, names: _Names) -> Value:
        """`and` and `or`: the value that decides, or the last."""
        for operand in node.values[:-1]:
            value = self.value(operand, names)
            if bool(value) is isinstance(node.op, ast.Or):
                return value
        return self.value(node.values[-1], names)

    def comparison(self, node: ast.Compare, names: _Names) -> bool:
        left = self.value(node.left, names)
        for op, operand in zip(node.ops, node.comparators, strict=True):
            right = self.value(operand, names)
            if not compare(type(op), left, right, self.meter):
                return False
            left = right
        return True

    def items(self, item: ast.expr, loops: Sequence[ast.comprehension], names: _Names) -> LazyItems:
        """What a comprehension gives. Its first list is worked out now, all else when it is read."""
        values = self.value(loops[0].iter, names)
        inner: _Names = ChainMap({}, names)
        return LazyItems(self.nested(item, loops, iterate(values, self.meter), inner))

    def nested(
        self, item: ast.expr, loops: Sequence[ast.comprehension], values: Iterator[Value], names: _Names
    ) -> Iterator[Value]:
        loop, *rest = loops
        for value in values:
            self.assign(loop.target, value, names)
            if all(self.value(test, names) for test in loop.ifs):
                if rest:
                    yield from self.nested(item, rest, iterate(self.value(rest[0].iter, names), self.meter), names)
                else:
                    yield self.value(item, names)

    def call(self, node: ast.Call, names: _Names) -> Value:
        function, first = self.function(node.func, names)
        arguments = [*first, *(self.value(argument, names) for argument in node.args)]
        options = {keyword.arg or "**": self.value(keyword.value, names) for keyword in node.keywords}
        return function(arguments, options, self.meter)

    def function(self, node: ast.expr, names: _Names) -> tuple[Callable[..., Value], list[Value]]:
        """A function or a method that a call names, and the value that the method is of."""
        match node:
            case ast.Name(id=name) if name in BUILTINS and name not in names and name not in self.locals:
                return BUILTINS[name], []
            case ast.Attribute(value=expression, attr=name):
                value = self.value(expression, names)
                if name in METHODS.get(type(value), {}):
                    return METHODS[type(value)][name], [value]
                raise refused(f"the method {name} of the type {type(value).__name__}")
        raise refused(f"a call of {ast.unparse(node) if isinstance(node, ast.Name) else type(node).__name__}")
