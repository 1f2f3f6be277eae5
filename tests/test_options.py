"""options.py: what each option accepts, what it refuses and in which words; what an option declares of itself."""

from __future__ import annotations

import dataclasses
import math
import pickle
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import numpy as np
import pytest

from sfumato.errors import InputError
from sfumato.options import (
    BIG,
    CONSTRAINTS,
    ELSEWHERE,
    FALLBACK_DEFAULTS,
    LOAD_OPTIONS,
    OPTIONS,
    OTHER_NAMES,
    SHAPING,
    About,
    LoadOptions,
    OptionFields,
    Options,
    declared,
)

# name: (lowest, highest, is a whole number, may be left open, the words of the limit)
LIMITS: dict[str, tuple[float, float, bool, bool, str]] = {
    "max_tokens": (1, 2**62, True, True, "from 1 to 2^62"),
    "min_tokens": (0, 2**62, True, False, "from 0 to 2^62"),
    "seed": (0, 2**62, True, True, "from 0 to 2^62"),
    "max_steps": (1, 4096, True, True, "from 1 to 4096"),
    "t_max": (1e-6, 100.0, False, True, "above 0, at most 100"),
    "t_min": (1e-6, 100.0, False, True, "above 0, at most 100"),
    "temperature_steps": (1, 4096, True, True, "from 1 to 4096"),
    "entropy_bound": (0.0, 1e9, False, True, "from 0 to 1e9"),
    "stability": (0, 4096, True, True, "from 0 to 4096"),
    "confidence": (0.0, 100.0, False, True, "from 0 to 100"),
    "repeats": (0, 16, True, False, "from 0 to 16"),
    "verify": (0.0, 100.0, False, True, "from 0 to 100"),
    "redos": (0, 64, True, False, "from 0 to 64"),
    "temperature": (0.0, 100.0, False, False, "from 0 to 100"),
    "top_k": (-1, 2**62, True, False, "from -1 to 2^62"),
    "top_logprobs": (0, 20, True, False, "from 0 to 20"),
    "top_p": (0.0, 1.0, False, False, "from 0 to 1"),
    "min_p": (0.0, 1.0, False, False, "from 0 to 1"),
    "presence_penalty": (-2.0, 2.0, False, False, "from -2 to 2"),
    "frequency_penalty": (-2.0, 2.0, False, False, "from -2 to 2"),
    "repetition_penalty": (1e-6, 100.0, False, False, "above 0, at most 100"),
}
FLAGS = ("drafts", "logprobs", "early", "finish", "short", "strict", "must_call", "thinking")
FORMS = ("schema", "regex", "grammar", "choices")


PARTNERS: dict[str, dict[str, Any]] = {
    "verify": {"redos": 1},
    "finish": {"verify": 1.0},
    "min_tokens": {"max_tokens": None},
    "t_min": {"t_max": None},
    "top_logprobs": {"logprobs": True},
}
"""What an option needs beside it to take any value of its range."""


def options_with(**values: Any) -> Options:
    """Options from values of any type, as a caller without a type checker gives them."""
    return Options(**values)


def refusal(**options: Any) -> str:
    """The one sentence with which these options are refused, from the constructor and from a mapping alike."""
    with pytest.raises(InputError) as error:
        Options(**options)
    with pytest.raises(InputError) as same:
        Options.from_dict(options)
    assert str(same.value) == str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.option is not None and error.value.option == same.value.option
    assert str(error.value).count(";") == 1  # what is wrong; what is allowed
    return str(error.value)


def test_every_option_is_covered_here() -> None:
    names = {field.name for field in dataclasses.fields(Options)}
    assert names == {*LIMITS, *FLAGS, *FORMS, "stop", "mode", "logit_bias", "adapter"}


@pytest.mark.parametrize("name", FORMS)
def test_an_answer_obeys_one_form(name: str) -> None:
    value: Any = {"schema": {}, "regex": "a", "grammar": "start: /a/", "choices": ["a", "b"]}[name]
    assert Options().constraint is None
    assert Options(**{name: value}).constraint == (name, tuple(value) if name == "choices" else value)
    other = "regex" if name != "regex" else "choices"
    both = {name: value, other: "a" if other == "regex" else ("a",)}
    assert "given together" in refusal(**both)
    assert "needs mode 'diffusion'" in refusal(**{name: value, "mode": "autoregressive"})
    assert "min_tokens above 1" in refusal(**{name: value, "min_tokens": 2})
    assert Options(**{name: value, "thinking": True}).constraint is not None


@pytest.mark.parametrize("name", LIMITS)
def test_both_limits_are_allowed(name: str) -> None:
    low, high, is_whole, is_open, _ = LIMITS[name]
    for value in (low, high, 1):
        partner = PARTNERS.get(name, {})
        assert getattr(options_with(**{name: value}, **partner), name) == value
    if not is_whole:
        assert getattr(options_with(**{name: 0.5}, **PARTNERS.get(name, {})), name) == 0.5
    assert (getattr(Options(), name) is None) is is_open


@pytest.mark.parametrize("name", LIMITS)
def test_what_is_out_of_range_is_named_with_its_limit(name: str) -> None:
    low, high, is_whole, _, words = LIMITS[name]
    outside: list[Any] = [low - 1, high + 1, -(10**9)]
    outside += [] if is_whole else [math.nan, math.inf, -math.inf, high * 1.001, low - 1e-9]
    for value in outside:
        assert refusal(**{name: value}) == f"{name} is {value!r}; give a number {words}"
        with pytest.raises(InputError) as error:
            Options(**{name: value})
        assert error.value.option == name


@pytest.mark.parametrize("name", LIMITS)
def test_what_is_no_number_is_named(name: str) -> None:
    _, _, is_whole, is_open, words = LIMITS[name]
    others: list[Any] = ["1", True, False, [1], {}, b"1"]
    others += [1.0, 2.5, math.nan] if is_whole else [1j]
    others += [] if is_open else [None]
    for value in others:
        assert refusal(**{name: value}) == f"{name} is {value!r}; give {'a whole' if is_whole else 'a'} number {words}"


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_is_true_or_false(name: str) -> None:
    for value in ("no", "true", 1, 0, None):
        assert refusal(**{name: value}) == f"{name} is {value!r}; give true or false"
    assert getattr(options_with(**{name: True}, **PARTNERS.get(name, {})), name) is True
    assert getattr(Options(), name) is False


def test_the_mode_is_one_of_two() -> None:
    for value in ("greedy", "", "Diffusion", 3, ["diffusion"]):
        assert refusal(mode=value) == f"mode is {value!r}; give 'diffusion' or 'autoregressive'"
    assert [Options(mode=mode).mode for mode in ("diffusion", "autoregressive")] == ["diffusion", "autoregressive"]
    assert Options().mode is None  # as the model is made


def test_stop_strings() -> None:
    assert options_with(stop="END").stop == ("END",)  # one string is a kindness of its own
    assert options_with(stop=["a", "b"]).stop == ("a", "b")  # as JSON brings it
    assert options_with(stop=[]).stop == Options().stop == ()
    for value in ("", ("a", ""), ("a", 3), [None], None, 5, {"a": 1}):
        assert refusal(stop=value) == f"stop is {value!r}; give strings of at least one character"


def test_a_bias_is_by_token_ids() -> None:
    """As Python writes them and as JSON does; what asks for nothing is nothing."""
    assert options_with(logit_bias={"5": -100, 7: 2}).logit_bias == {5: -100.0, 7: 2.0}
    assert options_with(logit_bias={np.int64(5): np.float32(0.5)}).logit_bias == {5: 0.5}
    assert options_with(logit_bias={}) == Options()
    for key in ("a", "-1", "1.5", "٣", "9" * 40, -1, 1.5, True, None, 2**62):
        assert refusal(logit_bias={key: 1}) == f"logit_bias has the key {reprlib.repr(key)}; give token ids, from 0 up"
    for number in ("1", 100.5, -101, math.nan, math.inf, True, None, [1]):
        expected = f"logit_bias of token 5 is {number!r}; give a number from -100 to 100"
        assert refusal(logit_bias={"5": number}) == expected
    for value in (5, "5", [5], True):
        assert refusal(logit_bias=value).startswith(f"logit_bias is {value!r}; give token ids and numbers")


def test_options_that_contradict_each_other() -> None:
    assert refusal(t_min=0.9, t_max=0.8) == "t_min is 0.9, above t_max 0.8; give t_min at most t_max"
    assert refusal(min_tokens=9, max_tokens=8) == "min_tokens is 9, above max_tokens 8; lower it"
    assert Options(t_min=0.8, t_max=0.8, min_tokens=8, max_tokens=8).t_min == 0.8


def test_an_unknown_name_lists_the_names() -> None:
    with pytest.raises(InputError) as error:
        Options.from_dict({"max_tokens": 5, "max_new_tokens": 5})
    names = ", ".join(sorted(field.name for field in dataclasses.fields(Options)))
    expected = f"there is no option 'max_new_tokens'; did you mean max_tokens? The options are {names}"
    assert str(error.value) == expected
    for name in (*LIMITS, *FLAGS, "stop", "mode"):
        assert name in names


def test_from_dict_is_the_constructor() -> None:
    values = {"max_tokens": 7, "stop": ["x"], "mode": "autoregressive", "drafts": True, "t_min": None, "top_p": 0.9}
    assert Options.from_dict(values) == Options(7, 0, ("x",), mode="autoregressive", drafts=True, top_p=0.9)
    assert Options.from_dict({}) == Options()


def test_options_are_frozen_and_hashable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().seed = 3  # type: ignore[misc]
    assert len({Options(), Options(seed=None), Options(seed=1)}) == 2


def test_defaults_fill_only_what_is_open() -> None:
    options = Options(max_steps=7, confidence=0.0)
    filled = options.with_defaults({**FALLBACK_DEFAULTS, "seed": 5, "max_tokens": None})
    assert (filled.max_steps, filled.confidence) == (7, 0.0)
    assert (filled.t_min, filled.t_max, filled.entropy_bound, filled.stability) == (0.4, 0.8, 0.1, 1)
    assert (filled.seed, filled.max_tokens, filled.temperature_steps) == (5, None, None)
    assert options == Options(max_steps=7, confidence=0.0)
    with pytest.raises(InputError, match=r"t_min is 0\.9, above t_max 0\.8"):
        Options(t_min=0.9).with_defaults(FALLBACK_DEFAULTS)


def test_the_fallback_is_the_released_generation_config() -> None:
    assert FALLBACK_DEFAULTS == {
        "max_steps": 48,
        "t_min": 0.4,
        "t_max": 0.8,
        "entropy_bound": 0.1,
        "stability": 1,
        "confidence": 0.005,
    }


def test_every_option_declares_itself() -> None:
    """A name, a type, a sentence, where it applies; a number's range. No option is declared anywhere else."""
    assert list(OPTIONS) == [field.name for field in dataclasses.fields(Options)]
    for name, option in OPTIONS.items():
        assert option.name == name and option.default == getattr(Options(), name)
        assert option.about.sentence[0].isupper() and option.about.sentence.endswith(".")
        assert option.brief.endswith(".") and option.brief[:-1] in option.about.sentence
        assert option.about.uses and len(set(option.about.uses)) == len(option.about.uses)
        assert bool(option.range) is (name in LIMITS)
        assert option.is_optional is (option.default is None)
    assert {name for name, option in OPTIONS.items() if option.kind is bool} == set(FLAGS)
    assert set(CONSTRAINTS) == set(FORMS)
    assert OPTIONS["mode"].choices == ("diffusion", "autoregressive")


def test_where_an_option_applies() -> None:
    """In which modes, and in which kinds of request."""
    for name, option in OPTIONS.items():
        uses = set(option.about.uses)
        assert name == "mode" or uses & {"canvas", "autoregressive"}
        assert uses & {"complete", "chat", "templates"}
    only_in_chat = {name for name, option in OPTIONS.items() if "complete" not in option.about.uses}
    assert only_in_chat == {"strict", "must_call", "thinking"}
    everywhere = {"seed", "temperature", "adapter", *SHAPING}
    assert everywhere == {name for name, option in OPTIONS.items() if len(option.about.uses) == 5}


def test_a_new_option_is_one_field() -> None:
    @dataclasses.dataclass(frozen=True)
    class More(Options):
        warmth: Annotated[float, About("How warm it is; a test's. No use.", ("canvas",), 0.0, 2.0)] = 0.5

    (name, option), *others = list(declared(More).items())[::-1]
    assert name == "warmth" and dict(reversed(others)) == OPTIONS
    assert (option.kind, option.default, option.range, option.is_optional) == (float, 0.5, "from 0 to 2", False)
    assert option.brief == "How warm it is."
    assert option.checked(2) == 2
    with pytest.raises(InputError, match=r"^warmth is 3; give a number from 0 to 2$") as error:
        option.checked(3)
    assert error.value.option == "warmth"


def test_how_to_load() -> None:
    assert list(LOAD_OPTIONS) == [field.name for field in dataclasses.fields(LoadOptions)]
    assert all(option.about.sentence.endswith(".") for option in LOAD_OPTIONS.values())
    assert LoadOptions() == LoadOptions("nano", "auto", None, "auto", None, None)
    assert pickle.loads(pickle.dumps(LoadOptions("a", memory_limit=3))) == LoadOptions("a", memory_limit=3)


def test_a_range_in_words() -> None:
    assert OPTIONS["seed"].range == "from 0 to 2^62" and OPTIONS["seed"].about.maximum == BIG == 2**62
    assert OPTIONS["t_min"].range == "above 0, at most 100"
    assert OPTIONS["stop"].range == ""


@pytest.mark.parametrize(
    ("spellings", "name"),
    [
        (("bf16", "bfloat16", "BF16", "torch.bfloat16"), "bfloat16"),
        (("fp16", "float16", "half"), "float16"),
        (("fp32", "float32", "float"), "float32"),
    ],
)
def test_a_dtype_has_one_name_and_several_spellings(spellings: tuple[str, ...], name: str) -> None:
    assert {LoadOptions(dtype=spelling).dtype for spelling in spellings} == {name}
    with pytest.raises(InputError, match="dtype is 'int3'; choose one of bfloat16, float16, float32, float64"):
        LoadOptions(dtype="int3")


def test_a_default_length_gives_way_to_a_longer_least() -> None:
    assert Options().with_defaults({"max_tokens": 82}).max_tokens == 82
    assert Options(min_tokens=90).with_defaults({"max_tokens": 82}).max_tokens is None


def test_options_by_name_are_the_declared_ones() -> None:
    """`OptionFields`, which type checkers read, has every option, in order, with its type or a wider one."""
    assert list(OptionFields.__annotations__) == list(OPTIONS)
    hints = get_type_hints(OptionFields)
    for name, hint in get_type_hints(Options).items():
        if hint == tuple[str, ...]:
            hint = str | Sequence[str]
        elif hint == tuple[str, ...] | None:
            hint = Sequence[str] | None
        elif hint == dict[int, float] | None:
            hint = Mapping[int, float] | Mapping[str, float] | None
        assert hints[name] == hint, name


def test_options_show_what_differs() -> None:
    assert repr(Options()) == "Options()"
    assert repr(Options(max_tokens=50, stop=("END",))) == "Options(max_tokens=50, stop=('END',))"
    assert repr(LoadOptions("a", quantize="int4")) == "LoadOptions(model='a', quantize='int4')"
    assert len(repr(Options(grammar="x" * 9999, seed=1))) < 80
    assert len(repr(Options(schema={str(n): {"a": [n]} for n in range(99)}))) < 120


@pytest.mark.parametrize("name", FORMS)
def test_a_form_of_another_kind_is_named(name: str) -> None:
    for value in (5, b"a", [None], {1}, [], "abc" if name == "choices" else 1.5):
        with pytest.raises(InputError, match=f"^{name} is ") as error:
            options_with(**{name: value})
        assert error.value.option == name


def test_an_adapter_is_a_name() -> None:
    assert Options(adapter="mine").adapter == "mine" and Options().adapter is None
    for value in (5, b"a", ["a"], True):
        with pytest.raises(InputError, match=r"^adapter is .*; give text") as error:
            options_with(adapter=value)
        assert error.value.option == "adapter"
    with pytest.raises(InputError, match="did you mean adapter"):
        Options.from_dict({"lora_name": "mine"})


def test_how_to_load_is_checked_for_its_kinds() -> None:
    for name in LOAD_OPTIONS:
        for value in (5.5, b"a", ["a"], True, {"a": 1}):
            with pytest.raises(InputError, match=f"^{name} is ") as error:
                LoadOptions(**{name: value})  # type: ignore[arg-type]
            assert error.value.option == name
    assert LoadOptions(Path("a")).model == Path("a")
    assert LoadOptions(adapters={"a": Path("b"), "c": "d"}).adapters == {"a": "b", "c": "d"}
    assert LoadOptions(adapters={}).adapters is None
    assert LoadOptions(calibration=Path("a/b.json")).calibration == "a/b.json"


def test_some_options_are_changed_by_name() -> None:
    options = Options(seed=1, max_tokens=5)
    assert options.with_changes({}) is options
    assert options.with_changes({"seed": 2}) == Options(seed=2, max_tokens=5)
    for wrong in (None, 5, [("seed", 1)], "seed"):
        with pytest.raises(InputError, match="give an Options or a dict of them"):
            Options.from_dict(wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="there is no option 5; the options are"):
        Options.from_dict({5: 1})  # type: ignore[dict-item]
    assert set(OTHER_NAMES.values()) <= set(OPTIONS) and not set(OTHER_NAMES) & set(OPTIONS)


def test_a_number_of_numpy_is_a_number() -> None:
    options = Options(max_tokens=np.int64(5), temperature=np.float32(0.5))  # type: ignore[arg-type]
    assert (type(options.max_tokens), type(options.temperature)) == (int, float)
    assert options == Options(max_tokens=5, temperature=0.5)
    for wrong in np.float64(5.0), np.bool_(True), np.int64(0):
        with pytest.raises(InputError, match="max_tokens is"):
            Options(max_tokens=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_is_no_option_here_is_to_be_had_elsewhere(name: str) -> None:
    assert name not in OPTIONS and name not in OTHER_NAMES
    with pytest.raises(InputError) as caught:
        Options.from_dict({name: 1})
    assert str(caught.value) == f"there is no option {name!r}; {ELSEWHERE[name]}" and caught.value.option == name


def test_a_dtype_may_be_left_to_the_file() -> None:
    assert LoadOptions(dtype="auto") == LoadOptions()
