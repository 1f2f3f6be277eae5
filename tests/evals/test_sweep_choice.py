"""evals/choice.py, evals/curve.py: the front, the choice on other items, how many would do; on made-up outcomes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from sfumato.evals.choice import SettingChoice, choose, is_safe, items_needed, preset_of
from sfumato.evals.curve import Point, front, task_front
from sfumato.evals.search import candidates
from sfumato.evals.settings import Setting
from sfumato.evals.statistics import PairedCounts
from sfumato.evals.tasks import TaskAnswer
from sfumato.options import LoadOptions, Options
from sfumato.presets import Preset


def answered(items: int, steps: int, wrong: Sequence[int] = ()) -> list[TaskAnswer]:
    """Answers that took so many steps; the items of these numbers are wrong."""
    return [TaskAnswer(str(n), "", n not in wrong, steps, steps, 9, cost_seconds=steps / 1e3) for n in range(items)]


def point_of(steps: int, wrong: Sequence[int] = (), items: int = 100, base: Sequence[int] = ()) -> Point:
    """A setting of so many steps beside a reference of 48."""
    own, reference = {"a": answered(items, steps, wrong)}, {"a": answered(items, 48, base)}
    return Point(Setting.of({"max_steps": steps}), own, reference)


def names(points: Sequence[Point]) -> list[int]:
    return [point.setting.options["max_steps"] for point in points]


def test_a_point_stands_beside_the_reference_on_the_same_items() -> None:
    point = point_of(12, wrong=(1, 2, 3), base=(3, 4))
    assert point.pooled == PairedCounts(96, 2, 1, 1)
    assert point.loss == pytest.approx(1.0)
    assert point.costs == pytest.approx({"steps": 0.25, "passes": 0.25, "milliseconds": 0.25})
    low, high = point.loss_interval
    assert low < 1.0 < high and -5 < low < 0 < high < 7
    assert point.losing_tasks == [] and not point.loses_more_than(1)
    worse = point_of(12, wrong=range(30))
    assert worse.losing_tasks == ["a"] and worse.loses_more_than(10) and not worse.loses_more_than(30)
    record = worse.to_dict()
    assert (record["setting"], record["loss"], record["tasks"]["a"]["paired"]["first_only"]) == ("max_steps=12", 30, 30)


def test_the_work_of_several_tasks_is_the_geometric_mean() -> None:
    own = {"a": answered(4, 12), "b": answered(4, 48)}
    point = Point(Setting(), own, {"a": answered(4, 48), "b": answered(4, 48)})
    assert point.costs["steps"] == pytest.approx(0.5)


def test_the_front_is_what_nothing_beats() -> None:
    points = [point_of(48), point_of(24, (1,)), point_of(20, (1,)), point_of(12, (1, 2, 3)), point_of(16, (1, 2, 3, 4))]
    assert names(front(points, "steps")) == [48, 20, 12]
    assert names(task_front(points, "a", "milliseconds")) == [48, 20, 12]
    equal = [point_of(12, (1,)), point_of(12, (2,)), point_of(12, (3,))]
    assert front(equal, "steps") == equal[:1], "of equals the first"
    assert front([], "steps") == []


def run(points: dict[int, Point], *steps: int, items: int = 1000) -> SettingChoice:
    """The choice among candidates whose answers to the confirming items are these points'."""

    def answer(setting: Setting) -> dict[str, Sequence[TaskAnswer]]:
        if not setting.changes:
            return {"a": answered(items, 48)}
        return dict(points[setting.options["max_steps"]].answers)

    return choose([point_of(one) for one in steps], answer, "steps", 1.0)


def test_the_cheapest_that_is_confirmed_is_chosen() -> None:
    points = {24: point_of(24, items=1000), 12: point_of(12, (1,), 1000), 6: point_of(6, range(20), 1000)}
    choice = run(points, 24, 12, 6)
    assert names(choice.tried) == [6, 12], "the cheapest first, and none after the choice"
    assert choice.chosen is not None and names([choice.chosen]) == [12]
    assert choice.level == pytest.approx(1 - 0.05 / 3), "three tries"
    assert "max_steps=12 loses 0.1 points, at most 0.8" in choice.sentence and choice.items_needed is None
    assert run(points, 12).level == pytest.approx(0.95)


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ((), "loses 0.0 points, at most 0.4"),
        ((1,), "gains 0.1 points, or loses at most 0.3"),
        (range(30), "gains 3.0 points, at least "),
    ],
)
def test_a_choice_says_what_is_lost_or_gained(base: Sequence[int], words: str) -> None:
    reference, own = {"a": answered(1000, 48, base)}, {"a": answered(1000, 12)}
    choice = choose([point_of(12)], lambda setting: own if setting.changes else reference, "steps", 1.0)
    assert choice.chosen is not None and words in choice.sentence


def test_what_is_not_safe_says_why() -> None:
    points = {steps: point_of(steps, wrong, 1000) for steps, wrong in ((24, range(20)), (12, range(12)))}
    choice = run(points, 24, 12)
    assert names(choice.tried) == [12, 24] and choice.chosen is None and choice.items_needed is None
    assert choice.sentence.endswith("of a it has significantly less right")
    assert run({12: point_of(12, range(2), 100)}, 12, items=100).sentence.endswith("which is too much")


def test_candidates_are_the_ends_of_the_front_and_what_it_hides() -> None:
    base = (1, 2, 3)
    lucky = point_of(10, (), base=base)
    points = [point_of(40, base, base=base), point_of(20, base, base=base), lucky, point_of(12, base, base=base)]
    assert names(candidates(points, "steps")) == [20, 12, 10]
    assert names(candidates([point_of(n, range(48 - n)) for n in (44, 40, 36, 30)], "steps")) == [44, 36, 30]
    assert names(candidates([point_of(12)], "steps")) == [12] and candidates([], "steps") == []


def test_without_a_candidate_nothing_is_answered() -> None:
    choice = choose([], lambda setting: pytest.fail("answered"), "steps", 1.0)
    assert choice.chosen is None and choice.sentence.startswith("no setting that was tried is cheaper and loses less")


def test_too_few_items_are_said_and_how_many_would_do() -> None:
    few = choose([point_of(12)], lambda setting: {"a": answered(100, 12 if setting.changes else 48)}, "steps", 1.0)
    assert few.chosen is None and few.items_needed == 381
    assert "these items do not suffice to say less than 1, about 381 would" in few.sentence
    assert few.to_dict()["items_needed"] == 381


@pytest.mark.parametrize(
    "counts", [PairedCounts(100, 0, 0, 0), PairedCounts(0, 0, 0, 7), PairedCounts(3960, 14, 6, 20)]
)
def test_the_items_that_would_do_do(counts: PairedCounts) -> None:
    needed = items_needed(counts, 1.0)
    assert needed is not None
    scale = needed / counts.count
    minus, plus = round(counts.first_only * scale), round(counts.second_only * scale)
    assert -100 * PairedCounts(needed - minus - plus, minus, plus, 0).interval().low < 1.0
    assert -100 * PairedCounts(needed - minus - plus - 10, minus, plus, 0).interval().low > 0.97, "hardly fewer would"


def test_no_number_of_items_proves_a_loss_that_is_there() -> None:
    assert items_needed(PairedCounts(98, 2, 0, 0), 1.0) is None
    assert items_needed(PairedCounts(0, 0, 0, 0), 1.0) is None


def test_a_setting_that_is_not_cheaper_on_other_items_is_passed_over() -> None:
    assert is_safe(point_of(40, items=1000), 1.0) and not is_safe(point_of(40, range(9), 1000), 1.0)
    points = {24: point_of(24, items=1000), 12: point_of(48, items=1000)}
    choice = run(points, 24, 12)
    assert len(choice.tried) == 2 and choice.chosen is not None and choice.chosen.setting.name == "max_steps=24"
    alone = run(points, 12)
    assert alone.chosen is None and alone.items_needed is None
    assert alone.sentence.endswith("on these items it is not cheaper")


def test_a_preset_has_what_was_measured_and_not_what_was_asked_for() -> None:
    setting = Setting.of({"max_steps": 12, "quantize": "int8"})
    options = Options(seed=7, max_tokens=64, early=True, max_steps=30)
    preset = preset_of(setting, options, LoadOptions("nano", device="cpu", dtype="bfloat16"), {"model": "nano"})
    assert preset.options == {"early": True, "max_steps": 12}
    assert preset.load == {"dtype": "bfloat16", "quantize": "int8"}
    assert Preset.of(preset.to_dict(), "it") == preset
