"""tasks/evaluate.py: what it knows gives what Python gives; all else is refused, soon, with little memory."""

from __future__ import annotations

import inspect
import random
import textwrap
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from sfumato.tasks.evaluate import LONGEST_SOURCE, MOST_STEPS, EvaluationError, is_same, run

# ---- Python's own functions, whose source is run beside them ---------------------------------------------------------


def numbers(a, b):  # type: ignore[no-untyped-def]
    """Operators."""
    return [a + b, a - b, a * b, a / b, a // b, a % b, -a, +b, ~b, a**2, 2**-1, a << 2, a >> 1, a & b, a | b, a ^ b]


def orders(a, b):  # type: ignore[no-untyped-def]
    return [a < b, a <= b, a > b, a >= b, a == b, a != b, a is None, b is not None, not a, 0 < a < b < 9, a < b > 3]


def logic(a, b):  # type: ignore[no-untyped-def]
    return (a and b, a or b, a or 5, (b and []) or "x", a if b else b, not (a and b), (a, b) < (b, a), [a] == [b])


def branches(a, b):  # type: ignore[no-untyped-def]
    if a > b:
        c = "more"
    elif a == b:
        c = "same"
    else:
        c = "less"
    pass
    return c


def loops(a, b):  # type: ignore[no-untyped-def]
    n = 0
    for i in range(a, b, 2):
        if i == 3:
            continue
        for j in range(i):
            if j > 4:
                break
            n += i * j
        else:
            n += 100
        if n > 400:
            return "early", n
    else:
        n += 1000
    for i in []:
        n = i
    return n, i


def lists(xs, n):  # type: ignore[no-untyped-def]
    ys = xs
    ys += [n, n]
    xs.append([n])
    zs = xs[:]
    zs[0] = "first"
    zs[-1] *= 2
    ys = ys + xs[:1]
    (a, b), [c, d] = zs[:2], (3, 4)
    e = f = zs[::-1]
    zs.extend(x for x in range(3))
    zs.insert(1, "in")
    zs.remove("in")
    last = zs.pop()
    xs *= 2
    return xs, ys, zs, a, b, c, d, e is None, f, last, zs.pop(0), xs[1:3], xs[-2], xs.count(n), zs.index(n)


def changes_while_it_loops(xs, n):  # type: ignore[no-untyped-def]
    for i, x in enumerate(xs):
        if i + 1 < len(xs):
            xs[i + 1] += x
        if len(xs) < 9:
            xs.append(n)
    return xs


def built_in(xs, n):  # type: ignore[no-untyped-def]
    one = [len(xs), sum(xs), sum(xs, n), min(xs), max(xs), max(n, 3), abs(n), sorted(xs), sorted(xs, reverse=True)]
    two = [list(reversed(xs)), list(zip(xs, range(9), strict=False)), list(enumerate(xs, 2)), tuple(xs), bool(xs)]
    six = [str(xs), str(n), int("12"), int("z", 36), int(2.9), float("2.5"), round(2.567, 2), divmod(n, 4), str(1.5)]
    ten = [any(xs), all(xs), any(x > 3 for x in xs), ord("a"), chr(98), max([], default=n), min(str(n)), sum([xs], [7])]
    return one, two, six, ten, 7, sum(0.1 for x in xs), range(n)[1:]


def comprehensions(xs, n):  # type: ignore[no-untyped-def]
    x = 7
    pairs = [(x, y) for x in xs if x > 1 if x < 9 for y in range(x) if y != n]
    lazy = (x * n for x in xs)
    n = 3
    nested = [[y for y in range(x % 4)] for x in xs]
    return pairs, list(lazy), list(lazy), nested, x, [z for x, z in zip(xs, xs[2:], strict=False)], 3 in (x for x in xs)


def strings(s, t):  # type: ignore[no-untyped-def]
    one = [s.upper(), s.lower(), s.title(), s.strip(), s.split(), s.split("a", 1), s.replace("a", t, 1), s.capitalize()]
    two = [s.count("a"), s.find(t), s.startswith(t), s.endswith("b"), "-".join(s), t.join([s, t]), s + t, s * 2, 2 * t]
    return one, two, s[::-1], s[1:-1], s[0], t in s, s < t, len(s), sorted(s), [c for c in s], s.isalpha(), list(s)


def shadows(xs, n):  # type: ignore[no-untyped-def]
    return [len for len in xs], len(xs), n


TWINS = [
    *((twin, [a, b]) for twin in (numbers, orders, logic, branches) for a, b in [(3, 2), (-7, 2), (2, 2), (0, 5)]),
    *((loops, [a, b]) for a, b in [(0, 6), (0, 4), (1, 40)]),
    *((twin, [[3, 1, 4, 1, 5], 2]) for twin in (lists, built_in, comprehensions, shadows, changes_while_it_loops)),
    *((strings, [s, t]) for s, t in [("banana b", "an"), ("Ab", "x"), (" ß ", " ")]),
]


@pytest.mark.parametrize(("twin", "arguments"), TWINS, ids=lambda value: getattr(value, "__name__", None))
def test_it_gives_what_python_gives(twin: Callable[..., Any], arguments: list[Any]) -> None:
    source = textwrap.dedent(inspect.getsource(twin))
    before = repr(arguments)
    value = run(source, arguments)
    assert repr(arguments) == before  # the program has copies
    assert is_same(value, twin(*arguments))


def test_what_it_returns_is_the_callers_own() -> None:
    """A constant list of the source, or an argument, is not shared with what comes out."""
    xs = [[1]]
    source = "def f(xs):\n  return xs"
    run(source, [xs])[0].append(2)
    assert xs == [[1]] and run(source, [xs]) == [[1]] and run("def f():\n  'words'", []) is None


FAILING = {
    "1 // 0": "ZeroDivisionError",
    "[1][3]": "IndexError",
    "int('x')": "ValueError",
    "a": "the name a has no value",
    "f(1)": "does not know a call of f",
    "1 + 'a'": "Add of the types int and str",
    "[1] < ['a']": "TypeError",
    "len(5)": "argument of the type int",
    "x.upper()": "the method upper of the type int",
    "'ab'.index('c')": "ValueError",
    "sum(['a'], '')": "a sum of strings",
    "(-8) ** 0.5": "values of the type complex",
    "zip([1], [2])": "an iterator as a value",
    "x is 5": "use ==",
    "max": "the name max has no value",
    "[1, 2].sort(key=3)": "the keyword argument key",
    "sorted(**x)": "the keyword argument",
    "x[1]": "a place of the type int in the type int",
    "[1][x:'a']": "a slice to the type str",
    "b'x'": "values of the type bytes",
    "1j": "values of the type complex",
    "...": "values of the type ellipsis",
    "f'{x}'": "JoinedStr",
    "'%s' % x": "Mod of the types str and int",
    "{1: 2}": "Dict",
    "{1}": "Set",
    "lambda: 1": "Lambda",
    "(y := 1)": "NamedExpr",
    "[*[1]]": "Starred",
    "await x": "Await",
    "(yield)": "Yield",
    "1 @ 2": "MatMult",
}


@pytest.mark.parametrize(("expression", "sentence"), FAILING.items())
def test_what_fails_is_one_error(expression: str, sentence: str) -> None:
    with pytest.raises(EvaluationError) as error:
        run(f"def f(x):\n  return {expression}", [1])
    assert sentence in str(error.value)


SOURCES = {
    "x = 1": "not one function",
    "": "not one function",
    "def f(x):\n return x\nf(1)": "not one function",
    "async def f(x):\n return x": "not one function",
    "class f:\n  pass": "not one function",
    "def f(x): return (": "no Python",
    "def f(x):\n\x00": "no Python",
    "def f(x): return '\ud800'": "no Python",
    "def f(x, x): return x": "two parameters have one name",
    "def f(x=[]): return x": "parameters or decorators",
    "def f(*x): return x": "parameters or decorators",
    "def f(x, /): return x": "parameters or decorators",
    "@x\ndef f(x): return x": "parameters or decorators",
    "def f(x):\n while x: pass": "While",
    "def f(x):\n import os": "Import",
    "def f(x):\n from os import system": "ImportFrom",
    "def f(x):\n global y": "Global",
    "def f(x):\n del x": "Delete",
    "def f(x):\n try: pass\n finally: pass": "Try",
    "def f(x):\n with x: pass": "With",
    "def f(x):\n def g(): pass": "FunctionDef",
    "def f(x):\n class g: pass": "ClassDef",
    "def f(x):\n raise x": "Raise",
    "def f(x):\n break": "outside a loop",
    "def f(x):\n for y in []: pass\n else: continue": "outside a loop",
    "def f(x):\n y = max(x, 1)\n max = 3\n return y": "a call of max",
    "def f(x):\n x.y = 1": "an assignment to Attribute",
    "def f(x):\n x.y += 1": "a change of Attribute",
    "def f(x):\n x[0:1] = [1]": "a change at the type slice",
    "def f(x):\n y = 'abc'\n y[0] = 'd'": "of the type str",
    "def f(x):\n a, b = [1]\n return a": "ValueError",
    "def f(x):\n return" + " (" * 40: "brackets are at most",
    "def f(x):\n return " + "-" * 200 + "x": "expressions are at most",
    "def f(x):\n" + " y = 1\n" * LONGEST_SOURCE: "no text of at most",
}


@pytest.mark.parametrize(("source", "sentence"), SOURCES.items(), ids=range(len(SOURCES)))
def test_a_source_that_it_does_not_know_is_refused(source: str, sentence: str) -> None:
    with pytest.raises(EvaluationError) as error:
        run(source, [[1]])
    assert sentence in str(error.value) and len(str(error.value)) < 250


ESCAPES = [
    *("__import__('os').system('true')", "open('/etc/passwd').read()", "eval('1')", "exec('x = 1')", "globals()"),
    *("().__class__.__bases__[0].__subclasses__()", "''.__class__.__mro__[1]", "x.__class__", "x.append.__self__"),
    *("'{0.__class__}'.format(x)", "'{}'.format_map(x)", "f'{x.__class__}'", "'%c' % 65", "getattr(x, 'append')"),
    *("type(x)", "vars(x)", "dir()", "locals()", "print(x)", "input()", "breakpoint()", "object()", "super()"),
    *("(g for g in x).gi_frame.f_back.f_globals", "[g for g in x].__init__", "x.sort(key=print)", "max(x, key=eval)"),
    *("compile('1', '', 'eval')", "memoryview(b'a')", "bytes(9)", "map(eval, x)", "iter(x)", "next(x)", "help()"),
    *(
        "setattr(x, 'a', 1)",
        "__builtins__",
        "__builtins__['eval']",
        "f.__globals__",
        "f.__code__",
        "str.format",
        "x.copy",
    ),
    *("x.__getattribute__('append')", "(lambda: 0)()", "[].__reduce_ex__(3)", "int.from_bytes", "str.join('', x)"),
    *("list.append(x, 1)", "''.encode()", "'a'.translate(x)", "''.maketrans", "x.clear()", "1 .real", "1 .__add__(1)"),
]


@pytest.mark.parametrize("expression", ESCAPES)
def test_a_way_out_is_refused(expression: str) -> None:
    with pytest.raises(EvaluationError):
        run(f"def f(x):\n  return {expression}", [[1]])


BOMBS = [
    *("2 ** 40000", "9 ** 9 ** 9", "1 << 10 ** 9", "10 ** 70 * 10 ** 70", "'a' * 10 ** 9", "[0] * 10 ** 9"),
    *("10 ** 9 * (0,)", "sum(range(10 ** 9))", "list(range(10 ** 9))", "'a' in range(10 ** 9)", "0x" + "f" * 900),
    *("[0 for a in range(10 ** 9)]", "max(range(10 ** 12))", "[(a, b) for a in range(999) for b in range(999)]"),
    *("sorted(range(10 ** 9))", "int('9' * 9999)", "round(5, -10 ** 9)", "round(1.5, 10 ** 30)", "range(10 ** 400)"),
    *("('a' * 9999).join(['a'] * 9999)", "('a' * 9999).replace('a', 'b' * 9999)", "len(range(2 ** 200))"),
    *("('a' * 9999).replace('', 'b' * 9)", "'a'.join(str(a) for a in range(10 ** 9))", "f'{5:1000000000}'"),
    *("enumerate(range(10 ** 9), 2 ** 300)", "'%1000000000d' % 5", "('\\u0390' * 9999).upper()", "int('f' * 9999, 16)"),
    *("list(zip(range(10 ** 9), range(10 ** 9)))", "all(1 for a in range(10 ** 9))"),
]
GROWING = [
    "x = [1]\n  for a in range(60):\n    x = [x, x]\n  return x",
    "x = [1]\n  for a in range(60):\n    x = [x, x]\n  return x == [x]",
    "x = [1]\n  for a in range(60):\n    x = [x, x]\n  return str(x)",
    "x = [1]\n  for a in range(60):\n    x = [x, x]\n  return x in [x, 1]",
    "x = [1]\n  for a in range(900):\n    x = [x]\n  return x",
    "x = ()\n  for a in range(900):\n    x = (x,)\n  return sorted([x, x])",
    "x = [1]\n  x.append(x)\n  return x",
    "x = [1]\n  x.append(x)\n  return [x] == x",
    "x = [1]\n  x.append(x)\n  return x.index(2)",
    "x = [1]\n  for a in x:\n    x.append(a)\n  return x",
    "x = [1]\n  for a in range(60):\n    x.extend(x)\n  return x",
    "x = [1]\n  for a in range(60):\n    x += x\n  return x",
    "x = [1]\n  x.extend(a for a in x if x.append(1) is None)\n  return x",
    "x = 'a'\n  for a in range(60):\n    x += x\n  return x",
    "x = 2\n  for a in range(60):\n    x = x * x\n  return x",
    "x = [0]\n  for a in range(900):\n    x = enumerate(x)\n  return list(x)",
    "x = [[0]]\n  for a in range(300):\n    x.append((c for b in [a] for c in x[b]))\n  return list(x[-1])",
    "x = [0]\n  for a in range(900):\n    x = zip(x)\n  return list(x)",
    "x = (a for b in [0] for a in x)\n  return list(x)",
    "x = ['a' * 9000] * 9000\n  return str(x)",
    "x = ['a' * 9000] * 9000\n  return ''.join(x)",
    "x = [[0] * 9000] * 9000\n  return x",
    "x = []\n  for a in range(9999):\n    x.append([0] * 9999)\n  return len(x)",
]


@pytest.mark.parametrize("body", [*(f"return {bomb}" for bomb in BOMBS), *GROWING])
def test_a_bomb_is_refused_with_little_memory(body: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(EvaluationError):
            run(f"def f():\n  {body}", [], 4000)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


def test_steps_are_counted() -> None:
    source = "def f(n):\n  t = 0\n  for i in range(n):\n    t += i\n  return t"
    assert run(source, [100], 1000) == 4950
    with pytest.raises(EvaluationError, match="more steps than its budget"):
        run(source, [1000], 1000)
    for budget in (0, MOST_STEPS + 1, True, 10.0, "9", None):
        with pytest.raises(EvaluationError, match="give one that is"):
            run(source, [1], budget)  # type: ignore[arg-type]


class Hostile(str):
    """A text of another kind, which does as it likes."""

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        raise AssertionError("it has run")


DEEP: list[Any] = []
for _ in range(99):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    "argument",
    [{}, {1}, b"", object(), 2**300, "a" * 10_001, [0] * 10_001, Hostile(), [[Hostile()]], DEEP, 1j, print, iter([])],
    ids=lambda value: type(value).__name__,
)
def test_an_argument_of_another_kind_is_refused(argument: object) -> None:
    with pytest.raises(EvaluationError):
        run("def f(x):\n  return 1", [argument])


def test_what_is_no_source_is_refused() -> None:
    sources: list[Any] = [None, 5, [], b"def f(): pass", Hostile("def f(): pass")]
    for source in sources:
        with pytest.raises(EvaluationError, match="no text of at most"):
            run(source, [])
    for arguments, sentence in ((None, "give a list"), ("ab", "give a list"), ([1], "takes 2 arguments, not 1")):
        with pytest.raises(EvaluationError, match=sentence):
            run("def f(a, b):\n  return a", arguments)  # type: ignore[arg-type]


WORDS = """a b x xs 1 2 0 -1 9999 'a' '' "b" [] () [1, 2] + - * / // % ** << >> & | ^ ~ < > <= >= == != = += -= *= not
and or is in if else for return break continue pass def f lambda ( ) [ ] { } , : . ; upper() append(x) join(xs) len sum
min max abs sorted reversed range str int list enumerate zip __class__ __import__ .__dict__ import while class del \\n
\\x00 é ² \N{LINE SEPARATOR} # ''' f' b' \\ @ ! $ ? ` _ None True 1e999 0x 1_0 0b1 1j ...""".split()


@pytest.mark.filterwarnings("error")  # the source's own warnings are nobody's
def test_garbage_raises_nothing_else() -> None:
    rng = random.Random(3)
    ends = ["def f(a, x, xs):\n  return ", "def f(a, x, xs):\n  for i in xs:\n    ", "def f(a, x, xs):\n  x = ", ""]
    values = 0
    for number in range(3000):
        if number % 4 == 3:
            text = "".join(map(chr, rng.choices([*range(128), 0xD800, 0x2028, 0x1F600], k=rng.randint(1, 60))))
        else:
            text = rng.choice(["", " "]).join(rng.choices(WORDS, k=rng.randint(1, 9 if number % 2 else 4)))
        try:
            run(rng.choice(ends) + text, [2, "ab", [3, 1, 2]], 500)
            values += 1
        except EvaluationError:
            pass
    assert values > 50  # some of it is Python


def test_same_is_of_one_type() -> None:
    nan = float("nan")
    assert is_same([1, (nan, "a")], [1, (nan, "a")]) and is_same(range(3), range(3))
    for one, other in [(1, True), (1, 1.0), ([1], (1,)), ([1], [1, 1]), ("1", 1), ([[1]], [[2]]), (None, False)]:
        assert not is_same(one, other)
