"""How an answer of one's own items is checked: exact, contains, JSON-equal, a regular expression, or a Python function.

A checker is made of a record's fields, which are checked first, and never raises on what a model wrote: that is right
or wrong. White space around an answer does not count; where a model sets JSON or Python in a fence of three backquotes,
the fence's content is the answer.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sfumato.constraints.values.equality import canonical
from sfumato.errors import InputError
from sfumato.evals import patterns
from sfumato.tasks.evaluate import EvaluationError, run

CheckName = Literal["exact", "contains", "json", "regex", "python"]
CHECKS: tuple[CheckName, ...] = get_args(CheckName)
GAP = "___"
"""Where in a `template` the model's text goes."""
MOST_INPUTS = 100
"""Calls of a function that is checked."""
BUDGET = 10_000
"""Steps of the evaluator for one of them."""
LONGEST = 1 << 20
"""Characters of an answer that are looked at; a longer one is wrong."""
_FENCE = re.compile(r"```[A-Za-z0-9_+-]*[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL)


@dataclass(frozen=True)
class AnswerChecker:
    """Whether a text is right, and one that is."""

    is_right: Callable[[str], bool]
    answer: str = ""
    """A right answer, where one is known."""


def checker_of(check: Any, record: Mapping[str, Any], problem: Callable[[str], None]) -> AnswerChecker:
    """The checker of a record. InputError says what is wrong with it.

    `problem` is called with a sentence where a check could not be carried out, which counts as wrong."""
    match check:
        case "exact":
            texts = _texts(record)
            return AnswerChecker(lambda text: text.strip() in texts, texts[0])
        case "contains":
            texts = _texts(record)
            return AnswerChecker(lambda text: any(one in text for one in texts), texts[0])
        case "json":
            return _json(record)
        case "regex":
            return _regex(record, problem)
        case "python":
            return _python(record)
    raise InputError(f"check is {reprlib.repr(check)}; give one of {', '.join(CHECKS)}")


def unfenced(text: str) -> str:
    """What stands in the first fence of a text; without one the text."""
    match = _FENCE.search(text)
    return text if match is None else match[1]


def strict_json(text: str) -> Any:
    """The JSON value of a text. ValueError where it is none, has a key twice, or a number that is not finite."""

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"it says {reprlib.repr(twice)} twice")
        return values

    def number_of(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError(f"{reprlib.repr(digits)} is no finite number")
        return value

    try:
        return json.loads(text, object_pairs_hook=object_of, parse_float=number_of, parse_constant=number_of)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


# ---- each check ------------------------------------------------------------------------------------------------------


def _field(record: Mapping[str, Any], name: str) -> Any:
    if name not in record:
        raise InputError(f"it has no {name}")
    return record[name]


def _texts(record: Mapping[str, Any]) -> Sequence[str]:
    """The texts that are right: one, or each of a list."""
    answer = _field(record, "answer")
    texts = answer if isinstance(answer, list) else [answer]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f"answer is {reprlib.repr(answer)}; give a text, or a list of texts that are right")
    return [text.strip() for text in texts]


def _json(record: Mapping[str, Any]) -> AnswerChecker:
    answer = _field(record, "answer")
    expected = _hashable(answer)

    def is_right(text: str) -> bool:
        try:
            return len(text) <= LONGEST and _hashable(strict_json(unfenced(text).strip())) == expected
        except ValueError:
            return False

    return AnswerChecker(is_right, json.dumps(answer, ensure_ascii=False))


def _hashable(value: Any) -> Any:
    try:
        return canonical(value)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _regex(record: Mapping[str, Any], problem: Callable[[str], None]) -> AnswerChecker:
    pattern = _field(record, "answer")
    if not isinstance(pattern, str) or not pattern:
        raise InputError(f"answer is {reprlib.repr(pattern)}; give a regular expression")
    patterns.check_pattern(pattern)
    too_slow: list[str] = []

    def is_right(text: str) -> bool:
        text = text.strip()
        if too_slow or len(text) > LONGEST:
            return False
        try:
            return patterns.is_match(pattern, text, f"the pattern {reprlib.repr(pattern)}")
        except InputError as error:
            too_slow.append(pattern)
            problem(str(error))
            return False

    return AnswerChecker(is_right)


def _python(record: Mapping[str, Any]) -> AnswerChecker:
    """A function: the answer itself, or the template with the answer in its gap; run, never handed to Python."""
    template, inputs = record.get("template", GAP), _field(record, "inputs")
    if not isinstance(template, str) or template.count(GAP) != 1:
        raise InputError(f"template is {reprlib.repr(template)}; give the source of a function with one gap, {GAP}")
    if not isinstance(inputs, list) or not 1 <= len(inputs) <= MOST_INPUTS:
        raise InputError(f"inputs is {reprlib.repr(inputs)}; give 1 to {MOST_INPUTS} lists of arguments")
    for arguments in inputs:
        if not isinstance(arguments, list):
            raise InputError(f"inputs has {reprlib.repr(arguments)}; give a list of arguments for each call")
        _check_value(arguments)
    source = record.get("answer")
    if not isinstance(source, str | None) or (source is None and "outputs" not in record):
        raise InputError(f"answer is {reprlib.repr(source)}; give code that is right, or outputs for the inputs")
    outputs = record.get("outputs")
    if outputs is None and source is not None:
        outputs = [run(_placed(source, template), arguments, BUDGET) for arguments in inputs]
    if not isinstance(outputs, list) or len(outputs) != len(inputs):
        raise InputError(f"outputs is {reprlib.repr(outputs)}; give a value for each of the {len(inputs)} inputs")

    for output in outputs:
        _check_value(output)

    def is_right(text: str) -> bool:
        code = _placed(text, template)
        try:
            return all(
                canonical(_as_json(run(code, arguments, BUDGET))) == canonical(_as_json(output))
                for arguments, output in zip(inputs, outputs, strict=True)
            )
        except EvaluationError:
            return False

    if source is not None and not is_right(source):
        raise InputError("the code of answer does not give the outputs; correct one of them")
    return AnswerChecker(is_right, source or "")


def _check_value(value: Any) -> None:
    """InputError for what no function of the evaluator takes or returns, such as a record."""
    run("def f(x):\n    return x", [value])


def _placed(text: str, template: str) -> str:
    return template.replace(GAP, unfenced(text).strip())


def _as_json(value: Any) -> Any:
    """A value with lists for tuples, as JSON has them."""
    return [*map(_as_json, value)] if isinstance(value, list | tuple) else value
