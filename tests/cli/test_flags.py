"""cli/flags.py and cli/options.py: the flags of records, and options as NAME=VALUE."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer

from sfumato.cli import flags, options
from sfumato.cli.options import build, changed, flags_of, load_flags_of
from sfumato.errors import InputError
from sfumato.options import CONSTRAINTS, LOAD_OPTIONS, OPTIONS, LoadOptions, Option, Options

# ---- NAME=VALUE -----------------------------------------------------------------------------------------------------


def test_options_from_pairs() -> None:
    pairs = ["max_steps=16", "stop=END", "stop=7", "drafts=true", "t_max=0.5"]
    expected = Options(max_steps=16, stop=("END", "7"), drafts=True, t_max=0.5, seed=3)
    assert build(pairs, seed=3, max_tokens=None) == expected
    with pytest.raises(InputError, match="entropy"):
        build(["entropy=1"])


def test_constraints_from_pairs() -> None:
    assert build(["regex=12"]) == Options(regex="12")
    assert build(["choices=1", "choices=b"]) == Options(choices=("1", "b"))
    assert build(None, choices=["a", "b"], early=True) == Options(choices=("a", "b"), early=True)
    assert build([' schema= {"type": "null"}'.strip()]) == Options(schema={"type": "null"})


def text_for(option: Option) -> str:
    """A value that the option takes, as text."""
    if option.choices:
        return option.choices[-1]
    if option.kind is bool:
        return "false"
    if option.kind in (int, float):
        low, high = option.about.minimum, option.about.maximum
        assert low is not None and high is not None
        return str(int(low)) if option.kind is int else str((low + min(high, 1.0)) / 2)
    return "{}" if option.kind is dict else "some text"


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_can_be_set_as_its_type_says(name: str) -> None:
    """A new field of `Options` too, and nothing in the command line names it."""
    option = OPTIONS[name]
    text = text_for(option)
    needed = {"top_logprobs": "logprobs=true", "verify": "redos=1"}.get(name)
    value = getattr(build([*filter(None, [needed]), f"{name}={text}"]), name)
    base = build([needed] if needed else [])
    assert getattr(changed(base, f"{name}={text}"), name) == value
    if option.kind is tuple:
        assert value == (text,)
    elif option.kind is dict:
        assert value == ({} if name in CONSTRAINTS else None)  # a bias of no token is none
    elif option.kind is str:
        assert value == text
    elif option.kind is bool:
        assert value is False
    else:
        assert value == float(text)


def test_a_bias_is_json_by_token_ids() -> None:
    assert build(['logit_bias={"5": -100, "7": 0.5}']).logit_bias == {5: -100, 7: 0.5}
    for text in ("5", "{", '{"5": "much"}', '{"5": 1, "5": 2}'):
        with pytest.raises(InputError, match="logit_bias"):
            build([f"logit_bias={text}"])


def test_the_declared_type_decides_how_a_value_is_read() -> None:
    assert build(["regex=true"]).regex == "true" and build(["drafts"]).drafts is True
    for pair, words in (("max_steps=1.5", "whole"), ("drafts=1", "true or false"), ("t_max=oops", "'oops'")):
        with pytest.raises(InputError, match=words):
            build([pair])


def test_one_option_changes_and_the_others_stay() -> None:
    start = Options(stop=("a",), seed=3, schema={"type": "null"})
    assert changed(start, "stop=b") == Options(stop=("a", "b"), seed=3, schema={"type": "null"})
    assert changed(start, "seed=4").seed == 4 and start.seed == 3
    with pytest.raises(InputError, match="warmth"):
        changed(start, "warmth=1")


# ---- flags ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "option"), [*OPTIONS.items(), *LOAD_OPTIONS.items()])
def test_every_declared_option_can_be_a_flag(name: str, option: Option) -> None:
    parameter = options.flag_of(option)
    assert parameter.name == name
    assert parameter.default is None  # a flag that is not given


def test_load_options_come_whole_from_their_flags() -> None:
    group = load_flags_of(has_decisions=True)
    names = [parameter.name for parameter in group.parameters]
    assert names == [*list(LOAD_OPTIONS)[1:], "preset"]  # the model is asked elsewhere
    values = {parameter.name: parameter.default for parameter in group.parameters}
    assert group.make(**values) == LoadOptions()
    assert group.make(**values | {"memory_limit": 1.5}) == LoadOptions(memory_limit=1_500_000_000)
    folders = group.make(**values | {"adapters": ["a=b/c", "d/e=f"]})
    assert folders == LoadOptions(adapters={"a": "b/c", "d/e": "f"})
    assert group.make(**values | {"adapters": ["runs/mine"]}) == LoadOptions(adapters={"mine": "runs/mine"})
    for wrong, sentence in (["=b"], "--adapter is '=b'; give NAME=DIR"), (["a=b", "a=c"], "names 'a' twice"):
        with pytest.raises(InputError, match=sentence):
            group.make(**values | {"adapters": wrong})
    with pytest.raises(InputError, match="--memory-limit is 0 GB"):
        group.make(**values | {"memory_limit": 0})
    beside = load_flags_of(without=("device", "preset"))
    assert [parameter.name for parameter in beside.parameters] == list(LOAD_OPTIONS)[2:-1]  # nor calibration


def test_a_template_has_no_constraint_of_the_whole_answer() -> None:
    group = flags_of("seed", is_template=True)
    assert group.make(set_=["max_steps=2"], seed=1) == Options(max_steps=2, seed=1)
    with pytest.raises(InputError, match="regex is an option of generate"):
        group.make(set_=["regex=a"], seed=None)


@dataclass(frozen=True)
class Pair:
    """Two flags."""

    left: Annotated[int, typer.Option(help="One.")]
    right: Annotated[int, typer.Option(help="Another.")] = 2


def test_a_group_stands_in_the_place_of_its_record() -> None:
    @flags.takes(pair=flags.group_of(Pair))
    def command(first: int, *, pair: Pair, last: int = 3) -> tuple[int, Pair, int]:
        """Does it."""
        return first, pair, last

    parameters = inspect.signature(command).parameters
    assert list(parameters) == ["first", "left", "right", "last"]
    assert parameters["left"].default is inspect.Parameter.empty and parameters["right"].default == 2
    assert command(first=1, left=5, right=6, last=7) == (1, Pair(5, 6), 7)
    assert command.__doc__ == "Does it."
