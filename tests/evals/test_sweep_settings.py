"""evals/settings.py: settings as changes to a reference, and the axes of a sweep."""

from __future__ import annotations

import pytest

from sfumato.errors import InputError
from sfumato.evals.settings import Setting, axis_of, singles, usual_axes
from sfumato.options import FALLBACK_DEFAULTS, LoadOptions, Options


def test_a_setting_has_one_name_however_it_is_made() -> None:
    setting = Setting.of({"max_steps": 8, "entropy_bound": 0.25, "ops": "reference", "early": True})
    assert setting.name == "early=true, entropy_bound=0.25, max_steps=8, ops=reference"
    assert setting == Setting.of(dict(reversed(setting.changes)))
    assert setting.over(Options(seed=3)) == Options(seed=3, max_steps=8, entropy_bound=0.25, early=True)
    assert setting.loaded(LoadOptions("x")) == LoadOptions("x", ops="reference")
    assert Setting().name == "reference" and Setting().over(Options(seed=3)) == Options(seed=3)
    assert setting.combined(Setting.of({"max_steps": 4})).options["max_steps"] == 4
    assert Setting.of({"t_max": 0.1 + 0.2}).name != Setting.of({"t_max": 0.3}).name


def test_an_axis_may_change_several_options_together() -> None:
    axis = axis_of(("t_min", "t_max"), [(0.1, 0.4), (0.2, 0.8), (0.1, 0.4)])
    assert [one.name for one in axis.settings] == ["t_max=0.4, t_min=0.1", "t_max=0.8, t_min=0.2"]


@pytest.mark.parametrize(
    ("names", "values", "part"),
    [
        (["max_step"], [(1,)], "max_step is no axis of a sweep; the axes are mode, max_steps"),
        (["schema"], [(True,)], "schema is no axis"),
        (["seed"], [(1,)], "seed is no axis"),
        (["device"], [("cpu",)], "device is no axis"),
        (["max_steps"], [], "has 0 values; give from 1 to 32"),
        (["max_steps"], [(n,) for n in range(1, 40)], "has 39 values"),
        (["max_steps"], [(0,)], "max_steps is 0; give a number from 1"),
        (["max_steps"], [(True,)], "max_steps is True"),
        (["dtype"], [("int3",)], "dtype is 'int3'"),
        (["t_min", "t_max"], [(0.3,)], "a value of 1 parts; give 2, as in 0.2:0.6"),
        (["t_min", "t_max"], [(0.8, 0.4)], "t_min is 0.8, above t_max 0.4"),
        (["t_min", "t_min"], [(0.3, 0.3)], "names an option twice"),
    ],
)
def test_a_wrong_axis_is_one_sentence(names: list[str], values: list[tuple[object, ...]], part: str) -> None:
    with pytest.raises(InputError) as caught:
        axis_of(names, values)
    assert part in str(caught.value)


def test_the_usual_axes_lie_around_the_reference() -> None:
    second, *single = usual_axes(Options(), FALLBACK_DEFAULTS)
    assert second.names == ("max_steps", "temperature_steps", "redos") and (16, 48, 1) in second.values
    axes = {axis.names[0]: [one for (one,) in axis.values] for axis in single}
    assert axes["max_steps"] == [24, 16, 12, 8, 6, 4]
    assert axes["entropy_bound"] == [0.2, 0.4, 0.8, 1.6]
    assert axes["stability"] == [0] and axes["early"] == [True]
    few = {axis.names[0]: axis.values for axis in usual_axes(Options(max_steps=3, early=True, stability=0), {})}
    assert few["max_steps"] == ((1,),) and not {"early", "stability"} & few.keys()


def test_singles_leave_out_what_changes_nothing_or_contradicts() -> None:
    axes = [axis_of(("max_steps",), [(8,), (4,)]), axis_of(("t_max",), [(0.1,), (0.9,)]), axis_of(("ops",), [("cpu",)])]
    some = [setting.name for _, setting in singles(axes, Options(max_steps=8, t_min=0.5))]
    assert some == ["max_steps=4", "t_max=0.9", "ops=cpu"]
