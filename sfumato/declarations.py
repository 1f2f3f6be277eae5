"""What is declared of an option beside its type and default (`About`), and the option as data read from it (`Option`).

`sfumato.options` declares the options themselves. It knows what a value may be, not what it does."""

from __future__ import annotations

import dataclasses
import difflib
import numbers
import reprlib
import types
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sfumato.errors import InputError

BIG = 1 << 62
"""The largest value of a whole number that has no limit of its own."""

LEAST = 1e-6
"""The smallest value of a number that must be above 0."""

CONSTRAINTS = ("schema", "regex", "grammar", "choices")
"""The options that say what an answer must obey; one of them at most is given."""

DTYPE_NAMES = {
    **dict.fromkeys(("bfloat16", "bf16"), "bfloat16"),
    **dict.fromkeys(("float16", "fp16", "half"), "float16"),
    **dict.fromkeys(("float32", "fp32", "float"), "float32"),
    **dict.fromkeys(("float64", "fp64", "double"), "float64"),
}
"""Every spelling of a dtype -> torch's own name of it."""

Use = Literal["canvas", "autoregressive", "complete", "chat", "templates"]
"""Where an option applies: in which mode (on a canvas, or one token after another), and in which kind of request
(`complete`, `chat`, or a template: `fill`, `infill`, `edit`, `decide`)."""


@dataclass(frozen=True)
class About:
    """What is declared of an option beside its type and its default."""

    sentence: str
    """What it does, to whoever sets it."""
    uses: tuple[Use, ...] = get_args(Use)
    minimum: float | None = None
    maximum: float | None = None


@dataclass(frozen=True)
class Option:
    """An option as data, read from its field."""

    name: str
    kind: type
    """int, float, bool, str, tuple (of texts), dict (a JSON Schema, or numbers by token id) or Mapping (folders)."""
    default: Any
    choices: tuple[str, ...]
    """The values that it can take; () where it has no such list."""
    is_optional: bool
    """Whether it may be None, which leaves the choice open."""
    about: About

    @property
    def range(self) -> str:
        """The range in words, to end "give a number …" with; "" where there is none."""
        low, high = self.about.minimum, self.about.maximum
        if low is None or high is None:
            return ""
        return f"above 0, at most {_short(high)}" if low == LEAST else f"from {_short(low)} to {_short(high)}"

    @property
    def brief(self) -> str:
        """The first part of its sentence, for a line of help."""
        return self.about.sentence.partition(";")[0].partition(". ")[0].rstrip(".") + "."

    def checked(self, value: Any) -> Any:
        """The value as it is kept; InputError, which names the option, for one that it cannot have."""
        if value is None and self.is_optional:
            return None
        if self.choices:
            if value not in self.choices:
                allowed = " or ".join(map(repr, self.choices))
                raise InputError(f"{self.name} is {value!r}; give {allowed}", option=self.name)
        elif self.kind is bool:
            if not isinstance(value, bool):
                raise InputError(f"{self.name} is {value!r}; give true or false", option=self.name)
        elif self.kind in (int, float):
            value = _own_number(value)
            self._check_number(value)
        elif self.name in CONSTRAINTS:
            return constraint_of(self.name, value, self.name)
        elif self.kind is dict:
            return bias_of(value, self.name)
        elif self.kind is tuple and isinstance(value, list):
            return tuple(value)
        elif self.kind is str and not isinstance(value, str):
            raise InputError(f"{self.name} is {reprlib.repr(value)}; give text", option=self.name)
        return value

    def _check_number(self, value: Any) -> None:
        is_whole = self.kind is int
        if isinstance(value, bool) or not isinstance(value, int if is_whole else (int, float)):
            message = f"{self.name} is {value!r}; give {'a whole' if is_whole else 'a'} number {self.range}"
            raise InputError(message, option=self.name)
        assert self.about.minimum is not None and self.about.maximum is not None
        if not self.about.minimum <= value <= self.about.maximum:
            raise InputError(f"{self.name} is {value!r}; give a number {self.range}", option=self.name)


def _own_number(value: Any) -> Any:
    """A number of another library (numpy's, above all) as Python's own; anything else as it is."""
    if isinstance(value, bool | int):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


MOST_BIAS = 100
"""The most that `logit_bias` adds to a logit, or takes from it: enough to force a token, or to forbid it."""


def bias_of(value: Any, name: str) -> dict[int, float] | None:
    """Token ids and what is added to their logits, as they are kept: None for no token. Ids may be text, as in JSON.

    InputError, which calls it `name`, for anything else. Whether the ids are tokens is checked where a model is."""
    if not isinstance(value, dict):
        raise InputError(
            f'{name} is {reprlib.repr(value)}; give token ids and numbers, as in {{"5": -100}}', option=name
        )
    bias: dict[int, float] = {}
    for key, number in value.items():
        token, number = _own_number(key), _own_number(number)
        if isinstance(token, str) and token.isascii() and token.isdecimal() and len(token) < 20:
            token = int(token)
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < BIG:
            raise InputError(f"{name} has the key {reprlib.repr(key)}; give token ids, from 0 up", option=name)
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not -MOST_BIAS <= number <= MOST_BIAS:
            message = f"{name} of token {token} is {reprlib.repr(number)}; give a number from -100 to 100"
            raise InputError(message, option=name)
        bias[token] = float(number)
    return bias or None


def constraint_of(kind: str, value: Any, name: str) -> Any:
    """The value of a constraint of this kind as it is kept; InputError, which calls it `name`, for one of another type.

    What it may hold is checked where it is compiled."""
    expected = {
        "schema": ((dict, bool), "a JSON Schema, a dict or true"),
        "choices": ((tuple, list), "a list of texts"),
    }
    types_of_kind, words = expected.get(kind, ((str,), "text"))
    is_right = isinstance(value, types_of_kind)
    if kind == "choices" and is_right:
        is_right = bool(value) and all(isinstance(choice, str) and choice for choice in value)
        words = "a list of at least one text, none of them empty"
    if not is_right:
        raise InputError(f"{name} is {reprlib.repr(value)}; give {words}", option=kind)
    return tuple(value) if kind == "choices" else value


def _short(number: float) -> str:
    return {BIG: "2^62", 1e9: "1e9"}.get(number, f"{number:g}")


def declared(record: type) -> dict[str, Option]:
    """The options that a record of annotated fields declares, by name, in their order."""
    hints = get_type_hints(record, include_extras=True)
    options = {}
    for field in dataclasses.fields(record):
        hint, *extras = get_args(hints[field.name])
        about = next(extra for extra in extras if isinstance(extra, About))
        kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        first = next(kind for kind in kinds if kind is not type(None))
        origin = get_origin(first)
        choices = get_args(first) if origin is Literal else ()
        kind = str if choices else origin or first
        options[field.name] = Option(field.name, kind, field.default, choices, type(None) in kinds, about)
    return options


# ---- names that are no options --------------------------------------------------------------------------------------

OTHER_NAMES = {
    **dict.fromkeys(("max_new_tokens", "max_length", "max_completion_tokens", "num_predict"), "max_tokens"),
    "min_new_tokens": "min_tokens",
    "stop_sequences": "stop",
    **dict.fromkeys(("steps", "num_steps", "diffusion_steps", "num_inference_steps"), "max_steps"),
    **dict.fromkeys(("json_schema", "guided_json"), "schema"),
    "guided_regex": "regex",
    "guided_choice": "choices",
    "guided_grammar": "grammar",
    "repeat_penalty": "repetition_penalty",
    **dict.fromkeys(("think", "enable_thinking"), "thinking"),
    **dict.fromkeys(("lora", "lora_name", "lora_request", "adapter_name"), "adapter"),
}
"""What other libraries call an option -> its name here, for the suggestion in an error."""

ELSEWHERE = {
    **dict.fromkeys(("device", "dtype", "model"), "it is an argument of LLM.load(…)"),
    **dict.fromkeys(("n", "num_return_sequences"), "chat_many(…) gives several answers"),
    "prompt": "the prompt comes first, without a name",
    "response_format": "schema=… takes a JSON Schema",
    "stream": "stream(…) in place of chat(…) gives the events",
    **dict.fromkeys(("system", "system_prompt"), 'give a list that begins with {"role": "system", "content": "…"}'),
}
"""What other libraries take as an option -> where it is to be had here."""


def unknown_option(name: Any, known: Collection[str]) -> str:
    """The sentence about an option that there is not."""
    if str(name) in ELSEWHERE:
        return f"there is no option {reprlib.repr(name)}; {ELSEWHERE[str(name)]}"
    near = difflib.get_close_matches(str(name), known, 1)
    suggestion = OTHER_NAMES.get(str(name)) or (near[0] if near else "")
    hint = f"did you mean {suggestion}? The" if suggestion else "the"
    return f"there is no option {reprlib.repr(name)}; {hint} options are {', '.join(sorted(known))}"


def differences(record: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults."""
    return {f.name: value for f in dataclasses.fields(record) if (value := getattr(record, f.name)) != f.default}


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 40
_REPR.maxdict = _REPR.maxtuple = 3


def repr_of(record: Any) -> str:
    """A record of options as it is made: only what differs from the defaults, long values cut."""
    fields = ", ".join(f"{name}={_REPR.repr(value)}" for name, value in differences(record).items())
    return f"{type(record).__name__}({fields})"


def dtype_name(spelling: str) -> str:
    """Torch's name of a dtype, by any usual spelling of it; InputError where it is none."""
    name = spelling.removeprefix("torch.").lower()
    if name not in DTYPE_NAMES:
        known = ", ".join(dict.fromkeys(DTYPE_NAMES.values()))
        raise InputError(f"dtype is {spelling!r}; choose one of {known}", option="dtype")
    return DTYPE_NAMES[name]
