"""evals/search.py: which settings are tried, on how many items, and which are left, on outcomes that are made up."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import pytest

from sfumato.errors import InputError
from sfumato.evals.search import SettingSearch, parted
from sfumato.evals.settings import Axis, Setting, axis_of
from sfumato.evals.tasks import Exercise, TaskAnswer
from sfumato.options import Options
from sfumato.tasks.task import TASKS

ITEMS = [f"item {number}" for number in range(64)]
STEPS = axis_of(("max_steps",), [(24,), (12,), (6,)])
BOUND = axis_of(("entropy_bound",), [(0.4,)])


@dataclass
class MadeUpModel:
    """Answers by a rule: how many steps a setting takes, and which items it has wrong."""

    rule: Callable[[Setting], tuple[int, Collection[int]]]
    """Setting -> its steps, and the numbers of the items that it has wrong."""
    calls: list[tuple[str, int]] = field(default_factory=list)

    def answer(self, setting: Setting, task: str, count: int) -> Sequence[TaskAnswer]:
        self.calls.append((setting.name, count))
        steps, wrong = self.rule(setting)
        return [
            TaskAnswer(item, "", n not in wrong, steps, steps, 10, cost_seconds=steps / 1000)
            for n, item in enumerate(ITEMS[:count])
        ]


def search_of(model: MadeUpModel, axes: Sequence[Axis], **more: object) -> SettingSearch:
    task = replace(TASKS["sorting"], name="made up")
    search = SettingSearch([Exercise(task, ITEMS)], axes, Options(seed=1), model.answer, lambda: False, batch=8)
    return replace(search, **more)  # type: ignore[arg-type]


def by_steps(wrong: dict[int, Collection[int]]) -> Callable[[Setting], tuple[int, Collection[int]]]:
    """The steps are max_steps, halved by a wider bound; wrong by max_steps."""

    def rule(setting: Setting) -> tuple[int, Collection[int]]:
        options = setting.over(Options(max_steps=48))
        assert options.max_steps is not None
        return options.max_steps // (2 if options.entropy_bound else 1), wrong.get(options.max_steps, ())

    return rule


def test_what_loses_for_certain_is_dropped_early_and_changes_are_joined() -> None:
    model = MadeUpModel(by_steps({6: range(0, 64, 2)}))
    search = search_of(model, [STEPS, BOUND])
    points = {point.setting.name: point for point in search.run()}
    assert model.calls[0] == ("reference", 64)
    assert points["max_steps=6"].items == 16, "half of its items are wrong: the first quarter says enough"
    assert points["max_steps=12"].items == points["entropy_bound=0.4"].items == 64
    joined = points["entropy_bound=0.4, max_steps=12"]
    assert (joined.items, joined.loss) == (64, 0.0)
    assert joined.costs["steps"] == pytest.approx(0.125)
    assert search.qualified[-1].setting.name == "entropy_bound=0.4, max_steps=12"
    assert search.is_complete


def test_each_look_goes_on_in_whole_batches() -> None:
    model = MadeUpModel(by_steps({}))
    search_of(model, [STEPS], batch=24).run()
    assert [count for name, count in model.calls if name == "max_steps=24"] == [24, 48, 64]


def test_what_is_no_cheaper_is_tried_once() -> None:
    model = MadeUpModel(lambda setting: (48, ()))
    search = search_of(model, [STEPS])
    search.run()
    assert {count for name, count in model.calls if name != "reference"} == {16}
    assert search.qualified == []


def test_the_safe_setting_that_was_dropped_has_a_second_chance() -> None:
    """Among many settings the front of a part of the items may be all luck: what is behind it is looked at again."""

    def rule(setting: Setting) -> tuple[int, Collection[int]]:
        steps = dict(setting.changes).get("max_steps", 48)
        return steps, (33, 63) if steps < 40 else ()  # which the first half of the items does not show

    model = MadeUpModel(rule)
    steps = axis_of(("max_steps",), [(40,), (36,), (32,), (28,), (24,), (20,), (16,), (12,)])
    search = search_of(model, [steps], lose=1.0)
    search.run()
    assert [one.setting.name for one in search.qualified] == ["max_steps=40"]
    last = [name for name, count in model.calls if count == 64]
    assert last[:4] == ["reference", "max_steps=12", "max_steps=16", "max_steps=20"], "three fronts of one"


def test_the_search_ends_with_its_time_and_the_reference_comes_first() -> None:
    model = MadeUpModel(by_steps({}))
    lines: list[str] = []
    search = search_of(model, [STEPS], is_over=lambda: len(model.calls) >= 3, tell=lines.append)
    points = search.run()
    assert [point.setting.name for point in points] == ["reference", "max_steps=24", "max_steps=12"]
    assert not search.is_complete and lines[-1] == "the time of the search is over"
    assert search.qualified[-1].setting.name == "max_steps=12", "on the items that there was time for"
    search = search_of(MadeUpModel(by_steps({})), [STEPS], is_over=lambda: True)
    assert [point.setting.name for point in search.run()] == ["reference"]


def test_settings_that_contradict_are_left_out() -> None:
    model = MadeUpModel(lambda setting: (48 - 8 * len(setting.changes), ()))
    axes = [axis_of(("t_min",), [(0.7,)]), axis_of(("t_max",), [(0.5,)])]
    search = search_of(model, axes)
    assert {point.setting.name for point in search.run()} == {"reference", "t_min=0.7", "t_max=0.5"}


def test_a_setting_that_is_refused_is_left_out_alone_and_with_others() -> None:
    model = MadeUpModel(by_steps({}))
    lines: list[str] = []

    def answer(setting: Setting, task: str, count: int) -> Sequence[TaskAnswer]:
        if setting.options.get("max_steps") == 6 or len(setting.changes) > 1:
            raise InputError("a template cannot have that; leave it out")
        return model.answer(setting, task, count)

    search = search_of(model, [STEPS, BOUND], answer=answer, tell=lines.append)
    points = {point.setting.name for point in search.run()}
    assert points == {"reference", "max_steps=24", "max_steps=12", "entropy_bound=0.4"}
    assert "max_steps=6 is left out: a template cannot have that; leave it out" in lines
    assert search.is_complete and search.qualified[-1].setting.name == "max_steps=12"


def test_both_parts_have_every_kind_whatever_their_order() -> None:
    task = replace(TASKS["sorting"], kind=lambda item: item[0])
    items = [f"{kind}{number}" for kind in "ab" for number in range(20)] + ["c"]
    choosing, confirming = parted(Exercise(task, items))
    assert sorted([*choosing.items, *confirming.items]) == sorted(items)
    for kind in "ab":
        assert sum(item[0] == kind for item in choosing.items) in (6, 7)
    assert {"a", "b"} <= {item[0] for item in choosing.items[:8]}, "the first ones stand for all"
    assert (choosing, confirming) == parted(Exercise(task, items[::-1]))
    with pytest.raises(InputError, match="has 1 items; a sweep needs two at least"):
        parted(Exercise(task, ["a1"]))
