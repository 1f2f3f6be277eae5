"""evals/curve_picture.py: every task has its two panels, and whatever was measured, the picture is whole."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from sfumato.evals.choice import SettingChoice
from sfumato.evals.curve import Point
from sfumato.evals.curve_picture import draw, ticks
from sfumato.evals.settings import Setting
from sfumato.evals.sweep import SweepResult
from sfumato.evals.tasks import TaskAnswer

SVG = "{http://www.w3.org/2000/svg}"


def answers(items: int, steps: int, right: int) -> list[TaskAnswer]:
    return [TaskAnswer(str(n), "", n < right, steps, steps, 9, cost_seconds=steps / 100) for n in range(items)]


def point(steps: int, right: int, items: int = 20) -> Point:
    setting = Setting.of({} if steps == 48 else {"max_steps": steps})
    own, base = ({name: answers(items, n, k) for name in ("a<b", "c\0d")} for n, k in ((steps, right), (48, items)))
    return Point(setting, own, base)


def shapes(text: str, kind: str, style: str) -> int:
    return sum(one.get("class") == style for one in ElementTree.fromstring(text).iter(f"{SVG}{kind}"))


def test_every_task_has_two_panels_with_all_settings() -> None:
    points = [point(48, 20), point(12, 19), point(6, 3, items=5)]
    text = draw(SweepResult(points, SettingChoice(1.0, "steps", points[1:2], points[1]), "steps", True), "a & b\n\x1b")
    assert shapes(text, "rect", "f") == 4 and shapes(text, "polyline", "l") == 4
    assert shapes(text, "rect", "r") == shapes(text, "polygon", "c") == 5, "and one in the legend"
    assert shapes(text, "circle", "p q") == 5 and shapes(text, "circle", "p") == 1
    titles = [one.text or "" for one in ElementTree.fromstring(text).iter(f"{SVG}title")]
    assert "max_steps=12: 95.0% of 20, 12.0 steps, 120 ms" in titles
    assert "nan" not in text and "inf" not in text


@pytest.mark.parametrize(("steps", "right"), [(48, 0), (48, 20), (0, 20)])
def test_a_reference_alone_is_a_picture_too(steps: int, right: int) -> None:
    one = Point(Setting(), {"a": answers(20, steps, right)}, {"a": answers(20, steps, right)})
    text = draw(SweepResult([one], SettingChoice(1.0, "milliseconds"), "milliseconds", False), "x" * 500)
    assert shapes(text, "rect", "r") == 3 and "no setting that was tried is cheaper" in text
    assert "nan" not in text and "inf" not in text


@pytest.mark.parametrize(("low", "high"), [(1, 48), (0.9, 1.1), (3.4, 3.5), (0.001, 1000), (95, 190)])
def test_an_axis_has_a_few_round_numbers(low: float, high: float) -> None:
    values = ticks(low, high)
    assert 2 <= len(values) <= 10 and values == sorted({*values})
    assert all(low * 0.99 <= value <= high * 1.01 for value in values)
